"""The shape of the house in numbers: files, imports, names, and how deep the way to a step is; beside each its goal.

    python benchmarks/house.py            read from the source
    python benchmarks/house.py --depth    and from one small run: frames of ours under optimizer.step and under dpo

Imports are counted wherever they stand, inside functions too. `docs/architecture.md` says what the numbers are for.
"""

import argparse
import ast
import contextlib
import io
import runpy
import statistics
import sys
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dpo_ref"
HYDRA = {"hydra", "omegaconf"}
GOALS = {
    "modules, bare __init__ aside": "114",
    "lines of the median module": "221",
    "modules under 60 lines": "3",
    "modules with one importer and no YAML": "at most 22",
    "entries at the package's root": "15",
    "modules in circles of imports": "0",
    "modules that train.py imports": "84",
    "modules that training/run.py imports": "26",
    "rooms that know Hydra": "cli",
    "file names twice in one room": "0",  # a subject keeps its name in every room
    "class names used twice": "0",
    "frames of ours down to optimizer.step": "at most 5",
    "frames of ours down to dpo": "at most 11",
}


def module_of(path):
    """dpo_ref/data/rows.py -> dpo_ref.data.rows"""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def tree_of(path):
    """The parsed file."""
    return ast.parse(path.read_text())


def imported(path):
    """Dotted names of everything a file imports."""
    names = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def is_bare(path):
    """Whether a file is an `__init__` with nothing but a docstring."""
    return path.name == "__init__.py" and not imported(path) and len(tree_of(path).body) <= 1


def dependencies(path, modules):
    """The modules of the package that a file imports."""
    names = imported(path)
    names |= {name.rpartition(".")[0] for name in names}
    return {modules[name] for name in names if name in modules} - {path}


def reached(start, graph, modules):
    """Everything that importing `start` may import, itself included if it is a module of the package."""
    seen, waiting = set(), [start]
    while waiting:
        path = waiting.pop()
        if path not in seen:
            seen.add(path)
            waiting += graph[path] if path in graph else dependencies(path, modules)
    return {path for path in seen if path in graph}


def in_circles(graph, modules):
    """Modules whose imports lead back to themselves."""
    return [p for p in graph if any(p in reached(other, graph, modules) for other in graph[p])]


def repeated(names):
    """How many of these names stand for more than one thing."""
    return sum(count > 1 for count in Counter(names).values())


def numbers():
    """Name and value of what is read from the source."""
    paths = [path for path in sorted(PACKAGE.rglob("*.py")) if not is_bare(path)]
    modules = {module_of(path): path for path in paths}
    graph = {path: dependencies(path, modules) for path in paths}
    lines = [len(path.read_text().splitlines()) for path in paths]
    importers = Counter(other for path in paths for other in graph[path])
    programs = [*ROOT.glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    importers.update(other for path in programs for other in dependencies(path, modules))
    targets = "\n".join(path.read_text() for path in (ROOT / "conf").rglob("*.yaml"))
    single = [p for p in paths if importers[p] == 1 and f"_target_: {module_of(p)}." not in targets]
    classes = [node.name for path in paths for node in tree_of(path).body if isinstance(node, ast.ClassDef)]
    entries = [path for path in PACKAGE.iterdir() if path.name not in ("__init__.py", "__pycache__")]
    around = PACKAGE / "training" / "run.py"
    knows_hydra = [path for path in paths if {name.split(".")[0] for name in imported(path)} & HYDRA]
    return {
        "modules, bare __init__ aside": len(paths),
        "lines in all": sum(lines),
        "lines of the median module": f"{statistics.median(lines):g}",
        "modules under 60 lines": sum(count < 60 for count in lines),
        "modules with one importer and no YAML": len(single),
        "entries at the package's root": len(entries),
        "modules in circles of imports": len(in_circles(graph, modules)),
        "modules that train.py imports": len(reached(ROOT / "train.py", graph, modules)),
        "modules that training/run.py imports": len(reached(around, graph, modules)),
        "modules that know Hydra": len(knows_hydra),
        "rooms that know Hydra": ", ".join(sorted({*map(room_of, knows_hydra)})),
        "file names twice in one room": repeated((room_of(path), path.stem) for path in paths),
        "class names used twice": repeated(name for name in classes if not name.startswith("_")),
    }


def room_of(path):
    """The folder, or file, at the package's root that a path lies in."""
    return path.relative_to(PACKAGE).parts[0]


def depths():
    """Frames of ours, from train.py's main on, that stand under optimizer.step and under dpo in a small run."""
    import torch

    sys.path.insert(0, str(ROOT))
    deepest = {}

    def ours():
        frame, count = sys._getframe(2), 0
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            count += path.is_relative_to(PACKAGE) or path == ROOT / "train.py"
            if path == ROOT / "train.py" and frame.f_code.co_name == "main":
                break
            frame = frame.f_back
        return count

    def note(frame, event, _):
        if event == "call" and frame.f_code.co_name == "dpo" and "objectives" in frame.f_code.co_filename:
            name = "frames of ours down to dpo"
            deepest[name] = max(deepest.get(name, 0), ours())  # it is also asked before there is a step

    step = torch.optim.AdamW.step

    def stepping(self, *arguments, **options):
        deepest.setdefault("frames of ours down to optimizer.step", ours())
        return step(self, *arguments, **options)

    with tempfile.TemporaryDirectory() as folder:
        words = ["tracking=none", "model=lab_tiny", "data.num_pairs=32", "trainer.max_steps=1"]
        sys.argv = ["train.py", *words, "data.num_eval_pairs=0", f"output_dir={folder}/run"]
        torch.optim.AdamW.step = stepping
        sys.setprofile(note)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        sys.setprofile(None)
    return deepest


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", action="store_true")
    args = parser.parse_args()
    for name, value in (numbers() | (depths() if args.depth else {})).items():
        goal = f"goal {GOALS[name]}" if name in GOALS else ""
        print(f"{name:42} {value!s:8} {goal}".rstrip())


if __name__ == "__main__":
    main()
