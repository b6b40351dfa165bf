"""What the numbers of a sweep say: the best KL strength of every series, how sure that is and which strengths are as
good; and, in sentences, what is seen and what does not follow.

All sentences are computed: nothing is claimed that an interval does not carry.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpo_ref.evaluation.results import (
    END_CHOSEN,
    ENDED,
    KL,
    LENGTH,
    SCORE,
    WIN_RATE,
    Evaluation,
    Measure,
    measure_of,
)
from dpo_ref.evaluation.sweep import Cell, axis_of, short_names
from dpo_ref.reports.tables import MISSING, NONE_IS_SOUND, number, percent

# --- the best strength of every series, how sure that is, and which are as good


NOTE = (
    "Intervals are 95 % and hold both kinds of chance: that of the prompts and, with several seeds, that of training "
    "(Student's t). That the best was picked among several is not in them. As good: its difference to the best, "
    "paired by seed where there are several, is not told from zero."
)


@dataclass(frozen=True, slots=True)
class BestBeta:
    """The best sound cell of a series, the 95 % interval of its measure, and what became of the other strengths."""

    series: str
    best: Cell | None  # None where every strength is degenerate
    low: float
    high: float
    as_good: list[float]
    degenerate: list[float]


def quantile(seeds: int) -> float:
    """How many standard errors make a 95 % interval: Student's t for several seeds, the normal's for one."""
    from scipy.stats import norm, t

    return float(t.ppf(0.975, seeds - 1) if seeds > 1 else norm.ppf(0.975))


def interval(cell: Cell, key: str) -> tuple[float, float]:
    """The 95 % interval of a cell's mean: prompts are the same for every seed, so seeds do not shrink their part."""
    values = cell.values(key)
    training = np.var(values, ddof=1) / len(values) if len(values) > 1 else 0.0
    half = quantile(len(values)) * math.sqrt(cell.error(key) ** 2 + training)
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def _by_seed(cell: Cell, key: str) -> dict[int | None, float]:
    return {job.seed: job.evaluation.get(key) for job in cell.jobs if job.evaluation}


def told_apart(first: Cell, second: Cell, key: str) -> bool:
    """Whether two cells' means differ by more than chance: paired over two or more common seeds, else by the standard
    errors of both."""
    mine, theirs = _by_seed(first, key), _by_seed(second, key)
    seeds = [seed for seed in mine if seed in theirs]
    if len(seeds) > 1:
        gaps = np.array([mine[seed] - theirs[seed] for seed in seeds])
        return bool(abs(gaps.mean()) > quantile(len(gaps)) * gaps.std(ddof=1) / math.sqrt(len(gaps)))
    gap = first.evaluation.get(key) - second.evaluation.get(key)
    return abs(gap) > quantile(1) * math.hypot(first.error(key), second.error(key))


def _strength(series: str, members: Sequence[Cell], key: str) -> BestBeta:
    sound = [cell for cell in members if not cell.evaluation.degenerate]
    degenerate = [cell.point for cell in members if cell.evaluation.degenerate and cell.point is not None]
    if not sound:
        return BestBeta(series, None, math.nan, math.nan, [], degenerate)
    best = max(sound, key=lambda cell: cell.evaluation.get(key))
    as_good = [cell.point for cell in sound if cell is not best and not told_apart(best, cell, key)]
    return BestBeta(series, best, *interval(best, key), [point for point in as_good if point is not None], degenerate)


def best_strengths(cells: Sequence[Cell]) -> list[BestBeta]:
    """The best strength of every series, in the series' order, by the sweep's measure."""
    key = measure_of([cell.evaluation for cell in cells]).key
    names = dict.fromkeys(cell.series for cell in cells)
    return [_strength(name, [cell for cell in cells if cell.series == name], key) for name in names]


def _strengths_text(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values) or MISSING


def _entries(strength: BestBeta, name: str, measure: Measure) -> list[str]:
    if strength.best is None:
        return [name, MISSING, MISSING, MISSING, MISSING, MISSING, _strengths_text(strength.degenerate)]
    evaluation, scale = strength.best.evaluation, measure.scale
    value, low, high = (
        number(scale * x, measure.decimals) for x in (evaluation.get(measure.key), strength.low, strength.high)
    )
    return [
        name,
        _strengths_text([strength.best.point] if strength.best.point is not None else []),
        f"{value} [{low}, {high}]",
        number(evaluation.value(LENGTH), 1),
        number(evaluation.value(KL), 2),
        _strengths_text(strength.as_good),
        _strengths_text(strength.degenerate),
    ]


def strength_table(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """The best strength of every series: titles, and a row of texts each."""
    measure, short = measure_of([cell.evaluation for cell in cells]), short_names(cells)
    point = axis_of(cells).sign
    title = measure.title[0].upper() + measure.title[1:]
    names = ["Series", f"Best {point}", title, "Tokens", "KL to initial", f"As good: {point}", f"Degenerate: {point}"]
    return names, [_entries(strength, short[strength.series], measure) for strength in best_strengths(cells)]


# --- in sentences


def findings(cells: Sequence[Cell], initial: Evaluation | None) -> list[str]:
    """What is seen: who gained most over the initial policy, and what the smallest and the largest KL strength of one
    objective did; then what does not follow. Empty where nothing is compared with the initial policy."""
    compared = [cell for cell in cells if initial and not math.isnan(cell.evaluation.get(cell.evaluation.key(SCORE)))]
    if initial is None or not compared:
        return []
    return [_gains(compared, initial), *_ends_of_the_grid(compared, initial), _does_not_follow(compared)]


def _gains(cells: Sequence[Cell], initial: Evaluation) -> str:
    sound = [cell for cell in cells if not cell.evaluation.degenerate]
    if not sound:
        return NONE_IS_SOUND
    measure = measure_of([cell.evaluation for cell in cells])
    best = max(sound, key=lambda cell: cell.evaluation.get(measure.key))
    low, high = gain(best, initial)[1:] if measure.key != best.evaluation.key(WIN_RATE) else _above_half(best)
    label, numbers = _label(best, cells), _gain_in_words(best, initial)
    other = "the initial policy" if initial.name == "initial" else initial.name
    if low > 0:
        seen = f"{label} gained most over {other}: {numbers}"
    elif high < 0:
        seen = f"{label} comes first, and loses to {other}: {numbers}"
    else:
        seen = f"{label} comes first, and is not told from {other}: {numbers}"
    rank = _rank(best, sound, cells, measure.key)
    return f"{seen} (95 % intervals){f'; {rank}' if rank else ''}."


def gain(cell: Cell, initial: Evaluation) -> tuple[float, float, float]:
    """How much more reward than the initial policy, and the ends of its 95 % interval, as if the answers of both were
    not to the same prompts: a little wider than need be."""
    key = cell.evaluation.key(SCORE)
    mean, (low, high) = cell.evaluation.get(key) - initial.get(key), interval(cell, key)
    half = math.hypot((high - low) / 2, quantile(1) * initial.get(f"{key}_se"))
    return mean, mean - half, mean + half


def _above_half(cell: Cell) -> tuple[float, float]:
    """The interval of the win rate, less one half."""
    key = cell.evaluation.key(WIN_RATE)
    return cell.evaluation.get(f"{key}_low") - 0.5, cell.evaluation.get(f"{key}_high") - 0.5


def _gain_in_words(cell: Cell, initial: Evaluation) -> str:
    evaluation = cell.evaluation
    mean, low, high = (number(value, SCORE.decimals, signed=True) for value in gain(cell, initial))
    words = [f"{evaluation.scorer} {mean} [{low}, {high}]"]
    key = evaluation.key(WIN_RATE)
    if key in evaluation.metrics:
        low, high = (100 * evaluation.get(f"{key}{end}") for end in ("_low", "_high"))
        words.append(f"win rate {percent(evaluation.get(key))} [{low:.1f}, {high:.1f}]")
    return ", ".join(words)


def _label(cell: Cell, cells: Sequence[Cell]) -> str:
    """What tells a cell from the others of its sweep."""
    short = short_names(cells)
    series = [short[cell.series]] if len(short) > 1 or cell.point is None else []
    sign = f"{cell.axis.sign} =" if cell.axis.is_strength else cell.axis.sign
    point = [] if cell.point is None else [f"{sign} {cell.point:g}"]
    return ", ".join([*series, *point])


FEW = 3  # that are named in a sentence


def _rank(best: Cell, sound: Sequence[Cell], cells: Sequence[Cell], key: str) -> str:
    """Which others are as good, and where among the strengths that were tried the best one stands."""
    as_good = [_label(cell, cells) for cell in sound if cell is not best and not told_apart(best, cell, key)]
    if as_good:
        named = " and ".join(as_good) if len(as_good) <= FEW else f"{len(as_good)} others"
        return f"{named} {'is' if len(as_good) == 1 else 'are'} not told apart from it"
    points = [cell.point for cell in cells if cell.series == best.series and cell.point is not None]
    if len(points) < 3 or best.point is None:
        return ""
    inside = min(points) < best.point < max(points)
    return "the best lies inside the grid" if inside else "it is at the end of the grid, and the best may lie beyond"


def _ends_of_the_grid(cells: Sequence[Cell], initial: Evaluation) -> list[str]:
    """What the smallest and the largest strength did, where several of one objective were tried: those of different
    objectives are in different units."""
    swept = [cell for cell in cells if cell.beta is not None and cell.axis.is_strength]
    if len({cell.beta for cell in swept}) < 2 or len({cell.evaluation.objective for cell in swept}) > 1:
        return []
    loosest, tightest = (pick(swept, key=lambda cell: cell.beta or 0.0) for pick in (min, max))
    names = [f"{cell.beta:g}{_of_series(cell, swept)}" for cell in (loosest, tightest)]
    small = ", ".join([_length(loosest, initial), *_end(loosest, initial), *_distance(loosest)])
    large = ", ".join([_length(tightest, initial), *_distance(tightest)])
    small, large = (
        f"{words}, and the policy is {_soundness(cell)}" for words, cell in ((small, loosest), (large, tightest))
    )
    return [f"At the smallest β, {names[0]}, {small}; at the largest, {names[1]}, {large}."]


def _of_series(cell: Cell, cells: Sequence[Cell]) -> str:
    short = short_names(cells)
    return f" ({short[cell.series]})" if len(short) > 1 else ""


def _length(cell: Cell, initial: Evaluation) -> str:
    """What became of it, as far as the 95 % interval says."""
    mean, (low, high) = cell.evaluation.value(LENGTH), interval(cell, LENGTH.key)
    before = initial.value(LENGTH)
    half = math.hypot((high - low) / 2, quantile(1) * initial.get(f"{LENGTH.key}_se"))
    words = "grow" if mean > before + half else "shrink" if mean < before - half else "keep their length"
    return f"answers {words} ({number(before, 1)} to {number(mean, 1)} tokens)"


def _end(cell: Cell, initial: Evaluation) -> list[str]:
    never = [1 - evaluation.value(ENDED) for evaluation in (cell.evaluation, initial)]
    ends = f"{percent(never[0])} of them never end (initially {percent(never[1])})"
    parts = [ends if any(never) else "all of them still end"]
    if END_CHOSEN.key in cell.evaluation.metrics:
        moved = number(cell.evaluation.value(END_CHOSEN), 2, signed=True)
        parts.append(f"the end token's log-prob moved by {moved}")
    return parts


def _distance(cell: Cell) -> list[str]:
    if cell.evaluation.key(KL) not in cell.evaluation.metrics:
        return []
    return [f"KL to the initial policy is {number(cell.evaluation.value(KL), 1)} nats"]


def _soundness(cell: Cell) -> str:
    reasons = cell.evaluation.degenerate
    return f"degenerate: {', '.join(reasons)}" if reasons else "not degenerate"


def _does_not_follow(cells: Sequence[Cell]) -> str:
    """What a reader may be tempted to conclude."""
    seeds = max(cell.evaluation.num_seeds for cell in cells)
    again, cover = "another seed of training", "prompts, not training"
    if seeds > 1:
        again, cover = "other data", f"prompts and {seeds} seeds"
    world = ", found in a toy world whose judge is known," if cells[0].evaluation.scorer == "gold" else ""
    claims = [f"that {again} would give the same (intervals cover {cover})", "that what is not told apart is ranked"]
    if cells[0].beta is not None:
        claims.append(f"that these {axis_of(cells).values}{world} suit another model or other data")
    return f"What does not follow: {', '.join(claims[:-1])}, or {claims[-1]}."
