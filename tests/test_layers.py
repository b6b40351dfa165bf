"""The rules of the house, read from the code: where imports go, what hangs on what, names, and the way to a step."""

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo_ref.cli.schemas import locate
from tests.support.command import typed

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
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            of_a_package = (PACKAGE.parent / node.module.replace(".", "/")).is_dir()
            modules |= {f"{node.module}.{alias.name}" for alias in node.names} if of_a_package else {node.module}
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    return modules


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def upward(path: Path) -> set[tuple[str, str]]:
    """The file's imports that go neither to a lower floor nor to its own room."""
    here = room_of(path)
    ours = {name for name in imported(path) if name.split(".")[0] == "dpo_ref"}
    imports = {name for name in ours if (room := name.split(".")[1]) != here and FLOOR_OF[room] >= FLOOR_OF[here]}
    return {(str(path.relative_to(PACKAGE)), name) for name in imports}


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_to_lower_floors(path):
    assert upward(path) == set()


def test_the_root_holds_the_rooms_and_nothing_else():
    entries = {path.name.removesuffix(".py") for path in PACKAGE.iterdir()} - {"__init__", "__pycache__"}
    assert entries == set(FLOOR_OF)
    assert sum((PACKAGE / room).is_dir() for room in FLOOR_OF) == 12


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_hydra_and_wandb_stay_in_their_rooms(path):
    roots = {name.split(".")[0] for name in imported(path)}
    assert room_of(path) == "cli" or not roots & {"hydra", "omegaconf"}
    assert room_of(path) == "tracking" or "wandb" not in roots
    assert "pickle" not in roots
    assert not roots & {"studies", "benchmarks", "tests"}  # they use the package, and never the other way


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_the_user_is_told_is_printed_by_the_terminal_and_the_command_line(path):
    names = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)]
    in_the_open = room_of(path) == "cli" or path == PACKAGE / "tracking" / "terminal.py"
    assert in_the_open or "print" not in {node.id for node in names}
    assert "redirect_stdout" not in path.read_text()


def hung_on_functions(path: Path) -> list[str]:
    """Assignments to attributes of the file's own functions and classes, and to any attribute while it is imported."""
    tree = ast.parse(path.read_text())
    own = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.Lambda)]
    later = {inner for function in functions for inner in ast.walk(function)}
    stored = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]
    on_own = [node for node in stored if isinstance(node.value, ast.Name) and node.value.id in own]
    return [ast.unparse(node) for node in stored if node in on_own or node not in later]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_a_component_declares_is_typed(path):
    """It stands in `@component(...)` and is read from `Hooks`."""
    assert hung_on_functions(path) == []
    assert "reportFunctionMemberAccess" not in path.read_text()


HANDED_OVER = ("Context", "Request", "Settings", "Workspace")


def fields_handed_over(path: Path) -> dict[str, int]:
    """How many fields each class of the file has that is handed over to do work, by its name."""
    classes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
    bodies = {node.name: node.body for node in classes if node.name.endswith(HANDED_OVER)}
    return {name: sum(isinstance(line, ast.AnnAssign) for line in body) for name, body in bodies.items()}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_context_has_at_most_8_fields(path):
    assert [name for name, count in fields_handed_over(path).items() if count > 8] == []


CLASSES = [node for path in FILES for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]


def test_class_names_are_unique():
    counts = Counter(node.name for node in CLASSES if not node.name.startswith("_"))
    assert [name for name, count in counts.items() if count > 1] == []


def defined_by(node: ast.ClassDef) -> Iterator[str]:
    """Names of a class's fields, methods and properties, and of what its methods store in `self`."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.FunctionDef):
            yield inner.name
        elif isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
            yield inner.attr
    for statement in node.body:
        targets = [statement.target] if isinstance(statement, ast.AnnAssign) else getattr(statement, "targets", [])
        yield from (target.id for target in targets if isinstance(target, ast.Name))


OURS = {name for node in CLASSES for name in defined_by(node)}
ALSO_OF_OTHERS = {
    ("models/reward_model.py", "classifier", "score"),  # the last layer of transformers' classifiers
}
COMPUTED = {  # names that no code can spell out
    ("cli/schemas.py", "importlib.import_module(module)", "name"),  # what a `_target_` names
    ("models/loading.py", "config", "name"),  # whatever dropouts an architecture's configuration has
    ("types.py", "self", "name"),  # the fields that `axes_of` lists
}


def looked_up(path: Path) -> Iterator[tuple[str, str, ast.expr]]:
    """File, object and name of every `getattr` and `hasattr`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            yield str(path.relative_to(PACKAGE)), ast.unparse(node.args[0]), node.args[1]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_of_ours_is_read_by_a_name(path):
    """Names that are spelled out are not those of our classes; computed ones are the fields of a dataclass."""
    for file, target, name in looked_up(path):
        if isinstance(name, ast.Constant):
            assert name.value not in OURS or (file, target, name.value) in ALSO_OF_OTHERS
        else:
            assert ast.unparse(name) == "f.name" or (file, target, ast.unparse(name)) in COMPUTED


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_table_is_keyed_by_our_types(path):
    """What depends on a type is its method, or a `functools.singledispatch`."""
    classes = {node.name for node in CLASSES}
    tables = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Dict)]
    keys = [ast.unparse(key) for table in tables for key in table.keys if key is not None]
    assert [key for key in keys if key.rpartition(".")[2] in classes] == []


def test_what_the_configuration_names_is_there():
    """Of Hydra's callbacks and launchers too, which no test composes."""
    targets = {
        target
        for path in (PACKAGE.parent / "conf").rglob("*.yaml")
        for target in re.findall(r"_target_: (dpo_ref\.[\w.]+)", path.read_text())
    }
    assert len(targets) > 50
    assert [target for target in targets if not callable(locate(target))] == []


def test_the_way_to_a_step_is_short():
    """Frames of ours under the optimiser's step, and under the objective."""
    printed = typed("benchmarks/house.py", "--depth").stdout
    depths = dict(re.findall(r"frames of ours down to (\S+) +(\d+)", printed))
    assert int(depths["optimizer.step"]) <= 5
    assert int(depths["dpo"]) <= 11


IMPORTING = """
import importlib, pkgutil, torch
from torch.utils._python_dispatch import TorchDispatchMode

class Told(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        raise AssertionError(f"{operation} at import")

import dpo_ref
with Told():
    for module in pkgutil.walk_packages(dpo_ref.__path__, "dpo_ref."):
        if module.name != "dpo_ref.models.kernels":  # needs triton
            importlib.import_module(module.name)
"""


def test_nothing_is_computed_when_modules_are_imported():
    """Jobs of a sweep are forked from a process that has imported everything. Had it computed with several threads,
    those would be gone in the jobs, which would wait for them for ever."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTING], cwd=PACKAGE.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
