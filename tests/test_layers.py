"""Imports go down a floor or stay in their room, and nothing hangs on functions: read from the code, at any depth."""

import ast
from dataclasses import fields
from pathlib import Path

import pytest

from dpo_ref.component import Hooks

PACKAGE = Path(__file__).parents[1] / "dpo_ref"
FLOORS = {
    1: ["types", "component", "files", "distributed"],
    2: ["data", "objectives", "tracking"],
    3: ["models"],
    4: ["references", "generation"],
    5: ["training", "evaluation"],
    6: ["reports"],
    7: ["lab"],
    8: ["cli"],
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}


def imported(path: Path) -> set[str]:
    """Dotted names of every module a file imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            of_a_package = (PACKAGE.parent / node.module.replace(".", "/")).is_dir()
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if of_a_package else {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def upward(path: Path) -> set[tuple[str, str]]:
    """The file's imports that go neither to a lower floor nor to its own room."""
    here = room_of(path)
    ours = {name for name in imported(path) if name.split(".")[0] == "dpo_ref"}
    found = {name for name in ours if (room := name.split(".")[1]) != here and FLOOR_OF[room] >= FLOOR_OF[here]}
    return {(str(path.relative_to(PACKAGE)), name) for name in found}


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_to_lower_floors(path):
    assert upward(path) == set()


def test_the_root_holds_the_rooms_and_nothing_else():
    entries = {path.name.removesuffix(".py") for path in PACKAGE.iterdir()} - {"__init__", "__pycache__"}
    assert entries == set(FLOOR_OF)
    assert sum((PACKAGE / room).is_dir() for room in FLOOR_OF) == 11


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_hydra_and_wandb_stay_in_their_rooms(path):
    roots = {name.split(".")[0] for name in imported(path)}
    assert room_of(path) == "cli" or not roots & {"hydra", "omegaconf"}
    assert room_of(path) == "tracking" or "wandb" not in roots
    assert "pickle" not in roots


def hung_on_functions(path: Path) -> list[str]:
    """Assignments to attributes of the file's own functions and classes, and to any attribute while it is imported."""
    tree = ast.parse(path.read_text())
    own = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.Lambda)]
    later = {inner for function in functions for inner in ast.walk(function)}
    stored = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]
    on_own = [node for node in stored if isinstance(node.value, ast.Name) and node.value.id in own]
    return [ast.unparse(node) for node in stored if node in on_own or node not in later]


def looked_up(path: Path) -> list[str]:
    """The names that a file looks up with `getattr` or `hasattr`, a name that is computed as its code."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    names = [call.args[1] for call in calls if ast.unparse(call.func) in ("getattr", "hasattr")]
    return [str(name.value) if isinstance(name, ast.Constant) else ast.unparse(name) for name in names]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_a_component_declares_is_typed(path):
    """It stands in `@component(...)` and is read from `Hooks`."""
    assert hung_on_functions(path) == []
    assert "reportFunctionMemberAccess" not in path.read_text()
    assert not {field.name for field in fields(Hooks)} & set(looked_up(path))


def test_attributes_are_looked_up_by_name_no_more_often():
    assert sum(len(looked_up(path)) for path in FILES) <= 61


HANDED_OVER = ("Context", "Request", "Settings", "Workspace")


def fields_handed_over(path: Path) -> dict[str, int]:
    """How many fields each class of the file has that is handed over to do work, by its name."""
    classes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
    bodies = {node.name: node.body for node in classes if node.name.endswith(HANDED_OVER)}
    return {name: sum(isinstance(line, ast.AnnAssign) for line in body) for name, body in bodies.items()}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_context_has_at_most_8_fields(path):
    assert [name for name, count in fields_handed_over(path).items() if count > 8] == []
