"""How far a model's token log-probabilities lie from another's: log-ratios, their distribution and where they are.

The log-ratio of a token is log pi(y_t | x, y_<t) - log ref(y_t | x, y_<t), in nats. Few tokens carry most of it, above
all the one that ends the answer (arXiv:2407.13709, section 5).
"""

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from dpo_ref.evaluation.diagnostics.token_statistics import ScoredTokens
from dpo_ref.evaluation.statistics.estimates import Estimate, clustered_mean

# --- what kind of token a token is, and what it looks like


CLASSES = ("end of the answer", "first of the answer", "whitespace", "punctuation", "other")
END, FIRST, WHITESPACE, PUNCTUATION, OTHER = range(len(CLASSES))
ANCHOR = "a"


class Vocabulary:
    """The texts of token ids, as they stand behind other text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        # Behind a letter: alone, SentencePiece tokens lose the blank they begin with.
        self._anchor = tokenizer.encode(ANCHOR, add_special_tokens=False)[-1:]

    def text(self, token: int) -> str:
        """What the token writes behind a letter."""
        return self._decode([*self._anchor, token])[len(self._decode(self._anchor)) :]

    def kinds(self, ids: Sequence[int]) -> Int[np.ndarray, " K"]:
        """Whitespace, punctuation or other, of each id."""
        return np.array([kind_of_text(self.text(token)) for token in ids], dtype=np.int64)

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def kind_of_text(text: str) -> int:
    """Punctuation is what consists of Unicode's classes P and S apart from blanks; a broken character is neither."""
    visible = text.strip()
    if not visible:
        return WHITESPACE if text else OTHER
    marks = all(unicodedata.category(character)[0] in "PS" for character in visible)
    return PUNCTUATION if marks and "\N{REPLACEMENT CHARACTER}" not in visible else OTHER


def classes_of(tokens: ScoredTokens, vocabulary: Vocabulary) -> Int[np.ndarray, " R"]:
    """The class of every token: the end of the answer goes before its first token, and both before what is written."""
    distinct, inverse = np.unique(tokens.ids, return_inverse=True)
    classes = vocabulary.kinds(distinct.tolist())[inverse]
    classes[tokens.position == 0] = FIRST
    classes[tokens.ends] = END
    return classes


# --- log-ratios


STEPS = tuple(float(10 ** (power / 4)) for power in range(-8, 7))  # 0.01 to 32 nats, four a decade
EDGES = (*(-step for step in reversed(STEPS)), *STEPS)  # the same for every run, so that distributions compare
LEVELS = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)
STILL = 0.01  # nats


@dataclass(frozen=True, slots=True)
class Bucket:
    """Tokens of one class or at some positions: mean log-ratio, mean size, and their share of the sum of sizes."""

    name: str
    num_tokens: int
    mean: Estimate
    mean_abs: float
    share: float


@dataclass(frozen=True, slots=True)
class Moved:
    """One vocabulary entry: how often it occurs, its mean log-ratio, and the sum over its occurrences."""

    text: str
    token: int
    num_tokens: int
    mean: float
    total: float


@dataclass(frozen=True, slots=True)
class LogRatios:
    """Log-ratios of a set of tokens. `counts` are tokens below `EDGES[0]`, between neighbouring edges, and above.
    `top_1_percent` is the share of the sum of |log-ratio| in that share of the tokens, rounded up; nan where no token
    moved."""

    num_tokens: int
    mean: Estimate
    mean_abs: float
    counts: tuple[int, ...]
    quantiles: tuple[float, ...]  # at LEVELS
    share_still: float  # of tokens that moved by less than 0.01 nats
    share_above_1: float
    share_above_5: float
    top_1_percent: float
    top_10_percent: float
    by_position: tuple[Bucket, ...]
    by_class: tuple[Bucket, ...]
    by_mean: tuple[Moved, ...]
    by_total: tuple[Moved, ...]


def concentration(values: Float[np.ndarray, " R"], share: float) -> float:
    """Share of sum |value| that the ceil(share * R) largest carry; nan where the sum is 0."""
    sizes = np.sort(np.abs(values))[::-1]
    total = sizes.sum()
    return float(sizes[: math.ceil(share * len(sizes))].sum() / total) if total > 0 else math.nan


def position_buckets(position: Int[np.ndarray, " R"]) -> tuple[Int[np.ndarray, " R"], list[str]]:
    """Buckets 1, 2, 3-4, 5-8, ... of the 1-based position, and their names."""
    codes = np.ceil(np.log2(position + 1.0)).astype(np.int64)
    names = ["1", "2", *(f"{2**k // 2 + 1}–{2**k}" for k in range(2, int(codes.max(initial=0)) + 1))]
    return codes, names


def _buckets(
    values: Float[np.ndarray, " R"], tokens: ScoredTokens, codes: Int[np.ndarray, " R"], names: Sequence[str]
) -> tuple[Bucket, ...]:
    """One bucket for each code that occurs."""
    buckets, total = [], np.abs(values).sum()
    for code in map(int, np.unique(codes)):
        inside = codes == code
        sizes = np.abs(values[inside])
        mean = _mean_inside(values, tokens, inside)
        share = float(sizes.sum() / total) if total > 0 else math.nan
        buckets.append(Bucket(names[code], int(inside.sum()), mean, float(sizes.mean()), share))
    return tuple(buckets)


def _mean_inside(values: Float[np.ndarray, " R"], tokens: ScoredTokens, inside: np.ndarray) -> Estimate:
    """Mean over the tokens inside, with the error of a ratio, clustered by prompt."""
    mean = float(values[inside].mean())
    residuals = np.bincount(tokens.prompts[tokens.response], weights=np.where(inside, values - mean, 0.0))
    count = len(np.unique(tokens.prompts[tokens.response[inside]]))
    if count < 2:
        return Estimate(mean, math.nan)
    return Estimate(mean, float(np.sqrt(np.square(residuals).sum() * count / (count - 1)) / inside.sum()))


def _most_moved(
    values: Float[np.ndarray, " R"], ids: Int[np.ndarray, " R"], vocabulary: Vocabulary, top: int, least: int
) -> tuple[tuple[Moved, ...], tuple[Moved, ...]]:
    """The vocabulary entries that moved most by mean (those that occur at least `least` times) and in total."""
    distinct, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
    totals = np.bincount(inverse, weights=values)
    means = totals / counts
    frequent = np.flatnonzero(counts >= least)
    orders = (
        frequent[np.argsort(-np.abs(means[frequent]), kind="stable")],
        np.argsort(-np.abs(totals), kind="stable"),
    )
    by_mean, by_total = (
        tuple(
            Moved(
                vocabulary.text(int(distinct[i])), int(distinct[i]), int(counts[i]), float(means[i]), float(totals[i])
            )
            for i in order[:top]
        )
        for order in orders
    )
    return by_mean, by_total


def shift_of(
    values: Float[np.ndarray, " R"],
    tokens: ScoredTokens,
    classes: Int[np.ndarray, " R"],
    vocabulary: Vocabulary,
    top: int,
    least: int,
) -> LogRatios:
    """Everything about the log-ratios `values` of `tokens`, which are at least one."""
    sizes = np.abs(values)
    positions, names = position_buckets(tokens.position)
    by_mean, by_total = _most_moved(values, tokens.ids, vocabulary, top, least)
    return LogRatios(
        num_tokens=len(values),
        mean=tokens.per_token(values),
        mean_abs=float(sizes.mean()),
        counts=tuple(np.bincount(np.searchsorted(EDGES, values), minlength=len(EDGES) + 1).tolist()),
        quantiles=tuple(np.quantile(values, LEVELS).tolist()),
        share_still=float((sizes < STILL).mean()),
        share_above_1=float((sizes > 1).mean()),
        share_above_5=float((sizes > 5).mean()),
        top_1_percent=concentration(values, 0.01),
        top_10_percent=concentration(values, 0.1),
        by_position=_buckets(values, tokens, positions, names),
        by_class=_buckets(values, tokens, classes, CLASSES),
        by_mean=by_mean,
        by_total=by_total,
    )


# --- when answers end: the shift of the token that ends them, and the hazard of ending at every position


TENTHS = 10


@dataclass(frozen=True, slots=True)
class EndShift:
    """log pi(end) - log initial(end) where an answer ended, over the answers that did."""

    num_ended: int
    logratio: Estimate


@dataclass(frozen=True, slots=True)
class Hazard:
    """Mean probability that the answer ends at a place, given that it has come so far: of those that have."""

    num_responses: tuple[int, ...]
    policy: tuple[float, ...]
    initial: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class TokenRanks:
    """Where a model ranks the tokens that stand there, 1 being its likeliest: share at 1, and the median; and the
    share of tokens that rank higher or lower with the policy than with the initial policy."""

    policy_first: float
    initial_first: float
    policy_median: float
    initial_median: float
    share_risen: float
    share_fallen: float


def end_shift(tokens: ScoredTokens) -> EndShift:
    """The shift of the end token, standard error clustered by prompt; nan where nothing ended."""
    ended = tokens.ends & tokens.last
    prompts = tokens.prompts[tokens.response[ended]].tolist()
    return EndShift(int(ended.sum()), clustered_mean(tokens.logratios[ended], prompts))


def _means(bins: Int[np.ndarray, " R"], values: Float[np.ndarray, " R"]) -> tuple[float, ...]:
    counts = np.bincount(bins)
    sums = np.bincount(bins, weights=values)
    return tuple((sums / np.where(counts, counts, np.nan)).tolist())


def _hazard(tokens: ScoredTokens, bins: Int[np.ndarray, " R"]) -> Hazard:
    models = (_means(bins, np.exp(readings.end_logps)) for readings in (tokens.policy, tokens.initial))
    return Hazard(tuple(np.bincount(bins).tolist()), *models)


def hazard(tokens: ScoredTokens) -> Hazard:
    """By position: entry t is over the responses with more than t scored tokens."""
    return _hazard(tokens, tokens.position)


def relative_hazard(tokens: ScoredTokens) -> Hazard:
    """By tenths of the way from a response's first token to its last, and at last the last token by itself. A place
    that no token stands at has 0 responses and nan."""
    lengths = tokens.lengths[tokens.response]
    tenths = TENTHS * tokens.position // np.maximum(lengths - 1, 1)
    return _hazard(tokens, np.where(lengths > 1, tenths, TENTHS))


def ranks_of(tokens: ScoredTokens) -> TokenRanks:
    """Ranks under policy and initial policy."""
    ours, theirs = tokens.policy.ranks, tokens.initial.ranks
    return TokenRanks(
        float((ours == 1).mean()), float((theirs == 1).mean()),
        float(np.median(ours)), float(np.median(theirs)),
        float((ours < theirs).mean()), float((ours > theirs).mean()),
    )  # fmt: skip
