"""Which commit of the hub a name and its revision stood for when this process fetched them: a branch moves, and the
record of a run says exactly what it was made of."""

import re
from pathlib import Path

COMMIT = re.compile(r"[0-9a-f]{40}")
_COMMITS: dict[tuple[str, str | None], str] = {}  # by name and revision, as they were asked for


def note_commit(name: str, revision: str | None, where: str | Path) -> None:
    """Remember the commit that a path of the hub's cache, or an address on the hub, is of, if it names one."""
    if found := COMMIT.findall(str(where)):
        _COMMITS[name, revision] = found[-1]


def commit_of(name: str, revision: str | None) -> str | None:
    """The commit that was fetched; None for what is no name on the hub, or was not fetched here."""
    return _COMMITS.get((name, revision))
