"""The numbers of a run while it trains: written to `metrics.jsonl`, logged to the tracker, the latest of each kept.

`metrics.jsonl` has one JSON object a line, `step` first; it is the record of a run that needs no service, and is
written whatever the tracker. Strict JSON: a value that is not finite is written as null. A process may die in the
middle of a line, so a last line that does not parse is not an error but a line that was never written. A checkpoint
holds a seal of the lines up to its step: a resumed run has all of them, or says that it has not.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dpo_ref.files.writing import write_lines
from dpo_ref.tracking.terminal import say
from dpo_ref.tracking.tracker import Tracker

# --- `metrics.jsonl`


def _strict(value: float) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The file's objects; a torn last line is left out, a damaged one elsewhere is a ValueError."""
    lines = path.read_bytes().splitlines()
    for row, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except ValueError as error:
            if row < len(lines):
                raise ValueError(f"{path} line {row} is not JSON ({error}); delete or mend that line") from error


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file as they were written; values that were not finite are None.

    Raises FileNotFoundError, and ValueError naming the line if one other than the last is damaged.
    """
    return list(_rows(path))


GIVEN_UP = "metrics.given_up.jsonl"  # beside a `metrics.jsonl` that is gone: its lines are not missed


class Seal(NamedTuple):
    """How many lines, and the SHA-256 of their bytes."""

    lines: int
    digest: str


@dataclass(frozen=True, slots=True)
class MetricsFile:
    """Appends to a `metrics.jsonl`; the file is made by the first line."""

    path: Path

    def append(self, metrics: Mapping[str, float], *, step: int) -> str:
        """Write one line and hand it to the operating system, so that a killed process has lost none; the line."""
        values = {"step": step} | {name: _strict(value) for name, value in metrics.items()}
        line = json.dumps(values, allow_nan=False) + "\n"
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise OSError(
                f"{self.path} cannot be written ({error.strerror}): step {step} is not on record. Once that is mended "
                f"go on with python train.py resume={self.path.parent}"
            ) from error
        return line

    def sealed(self, seal: "Seal") -> list[str]:
        """The lines that were there when a seal was made. Raises ValueError where they are not as they were."""
        lines = self.path.read_bytes().splitlines(keepends=True)[: seal.lines] if self.path.exists() else []
        if seal == Seal(len(lines), hashlib.sha256(b"".join(lines)).hexdigest()):
            return [line.decode() for line in lines]
        missing = seal.lines - len(lines)
        change = f"{missing} of its first {seal.lines} lines are missing" if missing else "lines of it were changed"
        aside = self.path.with_name(GIVEN_UP)
        remedy = f"mv {self.path} {aside}" if self.path.exists() else f"touch {aside}"
        raise ValueError(
            f"{self.path} is not as the checkpoint left it: {change}. Put it back, or give up the numbers from before "
            f"the checkpoint: {remedy}"
        )


# --- the record


ANEW = {"evaluation"}  # what of it is not measured once more is unknown from there on
DISTRIBUTIONS = {"logratios/chosen", "logratios/rejected", "rewards/margins"}


@dataclass
class RunRecord:
    """What a run has measured since its first step, whatever process measured it."""

    path: Path  # metrics.jsonl
    tracker: Tracker
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    _measured: dict[str, int] = field(default_factory=dict)  # the latest step of each prefix
    _lines: int = 0
    _hasher: Any = field(default_factory=hashlib.sha256)  # of the lines' bytes

    @property
    def seal(self) -> Seal:
        """Of all lines up to here."""
        return Seal(self._lines, self._hasher.hexdigest())

    def start_over(self) -> None:
        """Forget all that was measured."""
        if self.path.exists():
            self._replace([])

    def holds(self, prefix: str, step: int) -> bool:
        """Whether the latest numbers of `prefix` were measured at this step."""
        return self._measured.get(prefix) == step

    def go_on_from(self, seal: Seal) -> None:
        """Forget what was measured after the seal, and read what was before. Raises ValueError where what was before
        is not as it was."""
        if seal.lines and not self.path.exists() and self.path.with_name(GIVEN_UP).exists():
            say(f"the numbers from before are given up: {self.path.with_name(GIVEN_UP)}")
            return
        lines = MetricsFile(self.path).sealed(seal)
        self._replace(lines)
        for row in map(json.loads, lines):
            self._keep(row, row.pop("step"))

    def _replace(self, lines: list[str]) -> None:
        write_lines(self.path, lines)
        self._lines, self._hasher = len(lines), hashlib.sha256("".join(lines).encode())

    def add(self, metrics: Mapping[str, float], step: int) -> None:
        """Numbers of an optimiser step."""
        self._keep(metrics, step)
        if self._lines and not self.path.exists():
            say(f"{self.path} was removed while training: the numbers before step {step} are lost")
            self._lines, self._hasher = 0, hashlib.sha256()
        line = MetricsFile(self.path).append(metrics, step=step)
        self._lines += 1
        self._hasher.update(line.encode())
        self.tracker.log(metrics, step=step)

    def add_distributions(self, prefix: str, values: Mapping[str, Any], step: int) -> None:
        """How log-ratios and margins are spread over single pairs, to the tracker."""
        for name in DISTRIBUTIONS & values.keys():
            self.tracker.histogram(f"{prefix}/{name}_values", values[name].tolist(), step=step)

    def _keep(self, metrics: Mapping[str, float | None], step: int) -> None:
        prefixes = {name.partition("/")[0] for name in metrics}
        self._measured |= dict.fromkeys(prefixes, step)
        known = {name: value for name, value in metrics.items() if value is not None}
        self.first = {**known, **self.first}
        self.last = {name: value for name, value in self.last.items() if name.partition("/")[0] not in ANEW & prefixes}
        self.last |= known
