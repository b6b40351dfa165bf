"""The protocol of references, and what is handed over to build one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from dpo_ref.data.groups import Groups
from dpo_ref.models.loading import ModelSource
from dpo_ref.types import PackedBatch, Progress, ResponseLogps, TokenGroup


@runtime_checkable
class Reference(Protocol):
    """A policy that others are measured against.

    `identity` is a digest of what its numbers mean (weights, tokenizer, template, dtype; truncation is in the token
    ids that are scored), never of beta, learning rate, seed or run. `weights` is the digest of its weights, or "".
    `normalised` says whether its probabilities of all responses to a prompt sum to 1; where they do not, only
    objectives in which a constant per prompt cancels may use it.
    """

    name: str
    identity: str
    weights: str
    normalised: bool
    own_text: bool  # it reads other text than the policy: another template, tokenizer, system prompt or end

    def logps(self, batch: PackedBatch) -> ResponseLogps:
        """Log-probabilities of the pack's responses, in nats."""
        ...

    def update(self, policy: nn.Module, step: int) -> None:
        """Move towards the policy after optimiser step `step`; a no-op unless the reference moves."""
        ...

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold for the run to go on; empty unless the reference moves."""
        ...

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over what `state_dict` gave."""
        ...


class Still:
    """What references have in common that do not move."""

    normalised, own_text = True, False

    def update(self, policy: nn.Module, step: int) -> None:
        """It does not move."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Nothing that training changed."""
        return {}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Raises ValueError for a checkpoint that holds a state: it is another reference's."""
        if state:
            raise ValueError("the checkpoint holds the weights of a reference that moves, and this one does not")


@dataclass(frozen=True, slots=True)
class ReferenceContext:
    """What references are built from at run time."""

    policy: nn.Module  # as it is before training
    tokenizer: Any  # the policy's
    uses_reference: bool  # whether the objective looks at a reference
    load: Callable[[ModelSource], nn.Module]
    load_tokenizer: Callable[..., Any]  # of a path and a revision
    text_identity: str  # digest of the policy's tokenizer and chat template
    groups: Groups  # everything that will be asked for: training and held-out data
    pack: Callable[[Sequence[TokenGroup]], list[list[TokenGroup]]]
    progress: Progress
    device: torch.device
    cache: Path
    needs_tokens: bool = False  # whether the objective looks at values of single tokens of the reference
