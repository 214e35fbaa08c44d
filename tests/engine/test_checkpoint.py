import ast
import contextlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import falcon_unlearn
from falcon_unlearn.engine.checkpoint import (
    Progress,
    checkpoint_files,
    load_checkpoint,
    load_newest,
    save_checkpoint,
)
from falcon_unlearn.engine.optimizers import OptimizerConfig, build_optimizer
from falcon_unlearn.errors import UserError

OPTIMIZERS = {
    "adamw": OptimizerConfig(lr=1e-2, weight_decay=0.1),
    "sgd": OptimizerConfig(name="sgd", lr=1e-2),
    "sgd_plain": OptimizerConfig(name="sgd", lr=1e-2, betas=(0.0, 0.9)),
    "sophia": OptimizerConfig(name="sophia", lr=1e-2, rho=0.9, hessian_every=3),
    "sophia_published": OptimizerConfig(name="sophia", lr=1e-2, hessian="published_code"),
    "sophia_none": OptimizerConfig(name="sophia", lr=1e-2, hessian="none"),
}


def fresh(config=OPTIMIZERS["adamw"]):
    """Masters (one name with a slash, one a prefix of another) and their optimiser."""
    shapes = {"layers.1.w": (3, 4), "layers.1.w.b": (4,), "odd/name": (2, 2)}
    masters = {name: torch.ones(shape, requires_grad=True) for name, shape in shapes.items()}
    return masters, build_optimizer(config, masters.values(), hidden_size=8, batch_size=2)


def advance(masters, optimizer, steps):
    for step in steps:
        for i, parameter in enumerate(masters.values()):
            generator = torch.Generator().manual_seed(100 * step + i)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("config", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("stop", [0, 1, 4])
def test_going_on_is_bit_identical(tmp_path, config, stop):
    masters, optimizer = fresh(config)
    advance(masters, optimizer, range(stop))
    save_checkpoint(tmp_path / "state", Progress(stop, 4), "same", masters, optimizer)
    advance(masters, optimizer, range(stop, 9))
    resumed, resumed_optimizer = fresh(config)
    assert load_checkpoint(tmp_path / "state", "same", resumed, resumed_optimizer) == Progress(stop, 4)
    advance(resumed, resumed_optimizer, range(stop, 9))
    for name, value in masters.items():
        assert torch.equal(resumed[name], value)
        assert not torch.equal(value, torch.ones_like(value))
    save_checkpoint(tmp_path / "a", Progress(9, 4), "same", masters, optimizer)
    save_checkpoint(tmp_path / "b", Progress(9, 4), "same", resumed, resumed_optimizer)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_without_the_optimizer_state_it_would_not_be(tmp_path):
    """The test above can fail: momentum matters."""
    masters, optimizer = fresh()
    advance(masters, optimizer, range(4))
    save_checkpoint(tmp_path / "state", Progress(4, 4), "same", masters, optimizer)
    advance(masters, optimizer, range(4, 9))
    resumed, resumed_optimizer = fresh()
    load_checkpoint(tmp_path / "state", "same", resumed, resumed_optimizer)
    resumed_optimizer.state.clear()
    advance(resumed, resumed_optimizer, range(4, 9))
    assert not torch.equal(resumed["layers.1.w"], masters["layers.1.w"])


def test_masters_stay_the_same_leaves(tmp_path):
    masters, optimizer = fresh()
    advance(masters, optimizer, range(2))
    save_checkpoint(tmp_path / "state", Progress(2, 4), "same", masters, optimizer)
    resumed, resumed_optimizer = fresh()
    leaves = dict(resumed)
    load_checkpoint(tmp_path / "state", "same", resumed, resumed_optimizer)
    assert all(resumed[name] is leaves[name] and leaves[name].requires_grad for name in leaves)
    assert set(resumed_optimizer.state) == set(leaves.values())


def test_replaces_the_file_and_leaves_nothing_beside_it(tmp_path):
    masters, optimizer = fresh()
    for step in range(3):
        save_checkpoint(tmp_path / "state", Progress(step, 4), "same", masters, optimizer)
        advance(masters, optimizer, [step])
    assert [p.name for p in tmp_path.iterdir()] == ["state"]
    assert load_checkpoint(tmp_path / "state", "same", *fresh()) == Progress(2, 4)


def test_a_failed_write_keeps_the_last_state(tmp_path, monkeypatch):
    masters, optimizer = fresh()
    save_checkpoint(tmp_path / "state", Progress(1, 4), "same", masters, optimizer)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path / "state", Progress(2, 4), "same", masters, optimizer)
    assert [p.name for p in tmp_path.iterdir()] == ["state"]
    assert load_checkpoint(tmp_path / "state", "same", *fresh()) == Progress(1, 4)


class TestRefused:
    @pytest.fixture
    def state(self, tmp_path):
        masters, optimizer = fresh()
        advance(masters, optimizer, range(3))
        save_checkpoint(tmp_path / "state", Progress(3, 4), "mine", masters, optimizer)
        return tmp_path / "state"

    def refuse(self, path, match, fingerprint="mine"):
        """Loading fails with one line and changes nothing."""
        masters, optimizer = fresh()
        with pytest.raises(UserError, match=match) as caught:
            load_checkpoint(path, fingerprint, masters, optimizer)
        assert "--overwrite" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert all(torch.equal(value, torch.ones_like(value)) for value in masters.values())
        assert not optimizer.state

    def test_another_fingerprint(self, state):
        self.refuse(state, "another recipe, model or data", fingerprint="yours")

    @pytest.mark.parametrize("keep", [0, 5, 40, 0.5, 0.99, -1])
    def test_truncated(self, state, keep):
        data = state.read_bytes()
        state.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
        self.refuse(state, "not a usable checkpoint")

    def test_something_else(self, state):
        state.write_bytes(b"PK\x03\x04" * 100)
        self.refuse(state, "not a usable checkpoint")

    def test_a_folder(self, tmp_path):
        (tmp_path / "folder").mkdir()
        self.refuse(tmp_path / "folder", "not a usable checkpoint")

    @pytest.mark.parametrize(
        "metadata",
        [
            None,
            {"state": "{"},
            {"state": "[]"},
            {"state": json.dumps({"step": 3})},
            {"state": json.dumps({"step": None, "fingerprint": "mine"})},
        ],
    )
    def test_safetensors_without_a_state(self, state, metadata):
        save_file(load_file(state), state, metadata=metadata)
        self.refuse(state, "not a usable checkpoint")

    @pytest.mark.parametrize("place", [0.2, 0.5, 0.9, -1])
    def test_a_single_byte_that_is_another(self, state, place):
        data = bytearray(state.read_bytes())
        data[int(place * len(data)) if place > 0 else place] ^= 1
        state.write_bytes(data)
        self.refuse(state, "not a usable checkpoint")

    def test_another_step_than_was_written(self, state):
        data = state.read_bytes()
        assert data.count(rb"\"step\": 3") == 1
        state.write_bytes(data.replace(rb"\"step\": 3", rb"\"step\": 2"))
        self.refuse(state, "not what was written")

    @pytest.mark.parametrize("change", ["absent", "reshaped"])
    def test_a_master_that_does_not_fit(self, state, change):
        masters, optimizer = fresh()
        value = masters.pop("layers.1.w")
        if change == "reshaped":
            masters["layers.1.w"] = value[:1]
        save_checkpoint(state, Progress(3, 4), "mine", masters, optimizer)
        self.refuse(state, r"no layers\.1\.w in it")


def saved(path, steps, keep):
    """Checkpoints after each of ``steps`` steps; the masters at each."""
    masters, optimizer = fresh()
    states = {}
    for step in range(steps):
        states[step] = {name: value.detach().clone() for name, value in masters.items()}
        save_checkpoint(path, Progress(step, 4), "mine", masters, optimizer, keep=keep)
        advance(masters, optimizer, [step])
    return states


def newest(path):
    """Step and masters that training would go on from, and what is said about it."""
    said = []
    masters, optimizer = fresh()
    found = load_newest(path, "mine", masters, optimizer, said.append)
    return None if found is None else found.step, masters, said


def spoil(path, how):
    data = path.read_bytes()
    path.write_bytes({
        "truncated": data[: len(data) // 2], "empty": b"", "altered": data[:-1] + bytes([data[-1] ^ 4]),
        "header": b"\0" + data[1:],
    }[how])  # fmt: skip


class TestRotation:
    @pytest.mark.parametrize("keep", [1, 2, 3, 5])
    @pytest.mark.parametrize("steps", [1, 2, 4])
    def test_the_last_ones_are_kept_the_newest_first(self, tmp_path, keep, steps):
        path = tmp_path / "checkpoint.safetensors"
        saved(path, steps, keep)
        files = checkpoint_files(path)
        assert sorted(files) == sorted(tmp_path.iterdir())
        assert [load_checkpoint(file, "mine", *fresh()).step for file in files] == list(range(steps))[::-1][:keep]
        assert [file.name for file in files][:2] == ["checkpoint.safetensors", "checkpoint.1.safetensors"][: len(files)]

    @pytest.mark.parametrize("how", ["truncated", "empty", "altered", "header"])
    @pytest.mark.parametrize("spoilt", [0, 1, 2])
    def test_the_newest_whole_one_is_used_and_damaged_ones_named_and_removed(self, tmp_path, how, spoilt):
        path = tmp_path / "checkpoint.safetensors"
        states = saved(path, 5, keep=3)
        files = checkpoint_files(path)
        for file in files[:spoilt]:
            spoil(file, how)
        step, masters, said = newest(path)
        assert step == 4 - spoilt
        assert all(torch.equal(masters[name], value) for name, value in states[step].items())
        assert len(said) == spoilt
        for line, file, after in zip(said, files, files[1:], strict=False):
            assert line.startswith(f"{file}: not a usable checkpoint (")
            assert line.endswith(f"; trying the one before it, {after.name}")
            assert "\n" not in line
        assert checkpoint_files(path) == files[spoilt:]

    def test_all_damaged_is_refused_and_nothing_removed(self, tmp_path):
        path = tmp_path / "checkpoint.safetensors"
        saved(path, 3, keep=2)
        for file in checkpoint_files(path):
            spoil(file, "truncated")
        with pytest.raises(UserError, match=r"not a usable checkpoint .*start again with --overwrite"):
            newest(path)
        assert len(checkpoint_files(path)) == 2

    def test_another_runs_is_refused_and_not_passed_over(self, tmp_path):
        path = tmp_path / "checkpoint.safetensors"
        saved(path, 3, keep=2)
        with pytest.raises(UserError, match="another recipe, model or data"):
            load_newest(path, "yours", *fresh(), lambda line: None)

    def test_none_there_is_none_found(self, tmp_path):
        assert newest(tmp_path / "checkpoint.safetensors")[0] is None

    @pytest.mark.parametrize("keep", [1, 2, 3])
    def test_cut_off_at_any_renaming_the_newest_whole_one_is_still_there(self, tmp_path, monkeypatch, keep):
        """``replace`` is all that a save does to names; it stops before the n-th of them."""
        for allowed in range(keep + 1):
            path = tmp_path / str(allowed) / "checkpoint.safetensors"
            path.parent.mkdir()
            saved(path, 4, keep)
            replace, left = Path.replace, [allowed]

            def counted(file, target, replace=replace, left=left):
                if not left[0]:
                    raise OSError(5, "cut off")
                left[0] -= 1
                return replace(file, target)

            masters, optimizer = fresh()
            with monkeypatch.context() as patched:
                patched.setattr(Path, "replace", counted)
                with pytest.raises(OSError, match="cut off") if allowed < keep else contextlib.nullcontext():
                    save_checkpoint(path, Progress(4, 4), "mine", masters, optimizer, keep=keep)
            assert newest(path)[0] == (3 if allowed < keep else 4)
            save_checkpoint(path, Progress(5, 4), "mine", masters, optimizer, keep=keep)
            assert newest(path)[0] == 5
            assert len(checkpoint_files(path)) <= keep


def test_nothing_is_written_or_read_with_pickle():
    """Not by name, and not by the functions of libraries that do."""
    modules = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    calls = {"torch.save", "torch.load", "torch.jit.load", "numpy.load", "np.load", "np.save", "pd.read_pickle"}
    package = Path(falcon_unlearn.__file__).parent
    files = sorted(package.rglob("*.py"))
    found = []
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            bad = {name.split(".")[0] for name in names} & modules
            if bad or (isinstance(node, ast.Attribute) and ast.unparse(node) in calls):
                found.append(f"{file.name}:{node.lineno}")
    assert len(files) > 100
    assert found == []
