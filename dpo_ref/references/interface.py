"""The protocol of references, and what is handed over to build one."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from dpo_ref.component import Component
from dpo_ref.data.groups import ConcatGroups, Groups
from dpo_ref.data.scoring import Scoring
from dpo_ref.models.asked import Workspace
from dpo_ref.models.loading import TrainedModel
from dpo_ref.models.next_token import NextTokens
from dpo_ref.types import PackedBatch, ResponseLogps, TokenGroup, digest


class Reference(ABC):
    """A policy that others are measured against; what is not said of one is that it stays as it is.

    `identity` is a digest of what its numbers mean (weights, tokenizer, template, dtype; truncation is in the token
    ids that are scored), never of beta, learning rate, seed or run. `weights` is the digest of its weights, or "".
    `normalised` says whether its probabilities of all responses to a prompt sum to 1; where they do not, only
    objectives in which a constant per prompt cancels may use it.
    """

    name: str
    identity: str
    weights: str = ""
    normalised: bool = True
    own_text: bool = False  # it reads other text than the policy: another template, tokenizer, system prompt or end
    live: bool = True  # it can be asked about responses that were not known when it was built
    values_digest: str | None = None  # of its log-probs, where they were computed or given beforehand
    provenance: str | None = None  # whose log-probs it has, as the user declared
    strength: float = 1.0  # what a model's log-probs are multiplied with; other than 1 it is not that model
    table: str | None = None  # name of the folder of its log-probs, where they were computed beforehand
    audit: "Audit | None" = None  # what became of the responses in its own tokenizer and template
    notes: tuple[str, ...] = ()  # what the user is told of how it came about

    @property
    def tables(self) -> tuple[str, ...]:
        """Names of the folders that its log-probs are read from: its table, or its parts'."""
        return () if self.table is None else (self.table,)

    @property
    def model(self) -> nn.Module | None:
        """The model that gives its log-probs, where it is one of the policy's tokens and in memory."""
        return None

    @property
    def vocabulary(self) -> int | None:
        """How many tokens its next-token distributions are over, where its model is one of the policy's tokens, reads
        the policy's text and is in memory; else None."""
        return None

    @abstractmethod
    def logps(self, batch: PackedBatch) -> ResponseLogps:
        """Log-probabilities of the pack's responses, in nats."""

    def next_tokens(self, batch: PackedBatch) -> NextTokens:
        """Its next-token distributions at the pack's response tokens. Raises ValueError where it has none."""
        raise ValueError(f"reference={self.name} has no model in memory whose next-token distributions could be seen")

    def digest_of(self, indices: Sequence[int]) -> str | None:
        """Digest of its log-probs of the groups with these `group_index`, where they were computed or given
        beforehand."""
        return None

    def equals(self, policy: TrainedModel) -> bool:
        """Whether it is this model, reading the same text, and stays it."""
        same = self.weights == policy.weights and self.strength == 1
        return same and not self.own_text and not self.state_dict()

    def update(self, policy: nn.Module, step: int, made: Bool[Tensor, ""]) -> None:  # noqa: B027
        """Move towards the policy after optimiser step `step`, unless its update was not made."""

    def begin_round(self, policy: nn.Module) -> None:  # noqa: B027
        """Look at the policy as a round of training begins, before its first step."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold for the run to go on; empty unless the reference moves."""
        return {}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over what `state_dict` gave. Raises ValueError for a state of another reference."""
        if state:
            raise ValueError("the checkpoint holds the weights of a reference that moves, and this one does not")


class Tempered(Reference):
    """A reference whose log-probs are multiplied with `strength`: pi_ref^strength, not normalised. Its table, weights
    and audit are those of the reference as it is."""

    normalised = False

    def __init__(self, whole: Reference, strength: float) -> None:
        self._whole, self.strength = whole, strength
        self.name, self.weights, self.table = whole.name, whole.weights, whole.table
        self.identity = digest([whole.identity, "strength", strength])
        self.own_text, self.live, self.provenance = whole.own_text, whole.live, whole.provenance
        self.values_digest, self.audit, self.notes = whole.values_digest, whole.audit, whole.notes

    @property
    def model(self) -> nn.Module | None:
        """The model that gives the log-probs before they are multiplied."""
        return self._whole.model

    def logps(self, batch: PackedBatch) -> ResponseLogps:
        """Those of the whole reference, times the strength."""
        whole = self._whole.logps(batch)
        values = (whole.token_logps, whole.aligned, whole.span_logps)
        tokens, aligned, spans = (None if each is None else self.strength * each for each in values)
        sums = self.strength * whole.sums
        return ResponseLogps(sums, whole.lengths, whole.num_bytes, tokens, aligned, spans, whole.span_ends)

    def digest_of(self, indices: Sequence[int]) -> str | None:
        """That of the whole reference."""
        return self._whole.digest_of(indices)

    def update(self, policy: nn.Module, step: int, made: Bool[Tensor, ""]) -> None:
        """Move the whole reference."""
        self._whole.update(policy, step, made)

    def begin_round(self, policy: nn.Module) -> None:
        """Let the whole reference look at the policy."""
        self._whole.begin_round(policy)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """That of the whole reference."""
        return self._whole.state_dict()

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Into the whole reference."""
        self._whole.load_state_dict(state)


def tempered(reference: Reference, *, strength: float = 1.0) -> Reference:
    """The reference with its log-probs times `strength`, in (0, infinity): below 1 it counts less, and 0 would be
    reference=none (RainbowPO, arXiv:2410.04203). With dpo the margin is beta (D - strength D_ref), where
    D = log pi(chosen) - log pi(rejected)."""
    check_strength(reference.name, strength)
    return reference if strength == 1 else Tempered(reference, strength)


def check_strength(name: str, strength: float) -> None:
    """Raise ValueError for a strength that leaves no reference, or none to act on."""
    if strength == 1:
        return
    if name == "none":
        raise ValueError(f"reference.strength={strength} has no effect without a reference; leave it out")
    if strength == 0:
        raise ValueError("reference.strength=0 leaves no reference: write reference=none")
    if not 0 < strength < float("inf"):
        raise ValueError(f"reference.strength={strength} must be positive and finite: 1 is the reference as it is")


class Audit(Protocol):
    """What became of the responses on their way through a reference's template and tokenizer."""

    def line(self) -> str:
        """In a line."""
        ...


@dataclass(frozen=True, slots=True)
class ReferenceContext:
    """What references are built from at run time."""

    work: Workspace
    policy: TrainedModel  # as it is before training
    groups: Groups  # everything that will be asked for: training and held-out data
    pack: Callable[[Sequence[TokenGroup]], list[list[TokenGroup]]]
    uses_reference: bool = True  # whether the objective looks at a reference
    needs_tokens: bool = False  # whether it looks at values of single tokens of the reference
    scoring: Scoring = field(default_factory=Scoring)  # what of the groups' texts their tokens score
    spans_serve: bool = True  # whether spans of text may stand for tokens where theirs are not the policy's


def build(reference: Component, context: ReferenceContext) -> Reference:
    """A configured reference for the context's groups and the others that an objective looks at beside them."""
    groups = ConcatGroups(context.groups, *context.groups.others)
    with context.policy.precision():
        return reference.bound(tempered)(reference(replace(context, groups=groups)))
