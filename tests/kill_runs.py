"""Run recipes to their ends, then again, killed with SIGKILL where it is told to be: ``kill_runs.py PLAN``.

Imports take seconds, so every session is a fork of this process, which never computes itself. What a session writes is
seen through Python's audit events: it is killed right before the n-th change of files of some name, or a while after.

PLAN is JSON, ``{"seed": 0, "runs": {name: run}}`` with runs ``{"recipe": file, "folder": folder, "whole": folder,
"kills": [regex, ...]}``. For each kill a moment is drawn among the changes of files that match in the uninterrupted
run (which is moved from ``folder`` to ``whole``): right before one, or for every second kill at some time between it
and the next. Prints ``{name: [[what, seconds after it], ...]}``, the kills that hit.
"""

import contextlib
import gc
import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}


def change(event, args, folder):
    """``rename patch/patch.json`` for an event that changes a file in ``folder``, temporary names undone; or None."""
    if event not in CHANGES or not isinstance(args[0], str | os.PathLike):
        return None
    if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
        return None
    path = os.fspath(args[1] if event == "os.rename" else args[0])
    if not path.startswith(f"{folder}{os.sep}"):
        return None
    name = re.sub(r"\.([^/]+)\.\d+\.tmp", r"\1", path[len(folder) + 1 :])
    return f"{event.removeprefix('os.')} {name}"


def session(command, folder, on_change):
    """The command in a fork of this process; ``on_change(name)`` is called in it before files change."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        from falcon_unlearn.cli import main

        with Path(f"{folder}.log").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)

        def hook(event, args):
            if event in CHANGES and (name := change(event, args, folder)) is not None:
                on_change(name)

        sys.addaudithook(hook)
        try:
            code = main(command)
        except SystemExit as leave:
            code = leave.code
        sys.stderr.flush()
    finally:
        os._exit(code or 0)


def ended(process):
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status)


def uninterrupted(run):
    """Changes of the whole run with their times, and the modules it needed."""
    began, seen = time.monotonic(), []
    command = ["run", run["recipe"], "--debug"]

    def on_change(name):
        seen.append((time.monotonic() - began, name))
        if name.startswith("remove ") or name == "rename model_card.md":  # among the last ones
            found = {"changes": seen, "modules": sorted(sys.modules)}
            Path(f"{run['folder']}.seen.json").write_text(json.dumps(found))

    code = ended(session(command, run["folder"], on_change))
    assert code == 0, (code, Path(f"{run['folder']}.log").read_text()[-3000:])
    found = json.loads(Path(f"{run['folder']}.seen.json").read_text())
    shutil.move(run["folder"], run["whole"])
    return found["changes"], found["modules"]


def killed(run, pattern, count, after):
    """Resume the run and kill it before its ``count``-th change that matches, or ``after`` seconds later; did it?"""
    read, write = os.pipe()
    left = [count]

    def on_change(name):
        if re.search(pattern, name):
            left[0] -= 1
            if not left[0]:
                if not after:
                    os.kill(os.getpid(), signal.SIGKILL)
                os.write(write, b"x")

    process = session(["run", run["recipe"], "--resume", "--debug"], run["folder"], on_change)
    os.close(write)
    if os.read(read, 1):  # nothing where it ended before
        time.sleep(after)
        os.kill(process, signal.SIGKILL)  # not reaped yet, so it is still this process
    os.close(read)
    code = ended(process)
    assert code in {0, -signal.SIGKILL}, (code, Path(f"{run['folder']}.log").read_text()[-3000:])
    return code != 0


def main(plan):
    rng = random.Random(plan["seed"])
    importlib.import_module("falcon_unlearn.pipeline")
    hits = {}
    for name, run in plan["runs"].items():
        changes, modules = uninterrupted(run)
        for module in modules:
            with contextlib.suppress(Exception):
                importlib.import_module(module)
        gc.freeze()  # forks share what is not touched
        hits[name] = []
        for position, pattern in enumerate(run["kills"]):
            matching = [at for at, (_, what) in enumerate(changes) if re.search(pattern, what)]
            assert matching, (name, pattern, [what for _, what in changes])
            # Not the later ones: a resumed run has less left to do, and one that is not hit ends.
            drawn = rng.randrange(max(1, len(matching) // (2 + run["kills"][:position].count(pattern))))
            at = matching[drawn]
            began, what = changes[at]
            after = rng.uniform(0, changes[at + 1][0] - began) if position % 2 and at + 1 < len(changes) else 0
            if killed(run, pattern, drawn + 1, after):
                hits[name].append([what, after])
        code = ended(session(["run", run["recipe"], "--resume", "--debug"], run["folder"], lambda name: None))
        assert code == 0, (code, Path(f"{run['folder']}.log").read_text()[-3000:])
    print(json.dumps(hits))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
