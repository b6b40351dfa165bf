"""What the cache holds, and making room in it.

    python -m dpo_ref.cli.cache
    python -m dpo_ref.cli.cache prune older_than=30d to=20GB kind=reference yes=true

The first lists every entry: its kind, size, when it was last used, and by which runs. `prune` names what it would
delete, and deletes it with `yes=true`: what was not used for `older_than`, the longest unused first until the cache is
as small as `to`, of one `kind`; one of the three has to be given. Kept is what a process works with, and what a run
that is under way or can be resumed was made with. A judge's answers go only with `kind=judge`: they cost money.
"""

import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dpo_ref.cli import stopping
from dpo_ref.evaluation.results import read_json
from dpo_ref.files.cache import cache_folder, cache_not_writable, delete, entries_in_use, unused
from dpo_ref.files.digests import bytes_digest, sealed, unsealed
from dpo_ref.files.writing import below, remove, sweep_abandoned, write_json
from dpo_ref.models.checkpoint import complete_in
from dpo_ref.tracking.terminal import guard_streams, say

# --- what is there


FOLDERS = {  # of kinds: what an entry is
    "groups": "rows that were read",
    "tokens": "tokenised rows",
    "reference": "tables of reference log-probs",
    "models": "models of the lab",
    "evaluations": "answers of initial policies and baselines",
    "served": "what served references said to fixed texts",
}
JUDGE = "judge"
LOG_ENDINGS = ("", "-wal", "-shm")  # of the files of SQLite
RUNS = "runs"  # which entries a run was made with, a file for each run


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing in the cache. `used` is the time of its last use, `runs` the folders of the runs made with it."""

    kind: str
    path: Path
    size: int
    used: float
    runs: tuple[Path, ...]

    @property
    def needed(self) -> bool:
        """Whether a run goes on with it, or may."""
        return any(map(may_go_on, self.runs))

    @property
    def lock(self) -> Path:
        """What processes hold that work with it."""
        return self.path.parent / "judge_answers.lock" if self.kind == JUDGE else self.path

    def delete(self) -> bool:
        """Remove it unless a process works with it; whether it was removed."""
        self.lock.touch()
        with unused(self.lock) as alone:
            if alone:
                delete(self.path)
                for ending in LOG_ENDINGS:
                    remove(self.path.with_name(self.path.name + ending))
        return alone


def may_go_on(run: Path) -> bool:
    """Whether a run is under way or can be resumed."""
    try:
        status = read_json(run / "summary.json").get("status")
    except ValueError:
        return bool(complete_in(run / "checkpoints"))
    return status in ("running", "interrupted") or (status == "failed" and bool(complete_in(run / "checkpoints")))


def check_cache() -> None:
    """Training keeps what it builds. Raises ValueError where the cache may only be read."""
    cache = cache_folder()
    if not os.access(cache, os.W_OK):
        raise cache_not_writable(cache, "it may only be read")


def record_uses(run: Path) -> None:
    """Write down which entries a run was made with."""
    cache = cache_folder()
    entries = [str(path.relative_to(cache)) for path in entries_in_use() if path.is_relative_to(cache)]
    (cache / RUNS).mkdir(parents=True, exist_ok=True)
    path = cache / RUNS / f"{bytes_digest(str(run.resolve()).encode())}.json"
    write_json(path, sealed({"run": str(run.resolve()), "entries": entries}))


def _runs(cache: Path) -> dict[Path, list[Path]]:
    """The runs that were made with an entry. Records of runs that are gone are removed."""
    runs = defaultdict(list)
    for path in sorted((cache / RUNS).glob("*.json")):
        with suppress(ValueError):
            record = unsealed(path.read_bytes(), str(path), "it is written by the run's next start")
            if not (run := Path(record["run"])).is_dir():
                path.unlink(missing_ok=True)
                continue
            for name in record["entries"]:
                runs[cache / name].append(run)
    return runs


def _size(path: Path) -> int:
    """Bytes of a file or of all files in a folder; what goes meanwhile counts nothing."""
    total = 0
    for file in [path, *below(path)]:
        with suppress(OSError):
            total += 0 if file.is_dir() else file.stat().st_size
    return total


def _paths(cache: Path) -> Iterator[tuple[str, Path]]:
    for kind in FOLDERS:
        for path in sorted((cache / kind).glob("*")):
            if path.is_dir() and not path.name.startswith("."):
                yield kind, path
    yield from ((JUDGE, path) for path in sorted(cache.glob("judge_answers*.sqlite")))


def entries(cache: Path) -> list[Entry]:
    """Everything in the cache, what was not used for longest first."""
    runs, listed = _runs(cache), []
    for kind, path in _paths(cache):
        beside = [path.with_name(path.name + ending) for ending in LOG_ENDINGS]
        with suppress(OSError):
            listed.append(Entry(kind, path, sum(map(_size, beside)), path.stat().st_mtime, tuple(runs[path])))
    return sorted(listed, key=lambda entry: entry.used)


# --- sizes and times as they are written


UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
SECONDS = {"h": 3600, "d": 24 * 3600}
DEFAULT_LIMIT = "50GB"


def _quantity(key: str, text: str, units: dict[str, int]) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(\w+)", text)
    if match is None or match[2] not in units:
        raise ValueError(f"{key}={text} must be a number with its unit, one of {', '.join(units)}")
    return float(match[1]) * units[match[2]]


def size_in_words(size: float | int) -> str:
    """12.3 MB."""
    unit = next((unit for unit in reversed(UNITS) if size >= UNITS[unit]), "kB")
    return f"{size / UNITS[unit]:.1f} {unit}"


def _age_in_words(seconds: float | int) -> str:
    days = seconds / SECONDS["d"]
    return f"{days:.0f} days ago" if days >= 2 else f"{max(0.0, seconds) / SECONDS['h']:.0f} hours ago"


def limit() -> float:
    """Bytes beyond which the cache says how large it is: DPO_REF_CACHE_LIMIT, or 50 GB."""
    return _quantity("DPO_REF_CACHE_LIMIT", os.environ.get("DPO_REF_CACHE_LIMIT") or DEFAULT_LIMIT, UNITS)


def look_after_cache() -> None:
    """At the start of a command: remove what killed processes left half-made, and say where the cache is large."""
    cache, most = cache_folder(), limit()
    sweep_abandoned(cache)
    size = sum(_size(path) for _, path in _paths(cache))
    if size > most:
        say(
            f"the cache {cache} has {size_in_words(size)}, more than DPO_REF_CACHE_LIMIT={size_in_words(most)}: "
            "`python -m dpo_ref.cli.cache` lists it, `prune` makes room"
        )


# --- the command


def _name(entry: Entry) -> str:
    return f"{entry.kind}/{entry.path.name}"


def show(cache: Path) -> None:
    """Print a table of all entries, the longest unused last."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table, listed = Table(box=SIMPLE_HEAD, pad_edge=False), entries(cache)
    for title in ("entry", "size", "last used", "of the runs"):
        table.add_column(title, justify="right" if title in ("size", "last used") else "left", overflow="fold")
    for entry in reversed(listed):
        runs = [f"{run}{' (may go on)' if may_go_on(run) else ''}" for run in entry.runs]
        age = _age_in_words(time.time() - entry.used)
        table.add_row(_name(entry), size_in_words(entry.size), age, "\n".join(runs))
    Console().print(table)
    print(f"{len(listed)} entries, {size_in_words(sum(entry.size for entry in listed))} in {cache}")


def chosen(listed: Sequence[Entry], options: dict[str, str]) -> list[Entry]:
    """What `prune` deletes of the entries. Raises ValueError for options out of range."""
    kind, now = options.get("kind"), time.time()
    if kind not in (None, JUDGE, *FOLDERS):
        raise ValueError(f"kind={kind} is none of {', '.join((*FOLDERS, JUDGE))}")
    age = _quantity("older_than", options["older_than"], SECONDS) if "older_than" in options else 0.0
    most = _quantity("to", options["to"], UNITS) if "to" in options else -1.0
    total, selection = sum(entry.size for entry in listed), []
    for entry in listed:
        of_the_kind = entry.kind == kind or (kind is None and entry.kind != JUDGE)
        unused = max(0.0, now - entry.used)  # a clock may have jumped back
        if total > most and of_the_kind and unused >= age and not entry.needed:
            selection.append(entry)
            total -= entry.size
    return selection


def prune(cache: Path, words: Sequence[str]) -> None:
    """Name what is to be deleted, and delete it with yes=true."""
    options = {key: value for key, _, value in (word.partition("=") for word in words)}
    if unknown := options.keys() - {"older_than", "to", "kind", "yes"}:
        raise ValueError(f"{min(unknown)} is unknown; prune takes older_than=30d, to=20GB, kind=reference, yes=true")
    if not options.keys() - {"yes"}:
        raise ValueError("prune needs one of older_than=30d, to=20GB, kind=reference")
    deletes = options.get("yes", "false") == "true"
    selection = chosen(entries(cache), options)
    gone = [entry for entry in selection if not deletes or _deleted(entry)]
    for entry in gone:
        facts = f"{size_in_words(entry.size)}, last used {_age_in_words(time.time() - entry.used)}"
        print(f"{'deleted' if deletes else 'would delete'} {_name(entry)} ({facts})")
    size = size_in_words(sum(entry.size for entry in gone))
    print(f"{len(gone)} entries, {size}" + ("" if deletes else "; nothing was deleted: add yes=true"))


def _deleted(entry: Entry) -> bool:
    deleted = entry.delete()
    if not deleted:
        print(f"kept {_name(entry)}: a process works with it")
    return deleted


def main(arguments: Sequence[str]) -> None:
    """The command: nothing, or `prune` and its options."""
    cache = cache_folder()
    sweep_abandoned(cache)
    if not arguments:
        show(cache)
        return
    if arguments[0] != "prune":
        raise ValueError("python -m dpo_ref.cli.cache [prune older_than=30d to=20GB kind=reference yes=true]")
    prune(cache, arguments[1:])


if __name__ == "__main__":
    guard_streams()
    with stopping.in_one_line():
        try:
            main(sys.argv[1:])
        except (ValueError, OSError) as error:
            sys.exit(f"error: {error}")
