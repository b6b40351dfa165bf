"""The table of win rates, for the terminal and as CSV, what it says in a sentence, and its pictures."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_ref.evaluation.statistics.bradley_terry import BradleyTerry
from dpo_ref.evaluation.winrates import ModelWinRate, Versus, WinRates
from dpo_ref.files.writing import as_csv
from dpo_ref.reports.plots import INITIAL, LONGEST_LABEL, SERIES, Panel
from dpo_ref.reports.tables import MISSING, number
from dpo_ref.tracking.terminal import words

CONTROLLED, ADJUSTED = "length_controlled", "length_adjusted"


@dataclass(frozen=True, slots=True)
class WinRateColumn:
    """A column: its title, what its numbers mean, and a model's entry."""

    title: str
    note: str
    text: Callable[[ModelWinRate], str]


def _points(value: float) -> str:
    return number(100 * value, 1)


def _plus_minus(rate: ModelWinRate) -> str:
    mean, error = _points(rate.get("win_rate")), _points(rate.get("win_rate_se"))
    return mean if MISSING in (mean, error) else f"{mean}±{error}"


def interval(rate: ModelWinRate, key: str) -> str:
    """A rate in percent with its 95 % interval."""
    mean, low, high = (_points(rate.get(f"{key}{part}")) for part in ("", "_low", "_high"))
    return mean if MISSING in (mean, low) else f"{mean} [{low},{high}]"


def equal_length_key(rates: Sequence[ModelWinRate]) -> str:
    """Which estimate for equal lengths a table shows."""
    return CONTROLLED if any(CONTROLLED in rate.metrics for rate in rates) else ADJUSTED


def columns(rates: Sequence[ModelWinRate]) -> list[WinRateColumn]:
    """The columns of a table; baseline and judge only where they differ."""
    key = equal_length_key(rates)
    note = {
        CONTROLLED: "length-controlled AlpacaEval 2 win rate, 95 % interval of refits",
        ADJUSTED: "at equal lengths, by our own regression: not AlpacaEval's length-controlled win rate",
    }
    optional = [
        WinRateColumn("against", "the baseline", lambda rate: rate.baseline),
        WinRateColumn("judge", "who judged", lambda rate: rate.judge),
    ]
    differing = [len({rate.baseline for rate in rates}) > 1, len({rate.judge for rate in rates}) > 1]
    return [
        *(column for column, differs in zip(optional, differing, strict=True) if differs),
        WinRateColumn("win rate", "%, ± standard error clustered by prompt", _plus_minus),
        WinRateColumn(
            "discrete", "%, preferences rounded to win, tie, loss", lambda r: _points(r.get("discrete_win_rate"))
        ),
        WinRateColumn({CONTROLLED: "LC", ADJUSTED: "length-adj."}[key], note[key], lambda rate: interval(rate, key)),
        WinRateColumn("chars", "mean length of the answers", lambda rate: number(rate.get("length"), 0)),
        WinRateColumn("n", "judged pairs", lambda rate: number(rate.get("num_compared"), 0)),
        WinRateColumn("missing", "pairs without a preference", lambda rate: number(rate.get("num_missing"), 0)),
    ]


def _table(head: str, names: Sequence[str], titles: Sequence[str], rows: Sequence[Sequence[str]], notes: str) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False, caption=words(notes),
        caption_justify="left",
    )  # fmt: skip
    table.add_column(words(head), overflow="fold", min_width=14)
    for title in titles:
        table.add_column(words(title), justify="right", overflow="fold")
    for name, row in zip(names, rows, strict=True):
        table.add_row(words(name), *map(words, row))
    return table


def rates_table(win_rates: WinRates) -> Any:
    """A rich table with a row per model, what its columns mean below."""
    shown = columns(win_rates.rates)
    notes = "\n".join(f"{column.title}: {column.note}" for column in shown)
    rows = [[column.text(rate) for column in shown] for rate in win_rates.rates]
    return _table("model", [rate.model for rate in win_rates.rates], [c.title for c in shown], rows, notes)


def strengths_note(fit: BradleyTerry) -> str:
    """What strengths are relative to, and which of them the preferences leave open."""
    against = f"relative to {fit.anchor}" if fit.anchor else "relative to their mean"
    if fit.finite:
        return f"log-odds {against}; 95 % interval over prompts"
    parts = " > ".join(" and ".join(group) for group in fit.groups)
    return (
        f"log-odds {against}. Those on the right never won anything from those on the left: {parts}. How far they lie "
        f"apart is set by a ridge of {fit.ridge:g} alone"
    )


def strengths_table(judge: str, fit: BradleyTerry) -> Any:
    """A rich table of Bradley–Terry strengths."""
    rows = [[number(s.value, 2, signed=True), f"[{number(s.low, 2)},{number(s.high, 2)}]"] for s in fit.strengths]
    names = [s.model for s in fit.strengths]
    return _table(f"Bradley–Terry, judged by {judge}", names, ["strength", "interval"], rows, strengths_note(fit))


def headline(win_rates: WinRates) -> str:
    """The main finding: whether the best model beats the next one, or what the only one comes to."""
    best = win_rates.rates[0]
    if math.isnan(best.get("win_rate")):
        return "no pair has a preference"
    pair = next((pair for pair in win_rates.versus if _is_top(pair, win_rates.rates)), None)
    if pair is None:
        return f"{best.model} wins {interval(best, 'win_rate')} % of comparisons with {best.baseline}"
    low, high = (number(100 * value, 1, signed=True) for value in (pair.difference.low, pair.difference.high))
    points = f"{number(100 * pair.difference.mean, 1, signed=True)} points [{low}, {high}] on the same prompts"
    if pair.difference.low > 0:
        return f"{pair.model} is better than {pair.other} against {pair.baseline}: {points}"
    return f"{pair.model} cannot be told from {pair.other} against {pair.baseline}: {points}"


def _is_top(pair: Versus, rates: Sequence[ModelWinRate]) -> bool:
    """Whether it is between the two best win rates."""
    first, second = rates[:2]
    return (pair.model, pair.other) == (first.model, second.model) and pair.baseline == first.baseline


def summary_metrics(win_rates: WinRates) -> dict[str, float]:
    """All numbers under flat names, for a tracker; those that could not be measured are left out."""
    return {
        f"{rate.model}/{rate.baseline}/{key}": value
        for rate in win_rates.rates
        for key, value in rate.metrics.items()
        if not math.isnan(value)
    }


def csv_text(win_rates: WinRates) -> str:
    """A row per model with every metric, and its strength where there is one."""
    strengths = {
        (judge, s.model): s for judge, parts in win_rates.strengths.items() for part in parts for s in part.strengths
    }
    names = list(dict.fromkeys(key for rate in win_rates.rates for key in rate.metrics))
    rows: list[list[Any]] = [["model", "baseline", "judge", *names, "strength", "strength_low", "strength_high"]]
    for rate in win_rates.rates:
        strength = strengths.get((rate.judge, rate.model))
        values = [rate.get(name) for name in names]
        values += [strength.value, strength.low, strength.high] if strength else [math.nan] * 3
        rows.append([rate.model, rate.baseline, rate.judge, *("" if math.isnan(v) else repr(v) for v in values)])
    return as_csv(rows)


# --- pictures: how often each model wins, what length does to it, and Bradley–Terry strengths


MOST_ROWS = 14  # more would not be legible
RATE, LONGER, SHORTER = SERIES[0], SERIES[1], SERIES[2]


def _short(name: str) -> str:
    half = LONGEST_LABEL // 2
    return name if len(name) <= LONGEST_LABEL else f"{name[:half]}…{name[-half:]}"


def _rows(axes: Any, names: Sequence[str], title: str) -> None:
    """One row per model, the best on top."""
    axes.set_title(title)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_yticks(range(len(names)), [_short(name) for name in names])
    axes.tick_params(axis="y", length=0, labelsize=9 if len(names) < 8 else 7)
    axes.grid(axis="y", visible=False)


def _bar(axes: Any, values: Sequence[float], row: float, colour: str, **marker: Any) -> None:
    """A mean and the ends of its interval."""
    mean, low, high = values
    axes.plot([low, high], [row, row], color=colour, linewidth=2.0, solid_capstyle="round", alpha=0.55)
    axes.plot([mean], [row], color=colour, linestyle="none", **marker)


def _names(rates: Sequence[ModelWinRate]) -> list[str]:
    several = len({rate.baseline for rate in rates}) > 1
    return [f"{rate.model} / {rate.baseline}" if several else rate.model for rate in rates]


def _percentages(rate: ModelWinRate, key: str) -> list[float]:
    return [100 * rate.get(f"{key}{part}") for part in ("", "_low", "_high")]


def rates_panel(rates: Sequence[ModelWinRate]) -> Panel:
    """Win rates and estimates for equal lengths, with their intervals."""
    key = equal_length_key(rates)
    label = "length-controlled (AlpacaEval 2)" if key == CONTROLLED else "length-adjusted"

    def draw(axes: Any) -> None:
        _rows(axes, _names(rates), "Win rate")
        for row, rate in enumerate(rates):
            names = {"label": "as judged"} if row == 0 else {}
            _bar(axes, _percentages(rate, "win_rate"), row - 0.14, RATE, marker="o", markersize=6, **names)
            names = {"label": label} if row == 0 else {}
            _bar(axes, _percentages(rate, key), row + 0.14, LONGER, marker="D", markersize=5, **names)
        axes.axvline(50, color=INITIAL, linestyle=(0, (4, 3)), linewidth=1.0)
        axes.set_xlabel("% of comparisons, ties half")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, handletextpad=0.2)

    return Panel(f"How often the judge prefers the model, as judged and {label}; bars are 95 % intervals.", draw)


def length_panel(rates: Sequence[ModelWinRate]) -> Panel:
    """What becomes of the win rate where the model's answer is the longer one, and the shorter one."""

    def draw(axes: Any) -> None:
        _rows(axes, _names(rates), "Longer and shorter answers")
        for row, rate in enumerate(rates):
            ends = [100 * rate.get(f"win_rate_{side}") for side in ("longer", "shorter")]
            axes.plot(ends, [row, row], color=INITIAL, linewidth=1.2, alpha=0.6)
            for side, end, colour in zip(("longer", "shorter"), ends, (LONGER, SHORTER), strict=True):
                names = {"label": side} if row == 0 else {}
                axes.plot([end], [row], marker="o", markersize=6, color=colour, linestyle="none", **names)
        axes.set_xlabel("% won, ties half")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, handletextpad=0.2)

    return Panel("Win rate among prompts whose answer is longer than the baseline's, and shorter.", draw)


def strengths_panel(judge: str, fit: BradleyTerry) -> Panel:
    """Bradley–Terry strengths with their intervals."""
    shown = fit.strengths[:MOST_ROWS]

    def draw(axes: Any) -> None:
        _rows(axes, [strength.model for strength in shown], "Bradley–Terry strength")
        for row, strength in enumerate(shown):
            colour = INITIAL if strength.model == fit.anchor else RATE
            _bar(axes, [strength.value, strength.low, strength.high], float(row), colour, marker="o", markersize=6)
        axes.axvline(0, color=INITIAL, linestyle=(0, (4, 3)), linewidth=1.0)
        axes.set_xlabel(f"log-odds against {_short(fit.anchor or 'their mean')}")

    return Panel(f"Strengths from all comparisons by {judge}; bars are 95 % intervals over prompts.", draw)


def panels(win_rates: WinRates) -> list[Panel]:
    """The pictures of `winrates.png`; of many models the best."""
    rates = [rate for rate in win_rates.rates if not math.isnan(rate.get("win_rate"))][:MOST_ROWS]
    if not rates:
        return []
    both = [r for r in rates if not any(math.isnan(r.get(f"win_rate_{side}")) for side in ("longer", "shorter"))]
    strengths = [strengths_panel(judge, part) for judge, parts in win_rates.strengths.items() for part in parts]
    return [rates_panel(rates), *([length_panel(both)] if both else []), *strengths]
