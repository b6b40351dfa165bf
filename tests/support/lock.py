"""requirements.lock as a list of what it pins. Reads a file and nothing else, so that tools without torch can."""

import re
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "requirements.lock"


class Pin(NamedTuple):
    """One entry: `name==version ; marker`, the hashes of its files, and what asks for it."""

    requirement: Requirement
    hashes: list[str]
    via: list[str]

    @property
    def name(self) -> str:
        return canonicalize_name(self.requirement.name)

    @property
    def version(self) -> str:
        return str(self.requirement.specifier).removeprefix("==")


def pins(lock: Path = LOCK) -> list[Pin]:
    """What a lock pins, in its order. A package stands twice where its version depends on that of Python."""
    entries = re.split(r"^(?=\w)", lock.read_text(), flags=re.MULTILINE)[1:]
    return [
        Pin(
            Requirement(entry.splitlines()[0].removesuffix("\\")),
            re.findall(r"--hash=(\S+)", entry),
            re.findall(r"^    # +(?:via )?(?!via$)(.+)$", entry, re.MULTILINE),
        )
        for entry in entries
    ]


def requirements(path: Path) -> dict[str, Requirement]:
    """The lines of a requirements file by their packages' names."""
    lines = (re.sub(r"#.*", "", line).strip() for line in path.read_text().splitlines())
    ranges = [Requirement(line) for line in lines if line and not line.startswith("-")]
    return {canonicalize_name(requirement.name): requirement for requirement in ranges}
