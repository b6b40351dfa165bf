"""What can be seen of a training run before anything is spent on it: what the data, the reference and the options say
about the first step, and what is likely to go wrong, ordered by how much of the run it costs.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from dpo_ref.data.inspection import Hygiene
from dpo_ref.evaluation.compatibility import AtBeta, Start, at_beta, half_ties, start

BETAS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # of which the largest healthy one is suggested


# --- what policy and reference say of a few pairs


@dataclass(frozen=True, slots=True)
class StepZero:
    """What the first step would see, on so many pairs of the run."""

    num_pairs: int
    prefers_rejected: float | None  # share on which the reference finds the rejected response likelier; ties half
    beta: float | None  # the run's; None for an objective without
    at: AtBeta | None  # saturation at it
    start: Start


def step_zero(
    policy: Float[np.ndarray, " B"],
    reference: Float[np.ndarray, " B"],
    beta: float | None,
    clusters: Sequence[int],
) -> StepZero:
    """Of margins log p(chosen) - log p(rejected) under both, in nats; `clusters` says which pairs share a prompt."""
    margins = policy - reference
    wrong = None if not reference.any() else 1 - float(half_ties(reference).mean())
    return StepZero(
        num_pairs=len(margins),
        prefers_rejected=wrong,
        beta=beta,
        at=None if beta is None else at_beta(margins, beta, clusters),
        start=start(margins, BETAS, clusters),
    )


# --- what is known of a run, and what is likely to go wrong


@dataclass(frozen=True, slots=True)
class Fit:
    """Bytes that a run takes on its device at most, and what there is."""

    needed: int
    available: int
    tokens_that_fit: int | None  # of a pack; None: not even one token's
    where: str  # the device


class RankFacts(NamedTuple):
    """What one of the ranks of a run has and does."""

    where: str
    needed: int  # bytes at the peak of a step
    available: int | None  # None where its system does not say
    flops: float  # floating-point operations a second of products of matrices, while all ranks make them
    tokens: int  # of the first batches


@dataclass(frozen=True, slots=True)
class RanksFacts:
    """What the ranks of a run are like together."""

    ranks: Sequence[RankFacts]
    busiest: float  # tokens of the rank that has most of a batch, over the mean of ranks; in the mean of these batches
    sent: float  # bytes that a rank sends in a step
    sending: float  # seconds that takes if nothing hides it
    step: float | None  # seconds of a step; None where none was made

    @property
    def slowest(self) -> tuple[int, float]:
        """The rank that computes slowest, and how fast beside the median of the others."""
        speeds = np.array([rank.flops for rank in self.ranks])
        at = int(speeds.argmin())
        return at, float(speeds[at] / np.median(np.delete(speeds, at)))

    @property
    def tightest(self) -> int:
        """The rank that has least room; the first where no system says how much there is."""
        left = [math.inf if rank.available is None else rank.available - rank.needed for rank in self.ranks]
        return left.index(min(left))


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What warnings are made from. What is not known, or not asked of this run, is None."""

    hygiene: Hygiene
    max_length: int
    tokens_per_batch: int
    num_steps: int
    epoch_share: float  # of the training groups that the run visits; 1 and more: all
    pairwise: bool
    uses_reference: bool
    reference: str
    lr: float
    usual_lr: float  # that one would start with for this model and objective
    whose_lr: str
    unfinished: float  # share of responses that end without an end token
    longest: int  # tokens of the longest group of those looked at
    positions: int | None  # that the model was made for
    prompt_is_open: bool  # whether the template writes the assistant's beginning
    held_out_option: str  # what gives held-out rows
    frozen_experts: float = 0.0  # share of the parameters that are experts which nothing trains
    float32_on_cuda: bool = False
    step_zero: StepZero | None = None
    fit: Fit | None = None
    together: RanksFacts | None = None  # of a run of several ranks
    seconds: dict[str, float] = field(default_factory=dict)  # of the run, by part

    @property
    def num_rows(self) -> int:
        """Groups before any was dropped."""
        kept = self.hygiene.num_train + self.hygiene.num_eval
        return kept + sum(count for name, count in self.hygiene.counts.items() if name.startswith("dropped"))


@dataclass(frozen=True, slots=True)
class RunWarning:
    """Something that is likely to cost part of a run: what it is, what it costs, in words and as a share of the run,
    and the option that mends it."""

    what: str
    cost: str
    mend: str
    wasted: float  # 1: the whole run


Made = Iterator[RunWarning]


def _memory(facts: RunFacts) -> Made:
    fit = facts.fit
    if fit is None or fit.needed <= fit.available:
        return
    over = (fit.needed - fit.available) / 2**30
    lower = (
        f"data.tokens_per_batch={fit.tokens_that_fit}, or model.gradient_checkpointing=full"
        if fit.tokens_that_fit and fit.tokens_that_fit >= facts.longest
        else "model.lora_rank=16, a smaller model, or another device"
    )
    yield RunWarning(
        f"it takes {fit.needed / 2**30:.1f} GiB at packs of {facts.tokens_per_batch:,} tokens, and {fit.where} has "
        f"{fit.available / 2**30:.1f}",
        f"{over:.1f} GiB too much: the run ends at its first full pack",
        lower,
        1.0,
    )


TOO_HIGH, TOO_LOW = 20.0, 1 / 50  # times the usual learning rate: from there on it is said


def _lr_too_high(facts: RunFacts) -> Made:
    ratio = facts.lr / facts.usual_lr
    if ratio >= TOO_HIGH:
        yield RunWarning(
            f"optim.lr={facts.lr:g} is {_times(ratio)} times what {facts.whose_lr} stands, {facts.usual_lr:g}",
            "the policy is likely to fall apart in its first steps: the whole run",
            f"leaving optim.lr out, or optim.lr={facts.usual_lr:g}",
            0.95,
        )


def _lr_too_low(facts: RunFacts) -> Made:
    ratio = facts.lr / facts.usual_lr
    if ratio <= TOO_LOW:
        yield RunWarning(
            f"optim.lr={facts.lr:g} is a {_times(1 / ratio)}th of what {facts.whose_lr} takes, {facts.usual_lr:g}",
            "the policy is likely to stay as it is",
            f"leaving optim.lr out, or optim.lr={facts.usual_lr:g}",
            0.8,
        )


def _times(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.2g}"


def _dropped(facts: RunFacts) -> Made:
    for name, count in facts.hygiene.counts.items():
        share = count / max(facts.num_rows, 1)
        if name.startswith("dropped") and share >= 0.01:
            long = "too long" in name or "would be left" in name
            yield RunWarning(
                f"{count:,} of {facts.num_rows:,} groups {name}",
                f"{share:.0%} of the data",
                f"data.max_length (now {facts.max_length:,}) or data.over_length" if long else "stage=data shows why",
                share,
            )


def _cut(facts: RunFacts) -> Made:
    cut = {name: count for name, count in facts.hygiene.counts.items() if "cut" in name or "without their" in name}
    for name, count in cut.items():
        share = min(1.0, count / max(facts.num_rows, 1))
        if share >= 0.01:
            yield RunWarning(
                f"{count:,} {name} to {facts.max_length:,} tokens",
                f"{share:.0%} of the groups are read in part",
                f"data.max_length (now {facts.max_length:,})",
                share / 2,
            )


def _duplicates(facts: RunFacts) -> Made:
    share = facts.hygiene.duplicates / max(facts.hygiene.num_train, 1)
    if share >= 0.01:
        yield RunWarning(
            f"{facts.hygiene.duplicates:,} of {facts.hygiene.num_train:,} groups were there before",
            f"{share:.0%} of the steps repeat others",
            "data.deduplicate=exact",
            share,
        )


def _contradictions(facts: RunFacts) -> Made:
    share = facts.hygiene.contradictions / max(facts.hygiene.num_train, 1)
    if share >= 0.01:
        yield RunWarning(
            f"{facts.hygiene.contradictions:,} groups order the same responses differently from another",
            f"{share:.0%} of the groups teach nothing",
            "stage=data shows them; objective=cdpo expects labels that are wrong",
            share,
        )


def _leaked(facts: RunFacts) -> Made:
    share = facts.hygiene.leaked / max(facts.hygiene.num_eval, 1)
    if share >= 0.01:
        yield RunWarning(
            f"{facts.hygiene.leaked:,} of {facts.hygiene.num_eval:,} held-out groups have a prompt that is trained on",
            f"{share:.0%} of what is measured is known already",
            f"another split: {facts.held_out_option}",
            share / 2,
        )


def _length_baseline(facts: RunFacts) -> Made:
    if not facts.pairwise or not len(facts.hygiene.chosen):
        return
    share = facts.hygiene.longer_chosen
    if abs(share - 0.5) >= 0.1:
        which = "longer" if share > 0.5 else "shorter"
        yield RunWarning(
            f"the {which} response is chosen in {max(share, 1 - share):.0%} of the pairs",
            "length alone explains so many labels: answers are likely to grow" if share > 0.5 else
            "length alone explains so many labels: answers are likely to shrink",
            "objective=r_dpo, objective=ld_dpo or objective=simpo",
            abs(share - 0.5),
        )  # fmt: skip


def _reference_prefers_rejected(facts: RunFacts) -> Made:
    zero = facts.step_zero
    if zero is None or zero.prefers_rejected is None:
        return
    if zero.prefers_rejected - 1.96 * math.sqrt(0.25 / zero.num_pairs) <= 0.5:  # chance would do the same
        return
    yield RunWarning(
        f"the reference prefers the rejected response on {zero.prefers_rejected:.0%} of {zero.num_pairs} pairs",
        "these pairs are to be turned round against it",
        "another reference=, or evaluate.py stage=compatibility to compare some",
        zero.prefers_rejected - 0.5,
    )


def _saturated(facts: RunFacts) -> Made:
    zero = facts.step_zero
    if zero is None or zero.at is None or zero.at.saturated.mean <= 0.05:
        return
    share, suggested = zero.at.saturated.mean, zero.start.listed
    yield RunWarning(
        f"{share:.0%} of {zero.num_pairs} pairs are saturated at beta={zero.beta:g} before the first step",
        f"{zero.at.saturated_right:.0%} teach nothing, {zero.at.saturated_wrong:.0%} pull at full strength",
        "reference=initial" if suggested is None else f"beta={suggested:g}",
        share,
    )


def _no_held_out(facts: RunFacts) -> Made:
    if not facts.hygiene.num_eval:
        yield RunWarning(
            "no rows are held out",
            "nothing tells learning from memorising",
            facts.held_out_option,
            0.3,
        )


def _part_of_an_epoch(facts: RunFacts) -> Made:
    if facts.epoch_share < 1:
        yield RunWarning(
            f"the run's {facts.num_steps:,} steps visit {facts.epoch_share:.0%} of the training groups",
            f"{1 - facts.epoch_share:.0%} of the data is never seen",
            "trainer.max_steps or trainer.epochs",
            0.05,
        )


WORTH_SAYING = 60.0  # seconds


def _evaluation_costs(facts: RunFacts) -> Made:
    training = facts.seconds.get("steps", 0.0)
    other = sum(facts.seconds.get(part, 0.0) for part in ("evaluation", "answers", "samples"))
    if training and other > max(training, WORTH_SAYING):
        yield RunWarning(
            "evaluations take longer than training",
            f"{in_time(other)} against {in_time(training)}",
            "trainer.eval_every, evaluation.every, evaluation.num_prompts, evaluation.max_new_tokens",
            other / (other + training) / 2,
        )


def _unfinished(facts: RunFacts) -> Made:
    if facts.unfinished >= 0.01:
        yield RunWarning(
            f"{facts.unfinished:.0%} of the responses end without an end token",
            "the policy learns not to end its answers",
            "data.over_length=drop, or a model.template that ends the assistant's turn",
            facts.unfinished,
        )


def _open_prompt(facts: RunFacts) -> Made:
    if not facts.prompt_is_open:
        yield RunWarning(
            "the chat template does not write where the assistant begins",
            "a prompt is answered otherwise than it was trained: the whole run may not show",
            "model.template",
            0.5,
        )


def _positions(facts: RunFacts) -> Made:
    if facts.positions is not None and facts.max_length > facts.positions:
        yield RunWarning(
            f"data.max_length={facts.max_length:,} exceeds the {facts.positions:,} positions of the model",
            "longer groups are dropped or cut there",
            f"data.max_length={facts.positions}, or a model of longer texts",
            0.05,
        )


def _no_reference(facts: RunFacts) -> Made:
    if facts.uses_reference and facts.reference == "none":
        yield RunWarning(
            "reference=none: the objective measures against nothing",
            "its reward is the likelihood itself, and nothing holds the policy near where it began",
            "reference=initial, or an objective without a reference such as simpo",
            0.2,
        )


def _experts(facts: RunFacts) -> Made:
    if facts.frozen_experts >= 0.01:
        yield RunWarning(
            f"experts, {facts.frozen_experts:.0%} of the parameters, stay as they are",
            "what they know is not trained",
            "leave model.lora_rank out to train all weights",
            0.1,
        )


SLOW, BUSY, SENDING = 0.85, 1.1, 0.3  # of the others; times the mean; of a step: from there on it is said


def _slow_rank(facts: RunFacts) -> Made:
    if facts.together is None:
        return
    at, speed = facts.together.slowest
    if speed < SLOW:
        yield RunWarning(
            f"rank {at} ({facts.together.ranks[at].where}) computes {speed:.2f} times as fast as the others",
            f"the others wait for it, up to {1 - speed:.0%} of every step",
            "looking at what else runs there, or leaving it out",
            1 - speed,
        )


def _busy_rank(facts: RunFacts) -> Made:
    together = facts.together
    if together is not None and together.busiest > BUSY:
        yield RunWarning(
            f"the rank with the longest pairs of a batch has {together.busiest:.2f} times the mean's tokens",
            f"the others wait for it, {1 - 1 / together.busiest:.0%} of a step's computing",
            "a larger trainer.batch_size, or fewer ranks",
            1 - 1 / together.busiest,
        )


def _sending(facts: RunFacts) -> Made:
    together = facts.together
    if together is None or not together.step or together.sending < SENDING * together.step:
        return
    share = min(1.0, together.sending / together.step)
    yield RunWarning(
        f"a rank sends {together.sent / 1e6:,.1f} MB in a step, which takes {together.sending:.2g} s of "
        f"{together.step:.2g} s if nothing hides it",
        f"up to {share:.0%} of every step",
        "a larger trainer.batch_size, an adapter (model.lora_rank=16), or fewer machines",
        share / 2,  # some of it is hidden
    )


def _float32(facts: RunFacts) -> Made:
    if facts.float32_on_cuda:
        yield RunWarning(
            "model.dtype=float32 on a graphics card",
            "several times the time, and no FlashAttention",
            "model.dtype=auto",
            0.6,
        )


KINDS: tuple[Callable[[RunFacts], Made], ...] = (
    _memory, _lr_too_high, _lr_too_low, _dropped, _cut, _duplicates, _contradictions, _leaked, _length_baseline,
    _reference_prefers_rejected, _saturated, _no_held_out, _part_of_an_epoch, _evaluation_costs, _unfinished,
    _open_prompt, _positions, _no_reference, _experts, _float32, _slow_rank, _busy_rank, _sending,
)  # fmt: skip


def run_warnings(facts: RunFacts) -> list[RunWarning]:
    """What is likely to go wrong, the costliest first."""
    found = [warning for kind in KINDS for warning in kind(facts)]
    return sorted(found, key=lambda warning: -warning.wasted)


def in_time(seconds: float) -> str:
    """So much time, in the unit that says most: under 1 s, 12 s, 3.5 min, 2.4 h, 3.1 days."""
    if seconds < 1:
        return "under 1 s"
    for unit, size, limit in (("s", 1, 90), ("min", 60, 5400), ("h", 3600, 172800)):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}" if unit == "s" else f"{seconds / size:.1f} {unit}"
    return f"{seconds / 86400:.1f} days"
