"""Model selection: which of a run's policies is the best by a metric of held-out data, and when to stop looking.

The metric's better direction is that of the table in `evaluation/results.py`. The policy before training is no
candidate. Of equal values the earlier is the best.
"""

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Criterion:
    """`key` is that of `metrics.jsonl`; after `patience` evaluations in a row that are no better than the best one the
    run ends, None for never."""

    key: str
    better: Literal["higher", "lower"]
    patience: int | None = None

    def improves(self, value: float, on: float) -> bool:
        """Whether `value` is strictly better."""
        return value > on if self.better == "higher" else value < on


@dataclass(frozen=True, slots=True)
class Best:
    """The best policy so far: after which optimiser step, its value, and why it was degenerate at the last evaluation
    of samples until then, if it was."""

    step: int
    value: float
    degenerate: list[str]


@dataclass
class ModelSelection:
    """The best policy of a run by its criterion."""

    criterion: Criterion
    best: Best | None = field(default=None, init=False)
    waited: int = field(default=0, init=False)  # evaluations since the best one

    def consider(self, step: int, metrics: Mapping[str, float], degenerate: list[str]) -> None:
        """Take in an evaluation, if it is one of the criterion's metric; a value that is not finite is never best."""
        prefix = self.criterion.key.partition("/")[0]
        if step == 0 or not any(name.startswith(f"{prefix}/") for name in metrics):
            return
        value = metrics.get(self.criterion.key, math.nan)
        if math.isfinite(value) and (self.best is None or self.criterion.improves(value, self.best.value)):
            self.best, self.waited = Best(step, value, list(degenerate)), 0
        else:
            self.waited += 1

    @property
    def exhausted(self) -> bool:
        """Whether the run is to end."""
        patience = self.criterion.patience
        return patience is not None and self.best is not None and self.waited >= patience

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        best = self.best and {"step": self.best.step, "value": self.best.value, "degenerate": self.best.degenerate}
        return {"key": self.criterion.key, "best": best, "waited": self.waited}

    def load_state(self, state: Mapping[str, Any] | None) -> None:
        """Go on from what a checkpoint kept; where that is of another metric, or none was followed, from nothing."""
        if state is not None and state["key"] == self.criterion.key:
            self.best, self.waited = state["best"] and Best(**state["best"]), state["waited"]


def near(key: str, known: Iterable[str]) -> str:
    """The three known keys most like `key`, to be shown."""
    return ", ".join(difflib.get_close_matches(key, sorted(known), n=3, cutoff=0.0))
