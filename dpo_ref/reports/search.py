"""A search among the jobs of a sweep: what it compared at each rung, and what it cost."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo_ref.evaluation.grid import Place, grids
from dpo_ref.evaluation.sweep import Climb, SweptRun
from dpo_ref.reports import page
from dpo_ref.reports.grid import Spot, heat_map
from dpo_ref.reports.plots import Panel
from dpo_ref.reports.tables import MISSING
from dpo_ref.tracking.terminal import words


@dataclass(frozen=True, slots=True)
class SearchedCell:
    """The jobs of a search that differ in their seed only, by the words that tell them from others, and how far each
    of them came."""

    name: str
    climbs: list[Climb]

    @property
    def rungs(self) -> int:
        """How many rungs it reached."""
        return min(len(climb.rungs) for climb in self.climbs)

    def value(self, rung: int) -> float:
        """The mean of the metric at a rung, from 1; nan where it has not been."""
        return float(np.mean([climb.value(rung) for climb in self.climbs])) if rung <= self.rungs else math.nan

    def step(self, rung: int) -> int:
        """Where a rung is."""
        return self.climbs[0].rungs[rung - 1][0]


def searched(jobs: Sequence[SweptRun]) -> list[SearchedCell]:
    """The cells of a search, those first that came farthest, then the better ones; none where no search was."""
    climbed = [(job.words, job.climb) for job in jobs if job.climb is not None and job.climb.rungs]
    shared = set.intersection(*(set(own) for own, _ in climbed)) if climbed else set()
    found: dict[str, list[Climb]] = defaultdict(list)
    for own, climb in climbed:
        found[" ".join(word.lstrip("+") for word in own if word not in shared) or "the job"].append(climb)
    cells = [SearchedCell(name, climbs) for name, climbs in found.items()]
    sign = -1 if climbed and climbed[0][1].better == "higher" else 1
    return sorted(cells, key=lambda cell: (-cell.rungs, _last(sign * cell.value(cell.rungs))))


def _last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def search_sentence(cells: Sequence[SearchedCell]) -> str:
    """By what cells were compared, how many came where, and how many optimiser steps that took."""
    first = cells[0].climbs[0]
    reached = [sum(cell.rungs >= rung for cell in cells) for rung in range(1, first.of + 1)]
    went = [f"{count} from {_where(cells, rung)}" for rung, count in enumerate(reached[1:], 1) if count]
    climbs = [climb for cell in cells for climb in cell.climbs]
    made, whole = sum(climb.steps for climb in climbs), sum(climb.num_steps for climb in climbs)
    return (
        f"Searched by {first.metric} ({first.better} is better): of {reached[0]} cells, "
        f"{' and '.join(went) or 'none'} went on. All jobs made {made:,} optimiser steps of the {whole:,} to their "
        f"ends ({made / whole:.0%})."
    )


def _where(cells: Sequence[SearchedCell], rung: int) -> str:
    """A rung by its step, where that is one for all that reached it."""
    steps = {cell.step(rung) for cell in cells if cell.rungs >= rung}
    return f"step {steps.pop():,}" if len(steps) == 1 else f"rung {rung}"


def search_table(cells: Sequence[SearchedCell]) -> tuple[list[str], list[list[str]]]:
    """The metric of every cell at every rung: titles, and a row of texts each."""
    rungs = range(1, max(cell.rungs for cell in cells) + 1)
    titles = ["Cell", *(_where(cells, rung).capitalize() for rung in rungs)]
    return titles, [[cell.name, *(_text(cell.value(rung)) for rung in rungs)] for cell in cells]


def _text(value: float) -> str:
    return MISSING if math.isnan(value) else f"{value:.4g}".replace("-", "−")


def search_section(jobs: Sequence[SweptRun]) -> str:
    """For the page; empty where no search was."""
    cells = searched(jobs)
    if not cells:
        return ""
    titles, rows = search_table(cells)
    return (
        f'<h2>Search</h2><p class="small">{page.text(search_sentence(cells))} Cells that were left behind were not '
        f"evaluated; their policies are those of the last step shown.</p>{page.plain_table(titles, rows)}"
    )


def search_terminal(jobs: Sequence[SweptRun]) -> list[Any]:
    """For the terminal; empty where no search was."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    cells = searched(jobs)
    if not cells:
        return []
    titles, rows = search_table(cells)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    table.add_column("cell of the search", overflow="fold")
    for title in titles[1:]:
        table.add_column(words(title.lower()), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*map(words, row))
    return [table, words(search_sentence(cells))]


def search_panels(jobs: Sequence[SweptRun]) -> list[Panel]:
    """The metric of every combination of two keys at the last rung that it reached."""
    return [panel for grid in grids(jobs) if (panel := _panel(grid.jobs, grid)) is not None]


def _panel(jobs: dict[Place, list[SweptRun]], grid: Any) -> Panel | None:
    cells = {place: searched(some) for place, some in jobs.items()}
    at = {place: found[0] for place, found in cells.items() if found}
    if not at:
        return None
    first = next(iter(at.values())).climbs[0]
    spots = {place: _spot(cell) for place, cell in at.items()}
    rest = f" ({grid.rest})" if grid.rest else ""
    caption = (
        f"{first.metric} ({first.better} is better) of every combination at the last rung that it reached, whose step "
        "is below it; framed are those that trained to their end. Numbers at different steps are no comparison."
    )
    return heat_map(grid, f"Search by {first.metric}{rest}", spots, caption, {"best": "trained to the end"})


def _spot(cell: SearchedCell) -> Spot:
    value = cell.value(cell.rungs)
    frame = "best" if cell.rungs == cell.climbs[0].of else None
    return Spot((_text(value), f"step {cell.step(cell.rungs):,}"), None if math.isnan(value) else value, frame)
