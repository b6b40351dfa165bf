"""The evaluations of one run over its steps: as a picture, and in a line of the terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_ref.evaluation.results import DEGENERATE, END_CHOSEN, END_OWN, ENDED, KL, LENGTH, SCORE, SECONDS, WIN_RATE
from dpo_ref.reports.plots import BROKEN, INITIAL, SERIES, Panel, write_png
from dpo_ref.tracking import run_record

PREFIX = "evaluation/"
WON, DISTANCE = WIN_RATE.of(baseline="initial"), KL.of(model="initial")
PICTURE = "training.png"  # in the run's folder
BAND = "The band is the 95 % interval over prompts; a cross marks a policy that is degenerate."


@dataclass(frozen=True, slots=True)
class Line:
    """A metric over steps: its key, what a legend calls it, and the factor of its unit."""

    key: str
    label: str
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Curve:
    """One panel: a title, what the axis shows, its lines, where the initial policy is, if one number says so, and the
    axis's bounds, if it has any."""

    title: str
    axis: str
    lines: tuple[Line, ...]
    level: float | None = None
    bounds: tuple[float, float] | None = None


CURVES = (
    Curve(
        "Win rate against the initial policy",
        "% of comparisons, ties half",
        (Line(WON, "", 100.0),),
        50.0,
    ),
    Curve("Length", "tokens per answer", (Line(LENGTH.key, ""),)),
    Curve("Answers that end", "% of answers", (Line(ENDED.key, "", 100.0),), bounds=(0.0, 103.0)),
    Curve("KL to the initial policy", "nats per answer", (Line(DISTANCE, ""),), 0.0),
    Curve(
        "Shift of the end token",
        "log-ratio to the initial policy, nats",
        (Line(END_CHOSEN.key, "held-out chosen answers"), Line(END_OWN.key, "own answers that end")),
        0.0,
    ),
)


def evaluations(path: Path) -> list[dict[str, float]]:
    """What `metrics.jsonl` at `path` has of evaluations in training, without prefix, in the order of their steps."""
    by_step: dict[int, dict[str, float]] = {}
    for row in run_record.read(path):
        metrics = {key.removeprefix(PREFIX): value for key, value in row.items() if key.startswith(PREFIX)}
        if metrics:
            by_step[row["step"]] = {"step": float(row["step"]), **metrics}
    return [by_step[step] for step in sorted(by_step)]


def _interval(row: Mapping[str, float], key: str) -> tuple[float, float]:
    """The 95 % interval, bootstrapped where there is one, else from the standard error; the value alone without."""
    half = 1.96 * row.get(f"{key}_se", 0.0)
    return row.get(f"{key}_low", row[key] - half), row.get(f"{key}_high", row[key] + half)


def _score(rows: Sequence[Mapping[str, float]]) -> list[Curve]:
    """The scorer's mean, under the scorer's name."""
    scorers = _scorers(rows[0]).items()
    return [Curve(f"{name.capitalize()} reward", "mean over answers", (Line(key, ""),)) for key, name in scorers]


def _scorers(metrics: Mapping[str, float]) -> dict[str, str]:
    """The keys of mean scores, and whose they are."""
    nameless = SCORE.of(scorer="")
    return {key: key.removesuffix(nameless) for key in metrics if key.endswith(nameless)}


def _draw_line(axes: Any, rows: Sequence[Mapping[str, float]], line: Line, colour: str) -> None:
    points = [row for row in rows if line.key in row]
    steps = [row["step"] for row in points]
    low, high = zip(*(_interval(row, line.key) for row in points), strict=True)
    axes.fill_between(
        steps, [line.scale * at for at in low], [line.scale * at for at in high], color=colour, alpha=0.18, linewidth=0
    )
    axes.plot(
        steps, [line.scale * row[line.key] for row in points], "o-", color=colour, markersize=4, label=line.label
    )
    broken = [(row["step"], line.scale * row[line.key]) for row in points if row[DEGENERATE.key]]
    axes.plot([x for x, _ in broken], [y for _, y in broken], "X", color=BROKEN, markersize=9, zorder=4)


def _panel(curve: Curve, rows: Sequence[Mapping[str, float]]) -> Panel:
    lines = [line for line in curve.lines if any(line.key in row for row in rows)]

    def draw(axes: Any) -> None:
        axes.set_title(curve.title)
        axes.set_xlabel("optimiser steps")
        axes.set_ylabel(curve.axis)
        if curve.level is not None:
            axes.axhline(curve.level, color=INITIAL, linestyle=(0, (4, 3)), linewidth=1.2)
        for line, colour in zip(lines, SERIES, strict=False):
            _draw_line(axes, rows, line, colour)
        if curve.bounds is not None:
            axes.set_ylim(*curve.bounds)
        if len(lines) > 1:
            axes.legend(loc="best")

    return Panel(f"{curve.title}. {BAND}", draw)


def training_panels(rows: Sequence[Mapping[str, float]]) -> list[Panel]:
    """One picture for each thing that was measured."""
    every = [*_score(rows), *CURVES]
    curves = [curve for curve in every if any(line.key in row for line in curve.lines for row in rows)]
    return [_panel(curve, rows) for curve in curves]


def write_picture(directory: Path) -> Path:
    """Draw the evaluations in a run's folder into its `training.png`."""
    path = directory / PICTURE
    write_png(path, training_panels(evaluations(directory / "metrics.jsonl")))
    return path


def in_words(rows: Sequence[Mapping[str, float]]) -> str:
    """From the first evaluation to the last, in one line."""
    first, last = rows[0], rows[-1]
    parts = [f"length {first[LENGTH.key]:.1f} -> {last[LENGTH.key]:.1f} tokens"]
    if WON in last:
        low, high = (100 * bound for bound in _interval(last, WON))
        parts.insert(0, f"win rate {100 * last[WON]:.1f} % [{low:.1f}, {high:.1f}]")
    parts.append(f"KL {last[DISTANCE]:.2f} nats")
    if END_CHOSEN.key in last:
        parts.append(f"end token {last[END_CHOSEN.key]:+.2f}")
    seconds = sum(row[SECONDS.key] for row in rows)
    return f"{', '.join(parts)}; {len(rows)} evaluations in {seconds:.0f} s"


def in_brief(metrics: Mapping[str, float]) -> str:
    """One evaluation beside a bar: the mean score where there is one, tokens of an answer, nats to the initial
    policy."""
    parts = [f"{name} {metrics[key]:.3f}" for key, name in _scorers(metrics).items()]
    return "  ".join([*parts, f"{metrics[LENGTH.key]:.1f} tokens", f"KL {metrics[DISTANCE]:.2f}"])
