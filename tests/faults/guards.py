"""What is promised, and the line of code that keeps it (guards.toml).

`make guards` takes out one after the other, in a copy of the project, and runs its test, which must fail.
"""

import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
COPIED = ("dpo_ref", "conf", "docs", "tests", "train.py", "evaluate.py", "pyproject.toml", "README.md")
AT_ONCE = 2  # copies of the project, each with one test
FAILED = 1  # pytest's status


class Guard(NamedTuple):
    """A line that keeps a promise, what would stand in its place, and the test that fails then."""

    promise: str
    file: str  # in dpo_ref
    guard: str
    without: str
    test: str  # from tests/faults


def read_guards() -> list[Guard]:
    """All of guards.toml."""
    content = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
    return [Guard(promise, **entry) for promise, entries in content.items() for entry in entries]


@contextmanager
def taken_out(guard: Guard, root: Path) -> Iterator[None]:
    """A project without a guard."""
    path = root / "dpo_ref" / guard.file
    text = path.read_text()
    path.write_text(text.replace(guard.guard, guard.without))
    try:
        yield
    finally:
        path.write_text(text)


def _status(root: Path, *tests: str) -> int:
    """How pytest ends."""
    words = [sys.executable, "-m", "pytest", "-x", "-m", "slow or not slow", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*words, *(f"tests/faults/{test}" for test in tests)], cwd=root, capture_output=True
    ).returncode


def _copied(root: Path) -> Path:
    """A copy of the project at `root`."""
    root.mkdir()
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, root / name)
    return root


def _is_missed(guard: Guard, roots: "SimpleQueue[Path]") -> bool:
    """Whether a guard's test fails without it, in a copy that is free."""
    root = roots.get()
    try:
        with taken_out(guard, root):
            return _status(root, guard.test) == FAILED
    finally:
        roots.put(root)


def main() -> None:
    """Try each guard, or those that hold the words that were typed; exits with 1 where a test passes without its
    guard, or fails with it."""
    guards = [guard for guard in read_guards() if all(word in " ".join(guard) for word in sys.argv[1:])]
    roots: SimpleQueue[Path] = SimpleQueue()
    unmissed = 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(AT_ONCE) as pool:
        for number in range(AT_ONCE):
            root = _copied(Path(folder) / str(number))
            roots.put(root)
        if _status(root, *dict.fromkeys(guard.test for guard in guards)):
            sys.exit("the tests fail with all guards in their places")
        for guard, missed in zip(guards, pool.map(partial(_is_missed, roots=roots), guards), strict=True):
            verdict = "missed by" if missed else "NOT MISSED BY"
            print(verdict, guard.test, "|", guard.file, "|", guard.guard.strip(), flush=True)
            unmissed += not missed
    print(f"{len(guards) - unmissed} of {len(guards)} guards were missed by their test when they were taken out")
    sys.exit(bool(unmissed))


if __name__ == "__main__":
    main()
