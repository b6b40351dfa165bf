"""Next-token distributions of a policy beside those of a reference, at the response tokens of a pack: log-probs and
what lies between the two (`objectives/divergences.py`), and the gradient of a loss of both.

The reference's hidden states are computed once a pack, without gradient. Both heads are applied to one chunk of tokens
after the other, in the pass of `logps.FusedLoss`: of a token its hidden states and a few numbers are kept, and no
[tokens, vocabulary] tensor outlives its chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dpo_ref.models.logps import (
    FromLogits,
    FusedLoss,
    Head,
    LossOf,
    Measured,
    chunk_rows,
    head_of,
    response_hidden,
    sizes_in,
    sum_by_response,
    sums_in,
    token_logps,
)
from dpo_ref.objectives.divergences import NextTokenLogps, ResponseDivergences, TokenDivergence
from dpo_ref.types import PackedBatch, ResponseLogps, Span


@dataclass(frozen=True, slots=True)
class NextTokens:
    """A model's next-token distributions at the response tokens of one pack, as what they are made of: hidden states
    and the head, wherever the model is."""

    hidden: Float[Tensor, "R H"]
    head: Head

    @torch.no_grad()
    def logps(self, batch: PackedBatch) -> ResponseLogps:
        """Log-probs of the pack's responses, on the batch's device."""
        here, there = batch.target_ids.device, self.hidden.device
        values = token_logps(self.hidden, self.head, batch.target_ids.to(there)).to(here)
        return ResponseLogps(sum_by_response(values, batch), batch.lengths, batch.num_bytes, values)

    @torch.no_grad()
    def log_softmax(self, rows: slice) -> Float[Tensor, "C V"]:
        """Log-probs of the whole vocabulary at some of the tokens."""
        return _normalised(self.head.logits(self.hidden[rows]))


@torch.no_grad()
def next_tokens(model: nn.Module, batch: PackedBatch) -> NextTokens:
    """Those of a model as it is now, which may be on another device than the batch: one forward pass of its trunk."""
    here, there = batch.input_ids.device, next(model.parameters()).device
    hidden, head = response_hidden(model, batch if here == there else batch.to(there)), head_of(model)
    bias = None if head.bias is None else head.bias.detach()
    return NextTokens(hidden, replace(head, weight=head.weight.detach(), bias=bias))


@torch.no_grad()
def vocabulary_of(model: nn.Module) -> int:
    """How many tokens a model's distributions are over: the rows of its head, of which its tokenizer may use fewer."""
    return len(head_of(model).weight)


def _normalised(logits: Float[Tensor, "C V"]) -> Float[Tensor, "C V"]:
    return logits.sub_(logits.logsumexp(dim=-1, keepdim=True))


@dataclass(frozen=True, slots=True)
class BesideReference(FromLogits):
    """A policy as objectives see it that look at its next-token distributions beside a reference's, which are those of
    one pack; `divergences` are what they ask for. In the place of a trained model in the loop."""

    policy: nn.Module
    reference: NextTokens
    divergences: tuple[TokenDivergence, ...]
    num_alive: ClassVar[int] = 4  # two models' logits, and what is made of them

    @torch.no_grad()
    def outputs(self, batch: PackedBatch) -> NextTokenLogps:
        """Log-probs of the pack's responses, and what lies between the two models at their tokens."""
        hidden, head = response_hidden(self.policy, batch), head_of(self.policy)
        size, parts = chunk_rows(head.weight, self.num_alive), []
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            parts.append(self.measure(head, hidden[rows], batch.target_ids[rows], None, rows)[0])
        return self._of_pack([torch.cat(part) for part in zip(*parts, strict=True)], batch)

    def loss(self, batch: PackedBatch, loss_of: LossOf) -> tuple[Float[Tensor, ""], NextTokenLogps]:
        """The summed loss, its gradient made in the forward pass, and the detached outputs. What `loss_of` returns
        must not depend on other groups."""
        hidden, head = response_hidden(self.policy, batch), head_of(self.policy)
        loss, *values = FusedLoss.apply(hidden, head.weight, head.bias, head, batch, loss_of, self)  # pyright: ignore
        return loss, self._of_pack(values, batch)

    def _of_pack(self, values: Sequence[Float[Tensor, " R"]], batch: PackedBatch) -> NextTokenLogps:
        (span,) = batch.spans(len(batch.target_ids))
        return self.told(values, batch, span)

    # --- what the fused loss is told of a chunk

    def measure(
        self, head: Head, hidden: Float[Tensor, "C H"], targets: Int[Tensor, " C"], room: Tensor | None, rows: slice
    ) -> Measured:
        """The targets' log-probs, and what is asked for; the gradient of a number without a coefficient is not
        made."""
        logits = head.logits(hidden, room)
        slope = head.slope(logits)
        logp = _normalised(logits)
        logq = self.reference.log_softmax(rows).to(logp)
        between = [divergence.values(logp, logq) for divergence in self.divergences]

        def gradient(of_logps: Tensor, *of_divergences: Tensor | None) -> Float[Tensor, "C V"]:
            d_logits = logp.exp().mul_(-of_logps[:, None])
            d_logits.scatter_add_(1, targets[:, None], of_logps[:, None])
            for divergence, values, of_values in zip(self.divergences, between, of_divergences, strict=True):
                if of_values is not None:
                    d_logits += divergence.gradient(logp, logq, values).mul_(of_values[:, None])
            return head.gradient_of_product(d_logits, slope, hidden.dtype)

        return [logp.gather(1, targets[:, None]).squeeze(1), *between], gradient

    def told(self, values: Sequence[Float[Tensor, " R"]], batch: PackedBatch, span: Span) -> NextTokenLogps:
        """Log-probs and divergences of which derivatives can be taken."""
        tokens, *between = values
        sums, *of_divergences = (sums_in(each, batch, span) for each in (tokens, *between))
        divergences = ResponseDivergences(dict(zip(self.divergences, of_divergences, strict=True)))
        return NextTokenLogps(sums, *sizes_in(batch, span), tokens, divergences=divergences)
