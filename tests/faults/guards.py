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
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
COPIED = ("dpo_ref", "conf", "tests", "train.py", "evaluate.py", "pyproject.toml", "README.md")
AT_ONCE = 2  # copies of the project, each with one test
FAILED = 1  # pytest's status


class Guard(NamedTuple):
    """A line that keeps a promise, what would stand in its place, and the test that fails then."""

    promise: str
    file: str  # in dpo_ref
    guard: str
    without: str
    test: str  # in tests/faults


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


def main() -> None:
    """Try each guard; exits with 1 where a test passes without its guard, or fails with it."""
    guards = [guard for guard in read_guards() if all(word in " ".join(guard) for word in sys.argv[1:])]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(AT_ONCE) as pool:
        roots: SimpleQueue[Path] = SimpleQueue()
        for number in range(AT_ONCE):
            root = Path(folder) / str(number)
            root.mkdir()
            for name in COPIED:
                copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
                copy(ROOT / name, root / name)
            roots.put(root)

        def is_seen(guard: Guard) -> bool:
            root = roots.get()
            try:
                with taken_out(guard, root):
                    return _status(root, guard.test) == FAILED
            finally:
                roots.put(root)

        root = roots.get()
        whole = _status(root, *dict.fromkeys(guard.test for guard in guards))
        roots.put(root)
        if whole:
            sys.exit("the tests fail with all guards in their places")
        unseen = []
        for guard, seen in zip(guards, pool.map(is_seen, guards), strict=True):
            print(
                "seen by" if seen else "NOT SEEN BY", guard.test, "|", guard.file, "|", guard.guard.strip(), flush=True
            )
            unseen += [] if seen else [guard]
    print(f"{len(guards) - len(unseen)} of {len(guards)} guards were missed by their test when they were taken out")
    sys.exit(bool(unseen))


if __name__ == "__main__":
    main()
