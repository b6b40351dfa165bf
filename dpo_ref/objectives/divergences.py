"""What lies between two next-token distributions, p of the policy and q of a reference, at a token: a number, and its
gradient by the policy's logits there.

Both are given as log-probs of the whole vocabulary, for a chunk of tokens at a time (`models/next_token.py`); what is
kept of a token is the number. Objectives are handed sums over the scored tokens of each response, in nats.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dpo_ref.types import PackedBatch, ResponseLogps


class TokenDivergence(ABC):
    """A function of p and q. Two that are equal are one, so what several objectives ask for is computed once."""

    metric: ClassVar[str | None] = None  # the name under which it is logged

    @abstractmethod
    def values(self, logp: Float[Tensor, "R V"], logq: Float[Tensor, "R V"]) -> Float[Tensor, " R"]:
        """Its value at each token."""

    @abstractmethod
    def gradient(
        self, logp: Float[Tensor, "R V"], logq: Float[Tensor, "R V"], values: Float[Tensor, " R"]
    ) -> Float[Tensor, "R V"]:
        """Of each token's value, by the policy's logits at that token."""


@dataclass(frozen=True)
class ForwardKL(TokenDivergence):
    """KL(q || p) = sum_v q_v (log q_v - log p_v)."""

    metric: ClassVar[str | None] = "forward"

    def values(self, logp: Float[Tensor, "R V"], logq: Float[Tensor, "R V"]) -> Float[Tensor, " R"]:
        """Summed as it stands: a difference of two entropies would lose the digits of a small KL."""
        return (logq - logp).mul_(logq.exp()).sum(dim=-1)

    def gradient(
        self, logp: Float[Tensor, "R V"], logq: Float[Tensor, "R V"], values: Float[Tensor, " R"]
    ) -> Float[Tensor, "R V"]:
        """p - q."""
        return logp.exp().sub_(logq.exp())


@dataclass(frozen=True)
class ReverseKL(TokenDivergence):
    """KL(p || q) = sum_v p_v (log p_v - log q_v)."""

    metric: ClassVar[str | None] = "reverse"

    def values(self, logp: Float[Tensor, "R V"], logq: Float[Tensor, "R V"]) -> Float[Tensor, " R"]:
        """Summed as it stands."""
        return (logp - logq).mul_(logp.exp()).sum(dim=-1)

    def gradient(
        self, logp: Float[Tensor, "R V"], logq: Float[Tensor, "R V"], values: Float[Tensor, " R"]
    ) -> Float[Tensor, "R V"]:
        """p_v (log p_v - log q_v - KL)."""
        return (logp - logq).sub_(values[:, None]).mul_(logp.exp())


@dataclass(frozen=True)
class RenyiSum(TokenDivergence):
    """log sum_v p_v^a q_v^(1 - a), a the `order`: a - 1 times the Rényi divergence of p from q.

    It is what log p^a q^(1 - a) must be lowered by to be a distribution: that of the logits a f + (1 - a) f_ref, which
    lie between the two models' (a in (0, 1)) or beyond either.
    """

    order: float

    def values(self, logp: Float[Tensor, "R V"], logq: Float[Tensor, "R V"]) -> Float[Tensor, " R"]:
        """The log-normaliser."""
        return torch.lerp(logq, logp, self.order).logsumexp(dim=-1)

    def gradient(
        self, logp: Float[Tensor, "R V"], logq: Float[Tensor, "R V"], values: Float[Tensor, " R"]
    ) -> Float[Tensor, "R V"]:
        """a (s - p), s the distribution that p^a q^(1 - a) is made to."""
        between = torch.lerp(logq, logp, self.order).sub_(values[:, None]).exp_()
        return between.sub_(logp.exp()).mul_(self.order)


FORWARD_KL, REVERSE_KL = ForwardKL(), ReverseKL()

# --- as objectives are handed them


@dataclass(frozen=True, slots=True)
class ResponseDivergences:
    """What was asked for, summed over the scored tokens of each of N responses."""

    sums: Mapping[TokenDivergence, Float[Tensor, " N"]]

    @classmethod
    def of(cls, divergences: "ResponseDivergences", batch: PackedBatch) -> "ResponseDivergences":
        """Those of a pack's responses."""
        return divergences

    def __getitem__(self, asked: TokenDivergence) -> Float[Tensor, " N"]:
        return self.sums[asked]


@dataclass(frozen=True, slots=True)
class PairDivergences:
    """The same, of chosen and rejected responses of B pairs, which are positions among the N."""

    sums: Mapping[TokenDivergence, Float[Tensor, " N"]]
    chosen: Int[Tensor, " B"]
    rejected: Int[Tensor, " B"]

    @classmethod
    def of(cls, divergences: ResponseDivergences, batch: PackedBatch) -> "PairDivergences":
        """Those of a pack's pairs."""
        return cls(divergences.sums, batch.chosen, batch.rejected)

    def __getitem__(self, asked: TokenDivergence) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """Of the chosen and of the rejected responses."""
        values = self.sums[asked]
        return values[self.chosen], values[self.rejected]


@dataclass(frozen=True, slots=True)
class NextTokenLogps(ResponseLogps):
    """What the policy says about N responses, and what lies between its next-token distributions and a reference's at
    their tokens."""

    divergences: ResponseDivergences = field(kw_only=True)


def kl_per_token(divergences: ResponseDivergences, batch: PackedBatch) -> Float[Tensor, " B"]:
    """KL(p || q) per token of a pair, in nats: the sum over the scored tokens of both responses, divided by their
    number."""
    chosen, rejected = PairDivergences.of(divergences, batch)[REVERSE_KL]
    return (chosen + rejected) / (batch.lengths[batch.chosen] + batch.lengths[batch.rejected])
