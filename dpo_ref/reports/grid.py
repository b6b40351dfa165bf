"""A sweep over two keys as a heat map and in a sentence: the best combination, which others are within its error, and
which are degenerate.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo_ref.evaluation.grid import Grid, Place, grids
from dpo_ref.evaluation.results import ACCURACY, Measure, measure_of
from dpo_ref.evaluation.sweep import Cell, SweptRun
from dpo_ref.reports.findings import interval, told_apart
from dpo_ref.reports.plots import EDGE, TICKS, Panel
from dpo_ref.reports.tables import MISSING, number

# --- which combination is the best


@dataclass(frozen=True, slots=True)
class RankedGrid:
    """A grid with the evaluated cells at its places, by the measure that they are compared by: the best sound one,
    those that are not told apart from it, and those that are degenerate."""

    grid: Grid
    measure: Measure
    cells: dict[Place, Cell]
    best: Place | None  # None where every cell is degenerate, or none is measured
    within: list[Place]
    degenerate: list[Place]

    def written(self, place: Place) -> str:
        """The measure at a place, with its unit."""
        return with_unit(self.cells[place].evaluation.get(self.measure.key), self.measure)


def with_unit(value: float, measure: Measure) -> str:
    """A value of a measure; a share as a percentage, a reward in the scorer's own unit."""
    return number(measure.scale * value, measure.decimals) + ("\u00a0%" if measure.scale == 100 else "")


PAIRS = Measure(ACCURACY.key, "held-out pairs ranked as labelled, %", "pair accuracy, %", 100.0, 1)  # without a scorer


def ranked_grids(jobs: Sequence[SweptRun], cells: Sequence[Cell]) -> list[RankedGrid]:
    """The grids of a sweep of which a cell is evaluated; none for a sweep over one key."""
    at = {job.folder: cell for cell in cells for job in cell.jobs}
    found = []
    for grid in grids(jobs):
        members = {place: at[job.folder] for place, some in grid.jobs.items() for job in some if job.folder in at}
        if members:
            found.append(_ranked(grid, members))
    return found


def _ranked(grid: Grid, cells: dict[Place, Cell]) -> RankedGrid:
    evaluations = [cell.evaluation for cell in cells.values()]
    measure = measure_of(evaluations)
    if all(math.isnan(evaluation.get(measure.key)) for evaluation in evaluations):
        measure = PAIRS
    key = measure.key
    degenerate = [place for place, cell in cells.items() if cell.evaluation.degenerate]
    sound = [place for place in cells if place not in degenerate and not math.isnan(cells[place].evaluation.get(key))]
    best = max(sound, key=lambda place: cells[place].evaluation.get(key), default=None)
    within = [place for place in sound if best not in (None, place) and _alike(cells[best], cells[place], key)]
    return RankedGrid(grid, measure, cells, best, within, degenerate)


def _alike(best: Cell, other: Cell, key: str) -> bool:
    """Whether the difference of two cells is within its error, where one is known: one seed of a metric without an
    error says nothing."""
    known = min(len(best.jobs), len(other.jobs)) > 1 or not math.isnan(best.error(key) + other.error(key))
    return known and not told_apart(best, other, key)


def grid_sentence(ranked: RankedGrid) -> str:
    """The best combination, its interval, what is within its error, and where in the grid it lies."""
    grid, measure = ranked.grid, ranked.measure
    head = f"Of {len(ranked.cells)} combinations of {grid.x.key} and {grid.y.key}"
    head += f" ({grid.rest})" if grid.rest else ""
    head += f" with a result (of {len(grid.jobs)})" if len(grid.jobs) > len(ranked.cells) else ""
    if ranked.best is None:
        return f"{head}, none is sound: {_listed(ranked, ranked.degenerate)} are degenerate."
    ends = [number(measure.scale * end, measure.decimals) for end in _ends(ranked.cells[ranked.best], measure.key)]
    about = "" if MISSING in ends else f" [{', '.join(ends)}]"
    what = measure.title.removesuffix(", %")
    sentences = [f"{head}, {grid.name(ranked.best)} is the best: {what} {ranked.written(ranked.best)}{about}."]
    if ranked.within:
        sentences.append(f"Within its error (95 %): {_listed(ranked, ranked.within)}.")
    elif len(ranked.cells) > 1 and about:
        sentences.append("No other is within its error (95 %).")
    if edges := grid.at_edge(ranked.best):
        sentences.append(f"It is at the end of the values of {' and '.join(edges)}, and the best may lie beyond.")
    if ranked.degenerate:
        sentences.append(f"Degenerate: {_listed(ranked, ranked.degenerate)}.")
    return " ".join(sentences)


def _ends(cell: Cell, key: str) -> tuple[float, float]:
    """Of the 95 % interval: the metric's own, as a win rate has it, else that of a mean."""
    low, high = (cell.evaluation.get(f"{key}{end}") for end in ("_low", "_high"))
    return interval(cell, key) if math.isnan(low + high) else (low, high)


FEW = 5  # that are named in a sentence


def _listed(ranked: RankedGrid, places: Sequence[Place]) -> str:
    """Combinations with their measure, the best first; of many, how many more."""
    best_first = sorted(places, key=lambda place: -ranked.cells[place].evaluation.get(ranked.measure.key))
    named = [f"{ranked.grid.name(place)} ({ranked.written(place)})" for place in best_first[:FEW]]
    rest = [f"{len(places) - FEW} more"] if len(places) > FEW else []
    return ", ".join([*named, *rest])


# --- as a picture
# Colours of cells and what is written on them are the same in light and dark: they are no colours of the page.


DARK, LIGHT, MAP = "#020202", "#ffffff", "cividis"  # a map made for eyes that do not tell all hues apart
ROOMY = (5, 6)  # columns and rows up to which letters have their full size, and the panel its usual height
ROW_INCHES = 0.36  # of a row beyond these
ROW_CHARACTERS = 40  # that stand beside each other below the columns
FRAMES = {"best": ("-", 2.6), "within": ((0, (3, 2)), 1.4)}  # line and its width, around a cell


@dataclass(frozen=True, slots=True)
class Spot:
    """What is drawn at a place: two lines of text, the value of its colour (None: no colour), its frame (a key of
    `FRAMES`), and whether it is hatched."""

    lines: tuple[str, str]
    value: float | None
    frame: str | None = None
    hatched: bool = False


def heat_map(grid: Grid, title: str, spots: dict[Place, Spot], caption: str, marks: dict[str, str]) -> Panel:
    """A cell for each combination; `marks` say what frames and hatching mean, by name, as far as they occur. Shades
    are for telling sound ones apart: hatched ones beyond those have the shade of the end."""
    sound = [spot for spot in spots.values() if not spot.hatched] or list(spots.values())
    values = [spot.value for spot in sound if spot.value is not None] or [0.0]
    low, span = min(values), (max(values) - min(values)) or 1.0

    def draw(axes: Any) -> None:
        from matplotlib import colormaps

        _prepare(axes, grid, title)
        for (x, y), spot in spots.items():
            shade = None if spot.value is None else colormaps[MAP](float(np.clip((spot.value - low) / span, 0, 1)))[:3]
            _draw_spot(axes, (grid.x.values.index(x), grid.y.values.index(y)), spot, shade)
        occurring = {spot.frame for spot in spots.values()} | {"hatched" for spot in spots.values() if spot.hatched}
        _legend(axes, grid, {name: text for name, text in marks.items() if name in occurring})

    return Panel(caption, draw)


def _prepare(axes: Any, grid: Grid, title: str) -> None:
    columns, rows = len(grid.x.texts), len(grid.y.texts)
    axes.set_title(title)
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(-0.5, rows - 0.5), xlabel=grid.x.key, ylabel=grid.y.key)
    axes.set_xticks(range(columns), list(grid.x.texts.values()), rotation=45 if _crowded(grid) else 0)
    axes.set_yticks(range(rows), list(grid.y.texts.values()))
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.figure.set_figheight(axes.figure.get_figheight() + ROW_INCHES * max(0, rows - ROOMY[1]))


def _crowded(grid: Grid) -> bool:
    """Whether the values below the columns would meet."""
    return len(grid.x.texts) * max(map(len, grid.x.texts.values())) > ROW_CHARACTERS


def _draw_spot(axes: Any, at: tuple[int, int], spot: Spot, shade: Sequence[float] | None) -> None:
    ink = TICKS if shade is None else DARK if _luminance(shade) > SPLIT else LIGHT
    face = "none" if shade is None else shade
    border = {"edgecolor": EDGE, "linewidth": 0.8} if shade is None else {"edgecolor": ink, "linewidth": 0}
    _square(axes, at, 0.47, facecolor=face, hatch="///" if spot.hatched else None, **border)
    (x, y), (first, second), size = at, spot.lines, _letters(axes)
    if spot.frame is not None:
        style, width = FRAMES[spot.frame]
        _square(axes, at, 0.43, fill=False, edgecolor=ink, linestyle=style, linewidth=width * size / 9)
    offset = 0.13 if second else 0.0
    text: dict[str, Any] = {"ha": "center", "va": "center", "color": ink}
    if spot.hatched:  # so that lines do not go through letters
        text["bbox"] = {"facecolor": face, "edgecolor": "none", "pad": 1.0}
    axes.text(x, y + offset, first, fontsize=size, fontweight="bold" if spot.frame == "best" else "normal", **text)
    axes.text(x, y - 1.5 * offset, second, fontsize=0.8 * size, **text)


def _square(axes: Any, at: tuple[int, int], half: float, **options: Any) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((at[0] - half, at[1] - half), 2 * half, 2 * half, **options))


def _letters(axes: Any) -> float:
    """Size of what is written in a cell, in points: smaller where there are many columns."""
    from matplotlib import rcParams

    columns = axes.get_xlim()[1] + 0.5
    return rcParams["font.size"] * max(0.55, min(0.92, 0.92 * ROOMY[0] / columns))


SPLIT = 0.18  # luminance at which black and white letters have the same contrast


def _luminance(colour: Sequence[float]) -> float:
    """Relative luminance of an sRGB colour (WCAG 2.2): 0 is black, 1 is white."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return float(np.dot((0.2126, 0.7152, 0.0722), linear))


def _legend(axes: Any, grid: Grid, marks: dict[str, str]) -> None:
    """What frames and hatching mean, below the picture."""
    from matplotlib.patches import Patch

    handles = []
    for name, text in marks.items():
        style, width = FRAMES.get(name, ("-", 0.0))
        hatch = "////" if name == "hatched" else None
        handles.append(
            Patch(facecolor="none", edgecolor=TICKS, linestyle=style, linewidth=width, hatch=hatch, label=text)
        )
    if handles:
        below = 4.4 + (0.5 * max(map(len, grid.x.texts.values())) if _crowded(grid) else 0)  # in letters
        place = {"loc": "upper left", "bbox_to_anchor": (0, 0), "borderaxespad": below, "borderpad": 0}
        narrow = {"columnspacing": 0.9, "handlelength": 1.4, "handletextpad": 0.5, "fontsize": "small"}
        axes.legend(handles=handles, ncols=len(handles), **place, **narrow)


MARKS = {"best": "best", "within": "within its error", "hatched": "degenerate"}


def grid_panel(ranked: RankedGrid) -> Panel:
    """The measure of every combination."""
    grid, measure = ranked.grid, ranked.measure
    spots = {place: _spot(ranked, place) for place in grid.jobs}
    seeds = max(cell.evaluation.num_seeds for cell in ranked.cells.values())
    error = (
        f"the mean over {seeds} seeds ± their standard deviation" if seeds > 1 else "± the standard error over prompts"
    )
    title = measure.title[0].upper() + measure.title[1:]
    if grid.rest:
        title = f"{title} ({grid.rest})"
    caption = (
        f"{title}: {error}, for each combination of {grid.x.key} and {grid.y.key}. Framed is the best sound one; a "
        "dashed frame says that the difference to it is within its 95 % interval; hatched cells are degenerate; those "
        "without a colour have no result."
    )
    return heat_map(grid, title, spots, caption, MARKS)


def _spot(ranked: RankedGrid, place: Place) -> Spot:
    cell = ranked.cells.get(place)
    if cell is None:
        return Spot(_fate(ranked.grid.jobs[place]), None)
    key, measure = ranked.measure.key, ranked.measure
    value, spread = cell.evaluation.get(key), cell.spread(key)
    frame = "best" if place == ranked.best else "within" if place in ranked.within else None
    second = f"± {number(measure.scale * spread, measure.decimals)}" if spread else ""
    written = ranked.written(place)
    if len(ranked.grid.x.texts) > 1.5 * ROOMY[0]:  # there is no room for the unit, which the title says too
        written = written.removesuffix("\u00a0%")
    return Spot((written, second), None if math.isnan(value) else value, frame, place in ranked.degenerate)


def _fate(jobs: Sequence[SweptRun]) -> tuple[str, str]:
    """What became of jobs without a result, in two short lines."""
    behind = [job.climb.steps for job in jobs if job.left_behind and job.climb]
    if behind:
        return "stopped", f"at step {max(behind):,}"
    return (jobs[0].status, "not evaluated") if jobs[0].finished else (jobs[0].status, "")
