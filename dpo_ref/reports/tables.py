"""The columns of every table, how their numbers are written (one list for terminal, page and picture), the table of
results in a terminal, and what the numbers say, in sentences.
"""

import html
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_ref.evaluation.results import (
    ACCURACY,
    END_CHOSEN,
    ENDED,
    JUDGE_WIN_RATE,
    KL,
    LENGTH,
    LENGTH_BASELINE,
    METRICS,
    NUM_JUDGE_PAIRS,
    NUM_JUDGED,
    SCORE,
    WIN_RATE,
    Evaluation,
    Heading,
    Metric,
    Style,
)
from dpo_ref.tracking.terminal import in_one_line, visible, words

MISSING = "–"


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its title, what its numbers mean, and a policy's entry."""

    title: str
    note: str
    text: Callable[[Evaluation], str]


def number(value: float, decimals: int, signed: bool = False) -> str:
    """A number with a real minus sign; a dash for what was not measured."""
    if math.isnan(value):
        return MISSING
    return f"{value:{'+' if signed else ''}.{decimals}f}".replace("-", "−")


def percent(value: float) -> str:
    """A share as a percentage with one decimal; the space does not break."""
    return MISSING if math.isnan(value) else f"{100 * value:.1f}\u00a0%"


def plus_minus(evaluation: Evaluation, key: str, decimals: int, signed: bool = False) -> str:
    """A mean and its standard error."""
    mean, error = number(evaluation.get(key), decimals, signed), number(evaluation.get(f"{key}_se"), decimals)
    return mean if MISSING in (mean, error) else f"{mean} ± {error}"


def _share_of_wins(evaluation: Evaluation, key: str) -> str:
    mean, low, high = (evaluation.get(f"{key}{part}") for part in ("", "_low", "_high"))
    share = MISSING if math.isnan(mean) else f"{percent(mean)} [{100 * low:.1f}, {100 * high:.1f}]"
    return _with_part(share, evaluation, key)


def _with_part(entry: str, evaluation: Evaluation, key: str) -> str:
    part = judged_in_part(evaluation) if key == evaluation.key(JUDGE_WIN_RATE) else ""
    return f"{entry} ({part})" if part and entry != MISSING else entry


def leading_key(evaluation: Evaluation) -> str:
    """The key of the win rate that is spoken of first: the scorer's, or the judge's where nobody scored."""
    scored = evaluation.key(WIN_RATE)
    return scored if scored in evaluation.metrics else evaluation.key(JUDGE_WIN_RATE)


def _percent_and_error(evaluation: Evaluation, key: str) -> str:
    mean, error = (100 * evaluation.get(f"{key}{part}") for part in ("", "_se"))
    share = MISSING if math.isnan(mean) else f"{mean:.1f} ± {number(error, 1)}\u00a0%"
    return _with_part(share, evaluation, key)


def _beside_length(evaluation: Evaluation, key: str) -> str:
    accuracy = percent(evaluation.get(key))
    return accuracy if accuracy == MISSING else f"{accuracy} ({percent(evaluation.value(LENGTH_BASELINE))})"


STYLES: dict[Style, Callable[[Evaluation, str, Metric], str]] = {
    "number": lambda policy, key, metric: number(policy.get(key), metric.decimals, metric.signed),
    "error": lambda policy, key, metric: plus_minus(policy, key, metric.decimals, metric.signed),
    "percent": lambda policy, key, metric: percent(policy.get(key)),
    "percent_error": lambda policy, key, metric: _percent_and_error(policy, key),
    "interval": lambda policy, key, metric: _share_of_wins(policy, key),
    "beside_length": lambda policy, key, metric: _beside_length(policy, key),
}


def _column(metric: Metric, heading: Heading, **names: str) -> Column:
    write, note = STYLES[heading.style], metric.meaning + heading.note
    return Column(heading.title.format(**names), note.format(**names), lambda e: write(e, e.key(metric), metric))


def columns(scorer: str) -> list[Column]:
    """The columns of a table of policies scored by `scorer`; no reward where nobody gives one."""
    unscored = scorer == "none"
    headings = [(m, m.column) for m in METRICS if not m.by_judge and not (unscored and m is SCORE)]
    return [_column(metric, heading, scorer=scorer.capitalize()) for metric, heading in headings if heading]


def brief_columns(scorer: str) -> list[Column]:
    """The columns that fit a terminal of 80 characters: without the errors of what is known well."""
    headings = [(metric, metric.brief) for metric in METRICS]
    return [_column(metric, heading, scorer=scorer, judge="a judge") for metric, heading in headings if heading]


def unscored_columns() -> list[Column]:
    """What stands in a terminal besides, where nobody scored the answers."""
    return [_column(metric, metric.unscored) for metric in METRICS if metric.unscored]


def judge_columns(evaluations: Sequence[Evaluation]) -> list[Column]:
    """What a judge says of the policies, if it was asked about any."""
    judges = dict.fromkeys(str(evaluation.judge["model"]) for evaluation in evaluations if evaluation.judge)
    headings = [(metric, metric.column) for metric in METRICS if metric.by_judge and judges]
    return [_column(metric, heading, judge=", ".join(judges)) for metric, heading in headings if heading]


def titles(evaluations: Sequence[Evaluation]) -> list[str]:
    """Short names that tell the policies of one table apart."""
    trained = [e for e in evaluations if e.objective is not None]
    with_reference = len({evaluation.reference for evaluation in trained}) > 1
    with_seed = len({evaluation.seed for evaluation in trained}) > 1
    names = [_title(e, with_reference, with_seed) for e in evaluations]
    return [e.name if names.count(name) > 1 else name for e, name in zip(evaluations, names, strict=True)]


def _title(evaluation: Evaluation, with_reference: bool, with_seed: bool) -> str:
    if evaluation.objective is None:
        return f"{evaluation.name} policy" if evaluation.name == "initial" else evaluation.name
    beta = [] if evaluation.beta is None else [f"β = {evaluation.beta:g}"]
    reference = [f"reference {evaluation.reference}"] if with_reference else []
    seed = [f"seed {evaluation.seed}"] if with_seed and evaluation.seed is not None else []
    name = evaluation.objective.upper() if evaluation.objective in ("dpo", "sft") else evaluation.objective
    details = [*beta, *reference, *seed]
    return f"{name} ({', '.join(details)})" if details else name


def settings(evaluation: Evaluation) -> list[tuple[str, str]]:
    """How an evaluation was made, as names and values."""
    prompts = f"{evaluation.num_prompts} prompts, {evaluation.num_generations} answers"
    options = [(f"generation.{name}", str(value)) for name, value in evaluation.generation.items()]
    judge = [("judge", f"{evaluation.judge['name']}, {evaluation.judge['model']}")] if evaluation.judge else []
    return [("prompts", prompts), ("scorer", evaluation.scorer), *judge, *options]


# --- texts of others in Markdown


MARKS = re.compile(r"[\\`*|~$]|\](?=[(\[:])|(?<!\w)_|_(?!\w)|^[#=:]|^[+-](?=\s)")  # what changes how a text is read
LINKING = re.compile(r"@|(?<=www)\.|:(?=//)", re.IGNORECASE)  # what becomes a link by itself


def in_markdown(text: object) -> str:
    """A value as one line of Markdown text: no markup, no link, no HTML, no border of a table's cell."""
    line = html.escape(in_one_line(str(text)), quote=False)
    line = MARKS.sub(lambda match: f"\\{match[0]}", line)
    return LINKING.sub(lambda match: f"&#{ord(match[0])};", line)


def code(text: object) -> str:
    """A value as a span of code, also in a table's cell."""
    line = in_one_line(str(text)).replace("|", r"\|")
    fence = "`" * (1 + _longest_run(line))
    return f"{fence} {line} {fence}" if line[:1] == "`" or line[-1:] == "`" else f"{fence}{line}{fence}"


def block(language: str, text: str) -> str:
    """A block of code, whatever fences are in it."""
    fence = "`" * max(3, 1 + _longest_run(text))
    return f"{fence}{language}\n{visible(text)}\n{fence}"


def _longest_run(text: str) -> int:
    """How many backticks stand in a row."""
    return max(map(len, re.findall("`+", text)), default=0)


# --- the table in a terminal


def results_table(evaluations: Sequence[Evaluation], failures: Sequence[tuple[str, str]] = ()) -> Any:
    """A rich table with a row per policy, 80 characters wide for short names.

    `failures` are names of runs without numbers, and what went wrong: rows too, their reasons below the table.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    every = brief_columns(evaluations[0].scorer if evaluations else "gold")
    if all(map(_unscored, evaluations)):
        every += unscored_columns()
    visible = [c for c in every if any(c.text(e) != MISSING for e in evaluations)] or every
    alike = _seeds_of_all(evaluations)
    below = words(f"means over {alike} seeds\n" if alike > 1 else "")
    below.append("\n".join(f"{name}: {why}" for name, why in failures), style="red")
    below.rstrip()
    table = Table(
        box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False, caption=below or None,
        caption_justify="left",
    )  # fmt: skip
    table.add_column("policy", overflow="fold", min_width=14)
    for column in visible:
        table.add_column(words(column.title), justify="right", no_wrap=True)
    for evaluation, name in zip(evaluations, titles(evaluations), strict=True):
        seeds = f" ({evaluation.num_seeds} seeds)" if alike == 1 and evaluation.num_seeds > 1 else ""
        label = words(name + seeds)
        if evaluation.degenerate:
            label.append(" degenerate", style="bold red")
        table.add_row(label, *(words(_narrow(column.text(evaluation))) for column in visible))
    for name, _ in failures:
        table.add_row(words(name, style="red"), *("–" for _ in visible))
    return table


def _seeds_of_all(evaluations: Sequence[Evaluation]) -> int:
    """How many runs each trained policy joins, where that is one number for all; else 1."""
    numbers = {e.num_seeds for e in evaluations if e.objective is not None}
    return numbers.pop() if len(numbers) == 1 else 1


def _narrow(entry: str) -> str:
    """Without the spaces that a page has room for."""
    return entry.replace(" ± ", "±").replace(", ", ",").replace("\u00a0%", "%").replace(" pairs)", ")")


# --- what the numbers say, in sentences
# All are computed: nothing is claimed that an interval does not carry.


def _interval(evaluation: Evaluation) -> tuple[float, float, float]:
    key = leading_key(evaluation)
    return evaluation.get(key), evaluation.get(f"{key}_low"), evaluation.get(f"{key}_high")


def _opponent(evaluation: Evaluation) -> str:
    return "the initial policy" if evaluation.baseline == "initial" else str(evaluation.baseline)


def verdict_on(evaluation: Evaluation, title: str) -> str:
    """Whether a policy beats its baseline, as far as the 95 % interval of its win rate says."""
    mean, low, high = _interval(evaluation)
    seeds = f", {evaluation.num_seeds} seeds" if evaluation.num_seeds > 1 else ""
    judge = "" if leading_key(evaluation) == evaluation.key(WIN_RATE) else f", judge {evaluation.judge.get('model')}"
    share = f"{percent(mean)} of comparisons (95 % interval {100 * low:.1f}–{100 * high:.1f}\u00a0%{seeds}{judge})"
    if low > 0.5:
        return f"{title} beats {_opponent(evaluation)} in {share}."
    if high < 0.5:
        return f"{title} loses to {_opponent(evaluation)}: it wins {share}."
    return f"{title} cannot be told from {_opponent(evaluation)}: it wins {share}."


def best(evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """The trained policy with the highest win rate, degenerate ones last; None without win rates."""
    candidates = [e for e in evaluations if not math.isnan(_interval(e)[0])]
    return max(candidates, key=lambda e: (not e.degenerate, _interval(e)[0]), default=None)


NONE_IS_SOUND = "Every policy is degenerate, so none is the best."
NOTHING_TO_COMPARE = "There is no baseline to compare with."


def headline(evaluations: Sequence[Evaluation]) -> str:
    """The main finding of an evaluation; the first of `evaluations` may be the baseline."""
    champion = best(evaluations)
    if champion is None:
        ranked = [e for e in evaluations if _unscored(e) and not math.isnan(e.value(ACCURACY))]
        return _ranking(ranked, evaluations) if ranked else NOTHING_TO_COMPARE
    compared = sum(not math.isnan(_interval(e)[0]) for e in evaluations)
    if compared > 1 and champion.degenerate:
        return NONE_IS_SOUND
    sentence = verdict_on(champion, titles(evaluations)[list(evaluations).index(champion)])
    return sentence if compared == 1 else f"Best of {compared}: {sentence}"


def _unscored(evaluation: Evaluation) -> bool:
    return math.isnan(evaluation.value(SCORE)) and math.isnan(_interval(evaluation)[0])


def _ranking(ranked: Sequence[Evaluation], evaluations: Sequence[Evaluation]) -> str:
    """What can be said where nobody scored the answers: how the best of `ranked` ranks held-out pairs."""
    policy = max(ranked, key=lambda evaluation: evaluation.value(ACCURACY))
    name = titles(evaluations)[list(evaluations).index(policy)]
    kl = "" if math.isnan(policy.value(KL)) else f", at {number(policy.value(KL), 2)} nats from the initial policy"
    return (
        f"{name} ranks {percent(policy.value(ACCURACY))} of held-out pairs as they are labelled (choosing the longer "
        f"answer: {percent(policy.value(LENGTH_BASELINE))}){kl}. Nobody scored the answers, so there is no win rate: "
        "scorer=reward_model or judge=... does."
    )


def drift(initial: Evaluation, evaluations: Sequence[Evaluation]) -> str | None:
    """What the smallest KL strength did, where several of one objective were tried: those of different objectives are
    in different units."""
    swept = [e for e in evaluations if e.beta is not None]
    if len({e.beta for e in swept}) < 2 or len({e.objective for e in swept}) > 1:
        return None
    loosest = min(swept, key=lambda e: e.beta or 0)
    before, after = (e.value(LENGTH) for e in (initial, loosest))
    parts = [
        f"answers {'grow' if after > before else 'shrink'} from {number(before, 1)} to {number(after, 1)} tokens",
        f"{percent(1 - loosest.value(ENDED))} of them never end (initially {percent(1 - initial.value(ENDED))})",
    ]
    if loosest.key(KL) in loosest.metrics:
        parts.append(f"the policy is {number(loosest.value(KL), 1)} nats from the initial one")
    if END_CHOSEN.key in loosest.metrics:
        parts.append(f"the end token's log-prob moved by {number(loosest.value(END_CHOSEN), 2, signed=True)}")
    return f"At the smallest β, {loosest.beta:g}, " + ", ".join(parts[:-1]) + f", and {parts[-1]}."


def judged_in_part(evaluation: Evaluation) -> str:
    """Over how many pairs the judge's numbers are, where that is not all; else empty."""
    judged, pairs = evaluation.value(NUM_JUDGED), evaluation.value(NUM_JUDGE_PAIRS)
    return f"{judged:g} of {pairs:g} pairs" if judged < pairs else ""


def lacking(evaluations: Sequence[Evaluation]) -> list[str]:
    """One sentence for all that was asked for and is not there."""
    sentences = []
    for name, evaluation in zip(titles(evaluations), evaluations, strict=True):
        sentences += [f"{name}: {why}." for why in evaluation.missing]
        if part := judged_in_part(evaluation):
            sentences.append(f"{name}: what the judge says is over {part}; it gave no verdict on the others.")
    return sentences


def broken(evaluations: Sequence[Evaluation]) -> list[str]:
    """One sentence for every degenerate policy."""
    names = titles(evaluations)
    return [
        f"{name} is degenerate: {'; '.join(e.degenerate)}."
        for name, e in zip(names, evaluations, strict=True)
        if e.degenerate
    ]
