"""The same chances for every method: a grid of learning rates and strengths on validation prompts, then the cell that
was chosen there and its neighbours on test prompts, with several seeds and initial policies."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpo_ref.reports.plots import Panel
from studies.pictures import forest, kl_axis, look
from studies.records import Record, markdown, percent, row_of, shown
from studies.runner import INITIALS, Runs, sweep

LR = "optim.lr"
LRS = ("1e-4", "2e-4", "4e-4", "8e-4")
SEEDS = ("seed=0,1,2,3,4", f"model.path={','.join(INITIALS)}")
Place = tuple[str, str]  # learning rate and strength


def slug(name: str) -> str:
    """A name as that of a folder."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower())


@dataclass(frozen=True, slots=True)
class Method:
    """What is compared: its name, the words that ask for it, the values of its strength, ascending, and the keys of
    that and of the split that its answers are to."""

    name: str
    words: tuple[str, ...]
    strengths: tuple[str, ...]
    key: str = "beta"
    split: str = "data.test_split"

    @property
    def folder(self) -> str:
        """Where its runs are."""
        return slug(self.name)

    @property
    def tuned_on(self) -> tuple[str, ...]:
        """Prompts and seed that its cell is chosen on."""
        return f"{self.split}=validation", "seed=100"

    @property
    def results_on(self) -> tuple[str, ...]:
        """Prompts, seeds and initial policies of its results."""
        return f"{self.split}=test", *SEEDS


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
    grid = tried(folder, experiment, method)
    chosen = best_of(grid)
    (lrs, strengths) = (_around(values, value) for values, value in zip(_axes(grid), chosen, strict=True))
    on = method.results_on
    results = swept(folder / "strengths", experiment, method, chosen[:1], strengths, on)
    others = [lr for lr in lrs if lr != chosen[0]]
    return Tuned(method, grid, chosen, results | swept(folder / "lrs", experiment, method, others, chosen[1:], on))


def tried(folder: Path, experiment: str, method: Method) -> dict[Place, Runs]:
    """A method's grid on validation prompts, and one more value of a key at whose end the best place lies."""
    grid = swept(folder / "grid", experiment, method, LRS, method.strengths, method.tuned_on)
    for axis in (0, 1):
        grid |= _beyond(folder, experiment, method, grid, axis)
    return grid


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
    return swept(folder / f"beyond_{('lr', 'strength')[axis]}", experiment, method, lrs, strengths, method.tuned_on)


def _rounded(value: float) -> float:
    """To one digit, which is how grids are written."""
    return float(f"{value:.0e}")


def _axes(grid: Mapping[Place, Any]) -> tuple[list[str], list[str]]:
    lrs, strengths = (sorted({place[axis] for place in grid}, key=float) for axis in (0, 1))
    return lrs, strengths


def _around(values: Sequence[str], value: str) -> list[str]:
    index = values.index(value)
    return list(values[max(0, index - 1) : index + 2])


def swept(
    folder: Path, experiment: str, method: Method, lrs: Sequence[str], strengths: Sequence[str], words: Sequence[str]
) -> dict[Place, Runs]:
    """Policies of a method at these learning rates and strengths."""
    asked = (f"{LR}={','.join(lrs)}", f"{method.key}={','.join(strengths)}", *words)
    runs = sweep(folder, f"+experiment={experiment}", *method.words, *asked)
    return {(lr, value): runs.at(**{LR: lr, method.key: value}) for lr in lrs for value in strengths}


# --- as it is shown


def chosen_table(found: Record) -> str:
    """The chosen cell of each method."""
    titles = [
        "method",
        "learning rate",
        "strength",
        "gold",
        "win rate, %",
        "tokens",
        "KL, nats",
        "degenerate",
        "at an end of",
    ]
    rows = [
        [
            row["method"],
            row["lr"],
            row["strength"],
            shown(row["gold"]),
            percent(row["win_rate"]),
            shown(row["tokens"], 1),
            shown(row["kl"], 2),
            f"{row['degenerate']} of {row['runs']}",
            ", ".join(found.also["edges"][row["method"]]) or "–",
        ]
        for row in found.rows["chosen"]
    ]
    return markdown(titles, rows)


def neighbours_table(found: Record) -> str:
    """The chosen cells and what lies beside them."""
    titles = ["method", "learning rate", "strength", "gold", "tokens", "KL, nats", "degenerate"]
    rows = [
        [row["method"], row["lr"], row["strength"], shown(row["gold"]), shown(row["tokens"], 1), shown(row["kl"], 2),
         f"{row['degenerate']} of {row['runs']}"]
        for row in found.rows["neighbours"]
    ]  # fmt: skip
    return markdown(titles, rows)


def chosen_panels(found: Record) -> list[Panel]:
    """Gold and length of each method at its chosen cell, and what all cells bought with how much KL."""
    rows, initial = found.rows["chosen"], found.also["initial"].values()
    names = [row["method"] for row in rows]

    def gold(axes: Any) -> None:
        forest(axes, names, [row["gold"] for row in rows], float(np.mean([each["gold"] for each in initial])))
        axes.set_title("Reward at the chosen cells")
        axes.set_xlabel("gold reward")

    def tokens(axes: Any) -> None:
        forest(axes, names, [row["tokens"] for row in rows], float(np.mean([each["tokens"] for each in initial])))
        axes.set_title("Length at the chosen cells")
        axes.set_xlabel("tokens an answer")

    return [
        Panel("Gold reward with 95 % intervals over seeds and prompts.", gold),
        Panel("Tokens with 95 % intervals over seeds.", tokens),
        bought_panel(found),
    ]


def bought_panel(found: Record) -> Panel:
    """Reward against KL, of the chosen cells (large) and their neighbours; marks are those beside the names."""

    def draw(axes: Any) -> None:
        for index, chosen in enumerate(found.rows["chosen"]):
            for row in (row for row in found.rows["neighbours"] if row["method"] == chosen["method"]):
                size = 9 if (row["lr"], row["strength"]) == (chosen["lr"], chosen["strength"]) else 4
                axes.plot(row["kl"].mean, row["gold"].mean, linestyle="none", markersize=size, **look(index))
        kl_axis(axes, [row["kl"].mean for row in found.rows["neighbours"]])
        axes.set_title("Reward against distance")
        axes.set_ylabel("gold reward")

    return Panel("Chosen cells (large) and their neighbours, in the marks beside their names.", draw)
