"""The same chances for every method: a grid of learning rates and strengths on validation prompts, then the cell that
was chosen there and its neighbours on test prompts, with several seeds and initial policies."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studies.records import row_of
from studies.runner import INITIALS, Runs, sweep

LR = "optim.lr"
LRS = ("1e-4", "2e-4", "4e-4", "8e-4")
TUNED_ON = ("data.test_split=validation", "seed=100")
RESULTS_ON = ("data.test_split=test", "seed=0,1,2,3,4", f"model.path={','.join(INITIALS)}")
Place = tuple[str, str]  # learning rate and strength


@dataclass(frozen=True, slots=True)
class Method:
    """What is compared: its name, the words that ask for it, and the values of its strength, ascending."""

    name: str
    words: tuple[str, ...]
    strengths: tuple[str, ...]
    key: str = "beta"


@dataclass(frozen=True, slots=True)
class Tuned:
    """A method, its grid on validation prompts, the place that was chosen, and the policies there and beside it."""

    method: Method
    grid: Mapping[Place, Runs]
    chosen: Place
    results: Mapping[Place, Runs]

    @property
    def at_edge(self) -> list[str]:
        """The keys of which the chosen place has the smallest or the largest value that was tried."""
        axes = _axes(self.grid)
        ends = zip((LR, self.method.key), axes, self.chosen, strict=True)
        return [key for key, values, value in ends if value in (values[0], values[-1])]

    def chosen_row(self, metrics: Sequence[str]) -> dict[str, Any]:
        """The row of the chosen place."""
        (row,) = (row for row in self.rows(metrics) if (row["lr"], row["strength"]) == self.chosen)
        return row

    def rows(self, metrics: Sequence[str]) -> list[dict[str, Any]]:
        """A row of each place that has results."""
        return [
            row_of(runs, metrics, method=self.method.name, lr=place[0], strength=place[1])
            for place, runs in self.results.items()
        ]

    def grid_rows(self) -> list[dict[str, Any]]:
        """Gold of each place of the grid."""
        return [
            row_of(runs, ("gold",), method=self.method.name, lr=place[0], strength=place[1])
            for place, runs in self.grid.items()
        ]


def tuned(folder: Path, experiment: str, method: Method) -> Tuned:
    """Run what is left of a method's tuning and of its results."""
    grid = _swept(folder / "grid", experiment, method, LRS, method.strengths, TUNED_ON)
    for axis in (0, 1):
        grid |= _beyond(folder, experiment, method, grid, axis)
    chosen = best_of(grid)
    (lrs, strengths) = (_around(values, value) for values, value in zip(_axes(grid), chosen, strict=True))
    results = _swept(folder / "strengths", experiment, method, chosen[:1], strengths, RESULTS_ON)
    others = [lr for lr in lrs if lr != chosen[0]]
    return Tuned(
        method, grid, chosen, results | _swept(folder / "lrs", experiment, method, others, chosen[1:], RESULTS_ON)
    )


def best_of(grid: Mapping[Place, Runs]) -> Place:
    """The place of the highest mean gold among those that are not degenerate; among all where all are."""
    sound = {place: runs for place, runs in grid.items() if not runs.num_degenerate} or grid
    return max(sound, key=lambda place: sound[place].gold.mean())


def _beyond(folder: Path, experiment: str, method: Method, grid: Mapping[Place, Runs], axis: int) -> dict[Place, Runs]:
    """One more value of a key beyond the end at which the best place lies; nothing where it lies inside."""
    axes, best = _axes(grid), best_of(grid)[axis]
    values = axes[axis]
    if best not in (values[0], values[-1]):
        return {}
    inner = values[1] if best == values[0] else values[-2]
    more = [f"{_rounded(float(best) ** 2 / float(inner)):g}"]
    lrs, strengths = (more, axes[1]) if axis == 0 else (axes[0], more)
    return _swept(folder / f"beyond_{('lr', 'strength')[axis]}", experiment, method, lrs, strengths, TUNED_ON)


def _rounded(value: float) -> float:
    """To one digit, which is how grids are written."""
    return float(f"{value:.0e}")


def _axes(grid: Mapping[Place, Any]) -> tuple[list[str], list[str]]:
    lrs, strengths = (sorted({place[axis] for place in grid}, key=float) for axis in (0, 1))
    return lrs, strengths


def _around(values: Sequence[str], value: str) -> list[str]:
    index = values.index(value)
    return list(values[max(0, index - 1) : index + 2])


def _swept(
    folder: Path, experiment: str, method: Method, lrs: Sequence[str], strengths: Sequence[str], words: Sequence[str]
) -> dict[Place, Runs]:
    asked = (f"{LR}={','.join(lrs)}", f"{method.key}={','.join(strengths)}", *words)
    runs = sweep(folder, f"+experiment={experiment}", *method.words, *asked)
    return {(lr, value): runs.at(**{LR: lr, method.key: value}) for lr in lrs for value in strengths}
