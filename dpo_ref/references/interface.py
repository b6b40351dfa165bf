"""The protocol of references, and what is handed over to build one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from dpo_ref.progress import Progress
from dpo_ref.types import PackedBatch, PromptGroup, ResponseLogps, TokenGroup


@runtime_checkable
class Reference(Protocol):
    """A policy that others are measured against.

    `identity` is a digest of what its numbers mean (weights, tokenizer, template, dtype; truncation is in the token
    ids that are scored), never of beta, learning rate, seed or run. `weights` is the digest of its weights, or "".
    """

    name: str
    identity: str
    weights: str

    def logps(self, batch: PackedBatch) -> ResponseLogps:
        """Log-probabilities of the pack's responses, in nats."""
        ...

    def update(self, policy: nn.Module, step: int) -> None:
        """Move towards the policy after optimiser step `step`; a no-op unless the reference moves."""
        ...


@dataclass(frozen=True, slots=True)
class ReferenceContext:
    """What references are built from at run time."""

    policy: nn.Module  # as it is before training
    tokenizer: Any  # the policy's
    uses_reference: bool  # whether the objective looks at a reference
    load: Callable[[str], nn.Module]  # another model of the same vocabulary, as the policy was loaded
    load_tokenizer: Callable[[str], Any]
    text_identity: str  # digest of the policy's tokenizer and chat template
    groups: Sequence[TokenGroup]  # everything that will be asked for: training and held-out data
    texts: Callable[[int], PromptGroup]  # the texts of the group with this group_index
    pack: Callable[[Sequence[TokenGroup]], list[list[TokenGroup]]]
    progress: Progress
    device: torch.device
    cache: Path
