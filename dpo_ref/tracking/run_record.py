"""The numbers of a run while it trains: written to `metrics.jsonl`, logged to the tracker, the latest of each kept.

`metrics.jsonl` has one JSON object a line, `step` first; it is the record of a run that needs no service, and is
written whatever the tracker. Strict JSON: a value that is not finite is written as null. A process may die in the
middle of a line, so a last line that does not parse is not an error but a line that was never written.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_ref.files import write_lines
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


@dataclass(frozen=True, slots=True)
class MetricsFile:
    """Appends to a `metrics.jsonl`; the file is made by the first line."""

    path: Path

    def append(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Write one line and hand it to the operating system, so that a killed process has lost none."""
        line = json.dumps({"step": step} | {name: _strict(value) for name, value in metrics.items()}, allow_nan=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def truncate_after(self, step: int) -> None:
        """Drop the lines of steps beyond `step` and a torn last line; the file is replaced at once or not at all.

        A resumed run calls it with its checkpoint's step: what came after is about to be measured again.
        """
        if not self.path.exists():
            return
        lines = [line for line in _rows(self.path) if line["step"] <= step]
        write_lines(self.path, (json.dumps(line, allow_nan=False) + "\n" for line in lines))


# --- the record


DISTRIBUTIONS = {"logratios/chosen", "logratios/rejected", "rewards/margins"}


@dataclass
class RunRecord:
    """What a run has measured since its first step, whatever process measured it."""

    path: Path  # metrics.jsonl
    tracker: Tracker
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)

    def go_on_after(self, step: int) -> None:
        """Forget what was measured after `step`, and read what was before."""
        MetricsFile(self.path).truncate_after(step)
        if not self.path.exists():
            return
        for row in read(self.path):
            self._keep({name: value for name, value in row.items() if name != "step" and value is not None})

    def add(self, metrics: Mapping[str, float], step: int) -> None:
        """Numbers of an optimiser step."""
        self._keep(metrics)
        MetricsFile(self.path).append(metrics, step=step)
        self.tracker.log(metrics, step=step)

    def replace_under(self, prefix: str, metrics: Mapping[str, float], step: int) -> None:
        """The numbers of `prefix`; those not among `metrics` are unknown from here on."""
        for name in [name for name in self.last if name.startswith(f"{prefix}/")]:
            del self.last[name]
        self.add({f"{prefix}/{name}": value for name, value in metrics.items()}, step)

    def add_distributions(self, prefix: str, values: Mapping[str, Any], step: int) -> None:
        """How log-ratios and margins are spread over single pairs, to the tracker."""
        for name in DISTRIBUTIONS & values.keys():
            self.tracker.histogram(f"{prefix}/{name}_values", values[name].tolist(), step=step)

    def _keep(self, metrics: Mapping[str, float]) -> None:
        self.first = {**metrics, **self.first}
        self.last |= metrics
