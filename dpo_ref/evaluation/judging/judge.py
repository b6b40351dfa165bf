"""Pairs of answers judged by a language model: the questions, what the answers say, what they come to.

Judged pairs are `judgments.jsonl`: one JSON object a line with everything that was said
about a pair. All numbers are shares of a win: 1 won, 0.5 tied, 0 lost.
"""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dpo_ref.data.bounded import OverLimit, bounded
from dpo_ref.evaluation import results
from dpo_ref.evaluation.judging.answers import (
    FILE,
    AnswerCache,
    Asker,
    JudgeAnswer,
    JudgeOutcome,
    JudgeRequest,
    collect,
)
from dpo_ref.evaluation.judging.templates import Template, Verdict
from dpo_ref.evaluation.statistics.comparisons import preference_metrics
from dpo_ref.files.digests import sealed, unsealed
from dpo_ref.files.writing import write_lines
from dpo_ref.generation.records import Generation
from dpo_ref.types import Message, Progress, digest

# --- pairs of answers to one prompt, and the questions about them: which is shown first, and whether twice


@dataclass(frozen=True, slots=True)
class Pair:
    """The policy's and the baseline's answer to one prompt."""

    prompt: tuple[Message, ...]
    prompt_index: int
    sample_index: int
    output: str
    baseline_output: str

    @property
    def identical(self) -> bool:
        """Whether there is nothing to judge: the pair is a tie."""
        return self.output == self.baseline_output

    def orders(self, both: bool) -> tuple[bool, ...]:
        """Whether the policy's answer is shown first, once for each question about the pair: both orders, or one drawn
        by the pair's own digest, so that it depends on nothing else."""
        if both:
            return (False, True)
        return (int(digest([self.prompt, self.output, self.baseline_output]), 16) % 2 == 1,)


def _by_prompt(generations: Sequence[Generation]) -> dict[tuple[str, int], dict[int, Generation]]:
    """Samples by their index, under the prompt's digest and how often the prompt occurred before."""
    samples: dict[tuple[str, int], dict[int, Generation]] = defaultdict(dict)
    occurrences: Counter[str] = Counter()
    keys: dict[int, tuple[str, int]] = {}
    for generation in generations:
        if generation.prompt_index not in keys:
            name = digest(generation.prompt)
            keys[generation.prompt_index] = (name, occurrences[name])
            occurrences[name] += 1
        samples[keys[generation.prompt_index]][generation.sample_index] = generation
    return samples


Shown = Literal["answer", "all"]


def shown(generation: Generation, how: Shown) -> str:
    """What a judge sees of an answer, and what is counted as its length: the answer behind its thought, or all."""
    return {"answer": generation.answer, "all": generation.output}[how]


def answer_pairs(
    generations: Sequence[Generation], baseline: Sequence[Generation], how: Shown = "answer"
) -> list[Pair]:
    """Every answer beside the baseline's of the same sample index, as far as both have it.

    Answers that were drawn with the same random numbers (same seed and index) are no independent draws where the
    policies are alike: there the baseline's next sample is taken, if there are several. Raises ValueError where the
    prompts differ, and for conversations of several turns: their later answers have no prompt in common.
    """
    if any(generation.turn > 1 for generation in (*generations, *baseline)):
        raise ValueError(
            "judge= compares two answers to one prompt, and these questions have further turns; stage=export "
            "export=mt_bench hands them to FastChat's judge"
        )
    ours, theirs = _by_prompt(generations), _by_prompt(baseline)
    if ours.keys() != theirs.keys() or not ours:
        raise ValueError(
            f"answers are judged prompt by prompt, but only {len(ours.keys() & theirs.keys())} prompts are shared by "
            f"the policy's {len(ours)} and the baseline's {len(theirs)}; generate both from the same prompts"
        )
    return [pair for prompt, samples in ours.items() for pair in _pairs(samples, theirs[prompt], how)]


def pair_of(ours: Generation, theirs: Generation, how: Shown) -> Pair:
    """Two answers to one prompt as a judge sees them."""
    return Pair(ours.prompt, ours.prompt_index, ours.sample_index, shown(ours, how), shown(theirs, how))


def _pairs(ours: dict[int, Generation], theirs: dict[int, Generation], how: Shown) -> list[Pair]:
    shared = sorted(ours.keys() & theirs.keys())
    same_draws = bool(shared) and ours[shared[0]].seed == theirs[shared[0]].seed
    partners = shared[1:] + shared[:1] if same_draws else shared
    return [pair_of(ours[index], theirs[partner], how) for index, partner in zip(shared, partners, strict=True)]


# --- from a judge's answers to a preference


TIE = 0.5


def label_of(verdict: Verdict, text: str) -> str | None:
    """The label that an answer names, None if it names none."""
    if verdict.pattern is None:
        label = text.strip()
    else:
        label = next((match[1] for match in reversed(list(re.finditer(verdict.pattern, text)))), None)
    return label if label in verdict.labels else None


def first_wins(verdict: Verdict, answer: JudgeAnswer) -> float | None:
    """How far the first answer wins; None where the judge's answer names no label (a parse failure).

    With log-probs it is P(first) + P(tie) / 2 with probabilities normalised over the labels, as AlpacaEval 2 has it
    (Dubois et al. 2024, arXiv:2404.04475); a label that is not among the likeliest tokens counts as impossible, and
    tokens that differ by the space around them count together.
    """
    if answer.candidates is None:
        label = label_of(verdict, answer.text)
        return None if label is None else verdict.labels[label]
    weights = dict.fromkeys(verdict.labels, 0.0)
    # Relative to the likeliest label: all of them may be too small for exp.
    candidates = [(token.strip(), logp) for token, logp in answer.candidates if token.strip() in weights]
    top = max((logp for _, logp in candidates), default=-math.inf)
    if top == -math.inf:
        return None
    for label, logp in candidates:
        weights[label] += math.exp(logp - top)
    return sum(share * weights[label] for label, share in verdict.labels.items()) / sum(weights.values())


def winner(share: float) -> int:
    """1, 0 or -1: won, tied, lost."""
    return (share > TIE) - (share < TIE)


def combine_orders(wins: list[float | None], soft: bool) -> float | None:
    """One preference from the wins that the same answer has in each order; None if an order gave no verdict.

    Probabilities are averaged; verdicts without them must agree, or the pair is a tie (Zheng et al. 2023,
    arXiv:2306.05685).
    """
    verdicts = [win for win in wins if win is not None]
    if len(verdicts) < len(wins):
        return None
    if soft:
        return sum(verdicts) / len(verdicts)
    return verdicts[0] if len(set(verdicts)) == 1 else TIE


# --- judged pairs


class JudgeLost(ValueError):
    """The judge stopped answering; what it said before is kept. `short` says it without where and what to type."""

    def __init__(self, name: str, num_judged: int, num_pairs: int, reason: str, kept_in: Path) -> None:
        super().__init__(
            f"{num_judged} of {num_pairs} pairs are judged, then judge={name} gave no answer: {reason.rstrip('.')}. "
            f"Every answer so far is kept in {kept_in}: type the same command again when the judge is back "
            "(stage=judge judges alone), and only the others are asked"
        )
        self.short = f"judge={name} was lost with {num_judged} of {num_pairs} pairs judged, so there is no win rate"


@dataclass(frozen=True, slots=True)
class Judge:
    """Whom to ask and how. `parameters` determine an answer beside the question itself; `soft` says that answers come
    with log-probs; `prices` are per million tokens of prompt and answer, None where they are not known."""

    name: str
    model: str
    template: Template
    parameters: Mapping[str, Any]
    both_orders: bool
    soft: bool
    ask: Asker
    cache: Path
    prices: tuple[float, float] | None = None
    shows: Shown = "answer"

    @property
    def identity(self) -> dict[str, Any]:
        """What the verdicts depend on, under names for a reader."""
        return {
            "name": self.name,
            "model": self.model,
            "template": self.template.name,
            "template_digest": self.template.identity,
            "orders": "both" if self.both_orders else "one, drawn by the pair's digest",
            "preferences": "log-probs of the labels" if self.soft else "written verdicts",
            "parameters": dict(self.parameters),
            **({} if self.shows == "answer" else {"shows": self.shows}),
        }

    def request(self, pair: Pair, policy_first: bool) -> JudgeRequest:
        """The question about a pair, with the policy's answer first or second."""
        answers = (pair.output, pair.baseline_output) if policy_first else (pair.baseline_output, pair.output)
        return JudgeRequest(self.template.fill(pair.prompt, *answers), self.parameters)


@dataclass(frozen=True, slots=True)
class Opinion:
    """The answer to one question. `win` is the policy's share, None where the answer names no label or was refused."""

    policy_first: bool
    win: float | None
    answer: str
    refusal: str | None
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Judgment:
    """A pair and what was said about it. `preference` is the policy's share of the win, None where an opinion has
    none. A pair of identical answers is a tie about which nobody was asked."""

    pair: Pair
    opinions: tuple[Opinion, ...]
    preference: float | None


@dataclass(frozen=True, slots=True)
class Judged:
    """All judgments, and how many questions they took this time."""

    judgments: list[Judgment]
    num_asked: int


def judge_pairs(judge: Judge, pairs: Sequence[Pair], progress: Progress) -> Judged:
    """What the judge says of every pair; what it was asked before comes from the cache.

    Raises JudgeLost, once all that was answered is stored, when the judge stops answering, and ValueError where it
    refuses everything.
    """
    requests = [[] if pair.identical else _requests(judge, pair) for pair in pairs]
    path = judge.cache / FILE
    with AnswerCache(path) as cache:
        outcome = collect([request for members in requests for request in members], cache, judge.ask, progress)
    if outcome.lost is not None:
        num_judged = sum(all(_is_settled(outcome, request) for request in members) for members in requests)
        raise JudgeLost(judge.name, num_judged, len(pairs), outcome.lost, path)
    if outcome.refusals and not outcome.answers:
        raise ValueError(f"judge={judge.name} refuses every question: {next(iter(outcome.refusals.values()))}")
    verdict, keys = judge.template.verdict, list(outcome.answers)
    try:  # apart: verdict.pattern may be a stranger's, and takes hours for some texts
        shares = list(bounded(lambda key: first_wins(verdict, outcome.answers[key]), keys))
    except OverLimit as error:
        raise ValueError(
            f"judge={judge.name}: verdict.pattern of template {judge.template.name} cannot be searched for "
            f"in an answer ({error}); write one that does not try so many ways"
        ) from None
    wins = dict(zip(keys, shares, strict=True))
    return Judged([_judgment(judge, pair, outcome, wins) for pair in pairs], outcome.num_asked)


def _requests(judge: Judge, pair: Pair) -> list[JudgeRequest]:
    return [judge.request(pair, policy_first) for policy_first in pair.orders(judge.both_orders)]


def _is_settled(outcome: JudgeOutcome, request: JudgeRequest) -> bool:
    return request.key in outcome.answers or request.key in outcome.refusals


def _judgment(judge: Judge, pair: Pair, outcome: JudgeOutcome, wins: Mapping[str, float | None]) -> Judgment:
    if pair.identical:
        return Judgment(pair, (), TIE)
    opinions = tuple(_opinion(judge, pair, first, outcome, wins) for first in pair.orders(judge.both_orders))
    return Judgment(pair, opinions, combine_orders([opinion.win for opinion in opinions], judge.soft))


def _opinion(
    judge: Judge, pair: Pair, policy_first: bool, outcome: JudgeOutcome, wins: Mapping[str, float | None]
) -> Opinion:
    key = judge.request(pair, policy_first).key
    if key in outcome.refusals:
        return Opinion(policy_first, None, "", outcome.refusals[key], 0, 0)
    answer = outcome.answers[key]
    share = wins[key]
    win = share if share is None or policy_first else 1 - share
    return Opinion(policy_first, win, answer.text, None, answer.prompt_tokens, answer.completion_tokens)


def write_judgments(path: Path, judgments: Iterable[Judgment]) -> None:
    """Replace a `.jsonl` file atomically."""
    write_lines(path, (json.dumps(_row(judgment), ensure_ascii=False) + "\n" for judgment in judgments))


def _row(judgment: Judgment) -> dict[str, Any]:
    opinions = [asdict(opinion) for opinion in judgment.opinions]
    return sealed(asdict(judgment.pair) | {"preference": judgment.preference, "opinions": opinions})


def read_judgments(path: Path) -> list[Judgment]:
    """The judgments in a file, in its order. Raises ValueError, naming the row, for what is none."""
    with path.open("rb") as file:
        return [_read(line, f"{path} row {index}") for index, line in enumerate(file, start=1)]


def _read(line: bytes, origin: str) -> Judgment:
    row = unsealed(line, origin, "judge again with stage=judge")
    try:
        opinions = tuple(Opinion(**opinion) for opinion in row.pop("opinions"))
        preference = row.pop("preference")
        pair: dict[str, Any] = row | {"prompt": tuple(row["prompt"])}
        return Judgment(Pair(**pair), opinions, preference)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{origin} is no judgment ({error}); judge again with stage=judge") from error


# --- what judgments come to
# How often the policy wins, how sure that is, and how far the judge can be trusted.


WIN_RATE = {  # of `preference_metrics`: what follows the win rate's key
    "win_rate": "",
    "win_rate_se": "_se",
    "win_rate_low": "_low",
    "win_rate_high": "_high",
    "discrete_win_rate": "_discrete",
    "length_adjusted": "_length_adjusted",
    "length_adjusted_low": "_length_adjusted_low",
    "length_adjusted_high": "_length_adjusted_high",
}
BESIDE_IT = {
    "ties": results.JUDGE_TIES,
    "win_rate_longer": results.WINRATE_LONGER,
    "win_rate_shorter": results.WINRATE_SHORTER,
    "longer_share": results.LONGER_SHARE,
    "num_compared": results.NUM_JUDGED,
    "num_missing": results.NUM_MISSING,
}


def judge_metrics(judge: Judge, judgments: Sequence[Judgment], baseline: str, seed: int) -> dict[str, float]:
    """The numbers of `judge_winrate/<baseline>` and `judge/...`, as far as there is something to count; lengths are
    those in characters. `seed` drives the bootstraps over prompts."""
    preferences = np.array([np.nan if j.preference is None else j.preference for j in judgments])
    ours = np.array([len(judgment.pair.output) for judgment in judgments])
    theirs = np.array([len(judgment.pair.baseline_output) for judgment in judgments])
    prompts = [digest(judgment.pair.prompt) for judgment in judgments]
    statistics = preference_metrics(preferences, ours, theirs, prompts, seed)
    key = results.JUDGE_WIN_RATE.of(baseline=baseline)
    metrics = {f"{key}{part}": statistics[name] for name, part in WIN_RATE.items()}
    metrics |= {metric.key: statistics[name] for name, metric in BESIDE_IT.items()}
    metrics |= _bias(judgments) | _bill(judge, judgments)
    return {key: value for key, value in metrics.items() if value == value}


def consistent(judgment: Judgment) -> bool:
    """Whether both orders have the same winner."""
    return len({winner(opinion.win) for opinion in judgment.opinions if opinion.win is not None}) == 1


def _bias(judgments: Sequence[Judgment]) -> dict[str, float]:
    """How often both orders have the same winner, and how often the answer shown first wins (ties half)."""
    judged = [judgment for judgment in judgments if judgment.opinions and judgment.preference is not None]
    first = [
        (1 + (winner(opinion.win) if opinion.policy_first else -winner(opinion.win))) / 2
        for judgment in judged
        for opinion in judgment.opinions
        if opinion.win is not None
    ]
    agree = [float(consistent(judgment)) for judgment in judged if len(judgment.opinions) == 2]
    shares = {results.CONSISTENCY.key: agree, results.FIRST_POSITION.key: first}
    return {key: float(np.mean(values)) for key, values in shares.items() if values}


def _bill(judge: Judge, judgments: Sequence[Judgment]) -> dict[str, float]:
    """What was asked, what failed, and what it costs (also what was known before, so that the numbers repeat)."""
    opinions = [opinion for judgment in judgments for opinion in judgment.opinions]
    tokens = [sum(o.prompt_tokens for o in opinions), sum(o.completion_tokens for o in opinions)]
    counts = {
        results.NUM_JUDGE_PAIRS.key: len(judgments),
        results.IDENTICAL.key: sum(judgment.pair.identical for judgment in judgments),
        results.PARSE_FAILURES.key: sum(o.win is None and o.refusal is None for o in opinions),
        results.REFUSALS.key: sum(o.refusal is not None for o in opinions),
        results.PROMPT_TOKENS.key: tokens[0],
        results.COMPLETION_TOKENS.key: tokens[1],
    }
    metrics = {key: float(count) for key, count in counts.items()}
    if judge.prices is not None:
        metrics[results.COST.key] = sum(price * count for price, count in zip(judge.prices, tokens, strict=True)) / 1e6
    return metrics
