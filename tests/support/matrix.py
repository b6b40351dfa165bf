"""`make test-matrix`: a short suite under each Python, with the oldest and newest torch and transformers that
requirements.txt allows, in environments of their own; writes docs/environments.md.

A Python that is not on the PATH, or a combination that cannot be installed, has a row that says so. With words, as in
`make test-matrix ONLY="3.13 newest"`, only the rows that hold them all are made anew; the others stay as they are.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement

from tests.support.lock import ROOT, requirements

PAGE = ROOT / "docs" / "environments.md"
PYTHONS = ["3.11", "3.12", "3.13"]
VARIED = ["torch", "transformers"]
SUITE = [  # what depends on Python, torch and transformers, and the commands as a user types them
    "tests/test_readme.py",
    "tests/cli/test_train_command.py",
    "tests/data/test_formats.py",
    "tests/data/test_token_groups.py",
    "tests/evaluation/test_judge_server.py",
    "tests/faults/test_environments.py",
    "tests/generation/test_generation.py",
    "tests/models/test_attention_kernels.py",
    "tests/models/test_model_loader.py",
    "tests/models/test_packed_logps.py",
    "tests/objectives/test_objectives.py",
    "tests/training/test_microdpo.py",
    "tests/training/test_trainer.py",
]
INTRODUCTION = """# Where it runs

Written by `make test-matrix`, on Linux (x86_64) without a GPU: a short suite, `SUITE` in
[tests/support/matrix.py](../tests/support/matrix.py), in environments made anew, with the oldest and newest torch and
transformers that `requirements.txt` allows, from the public index (on Linux its torch is the build for CUDA). Seconds
are of the suite and the installation. `make test` runs everything, under one Python.

| Python | torch | transformers | other requirements | result | seconds |
|---|---|---|---|---|---|
"""


class Environment(NamedTuple):
    """A Python, and the words by which uv chooses the versions of everything else."""

    python: str
    choice: tuple[str, ...]
    others: str = "newest"


def environments() -> Iterator[Environment]:
    """Every combination, and one in which all that requirements.txt names is the oldest."""
    ranges = requirements(ROOT / "requirements.txt")
    for python, *ends in product(PYTHONS, *[("oldest", "newest")] * len(VARIED)):
        oldest = [name for name, end in zip(VARIED, ends, strict=True) if end == "oldest"]
        yield Environment(python, tuple(f"{name}=={_lowest(ranges[name])}" for name in oldest))
    yield Environment(PYTHONS[0], ("--resolution", "lowest-direct"), "oldest")


def _lowest(requirement: Requirement) -> str:
    return next(part.version for part in requirement.specifier if part.operator == ">=")


def uv(*words: str | Path) -> None:
    """Raises CalledProcessError with what uv says."""
    command = [Path(sys.executable).with_name("uv"), words[0], "--quiet", "--no-config", *words[1:]]
    subprocess.run(command, check=True, capture_output=True, text=True)


def installed(environment: Environment, folder: Path) -> Path:
    """The interpreter of a new environment. Raises CalledProcessError where it cannot be made."""
    python = folder / "bin" / "python"
    uv("venv", "--no-python-downloads", "--python", f"python{environment.python}", folder)
    uv("pip", "install", "--python", python, *environment.choice, "-r", ROOT / "requirements-dev.txt")
    return python


def version(python: Path, name: str) -> str:
    program = f"from importlib.metadata import version; print(version({name!r}))"
    return subprocess.run([python, "-c", program], check=True, capture_output=True, text=True).stdout.strip()


def outcome(python: Path) -> str:
    """How the suite ended, as pytest counts it."""
    command = [python, "-m", "pytest", "-n", "2", "--dist", "worksteal", "-m", "slow or not slow", *SUITE]
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    out = subprocess.run(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True, check=False).stdout
    print(out, flush=True)
    ends = re.findall(r"^(?:=+ )?((?:\d+ \w+, )*\d+ (?:passed|failed|errors?)\b.*) in [\d.]+s", out, re.MULTILINE)
    return ends[-1] if ends else "not run to its end"


def asked(environment: Environment) -> list[str]:
    """The versions that were asked for, where none is installed."""
    pinned = dict(word.split("==") for word in environment.choice if "==" in word)
    return [pinned.get(name, environment.others) for name in VARIED]


def row(environment: Environment) -> list[str]:
    """A row of the page."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            python = installed(environment, Path(folder) / "venv")
        except subprocess.CalledProcessError as error:
            reason = " ".join(error.stderr.split())
            return [environment.python, *asked(environment), environment.others, f"not installed: {reason}", ""]
        versions = [version(python, name) for name in VARIED]
        result = outcome(python)
    return [environment.python, *versions, environment.others, result, f"{time.monotonic() - began:.0f}"]


def standing() -> list[list[str]]:
    """The rows of the page; "not run" for each where there is none."""
    lines = PAGE.read_text().removeprefix(INTRODUCTION).splitlines() if PAGE.is_file() else []
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    plan = list(environments())
    if [row[0] for row in rows] == [environment.python for environment in plan]:
        return rows
    return [[each.python, *asked(each), each.others, "not run", ""] for each in plan]


def main(words: Sequence[str]) -> int:
    """Make the rows that hold all `words`; the page is whole after each. 1 where any row of the page is not well."""
    table = standing()
    for index, environment in enumerate(environments()):
        if all(word in (environment.python, *asked(environment), environment.others) for word in words):
            table[index] = row(environment)
            print(json.dumps(table[index]), flush=True)
            PAGE.write_text(INTRODUCTION + "".join(f"| {' | '.join(cells)} |\n" for cells in table))
    return int(any(word in cells[-2] for cells in table for word in ("failed", "error", "not run")))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
