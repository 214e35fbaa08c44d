"""What stands in an output folder after a kill, and what becomes of it."""

import pytest
import yaml

from falcon_unlearn.errors import UserError
from falcon_unlearn.output_folder import open_output

MARKER = "settings.yaml"
OURS = {MARKER, "result.json", "scores", "scores/a.jsonl", "patch"}


def opened(path, **state):
    options = {"resume": False, "overwrite": False, **state}
    ours = lambda name: name.as_posix() in OURS  # noqa: E731
    open_output(path, MARKER, what="run", is_ours=ours, settings={"seed": 1}, not_compared=(), **options)


def names(path):
    return {p.relative_to(path).as_posix() for p in path.rglob("*")}


def write(path, *files):
    for name in files:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(yaml.safe_dump({"seed": 1}))
    return path


@pytest.mark.parametrize("state", [{}, {"resume": True}, {"overwrite": True}])
def test_killed_before_the_first_file_had_its_name_the_folder_is_empty(tmp_path, state):
    write(tmp_path, f".{MARKER}.4711.tmp")
    opened(tmp_path, **state)
    assert names(tmp_path) == set()


def test_resume_removes_what_was_cut_off_and_keeps_what_is_read(tmp_path):
    kept = {
        MARKER,
        "scores",
        "scores/.a.jsonl.partial.tmp",
        "scores/.b.jsonl.12.tmp",
        ".other.json.12.tmp",
        ".x.tmp",
        ".tmp",
        ".tmpfile",
    }
    write(tmp_path, *kept - {"scores"})
    write(
        tmp_path,
        ".result.json.0123456789ab.tmp",
        "scores/.a.jsonl.12.tmp",
        ".patch.12.tmp/.f.12.tmp",
        ".trial_a1.tmp/cache",
        ".tmpJsIAhk",  # safetensors'
        "scores/.tmpa0Zz9b",
    )
    opened(tmp_path, resume=True)
    assert names(tmp_path) == kept


def test_partial_scores_whose_whole_file_is_there_are_removed(tmp_path):
    write(tmp_path, MARKER, "scores/a.jsonl", "scores/.a.jsonl.partial.tmp")
    opened(tmp_path, resume=True)
    assert names(tmp_path) == {MARKER, "scores", "scores/a.jsonl"}


def test_a_refused_folder_is_left_as_it_is(tmp_path):
    before = names(write(tmp_path, MARKER, ".result.json.12.tmp"))
    with pytest.raises(UserError, match="go on there with --resume"):
        opened(tmp_path)
    assert names(tmp_path) == before
    write(tmp_path / "others", "thesis.tex", f".{MARKER}.12.tmp")
    with pytest.raises(UserError, match="holds no run"):
        opened(tmp_path / "others", resume=True)
    assert names(tmp_path / "others") == {"thesis.tex", f".{MARKER}.12.tmp"}
