"""What objectives may ask for, what they return, how they are told apart, and how they are called.

The types of the arguments left of an objective's star say what it is handed: `of` of each makes it of a pack. What it
refuses and reads is found by asking it, on two pairs that are no one's.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Annotated, Any, Generic, NamedTuple, TypeVar, get_type_hints

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from dpo_ref.component import Hooks, configuration, hooks_of
from dpo_ref.objectives.divergences import (
    REVERSE_KL,
    NextTokenLogps,
    ResponseDivergences,
    TokenDivergence,
    kl_per_token,
)
from dpo_ref.types import (
    POSITIONS_ON,
    HasParts,
    PackedBatch,
    PairLogps,
    PairScores,
    ResponseLogps,
    ResponseScores,
    Span,
    TokenGroup,
)

# --- what objectives may ask for: the types of the arguments left of their star, and how each is made


Running = dict[str, Float[Tensor, ""]]  # what an objective carries from one optimiser step to the next, by name


@dataclass(frozen=True, slots=True)
class TokenPairLogps(PairLogps):
    """Pairs with the values of their tokens: those of all responses one after the other, and where each begins."""

    token_logps: Float[Tensor, " R"]
    chosen_starts: Int[Tensor, " B"]
    rejected_starts: Int[Tensor, " B"]

    @classmethod
    def of(cls, logps: ResponseLogps, batch: PackedBatch) -> "TokenPairLogps":
        """The pairs of a pack, with their tokens."""
        pairs, starts = PairLogps.of(logps, batch), batch.lengths.cumsum(0) - batch.lengths
        sums = (pairs.chosen, pairs.rejected, pairs.chosen_lengths, pairs.rejected_lengths)
        sizes = (pairs.chosen_bytes, pairs.rejected_bytes)
        return cls(*sums, *sizes, logps.tokens(), starts[batch.chosen], starts[batch.rejected])

    def first(self, counts: Int[Tensor, " B"]) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """Log-probs of the first `counts` tokens of chosen and rejected, summed in float64; `counts` must not exceed
        a response's tokens."""
        before = F.pad(self.token_logps.double().cumsum(0), (1, 0))
        starts = self.chosen_starts, self.rejected_starts
        chosen, rejected = (before[start + counts] - before[start] for start in starts)
        return chosen, rejected


@dataclass(frozen=True, slots=True)
class TokenLogps(ResponseLogps):
    """Responses whose token values are there, and which of the N responses each of them belongs to."""

    response_index: Int[Tensor, " R"] = field(kw_only=True, metadata={POSITIONS_ON: "N"})

    @classmethod
    def of(cls, logps: ResponseLogps, batch: PackedBatch) -> "TokenLogps":
        """The responses of a pack, with their tokens."""
        sums = (logps.sums, logps.lengths, logps.num_bytes)
        return cls(*sums, logps.tokens(), response_index=batch.response_index)


@dataclass(frozen=True, slots=True)
class RankedLogps(ResponseLogps):
    """The responses of G prompts and which of them are better than which: of a ranking all its pairs, or some."""

    chosen: Int[Tensor, " B"] = field(kw_only=True, metadata={POSITIONS_ON: "N"})
    rejected: Int[Tensor, " B"] = field(kw_only=True, metadata={POSITIONS_ON: "N"})
    prompt_index: Int[Tensor, " N"] = field(kw_only=True, metadata={POSITIONS_ON: "G"})
    num_prompts: int = field(kw_only=True)

    @classmethod
    def of(cls, logps: ResponseLogps, batch: PackedBatch) -> "RankedLogps":
        """The rankings of a pack."""
        sizes = torch.tensor([len(responses) for _, responses in batch.layout], device=logps.sums.device)
        prompts = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
        pairs = {"chosen": batch.chosen, "rejected": batch.rejected}
        sums = (logps.sums, logps.lengths, logps.num_bytes, None)
        return cls(*sums, **pairs, prompt_index=prompts, num_prompts=batch.num_groups)


Items = TypeVar("Items", PairLogps, ResponseLogps)


@dataclass(frozen=True, slots=True)
class BatchLogps(HasParts, Generic[Items]):
    """Detached log-probs of all pairs or responses of the optimiser batch, in an order that depends on its packs; of
    responses without token values. `here` are the items of the call."""

    policy: Items
    reference: Items
    labels: Bool[Tensor, " N"] | None
    here: slice

    def part(self, span: Span) -> "BatchLogps[Items]":
        """The same batch for a call on a part of these items."""
        start, items = self.here.start, span["B" if isinstance(self.policy, PairLogps) else "N"]
        return replace(self, here=slice(start + items.start, start + items.stop))


@dataclass(frozen=True, slots=True)
class Quantiles(HasParts):
    """Of each response, the share of the reference's samples to its prompt whose reward is no higher."""

    values: Float[Tensor, " N"]


class Mismatched(NamedTuple):
    """Detached log-probs of M responses behind prompts that they do not answer, summed over each response."""

    policy: Float[Tensor, " M"]
    reference: Float[Tensor, " M"]


@dataclass(frozen=True, slots=True)
class ObjectiveInputs:
    """All there is to make arguments from, besides the policy's log-probs: of one pack, or a run of its groups.

    `old` are log-probs of the policy that drew the responses; `collision` sums of log sum_v p_v^2 over the policy's
    distributions at the responses' tokens; `divergences` lie between the policy's distributions there and the
    reference's, and come with the policy's log-probs. What an objective does not ask for is None.
    """

    batch: PackedBatch
    reference: ResponseLogps
    old: ResponseLogps | None = None
    collision: ResponseLogps | None = None
    whole: Any = None
    mismatched: Mismatched | None = None
    running: Running | None = None
    divergences: ResponseDivergences | None = None
    quantiles: Quantiles | None = None

    def part(self, span: Span) -> "ObjectiveInputs":
        """What is known of these groups. What speaks of the whole optimiser batch stays."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(
            self, **{name: value.part(span) for name, value in values.items() if isinstance(value, HasParts)}
        )


OF_PAIRS = (PairLogps, PairScores)
OF_TOKENS = (TokenPairLogps, TokenLogps)


def _row_scores(inputs: ObjectiveInputs) -> ResponseScores | None:
    return None if inputs.batch.rewards is None else ResponseScores(inputs.batch.rewards)


class Argument(NamedTuple):
    """What can stand left of an objective's star: where it comes from, and what to say where it is not there."""

    value: Callable[[ObjectiveInputs], Any]
    remedy: str


ARGUMENTS = {
    "reference": Argument(lambda inputs: inputs.reference, "a reference"),
    "old": Argument(
        lambda inputs: inputs.old, "log-probs of the policy that drew the responses; they come with data=on_policy"
    ),
    "collision": Argument(lambda inputs: inputs.collision, "the policy's distributions"),
    "labels": Argument(
        lambda inputs: inputs.batch.labels, "whether each response is wanted: rows with a label, or pairs"
    ),
    "advantages": Argument(
        lambda inputs: inputs.batch.advantages, "an advantage for each response; they come with data=on_policy"
    ),
    "rewards": Argument(
        _row_scores, "a score of each response: rows with score_chosen and score_rejected, or ranked by their scores"
    ),
    "whole": Argument(lambda inputs: inputs.whole, "statistics of the optimiser batch"),
    "mismatched": Argument(lambda inputs: inputs.mismatched, "responses of other prompts"),
    "running": Argument(lambda inputs: inputs.running, "its running statistic"),
    "quantiles": Argument(lambda inputs: inputs.quantiles, "rewards of the reference's samples"),
    "divergences": Argument(lambda inputs: inputs.divergences, "a reference that is a model in memory"),
}
MADE_OF_A_PACK = ResponseLogps | ResponseScores | ResponseDivergences


def _argument(inputs: ObjectiveInputs, name: str, kind: Any) -> Any:
    """An argument as an objective is handed it: what models say of responses as its annotation, `kind`, sees it."""
    value = ARGUMENTS[name].value(inputs)
    if value is None:
        raise ValueError(f"the objective needs {ARGUMENTS[name].remedy}")
    return kind.of(value, inputs.batch) if isinstance(value, MADE_OF_A_PACK) else value


def on_spans(policy: ResponseLogps, inputs: ObjectiveInputs) -> tuple[ResponseLogps, ObjectiveInputs]:
    """The same responses in spans of text instead of tokens, where the reference has other tokens than the policy: a
    span's log-prob is the sum of its tokens', a length the number of spans. Sums are what they were."""
    batch, ends = inputs.batch, inputs.reference.span_ends
    assert ends is not None and inputs.reference.span_logps is not None  # noqa: PT018
    owners, index = batch.response_index[ends], ends.cumsum(0) - ends.long()
    lengths = torch.zeros_like(batch.lengths).index_add(0, owners, torch.ones_like(owners))

    def summed(logps: ResponseLogps) -> ResponseLogps:
        tokens = logps.tokens()
        spans = tokens.new_zeros(len(owners)).index_add(0, index, tokens)
        return ResponseLogps(logps.sums, lengths, logps.num_bytes, spans)

    theirs = inputs.reference.span_logps[ends]
    reference = ResponseLogps(inputs.reference.sums, lengths, batch.num_bytes, theirs)
    last = {"head_index": batch.head_index[ends], "target_ids": batch.target_ids[ends]}  # tokens of the spans
    seen = replace(batch, response_index=owners, lengths=lengths, **last)
    old = None if inputs.old is None else summed(inputs.old)
    return summed(policy), replace(inputs, batch=seen, reference=reference, old=old)


# --- what they return, and how they are called


STRENGTH = "strength of the KL constraint"
KLStrength = Annotated[float, STRENGTH]
Strength = KLStrength  # its name before, by which objectives in users' own folders import it


class Preference(NamedTuple):
    """B pairs: losses, and the detached implicit rewards whose difference they are a function of."""

    losses: Float[Tensor, " B"]
    chosen_rewards: Float[Tensor, " B"]
    rejected_rewards: Float[Tensor, " B"]


class Mixed(NamedTuple):
    """B pairs under several objectives: losses, the detached implicit rewards of the first, and
    the losses of each by its name."""

    losses: Float[Tensor, " B"]
    chosen_rewards: Float[Tensor, " B"]
    rejected_rewards: Float[Tensor, " B"]
    parts: Mapping[str, Float[Tensor, " B"]]


class Stepped(NamedTuple):
    """B pairs under strengths of their own: losses, detached implicit rewards, and which way each pair's strength
    went: 1, 0 or -1."""

    losses: Float[Tensor, " B"]
    chosen_rewards: Float[Tensor, " B"]
    rejected_rewards: Float[Tensor, " B"]
    steps: Float[Tensor, " B"]


class Compared(NamedTuple):
    """B pairs of scored responses: losses, and the detached scores whose difference they are a function of."""

    losses: Float[Tensor, " B"]
    chosen_rewards: Float[Tensor, " B"]
    rejected_rewards: Float[Tensor, " B"]


class Likelihood(NamedTuple):
    """N responses scored one by one: losses, and the detached log-likelihood that they raise."""

    losses: Float[Tensor, " N"]
    rewards: Float[Tensor, " N"]


class Ranked(NamedTuple):
    """G prompts with ranked responses: losses, and the detached implicit rewards of all B pairs."""

    losses: Float[Tensor, " G"]
    chosen_rewards: Float[Tensor, " B"]
    rejected_rewards: Float[Tensor, " B"]


class Labelled(NamedTuple):
    """N responses that are wanted or not: losses, and detached implicit rewards."""

    losses: Float[Tensor, " N"]
    rewards: Float[Tensor, " N"]


class Regressed(NamedTuple):
    """N responses whose implicit reward is fitted to a target: losses, detached rewards, and targets."""

    losses: Float[Tensor, " N"]
    rewards: Float[Tensor, " N"]
    targets: Float[Tensor, " N"]


class Sampled(NamedTuple):
    """N responses drawn from a policy and scored: losses."""

    losses: Float[Tensor, " N"]


Outcome = Preference | Mixed | Stepped | Ranked | Regressed | Compared | Likelihood | Labelled | Sampled


@dataclass(frozen=True, slots=True)
class Objective:
    """An objective with its configuration bound, and what its signature says about it.

    `inputs` are the arguments left of its star, by name, with their types. `nll_weight` adds that many times the
    chosen response's mean negative token log-prob to every pair's loss (RPO, arXiv:2404.19733, eq. 2), `kl_weight`
    that many times KL(policy || reference) per token of the pair (`kl_per_token`). `between` is what its function asks
    for of the next-token distributions of policy and reference.
    """

    name: str
    function: "partial[Any]"
    inputs: Mapping[str, Any]
    hooks: Hooks
    nll_weight: float = 0.0
    kl_weight: float = 0.0
    between: tuple[TokenDivergence, ...] = ()
    advance: Callable[..., Running] | None = None  # before the losses of a batch, by what is known of all of it
    settle: Callable[..., Running] | None = None  # after them, by their values
    prepare: Callable[..., Any] | None = None  # makes, before training, what `quantiles` are looked up in
    quantiles: Callable[[PackedBatch], Quantiles] | None = None
    running: Running = field(default_factory=dict)  # what it carries from one optimiser step to the next

    @property
    def uses_reference(self) -> bool:
        """Whether its loss depends on a reference."""
        return "reference" in self.inputs or bool(self.divergences)

    @property
    def divergences(self) -> tuple[TokenDivergence, ...]:
        """What is measured between the next-token distributions of policy and reference; empty where they are not
        looked at."""
        return tuple(dict.fromkeys([*self.between, *([REVERSE_KL] if self.kl_weight else [])]))

    @property
    def asking(self) -> str:
        """What the user wrote that has it look at next-token distributions."""
        return f"objective={self.name}" if self.between else f"objective.kl_weight={self.kl_weight}"

    @property
    def pairwise(self) -> bool:
        """Whether its items are pairs, not responses."""
        return issubclass(self.inputs["policy"], OF_PAIRS)

    @property
    def listwise(self) -> bool:
        """Whether its items are prompts with all their responses."""
        return self.inputs["policy"] is RankedLogps

    def num_items(self, group: TokenGroup) -> int:
        """What of a group the loss is a mean over: its pairs, its responses, or itself."""
        if self.listwise:
            return 1
        return len(group.pairs) if self.pairwise else len(group.response_ids)

    @property
    def of_scores(self) -> bool:
        """Whether the trained model is asked for the scores of a reward model, not for log-probs."""
        return self.inputs["policy"] is PairScores

    @property
    def needs_tokens(self) -> bool:
        """Whether it looks at single tokens of the reference."""
        return self.inputs.get("reference") in OF_TOKENS or bool(self.divergences)

    def __call__(self, policy: ResponseLogps | ResponseScores, inputs: ObjectiveInputs) -> Any:
        """An `Outcome`: losses and rewards of one pack, or of a run of its groups. ValueError for what it needs and is
        not there."""
        if isinstance(policy, NextTokenLogps):
            inputs = replace(inputs, divergences=policy.divergences)
        outcome = self.outcome(policy, inputs)
        if self.nll_weight:
            pairs = self.inputs["policy"].of(policy, inputs.batch)
            nll = -pairs.chosen / pairs.chosen_lengths
            outcome = outcome._replace(losses=outcome.losses + self.nll_weight * nll)
        if self.kl_weight:
            kl = kl_per_token(_argument(inputs, "divergences", ResponseDivergences), inputs.batch)
            outcome = outcome._replace(losses=outcome.losses + self.kl_weight * kl)
        if inputs.batch.weights is not None:
            outcome = outcome._replace(losses=outcome.losses * inputs.batch.weights)
        return outcome

    def outcome(self, policy: ResponseLogps | ResponseScores, inputs: ObjectiveInputs) -> Any:
        """What its function says, before any term that objectives share."""
        if isinstance(policy, ResponseLogps) and self.needs_tokens and inputs.reference.span_ends is not None:
            policy, inputs = on_spans(policy, inputs)
        items = self.inputs["policy"].of(policy, inputs.batch)
        rest = {name: _argument(inputs, name, kind) for name, kind in self.inputs.items() if name != "policy"}
        return self.function(policy=items, **rest)

    def step(self, whole: BatchLogps[Any]) -> None:
        """Take an optimiser batch into the running statistic, before the batch's loss is computed."""
        if self.advance is not None:
            self.running.update(self.advance(self.running, whole))

    def end_step(self, values: Mapping[str, Tensor]) -> None:
        """Take the values of an optimiser batch's items (`training/metrics.py`) into the running statistic, for the
        batches after it."""
        if self.settle is not None:
            self.running.update(self.settle(self.running, values))

    def check(self) -> None:
        """Raise ValueError for a bad option before anything is loaded: the objective's own, on two made-up pairs, or
        for a term that has no effect or sense."""
        for name, weight in {"nll_weight": self.nll_weight, "kl_weight": self.kl_weight}.items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"objective.{name}={weight} must be at least 0 and finite")
            if weight and not self.pairwise:
                raise ValueError(f"objective.{name} has no place in objective={self.name}: it has no chosen responses")
            if weight and self.of_scores:
                raise ValueError(f"objective.{name} has no place in objective={self.name}: it has no log-probs")
        if self.nll_weight and self.hooks.fits_chosen:
            raise ValueError(f"objective={self.name} fits the chosen response itself; leave objective.nll_weight out")
        self._probe_losses(NO_PROMPT)

    @property
    def constants_cancel(self) -> bool:
        """Whether a constant per prompt in the reference's log-probs leaves the losses as they are, as in objectives
        on differences within a pair; asked of the function itself, on made-up pairs."""
        return not self.uses_reference or torch.allclose(
            self._probe_losses(NO_PROMPT), self._probe_losses((3.0, -1.0))
        )

    def _probe_losses(self, constants: tuple[float, float]) -> Tensor:
        """Losses of two made-up pairs, a constant for each prompt added to the reference's log-probs."""
        policy, inputs = probe_inputs(constants, self.inputs["policy"])
        return self(policy, replace(inputs, running={})).losses


def bind(
    function: Callable[..., Outcome], *, nll_weight: float = 0.0, kl_weight: float = 0.0, **options: object
) -> Objective:
    """An objective function with its configuration, described by its annotations.

    Its hooks take the options that they name: `advance(running, whole, *, ...)` and `settle(running, values, *, ...)`
    give what it carries from step to step (`running`), `between(*, ...)` what its `divergences` are of. Raises
    TypeError for an argument that nothing can be made of.
    """
    hints, hooks = get_type_hints(function), hooks_of(function)
    if hooks.bind is not None:
        return hooks.bind(nll_weight=nll_weight, kl_weight=kl_weight, **options)
    handed_over = [p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.KEYWORD_ONLY]
    unknown = set(handed_over) - {"policy", *ARGUMENTS}
    made = {"running": hooks.advance or hooks.settle, "divergences": hooks.between}
    unmade = [name for name, hook in made.items() if (name in handed_over) != (hook is not None)]
    if unknown or unmade:
        raise TypeError(
            f"{function.__name__}: {unknown or unmade[0]} cannot be made; see dpo_ref/objectives/interface.py"
        )
    configured = {name: p.default for name, p in configuration(function).items()} | options
    advance, settle, between = (_told(hook, configured) for hook in (hooks.advance, hooks.settle, hooks.between))
    return Objective(
        name=function.__name__,
        function=partial(function, **options),
        inputs={name: hints[name] for name in handed_over},
        hooks=hooks,
        nll_weight=nll_weight,
        kl_weight=kl_weight,
        between=() if between is None else between(),
        advance=advance,
        settle=settle,
    )


def _told(hook: Callable[..., Any] | None, configured: Mapping[str, object]) -> "partial[Any] | None":
    """A hook with those of the objective's options that it takes."""
    return hook and partial(hook, **{name: configured[name] for name in configuration(hook)})


def shared_terms(*, nll_weight: float = 0.0, kl_weight: float = 0.0) -> None:
    """The terms that every objective on pairs takes; `Objective` adds them to its losses."""


def positive(**values: float) -> None:
    """Raise ValueError naming the first value that is not a positive finite number."""
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{name}={value} must be positive and finite")


# --- two pairs that are no one's, on which objectives are asked what they refuse and what they read


LENGTHS = (2, 3, 1, 3)  # tokens of y_w, y_l, y_w, y_l
NO_PROMPT = (0.0, 0.0)


def _batch() -> PackedBatch:
    tokens, lengths = torch.arange(sum(LENGTHS)), torch.tensor(LENGTHS)
    return PackedBatch(
        input_ids=torch.arange(sum(LENGTHS) + 2),
        position_ids=torch.arange(sum(LENGTHS) + 2),
        layout=((1, LENGTHS[:2]), (1, LENGTHS[2:])),
        head_index=tokens,
        target_ids=tokens,
        response_index=torch.arange(4).repeat_interleave(lengths),
        lengths=lengths,
        num_bytes=4 * lengths,
        scored_per_group=(sum(LENGTHS[:2]), sum(LENGTHS[2:])),
        group_index=(0, 1),
        pairs_per_group=(1, 1),
        chosen=torch.tensor([0, 2]),
        rejected=torch.tensor([1, 3]),
        labels=torch.tensor([True, False, True, False]),
        advantages=torch.tensor([1.0, -1.0, 0.5, -0.5], dtype=torch.float64),
        rewards=torch.tensor([4.0, 1.0, 3.0, 2.5], dtype=torch.float64),
    )


def _logps(batch: PackedBatch, tokens: torch.Tensor) -> ResponseLogps:
    sums = torch.zeros(4, dtype=torch.float64).index_add(0, batch.response_index, tokens)
    return ResponseLogps(sums, batch.lengths, batch.num_bytes, tokens)


class _MadeUp(Mapping[TokenDivergence, Float[Tensor, " N"]]):
    """Any divergence, of distributions over three words at one token of each response."""

    def __init__(self) -> None:
        self.logp = torch.linspace(-2.0, 1.0, 12, dtype=torch.float64).reshape(4, 3).log_softmax(-1)
        self.logq = torch.linspace(0.5, -1.0, 12, dtype=torch.float64).reshape(3, 4).T.log_softmax(-1)

    def __getitem__(self, asked: TokenDivergence) -> Float[Tensor, " N"]:
        return asked.values(self.logp, self.logq)

    def __iter__(self) -> Iterator[TokenDivergence]:
        return iter(())

    def __len__(self) -> int:
        return 0


def probe_inputs(
    constants: tuple[float, float] = NO_PROMPT, kind: type = PairLogps
) -> tuple[ResponseLogps | ResponseScores, ObjectiveInputs]:
    """The policy's log-probs, or scores, and everything else, for an objective on items of this kind.

    `constants` are added to all reference log-probs of each of the two prompts, at the responses' first tokens.
    """
    batch = _batch()
    policy = _logps(batch, -torch.linspace(0.2, 3.0, sum(LENGTHS), dtype=torch.float64))
    other = -torch.linspace(2.0, 0.5, sum(LENGTHS), dtype=torch.float64)
    first = batch.lengths.cumsum(0) - batch.lengths
    each = torch.tensor(constants, dtype=torch.float64).repeat_interleave(2)
    reference = _logps(batch, other.index_add(0, first, each))
    pairwise = issubclass(kind, OF_PAIRS)
    models: Any = [policy, reference]
    if pairwise:
        models = [model.pairs(batch.chosen, batch.rejected) for model in models]
    own = (policy.sums, policy.lengths, policy.num_bytes, policy.token_logps)
    told = NextTokenLogps(*own, divergences=ResponseDivergences(_MadeUp()))
    outputs = ResponseScores(policy.sums) if kind is PairScores else told
    return outputs, ObjectiveInputs(
        batch,
        reference,
        old=_logps(batch, 1.1 * other),
        collision=_logps(batch, 0.5 * other),
        whole=BatchLogps(models[0], models[1], batch.labels, slice(0, 2 if pairwise else 4)),
        mismatched=Mismatched(policy.sums, reference.sums - 1),
        quantiles=Quantiles(torch.tensor([1.0, 0.25, 0.5, 0.0], dtype=torch.float64)),
    )
