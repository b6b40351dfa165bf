"""What the pictures of studies share. Colours are those of the project's reports, and every series has a marker of its
own, so that it is told apart without them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dpo_ref.reports.plots import INITIAL, SERIES
from studies.intervals import Interval

MARKERS = "osD^vP*X<"  # one more than there are colours, so that no two of the first 72 look alike


def look(index: int) -> dict[str, Any]:
    """Colour and marker of a series."""
    return {"color": SERIES[index % len(SERIES)], "marker": MARKERS[index % len(MARKERS)]}


def bars(intervals: Sequence[Interval]) -> tuple[np.ndarray, np.ndarray]:
    """Means, and how far their intervals go below and above; nothing where there is no interval."""
    means, lows, highs = np.array(intervals).T
    return means, np.nan_to_num(np.stack([means - lows, highs - means]))


def line(axes: Any, x: Sequence[float], intervals: Sequence[Interval], index: int, label: str) -> None:
    """A line of means with their intervals."""
    means, lengths = bars(intervals)
    axes.errorbar(x, means, yerr=lengths, linewidth=1.6, capsize=3, label=label, **look(index))


def strength_axis(axes: Any, strengths: Sequence[str]) -> None:
    """A logarithmic axis of KL strengths with these values."""
    axes.set_xscale("log")
    axes.set_xticks([float(value) for value in strengths], strengths)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("β (larger: closer to the reference)")


def kl_axis(axes: Any, kls: Sequence[float]) -> None:
    """A logarithmic axis of nats that holds these."""
    axes.set_xscale("log")
    low, high = min(kls) / 1.3, max(kls) * 1.3
    ticks = [value for value in (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100) if low <= value <= high]
    axes.set_xlim(low, high)
    axes.set_xticks(ticks, [f"{value:g}" for value in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("KL to the initial policy, nats an answer")


def level(axes: Any, value: float, label: str = "") -> None:
    """A dashed line to compare with."""
    axes.axhline(value, color=INITIAL, linestyle=(0, (4, 3)), linewidth=1.4, label=label or None)


def forest(axes: Any, names: Sequence[str], intervals: Sequence[Interval], at: float | None = None) -> None:
    """A row for each name, the first on top, with its interval; a dashed line at a value they are compared with."""
    means, lengths = bars(intervals)
    for row, (mean, length) in enumerate(zip(means, lengths.T, strict=True)):
        axes.errorbar([mean], [row], xerr=length[:, None], linewidth=2.0, capsize=3, **look(row))
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    if at is not None:
        axes.axvline(at, color=INITIAL, linestyle=(0, (4, 3)), linewidth=1.4)
