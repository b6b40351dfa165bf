"""How a candidate reference stands to a policy before any training: numbers from the log-probs of both on the same
pairs. It is an open question of arXiv:2407.13709 which references suit a policy; this measures what can be seen at
step 0.

Per pair, with log-probs summed over responses in nats:

    margin of a model     log p(chosen) - log p(rejected)
    step-0 margin m       margin of the policy - margin of the reference; the implicit reward margin is beta * m
    gradient weight       sigmoid(-beta * m): how much of a pair's gradient DPO lets through (arXiv:2305.18290, eq. 7)
    saturated             |beta * m| > 4: weight below 0.018 (right) or above 0.982 (wrong)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int

from dpo_ref.evaluation.kl import Divergence
from dpo_ref.evaluation.statistics.estimates import Estimate, clustered_mean

SATURATED = 4.0
TOLERATED = 0.05  # share of saturated pairs up to which a beta is suggested
LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)  # of the gradient weight's quantiles
NUM_RESAMPLES = 400  # of prompts, for the interval of a rank correlation


@dataclass
class CompatibilityOptions:
    """`compatibility.*`: what the report looks at."""

    num_pairs: int = 512  # training pairs, drawn by the seed
    num_prompts: int = 64  # of these pairs, answered once by each model to measure KL
    max_new_tokens: int = 96  # per answer, the end token included
    betas: list[float] = field(default_factory=lambda: [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0])

    def __post_init__(self) -> None:
        counts = (("num_pairs", self.num_pairs, 2), ("num_prompts", self.num_prompts, 2))
        for name, count, least in (*counts, ("max_new_tokens", self.max_new_tokens, 1)):
            if count < least:
                raise ValueError(f"compatibility.{name}={count} must be at least {least}")
        if not self.betas or not all(0 < beta < float("inf") for beta in self.betas):
            raise ValueError(f"compatibility.betas={list(self.betas)} must be positive numbers, at least one")
        self.betas = sorted(set(self.betas))


@dataclass(frozen=True, slots=True)
class Pairs:
    """B pairs among N responses: positions, lengths of the responses' texts, and the prompt each answers."""

    chosen: Int[np.ndarray, " B"]
    rejected: Int[np.ndarray, " B"]
    num_bytes: Int[np.ndarray, " N"]
    prompts: Int[np.ndarray, " N"]

    def margins(self, logps: Float[np.ndarray, " N"]) -> Float[np.ndarray, " B"]:
        """log p(chosen) - log p(rejected)."""
        return logps[self.chosen] - logps[self.rejected]

    @property
    def clusters(self) -> list[int]:
        """The prompt of every pair."""
        return self.prompts[self.chosen].tolist()


@dataclass(frozen=True, slots=True)
class Alone:
    """What one model says about pairs by itself."""

    accuracy: Estimate  # share of pairs whose chosen response it finds likelier; ties half
    margin: Estimate  # nats
    length_correlation: float  # of its margin with bytes of chosen - bytes of rejected


@dataclass(frozen=True, slots=True)
class BesidePolicy:
    """A reference beside the policy."""

    accuracy_difference: Estimate  # reference - policy, pair by pair
    logps_pearson: float
    logps_spearman: float
    per_byte_spearman: float  # of log p / bytes: sums follow the length whatever the model
    margins_pearson: float
    margins_spearman: float
    margins_spearman_interval: tuple[float, float]  # 95 %, bootstrap over prompts
    gap_per_byte: Estimate  # mean over responses of (log pi - log ref) / bytes, nats


@dataclass(frozen=True, slots=True)
class AtBeta:
    """The first DPO step at one beta."""

    beta: float
    saturated: Estimate
    saturated_right: float
    saturated_wrong: float
    loss: float
    weight_quantiles: tuple[float, ...]  # of the gradient weight, at `LEVELS`
    effective_share: float  # (sum w)^2 / (n sum w^2): 1 where all pairs weigh alike


@dataclass(frozen=True, slots=True)
class Start:
    """Step 0 at all betas, and where to start."""

    sd: float  # of the step-0 margin, nats
    mean: float
    listed: float | None  # the largest listed beta with at most 5 % saturated pairs
    unit: float | None  # the beta at which beta * m has s.d. 1; None where m is constant
    at: tuple[AtBeta, ...]


def half_ties(margins: Float[np.ndarray, " B"]) -> Float[np.ndarray, " B"]:
    """1 for a pair ranked as labelled, 0 for the reverse, 1/2 for a tie."""
    return (np.sign(margins) + 1) / 2


def pearson(a: Float[np.ndarray, " N"], b: Float[np.ndarray, " N"]) -> float:
    """Correlation; nan where one of them is constant."""
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt(np.square(a).sum() * np.square(b).sum())
    return float((a * b).sum() / scale) if scale > 0 else float("nan")


def ranks(values: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Ranks from 1, equal values sharing the mean of theirs."""
    _, inverse, count = np.unique(values, return_inverse=True, return_counts=True)
    return (count.cumsum() - (count - 1) / 2)[inverse]


def spearman(a: Float[np.ndarray, " N"], b: Float[np.ndarray, " N"]) -> float:
    """Rank correlation."""
    return pearson(ranks(a), ranks(b))


def _spearman_interval(
    a: Float[np.ndarray, " B"], b: Float[np.ndarray, " B"], clusters: Sequence[int], seed: int
) -> tuple[float, float]:
    """95 % percentile interval over resampled prompts; nan where a correlation is not defined."""
    members = [np.flatnonzero(np.asarray(clusters) == prompt) for prompt in dict.fromkeys(clusters)]
    generator, correlations = np.random.default_rng(seed), []
    for _ in range(NUM_RESAMPLES):
        rows = np.concatenate([members[index] for index in generator.integers(len(members), size=len(members))])
        correlations.append(spearman(a[rows], b[rows]))
    low, high = np.quantile(correlations, [0.025, 0.975])
    return float(low), float(high)


def alone(logps: Float[np.ndarray, " N"], pairs: Pairs) -> Alone:
    """Accuracy, margin and length preference of one model."""
    margins = pairs.margins(logps)
    longer = (pairs.num_bytes[pairs.chosen] - pairs.num_bytes[pairs.rejected]).astype(np.float64)
    return Alone(
        clustered_mean(half_ties(margins), pairs.clusters),
        clustered_mean(margins, pairs.clusters),
        pearson(margins, longer),
    )


def beside(
    policy: Float[np.ndarray, " N"], reference: Float[np.ndarray, " N"], pairs: Pairs, seed: int
) -> BesidePolicy:
    """How a reference's log-probs relate to the policy's; nan where it says the same about everything."""
    ours, theirs = pairs.margins(policy), pairs.margins(reference)
    has_gap = (pairs.num_bytes > 0) & bool(reference.any())  # zeros everywhere are no log-probs: there is no gap
    ours_per_byte, theirs_per_byte = (logps[has_gap] / pairs.num_bytes[has_gap] for logps in (policy, reference))
    return BesidePolicy(
        accuracy_difference=clustered_mean(half_ties(theirs) - half_ties(ours), pairs.clusters),
        logps_pearson=pearson(policy, reference),
        logps_spearman=spearman(policy, reference),
        per_byte_spearman=spearman(ours_per_byte, theirs_per_byte) if has_gap.any() else float("nan"),
        margins_pearson=pearson(ours, theirs),
        margins_spearman=spearman(ours, theirs),
        margins_spearman_interval=_spearman_interval(ours, theirs, pairs.clusters, seed),
        gap_per_byte=clustered_mean(ours_per_byte - theirs_per_byte, pairs.prompts[has_gap].tolist()),
    )


def at_beta(margins: Float[np.ndarray, " B"], beta: float, clusters: Sequence[int]) -> AtBeta:
    """DPO's first step on pairs with these step-0 margins."""
    rewards = beta * margins
    log_weights = -np.logaddexp(0.0, rewards)
    scaled = np.exp(log_weights - log_weights.max())  # a weight of e^-1000 would be 0, and 0 / 0 no share
    return AtBeta(
        beta=beta,
        saturated=clustered_mean((np.abs(rewards) > SATURATED).astype(np.float64), clusters),
        saturated_right=float((rewards > SATURATED).mean()),
        saturated_wrong=float((rewards < -SATURATED).mean()),
        loss=float(np.logaddexp(0.0, -rewards).mean()),
        weight_quantiles=tuple(np.quantile(np.exp(log_weights), LEVELS).tolist()),
        effective_share=float(scaled.sum() ** 2 / (len(scaled) * np.square(scaled).sum())),
    )


def start(margins: Float[np.ndarray, " B"], betas: Sequence[float], clusters: Sequence[int]) -> Start:
    """Step 0 at every beta (ascending), and the two suggestions."""
    at = tuple(at_beta(margins, beta, clusters) for beta in betas)
    fitting = [step.beta for step in at if step.saturated.mean <= TOLERATED]
    sd = float(margins.std())
    return Start(sd, float(margins.mean()), max(fitting, default=None), 1 / sd if sd > 0 else None, at)


# --- what a report holds, as values and as the JSON of `compatibility.json`


QUOTED_BETA = 0.1  # objective=dpo's default: the beta that sentences are about, or the listed one nearest to it


@dataclass(frozen=True, slots=True)
class TokenOverlap:
    """A reference's tokenizer beside the policy's."""

    shared: float  # share of the policy's vocabulary that the reference's has too, special tokens aside
    tokens_per_token: float  # reference tokens for one of the policy's, on the pairs' responses


@dataclass(frozen=True, slots=True)
class Candidate:
    """A reference that could be built, and everything measured about it. `words` is what selects it on the command
    line of train.py."""

    title: str
    kind: str
    words: tuple[str, ...]
    margins: Float[np.ndarray, " B"]  # of the reference, nats
    alone: Alone
    beside: BesidePolicy
    start: Start
    forward: Divergence  # KL(policy || reference)
    reverse: Divergence
    tokens: TokenOverlap | None
    audit: str | None

    @property
    def quoted(self) -> AtBeta:
        """Step 0 at the beta that sentences are about."""
        return min(self.start.at, key=lambda step: abs(math.log(step.beta / QUOTED_BETA)))

    @property
    def silent(self) -> bool:
        """Whether it gives every response log-prob 0: no reference."""
        return not self.margins.any() and self.start.sd != 0


@dataclass(frozen=True, slots=True)
class RefusedCandidate:
    """A reference that could not be built, and why."""

    title: str
    reason: str


@dataclass(frozen=True, slots=True)
class CompatibilityReport:
    """A policy, and candidate references beside it."""

    policy: str
    policy_alone: Alone
    policy_margins: Float[np.ndarray, " B"]
    candidates: tuple[Candidate, ...]
    refused: tuple[RefusedCandidate, ...]
    options: CompatibilityOptions
    data: str
    num_pairs: int
    num_prompts: int
    seed: int


def metrics_of(report: CompatibilityReport) -> dict[str, float]:
    """The numbers by which runs are compared in a tracker, flat; what was not measured is left out."""
    metrics: dict[str, float] = {"policy/accuracy": report.policy_alone.accuracy.mean}
    for candidate in report.candidates:
        values = {
            "accuracy": candidate.alone.accuracy.mean,
            "margin_sd": candidate.start.sd,
            "margins_spearman": candidate.beside.margins_spearman,
            "per_byte_spearman": candidate.beside.per_byte_spearman,
            "gap_per_byte": candidate.beside.gap_per_byte.mean,
            "start_beta": candidate.start.listed,
            "unit_beta": candidate.start.unit,
            "kl_forward": candidate.forward.per_answer and candidate.forward.per_answer.mean,
            "kl_reverse": candidate.reverse.per_answer and candidate.reverse.per_answer.mean,
        }
        metrics |= {f"{candidate.title}/{name}": value for name, value in values.items() if value is not None}
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
