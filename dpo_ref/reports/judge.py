"""The part of a report that is about the judge: what it preferred, how far it can be trusted, where it contradicts
itself."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpo_ref.evaluation import results
from dpo_ref.evaluation.judging.judge import Judgment, Opinion, consistent, read_judgments, winner
from dpo_ref.evaluation.results import read_record
from dpo_ref.evaluation.stages import JUDGE_AGAIN, JUDGMENTS, RECORD
from dpo_ref.reports import page
from dpo_ref.reports.plots import BROKEN, INITIAL, SERIES, Panel
from dpo_ref.reports.tables import percent

SHOWN = 5  # examples of each kind
BOTH, EITHER, NEITHER = "wins in both orders", "tie in both orders", "loses in both orders"
FIRST, SECOND, HALF = "shown first, wins", "shown second, wins", "tie in one order only"
ONE = {1: "wins", 0: "tie", -1: "loses"}  # where each pair was asked about once
SAME, NONE = "identical answers", "no verdict"
SHARES = (
    results.CONSISTENCY,
    results.FIRST_POSITION,
    results.JUDGE_TIES,
    results.WINRATE_LONGER,
    results.WINRATE_SHORTER,
)
COUNTS = (
    results.IDENTICAL,
    results.PARSE_FAILURES,
    results.REFUSALS,
    results.PROMPT_TOKENS,
    results.COMPLETION_TOKENS,
)
HUES = {BOTH: SERIES[0], FIRST: BROKEN, SECOND: BROKEN, HALF: BROKEN, ONE[1]: SERIES[0]}


def judge_section(folder: Path) -> str:
    """What lies in `folder` of a judge, as HTML; empty where nothing was judged."""
    if not (folder / RECORD).is_file():
        return ""
    record, judgments = read_record(folder / RECORD, JUDGE_AGAIN), read_judgments(folder / JUDGMENTS)
    metrics: dict[str, float] = record["metrics"]
    return "\n".join(
        [
            "<h2>What the judge says</h2>",
            f"<p>{page.text(_sentence(record['judge'], record['baseline'], metrics))}</p>",
            page.pictures(panels(judgments)),
            page.definitions(_facts(record["judge"], metrics)),
            _examples("The two orders disagree", [j for j in judgments if _contradicts(j)], record["baseline"]),
            _examples("No verdict", [j for j in judgments if j.preference is None], record["baseline"]),
        ]
    )


def _sentence(judge: Mapping[str, Any], baseline: str, metrics: Mapping[str, float]) -> str:
    key, num_pairs = results.JUDGE_WIN_RATE.of(baseline=baseline), metrics[results.NUM_JUDGE_PAIRS.key]
    name = f"{judge['model']} (template {judge['template']})"
    if key not in metrics:
        return f"{name} gave no verdict on any of {num_pairs:.0f} pairs."
    interval = f"{100 * metrics[f'{key}_low']:.1f}–{100 * metrics[f'{key}_high']:.1f}\u00a0%"
    count = f"{metrics[results.NUM_JUDGED.key]:.0f} of {num_pairs:.0f} pairs with a verdict"
    won = f"{percent(metrics[key])} of the wins (95 % interval {interval})"
    return f"Against {baseline}, {name} gives the policy {won}, over {count}."


def _facts(judge: Mapping[str, Any], metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    facts = [("judge", f"{judge['name']}, {judge['model']}"), ("preferences from", judge["preferences"])]
    facts += [("template", f"{judge['template']} {judge['template_digest'][:12]}"), ("orders", judge["orders"])]
    facts += [(share.title, percent(metrics[share.key])) for share in SHARES if share.key in metrics]
    facts += [(count.title, f"{metrics[count.key]:,.0f}") for count in COUNTS]
    cost = results.COST
    return facts + ([(cost.title, f"{metrics[cost.key]:.4g}")] if cost.key in metrics else [])


def _contradicts(judgment: Judgment) -> bool:
    return len(judgment.opinions) == 2 and judgment.preference is not None and not consistent(judgment)


def outcome(judgment: Judgment) -> str:
    """What both orders come to for the policy, in words."""
    if judgment.pair.identical:
        return SAME
    if judgment.preference is None:
        return NONE
    wins = {opinion.policy_first: winner(opinion.win) for opinion in judgment.opinions if opinion.win is not None}
    if len(wins) == 1:
        return ONE[next(iter(wins.values()))]
    if wins[True] == wins[False]:
        return {1: BOTH, 0: EITHER, -1: NEITHER}[wins[True]]
    if 0 in wins.values():
        return HALF
    return FIRST if wins[True] > wins[False] else SECOND


def panels(judgments: Sequence[Judgment]) -> list[Panel]:
    """How pairs came out in both orders, and the preference against the difference in length."""
    return [_outcomes(judgments), _lengths(judgments)]


def _outcomes(judgments: Sequence[Judgment]) -> Panel:
    counts = Counter(map(outcome, judgments))
    order = [BOTH, ONE[1], FIRST, SECOND, HALF, EITHER, ONE[0], NEITHER, ONE[-1], SAME, NONE]
    names = [name for name in order if counts[name]]

    def draw(axes: Any) -> None:
        bars = axes.barh(names, [counts[name] for name in names], color=[HUES.get(name, INITIAL) for name in names])
        axes.bar_label(bars, padding=3)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.12)
        axes.set_title("The policy's answer")
        axes.set_xlabel("pairs")

    return Panel("Every pair by its verdicts in both orders; red where the order of the answers decided.", draw)


def _lengths(judgments: Sequence[Judgment]) -> Panel:
    verdicts = [j for j in judgments if j.preference is not None]
    differences = np.array([len(j.pair.output) - len(j.pair.baseline_output) for j in verdicts], dtype=np.float64)
    preferences = np.array([j.preference for j in verdicts], dtype=np.float64)

    def draw(axes: Any) -> None:
        axes.plot(differences, 100 * preferences, ".", color=SERIES[0], alpha=0.35, markersize=6)
        order = np.argsort(differences, kind="stable")
        groups = [part for part in np.array_split(order, min(6, max(1, len(order) // 10))) if len(part)]
        middles, means = ([float(v[part].mean()) for part in groups] for v in (differences, 100 * preferences))
        axes.plot(middles, means, "-o", color=SERIES[1], linewidth=1.8, markersize=5, label="means of equal shares")
        axes.axhline(50, color=INITIAL, linestyle=(0, (4, 3)), linewidth=1.2)
        axes.set_title("Preference and length")
        axes.set_xlabel("characters of the policy's answer − the baseline's")
        axes.set_ylabel("preference for the policy, %")
        axes.set_ylim(-4, 104)
        axes.legend(loc="best")

    return Panel("A dot for each pair; a rising line says that longer answers are preferred.", draw)


def _examples(title: str, judgments: Sequence[Judgment], baseline: str) -> str:
    if not judgments:
        return ""
    count = f"{SHOWN} of {len(judgments)}" if len(judgments) > SHOWN else str(len(judgments))
    examples = "".join(_example(judgment, baseline) for judgment in judgments[:SHOWN])
    return (
        f'<details class="samples"><summary>{page.text(title)}<small>{count}</small></summary>'
        f'<div class="comparisons">{examples}</div></details>'
    )


def _example(judgment: Judgment, baseline: str) -> str:
    turns = "".join(
        f'<p class="turn {page.text(turn["role"])}"><span>{page.text(turn["role"])}</span>'
        f"{page.text(turn['content'])}</p>"
        for turn in judgment.pair.prompt
    )
    answers = _answer(baseline, judgment.pair.baseline_output) + _answer("policy", judgment.pair.output)
    opinions = "".join(
        f'<p class="turn"><span>judge</span>{page.text(_opinion_text(o, baseline))}</p>' for o in judgment.opinions
    )
    return (
        f'<article class="sample"><div class="prompt">{turns}</div><div class="answers">{answers}</div>'
        f'<div class="prompt">{opinions}</div></article>'
    )


def _answer(name: str, output: str) -> str:
    return f'<div class="answer"><header><b>{page.text(name)}</b></header><p>{page.text(output)}</p></div>'


def _opinion_text(opinion: Opinion, baseline: str) -> str:
    first = "policy" if opinion.policy_first else baseline
    share = "no verdict" if opinion.win is None else f"{percent(opinion.win)} for the policy"
    return f"{first} shown first: {share}\n{opinion.refusal or opinion.answer}"
