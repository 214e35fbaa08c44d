"""The chain of the design, held to: an import may only point to what stands above or to the left."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import falcon_unlearn
from falcon_unlearn.cli import _parse
from falcon_unlearn.recipe import recipe_from

PACKAGE = Path(falcon_unlearn.__file__).parent
README = Path(__file__).parents[1] / "README.md"

# Modules of one layer may import each other; of the layers above only the earlier ones. `presets` and `recipe`
# share a line of the design, as do `embedded`, `api` and `doctor`.
LAYERS = (
    ("errors",),
    ("config", "ranks"),
    ("artifacts", "output_folder"),
    ("console",),
    ("trackers",),
    ("corpus",),
    ("model",),
    ("selection",),
    ("objectives",),
    ("methods",),
    ("engine",),
    ("evaluation",),
    ("attacks",),
    ("report",),
    ("presets",),
    ("recipe",),
    ("self_samples",),
    ("stages",),
    ("suite_scores", "attack_runs", "subjects", "earlier"),
    ("estimate",),
    ("run_folder",),
    ("pipeline",),
    ("evaluate", "attack", "recompute", "sustainability"),
    ("embedded", "api", "doctor"),
    ("grid",),
    ("sweep_storage",),
    ("compare",),
    ("cli",),
    ("__main__",),
)
POSITION = {name: position for position, layer in enumerate(LAYERS) for name in layer}
MODULES = sorted(PACKAGE.rglob("*.py"))
RESOURCES = {"data"}


def layer_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def is_for_types_only(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def imported_layers(tree):
    """(line, layer) of every import of our own that runs, also those inside functions."""
    nodes = [tree]
    while nodes:
        node = nodes.pop()
        children = node.orelse if is_for_types_only(node) else list(ast.iter_child_nodes(node))
        nodes += children
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            first, *rest = name.split(".")
            if first == "falcon_unlearn" and rest:
                yield node.lineno, rest[0]


def test_the_check_sees_imports_everywhere_but_under_type_checking():
    source = """
from falcon_unlearn.model import patch
import falcon_unlearn.cli
from falcon_unlearn import api
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from falcon_unlearn.engine import trainer
def f():
    from falcon_unlearn.report import html
"""
    assert sorted(imported_layers(ast.parse(source))) == [(2, "model"), (3, "cli"), (4, "api"), (9, "report")]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_import_points_backwards(path):
    if path == PACKAGE / "__init__.py":  # the public names: resolved on first use
        assert list(imported_layers(ast.parse(path.read_text()))) == []
        return
    own = layer_of(path)
    assert own in POSITION, f"{path}: has no place in the chain; put it into LAYERS and into the design"
    public = {"__version__"}
    backwards = [
        f"{path.relative_to(PACKAGE)}:{line} imports {name}"
        for line, name in imported_layers(ast.parse(path.read_text(encoding="utf-8")))
        if name not in public and POSITION[name] > POSITION[own]
    ]
    assert backwards == []


def test_every_layer_exists():
    names = {layer_of(path) for path in MODULES} - {"__init__"} - RESOURCES
    assert names == set(POSITION)


def test_there_is_no_drawer_for_odds_and_ends():
    names = {part for path in MODULES for part in path.relative_to(PACKAGE).with_suffix("").parts}
    assert not {name for name in names if re.fullmatch(r"_*(utils?|helpers?|misc|common|manager)", name)}


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, falcon_unlearn; print({'torch', 'transformers', 'pydantic', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_every_public_name_is_there():
    for name in falcon_unlearn.__all__:
        assert getattr(falcon_unlearn, name).__doc__
    assert set(falcon_unlearn.__all__) <= set(dir(falcon_unlearn))
    with pytest.raises(AttributeError, match="no attribute 'unlern'"):
        _ = falcon_unlearn.unlern


def blocks(language):
    """The code blocks of the README that are marked with ``language``."""
    fenced = re.split(r"^```", README.read_text(encoding="utf-8"), flags=re.MULTILINE)[1::2]
    return [text for first, _, text in (block.partition("\n") for block in fenced) if first == language]


needs_readme = pytest.mark.skipif(not README.exists(), reason="the README is not beside the tests")


@needs_readme
def test_the_readmes_python_is_python_and_its_imports_exist():
    for block in blocks("python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "falcon_unlearn":
                for alias in node.names:
                    assert alias.name in falcon_unlearn.__all__


@needs_readme
def test_the_readmes_recipes_are_valid():
    for block in blocks("yaml"):
        assert recipe_from(yaml.safe_load(block)).corpus.forget


@needs_readme
def test_the_readmes_commands_are_understood():
    lines = [line for block in blocks("") for line in block.splitlines()]
    commands = [part.strip() for line in lines for part in line.split("&&") if "falcon-unlearn " in part]
    assert commands
    for command in commands:
        assert _parse(shlex.split(command, comments=True)[1:]).handler
