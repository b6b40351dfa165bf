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
from dpo_ref.types import PackedBatch, ResponseLogps, TokenGroup


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
    audit: "Audit | None" = None  # what became of the responses in its own tokenizer and template
    notes: tuple[str, ...] = ()  # what the user is told of how it came about

    @property
    def model(self) -> nn.Module | None:
        """The model that gives its log-probs, where it is one of the policy's tokens and in memory."""
        return None

    @abstractmethod
    def logps(self, batch: PackedBatch) -> ResponseLogps:
        """Log-probabilities of the pack's responses, in nats."""

    def digest_of(self, indices: Sequence[int]) -> str | None:
        """Digest of its log-probs of the groups with these `group_index`, where they were computed or given
        beforehand."""
        return None

    def equals(self, policy: TrainedModel) -> bool:
        """Whether it is this model, reading the same text, and stays it."""
        return self.weights == policy.weights and not self.own_text and not self.state_dict()

    def update(self, policy: nn.Module, step: int, made: Bool[Tensor, ""]) -> None:  # noqa: B027
        """Move towards the policy after optimiser step `step`, unless its update was not made."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold for the run to go on; empty unless the reference moves."""
        return {}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over what `state_dict` gave. Raises ValueError for a state of another reference."""
        if state:
            raise ValueError("the checkpoint holds the weights of a reference that moves, and this one does not")


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


def build(reference: Component, context: ReferenceContext) -> Reference:
    """A configured reference for the context's groups and the others that an objective looks at beside them."""
    groups = ConcatGroups(context.groups, *context.groups.others)
    with context.policy.precision():
        return reference(replace(context, groups=groups))
