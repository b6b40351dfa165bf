"""Pictures of an evaluation. A panel is drawn the same for the page (SVG, one by one) and for papers (PNG, a grid;
every panel a file of its own, at the size of a column).
"""

import io
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from dpo_ref.evaluation.results import KL, LENGTH, SCORE, Evaluated, Evaluation
from dpo_ref.files.writing import replacing
from dpo_ref.reports.tables import leading_key, titles
from dpo_ref.tracking.terminal import OF_SCRIPTS, visible

logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it tells when it has listed the machine's fonts

INITIAL, INK, GRID, BROKEN = "#6b7280", "#1f2937", "#e5e7eb", "#b91c1c"
SERIES = ("#2563eb", "#d97706", "#059669", "#9333ea", "#0891b2", "#be185d", "#65a30d", "#475569")
PANEL_INCHES = (4.9, 3.3)
LONGEST_LABEL = 30  # characters
TICKS, EDGE = "#4b5563", "#9ca3af"
THEMED = {  # colours that a page shows in its own shade, by the name of its variable
    "#000000": "ink", INK: "ink", TICKS: "soft", EDGE: "edge", GRID: "grid", INITIAL: "initial", BROKEN: "bad",
    **{hue: f"series-{index}" for index, hue in enumerate(SERIES)},
}  # fmt: skip
STYLE: dict[Any, Any] = {
    "axes.edgecolor": EDGE,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlepad": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": TICKS,
    "ytick.color": TICKS,
    "text.color": INK,
    "font.size": 10,
    "font.family": "sans-serif",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.constrained_layout.h_pad": 0.1,
    "figure.constrained_layout.w_pad": 0.1,
    "text.parse_math": False,  # a dollar sign in a run's name is a dollar sign
    "svg.fonttype": "none",  # text stays text: it takes the page's font and can be selected
    "svg.hashsalt": "dpo_ref",
}


@dataclass(frozen=True, slots=True)
class Panel:
    """A picture: what it shows in words, and how it is drawn on a matplotlib Axes."""

    caption: str
    draw: Callable[[Any], None]


@contextmanager
def figure_of(
    rows: int,
    columns: int,
    inches: tuple[float, float] = PANEL_INCHES,
    style: Mapping[Any, Any] = MappingProxyType({}),
) -> Iterator[tuple[Any, list[Any]]]:
    """A figure of panels, and their Axes, without pyplot, which would look for a display and keep global state."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({**STYLE, **style}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # of a name in any script: a box is drawn
        figure = Figure(figsize=(inches[0] * columns, inches[1] * rows), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def theme_colour(colour: str) -> str:
    """A colour as CSS: the page's shade of it, which may differ in light and dark, where the page has one."""
    return f"var(--{THEMED[colour]}, {colour})" if colour in THEMED else colour


def svg(panel: Panel) -> str:
    """One panel as an inline SVG element in the page's colours."""
    with figure_of(1, 1) as (figure, (axes,)):
        panel.draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = visible(buffer.getvalue(), OF_SCRIPTS)
    return re.sub(r"(?<=: )#[0-9a-f]{6}\b", lambda match: theme_colour(match[0]), text[text.index("<svg") :])


def write_png(path: Path, panels: Sequence[Panel], dpi: int = 160) -> None:
    """The panels as one picture, two in a row; replaced atomically."""
    columns = min(2, len(panels))
    with figure_of(math.ceil(len(panels) / columns), columns) as (figure, all_axes):
        for panel, axes in zip(panels, all_axes, strict=False):
            panel.draw(axes)
        for axes in all_axes[len(panels) :]:
            axes.set_visible(False)
        save(figure, path, dpi=dpi, metadata={"Software": None})


def save(figure: Any, path: Path, **options: Any) -> None:
    """Write a figure, replacing what was there atomically."""
    with replacing(path) as partial:
        figure.savefig(partial, format=path.suffix[1:], facecolor="white", **options)


def colours(evaluations: Sequence[Evaluation]) -> list[str]:
    """Grey for what others are compared with, one colour for each other policy."""
    hues = iter(SERIES * (1 + len(evaluations) // len(SERIES)))
    return [INITIAL if e.baseline is None else next(hues) for e in evaluations]


def _half_width(evaluation: Evaluation, key: str) -> float:
    error = evaluation.get(f"{key}_se")
    return 0.0 if math.isnan(error) else 1.96 * error


def labels(evaluations: Sequence[Evaluation]) -> list[str]:
    """Titles short enough to leave room for a picture."""
    half = LONGEST_LABEL // 2
    return [
        title if len(title) <= LONGEST_LABEL else f"{title[:half]}…{title[-half:]}" for title in titles(evaluations)
    ]


def _rows(axes: Any, evaluations: Sequence[Evaluation], title: str) -> None:
    """One row per policy, the first on top."""
    axes.set_title(title)
    axes.set_ylim(len(evaluations) - 0.4, -0.6)
    axes.set_yticks(range(len(evaluations)), labels(evaluations))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)


def _dot(axes: Any, x: float, y: float, low: float, high: float, evaluation: Evaluation, colour: str) -> None:
    axes.plot([low, high], [y, y], color=colour, linewidth=2.2, solid_capstyle="round", alpha=0.55)
    marker = {"marker": "X", "color": BROKEN} if evaluation.degenerate else {"marker": "o", "color": colour}
    axes.plot([x], [y], markersize=8, linestyle="none", **marker)


def _means_panel(evaluations: Sequence[Evaluation], key: str, title: str, what: str) -> Panel:
    """A mean of each policy with its 95 % interval."""

    def draw(axes: Any) -> None:
        _rows(axes, evaluations, title)
        for row, (evaluation, colour) in enumerate(zip(evaluations, colours(evaluations), strict=True)):
            mean, half = evaluation.get(key), _half_width(evaluation, key)
            _dot(axes, mean, float(row), mean - half, mean + half, evaluation, colour)

    return Panel(f"Mean {what} of the sampled answers; bars are 95 % intervals, clustered by prompt.", draw)


def mean_length_panel(evaluations: Sequence[Evaluation]) -> Panel:
    """How long each policy's answers are."""
    return _means_panel(evaluations, LENGTH.key, "Answer length, tokens", "length")


def _is_compared(evaluation: Evaluation) -> bool:
    return bool(evaluation.baseline) and not math.isnan(evaluation.get(leading_key(evaluation)))


def win_panel(evaluations: Sequence[Evaluation]) -> Panel:
    """Win rate of each trained policy with its bootstrap interval, against an even score. One has been compared."""
    shown = [(e, c) for e, c in zip(evaluations, colours(evaluations), strict=True) if _is_compared(e)]

    def draw(axes: Any) -> None:
        _rows(axes, [e for e, _ in shown], f"Win rate against {shown[0][0].baseline}")
        axes.axvline(50, color=INITIAL, linestyle=(0, (4, 3)), linewidth=1.2)
        for row, (evaluation, colour) in enumerate(shown):
            mean, low, high = (
                100 * evaluation.get(f"{leading_key(evaluation)}{part}") for part in ("", "_low", "_high")
            )
            _dot(axes, mean, float(row), low, high, evaluation, colour)
        axes.margins(x=0.12)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("% of comparisons, ties half")

    return Panel("Share of paired comparisons won; bars are 95 % bootstrap intervals over prompts.", draw)


def frontier_panel(evaluations: Sequence[Evaluation]) -> Panel:
    """What reward each policy bought with how much KL."""

    def draw(axes: Any) -> None:
        scorer = evaluations[0].scorer
        reward = SCORE.of(scorer=scorer)
        axes.set_title("Reward against distance")
        axes.set_xlabel("KL to the initial policy (nats per answer)")
        axes.set_ylabel(f"{scorer.capitalize()} reward")
        for evaluation, name, colour in zip(evaluations, labels(evaluations), colours(evaluations), strict=True):
            distance = evaluation.key(KL)
            x, y = evaluation.metrics.get(distance, 0.0), evaluation.get(reward)
            bars = {"xerr": _half_width(evaluation, distance), "yerr": _half_width(evaluation, reward)}
            marker = "X" if evaluation.degenerate else "s" if evaluation.baseline is None else "o"
            axes.errorbar(x, y, **bars, fmt=marker, color=colour, markersize=7, elinewidth=1.6, label=name)
        axes.margins(x=0.1, y=0.12)
        axes.legend(loc="best", handletextpad=0.2)

    return Panel(
        "Reward bought with distance: the further a policy is from the initial one, the more reward it should show "
        "for it. Bars are 95 % intervals.",
        draw,
    )


def length_panel(evaluated: Sequence[Evaluated]) -> Panel:
    """How long answers are: the share still going on after so many tokens."""

    def draw(axes: Any) -> None:
        names = labels([e.evaluation for e in evaluated])
        for policy, name, colour in zip(evaluated, names, colours([e.evaluation for e in evaluated]), strict=True):
            lengths = np.sort([g.num_tokens for g in policy.generations])
            finished = np.sort([g.num_tokens for g in policy.generations if g.finished])
            grid = np.arange(lengths.max() + 1)
            share = 100 * (1 - np.searchsorted(finished, grid, side="right") / len(lengths))
            style = {"linestyle": (0, (4, 3))} if policy.evaluation.baseline is None else {}
            axes.step(grid, share, where="post", color=colour, linewidth=1.8, label=name, **style)
        axes.set_title("Answers still going on")
        axes.set_xlabel("tokens")
        axes.set_ylabel("% of answers")
        axes.set_ylim(-2, 102)
        axes.set_xlim(left=0)
        axes.legend(loc="upper right")

    return Panel("Share of answers not yet ended after so many tokens; what is left at the limit was cut.", draw)


def is_scored(evaluation: Evaluation) -> bool:
    """Whether a scorer has looked at the answers."""
    return not math.isnan(evaluation.get(evaluation.key(SCORE)))


def reward_panels(evaluations: Sequence[Evaluation]) -> list[Panel]:
    """What answers are worth, policy beside policy, as far as anybody has said so."""
    panels = []
    if any(map(is_scored, evaluations)):
        scorer = evaluations[0].scorer
        title = f"{scorer.capitalize()} reward"
        panels.append(_means_panel(evaluations, SCORE.of(scorer=scorer), title, "reward"))
    return [*panels, *([win_panel(evaluations)] if any(map(_is_compared, evaluations)) else [])]


def comparison_panels(evaluated: Sequence[Evaluated]) -> list[Panel]:
    """The pictures of a report on a few policies, the baseline first."""
    evaluations = [policy.evaluation for policy in evaluated]
    panels = reward_panels(evaluations)
    if any(is_scored(e) and e.key(KL) in e.metrics for e in evaluations):
        panels.append(frontier_panel(evaluations))
    return [*panels, length_panel(evaluated)]


# --- a file for each panel


PAPER_INCHES = (3.4, 2.45)  # a column of a two-column page
PAPER_STYLE: dict[Any, Any] = {"font.size": 7.5, "axes.titlesize": 8, "axes.titlepad": 5, "legend.fontsize": 6.5,
                               "lines.markersize": 4, "pdf.fonttype": 42}  # fmt: skip


def write_panels(folder: Path, panels: Sequence[Panel]) -> None:
    """Every panel at the size of a paper's column: as PNG and SVG, named by its place and its title, and as a page of
    `panels.pdf`. Panels of an earlier call are deleted."""
    from matplotlib.backends.backend_pdf import PdfPages

    folder.mkdir(parents=True, exist_ok=True)
    pictures, metadata = set(), {"Creator": None, "Producer": None, "CreationDate": None}
    with replacing(folder / "panels.pdf") as partial, PdfPages(partial, metadata=metadata) as document:
        for index, panel in enumerate(panels, start=1):
            with figure_of(1, 1, PAPER_INCHES, PAPER_STYLE) as (figure, (axes,)):
                panel.draw(axes)
                figure.draw_without_rendering()
                figure.set_layout_engine("none")  # found, and the same for all three
                title = re.sub(r"[^a-z0-9]+", "_", axes.get_title(loc="left").lower()).strip("_")
                png, svg = (folder / f"{index}_{title}.{kind}" for kind in ("png", "svg"))
                save(figure, png, dpi=300, metadata={"Software": None})
                save(figure, svg, metadata={"Date": None, "Creator": None})
                document.savefig(figure)
                pictures |= {png, svg}
    for old in {*folder.glob("[0-9]*_*.png"), *folder.glob("[0-9]*_*.svg")} - pictures:
        old.unlink()
