"""Log-probabilities of responses: the one function that policy and references share.

The language-model head is applied to response positions only, a chunk of tokens at a time, and each chunk's logits are
recomputed in the backward pass: no [tokens, vocabulary] tensor outlives its chunk.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dpo_ref.models.adapters import effective_bias, effective_weight
from dpo_ref.models.attention import KERNEL_DTYPES, REGISTERED, PackedLayout, laid_out
from dpo_ref.models.shards import whole
from dpo_ref.types import PackedBatch, ResponseLogps, ResponseScores, Span

CHUNK_LOGITS = 2**25  # logits alive at once: 128 MiB in float32
WHOLE = 4  # times as many for the tokens of one group, whose gradient is then made of the same logits
ON_CUDA = 8  # times as many on CUDA: the gradient of the head, as large as its weights, is added to once a chunk


@dataclass(frozen=True, slots=True)
class Head:
    """The last linear layer and what its architecture does to the logits: logits = cap(scale * (h W^T + b))."""

    weight: Float[Tensor, "V H"]
    bias: Float[Tensor, " V"] | None = None
    scale: float = 1.0
    softcap: float | None = None

    def product(self, hidden: Float[Tensor, "R H"], room: Float[Tensor, "C V"] | None = None) -> Float[Tensor, "R V"]:
        """h W^T + b in the dtype of the hidden states; written into the first rows of `room`, where it is given."""
        weight = self.weight.to(hidden.dtype)
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        if room is None:
            return nn.functional.linear(hidden, weight, bias)
        product = torch.mm(hidden, weight.T, out=room[: len(hidden)])
        return product if bias is None else product.add_(bias)

    def logits(self, hidden: Float[Tensor, "R H"], room: Float[Tensor, "C V"] | None = None) -> Float[Tensor, "R V"]:
        """Logits in at least float32, whatever the dtype of the product."""
        logits = self.product(hidden, room)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = logits if self.scale == 1.0 else logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def slope(self, logits: Float[Tensor, "R V"]) -> Float[Tensor, "R V"] | None:
        """Of the cap, at these logits; None without one."""
        return None if self.softcap is None else 1 - (logits / self.softcap).square()

    def gradient_of_product(
        self, d_logits: Float[Tensor, "R V"], slope: Float[Tensor, "R V"] | None, dtype: torch.dtype
    ) -> Float[Tensor, "R V"]:
        """The gradient by the head's product, in its dtype, of that by the logits, which it may overwrite."""
        if slope is not None:
            d_logits.mul_(slope)
        return (d_logits if self.scale == 1.0 else d_logits.mul_(self.scale)).to(dtype)


def head_of(model: nn.Module) -> Head:
    """The head of a transformers causal language model, with its architecture's post-processing of the logits. Where
    an adapter lies on it, its weight is formed once for all tokens, and gradients reach the adapter through it; where
    ranks hold parts of it, it is gathered once, for all tokens of the pack."""
    causal_lm: Any = model
    output, config = causal_lm.get_output_embeddings(), causal_lm.config.get_text_config()
    scale = 1.0
    if getattr(config, "logit_scale", None) is not None:  # Cohere
        scale = float(config.logit_scale)
    elif getattr(config, "logits_scaling", None) is not None:  # Granite
        scale = 1.0 / float(config.logits_scaling)
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma; RecurrentGemma below
    softcap = getattr(config, "logits_soft_cap", None) if softcap is None else softcap
    bias = effective_bias(output)
    return Head(whole(effective_weight(output)), None if bias is None else whole(bias), scale, softcap)


def chunk_rows(weight: Float[Tensor, "V H"], num_alive: int = 1) -> int:
    """How many tokens' logits are alive at once, with so many tensors of their size."""
    return max(1, CHUNK_LOGITS * (ON_CUDA if weight.is_cuda else 1) // (num_alive * weight.shape[0]))


class _ChunkedTokenLogps(torch.autograd.Function):
    """log softmax(logits)[target] per token; saves hidden states and log-normalisers, recomputes logits."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head, targets: Tensor) -> Tensor:
        rows = chunk_rows(weight)
        logps, normalisers = [], []
        for hidden_c, target_c in zip(hidden.split(rows), targets.split(rows), strict=True):
            values, normaliser = _target_logps(head, hidden_c, target_c)
            logps.append(values)
            normalisers.append(normaliser)
        ctx.save_for_backward(hidden, weight, bias, targets, torch.cat(normalisers))
        ctx.rows, ctx.scale, ctx.softcap = rows, head.scale, head.softcap
        return torch.cat(logps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        hidden, weight, bias, targets, normalisers = ctx.saved_tensors
        head = Head(weight, bias, ctx.scale, ctx.softcap)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=normalisers.dtype)
        d_bias = torch.zeros(weight.shape[0], dtype=normalisers.dtype, device=weight.device)
        weight_h = weight.to(hidden.dtype)
        chunks = (x.split(ctx.rows) for x in (hidden, targets, normalisers, grads[0], grad_hidden))
        for hidden_c, target_c, normaliser_c, grad_c, out_c in zip(*chunks, strict=True):
            logits = head.logits(hidden_c)
            d_logits = (logits - normaliser_c[:, None]).exp_().mul_(-grad_c[:, None])
            d_logits.scatter_add_(1, target_c[:, None], grad_c[:, None].to(d_logits.dtype))
            if ctx.softcap is not None:
                d_logits.mul_(1 - (logits / ctx.softcap).square())
            d_product = d_logits.mul_(ctx.scale).to(hidden.dtype)
            torch.mm(d_product, weight_h, out=out_c)
            grad_weight += d_product.T @ hidden_c
            if bias is not None:
                d_bias += d_logits.sum(dim=0)
        grad_bias = None if bias is None else d_bias.to(bias.dtype)
        return grad_hidden, grad_weight.to(weight.dtype), grad_bias, None, None


def _target_logps(
    head: Head, hidden: Float[Tensor, "R H"], targets: Int[Tensor, " R"]
) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
    """The targets' log-probs and the log-normalisers."""
    if _kernels_take(hidden, head):
        from dpo_ref.models.kernels import target_logps

        return target_logps(head.product(hidden), targets, head.scale)
    logits = head.logits(hidden)
    normalisers = logits.logsumexp(dim=-1)
    return logits.gather(1, targets[:, None]).squeeze(1) - normalisers, normalisers


def token_logps(hidden: Float[Tensor, "R H"], head: Head, targets: Int[Tensor, " R"]) -> Float[Tensor, " R"]:
    """Log-probability of each target token in nats, at least float32, differentiable in hidden states and head."""
    return _ChunkedTokenLogps.apply(hidden, head.weight, head.bias, head, targets)  # pyright: ignore


@torch.no_grad()
def token_logps_and_entropy(
    hidden: Float[Tensor, "R H"], head: Head, targets: Int[Tensor, " R"]
) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
    """Log-probability of each target token and the entropy of the distribution it was drawn from, both in nats, from
    one product per chunk: H = log Z - sum_v p_v z_v."""
    rows = chunk_rows(head.weight)
    logps, entropies = [], []
    for hidden_c, target_c in zip(hidden.split(rows), targets.split(rows), strict=True):
        logits = head.logits(hidden_c)
        normaliser = logits.logsumexp(dim=-1)
        logps.append(logits.gather(1, target_c[:, None]).squeeze(1) - normaliser)
        weights = (logits - normaliser[:, None]).exp_()
        entropies.append(normaliser - (weights * logits).sum(dim=-1))
    return torch.cat(logps), torch.cat(entropies)


@torch.no_grad()
def token_collisions(hidden: Float[Tensor, "R H"], head: Head) -> Float[Tensor, " R"]:
    """log sum_v p_v^2 of the distribution at each token: the log-probability that two draws from it agree, nats."""
    rows = chunk_rows(head.weight)
    values = []
    for hidden_c in hidden.split(rows):
        logits = head.logits(hidden_c)
        normaliser = logits.logsumexp(dim=-1)
        values.append(logits.mul_(2).logsumexp(dim=-1) - 2 * normaliser)
    return torch.cat(values)


def response_hidden(model: nn.Module, batch: PackedBatch) -> Float[Tensor, "R H"]:
    """Hidden states from which the pack's response tokens are predicted: of the whole pack at once where packed
    attention is installed (see `packable`) and positions allow it (`reach`), else of one response after the other."""
    return hidden_at(model, batch, batch.head_index, batch.response_index)


def hidden_at(
    model: nn.Module, batch: PackedBatch, positions: Int[Tensor, " P"], owners: Int[Tensor, " P"]
) -> Float[Tensor, "P H"]:
    """Last hidden states at these positions of the pack, in its prompts as the responses `owners` see them; computed
    as `response_hidden` says."""
    kept = _KEPT.get()
    return (_hidden_at if kept is None else kept.hidden_at)(model, batch, positions, owners)


def _hidden_at(
    model: nn.Module, batch: PackedBatch, positions: Int[Tensor, " P"], owners: Int[Tensor, " P"]
) -> Float[Tensor, "P H"]:
    causal_lm: Any = model
    packed = causal_lm.config._attn_implementation in REGISTERED.values() and _within_reach(causal_lm, batch)
    if packed:
        hidden = _packed_states(model, batch).index_select(0, positions)
    else:
        hidden = _separate_states(model, batch).index_select(0, _rows_alone(batch, positions, owners))
    device = hidden.device.type
    # Autocast leaves the residual stream in float32, and does not reach the head's in-place products.
    return hidden.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else hidden


def _within_reach(model: Any, batch: PackedBatch) -> bool:
    """Whether positions in this pack are what they are in each of its sequences alone (`reach`). Raises ValueError
    where they are not even that of one sequence: they would depend on those that the model saw before."""
    longest, limit = (
        max(prompt + max(responses) for prompt, responses in batch.layout),
        reach(model.config.get_text_config()),
    )
    if limit is not None and longest > limit.tokens and limit.kind == "dynamic":
        raise ValueError(
            f"{type(model).__name__} has dynamic positions: beyond {limit.tokens} tokens what it says depends on what "
            f"it was asked before, and a sequence has {longest}; use data.max_length={limit.tokens}"
        )
    return limit is None or longest <= limit.tokens


class Reach(NamedTuple):
    """Up to how many tokens a sequence's rotary positions do not depend on the longest of its batch."""

    kind: str
    tokens: int


def reach(config: Any) -> Reach | None:
    """Of an architecture whose rotary positions depend on lengths; None for all others."""
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type")
    if kind == "dynamic":
        return Reach(kind, config.max_position_embeddings)
    return Reach(kind, rope["original_max_position_embeddings"]) if kind == "longrope" else None


# An evaluation asks the same models about the same answers and pairs for several of its numbers.

KEPT_BYTES = 2**28  # of hidden states; what does not fit is computed again


class _Kept:
    """Hidden states of packs, as long as their models live."""

    def __init__(self) -> None:
        self._states: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], Tensor]] = WeakKeyDictionary()
        self._room = KEPT_BYTES

    def hidden_at(
        self, model: nn.Module, batch: PackedBatch, positions: Int[Tensor, " P"], owners: Int[Tensor, " P"]
    ) -> Float[Tensor, "P H"]:
        known = self._states.setdefault(model, {})
        asked = (batch.layout, *(x.cpu().numpy().tobytes() for x in (batch.input_ids, positions)))
        if asked in known:
            return known[asked]
        hidden = _hidden_at(model, batch, positions, owners)
        if hidden.nbytes <= self._room:
            self._room -= hidden.nbytes
            known[asked] = hidden
        return hidden


_KEPT: ContextVar[_Kept | None] = ContextVar("hidden states that are kept", default=None)


@contextmanager
def hidden_states_kept() -> Iterator[None]:
    """Within, where no gradient is taken and no weight changes, what was computed for a pack is not computed again."""
    token = _KEPT.set(_Kept())
    try:
        yield
    finally:
        _KEPT.reset(token)


def separate_hidden(model: nn.Module, batch: PackedBatch) -> Float[Tensor, "R H"]:
    """The same hidden states with every response forwarded alone behind its prompt, in the attention that the model
    has."""
    rows = _rows_alone(batch, batch.head_index, batch.response_index)
    return _separate_states(model, batch).index_select(0, rows)


def _separate_states(model: nn.Module, batch: PackedBatch) -> Float[Tensor, "S H"]:
    """Of every response's own copy of its prompt and of itself, one after the other."""
    backbone: Any = model.base_model
    states, start = [], 0
    for prompt, responses in batch.layout:
        prompt_ids, start = batch.input_ids[start : start + prompt], start + prompt
        for size in responses:
            ids = torch.cat([prompt_ids, batch.input_ids[start : start + size]])
            with laid_out(PackedLayout(((prompt, (size,)),), ids.device)):  # where packed attention is installed
                states.append(backbone(input_ids=ids[None], use_cache=False)[0][0])
            start += size
    return torch.cat(states)


def _rows_alone(batch: PackedBatch, positions: Int[Tensor, " P"], owners: Int[Tensor, " P"]) -> Int[Tensor, " P"]:
    """Where positions of the pack lie when every response stands behind a prompt of its own."""
    shifts, start, row = (
        [],
        0,
        0,
    )  # per response: the prompt's end, and what is added to positions before and behind it
    for prompt, responses in batch.layout:
        begin, start = start, start + prompt
        for size in responses:
            shifts.append((begin + prompt, row - begin, row + prompt - start))
            start, row = start + size, row + prompt + size
    ends, before, behind = torch.tensor(shifts, device=positions.device)[owners].unbind(1)
    return positions + torch.where(positions < ends, before, behind)


def packed_hidden(model: nn.Module, batch: PackedBatch) -> Float[Tensor, "R H"]:
    """The same hidden states from one forward pass in which the responses of a group share their prompt."""
    return _packed_states(model, batch).index_select(0, batch.head_index)


def _packed_states(model: nn.Module, batch: PackedBatch) -> Float[Tensor, "T H"]:
    backbone: Any = model.base_model
    with laid_out(PackedLayout(batch.layout, batch.input_ids.device)):
        output = backbone(input_ids=batch.input_ids[None], position_ids=batch.position_ids[None], use_cache=False)
    return output[0][0]


def sum_by_response(values: Float[Tensor, " R"], batch: PackedBatch) -> Float[Tensor, " N"]:
    """Per-token values summed over each response, in float64."""
    zeros = torch.zeros(len(batch.lengths), dtype=torch.float64, device=values.device)
    return zeros.index_add(0, batch.response_index, values.double())


def response_logps(model: nn.Module, batch: PackedBatch) -> ResponseLogps:
    """Log-probabilities `model` gives the responses of a pack: DPO's log pi(y|x), summed over y and its end token."""
    values = token_logps(response_hidden(model, batch), head_of(model), batch.target_ids)
    return ResponseLogps(sum_by_response(values, batch), batch.lengths, batch.num_bytes, values)


def last_places(batch: PackedBatch) -> Int[Tensor, " N"]:
    """Where in the pack each response's last token lies: its end-of-turn token unless it was cut."""
    last, end = [], 0
    for prompt, responses in batch.layout:
        end += prompt
        for size in responses:
            end += size
            last.append(end - 1)
    return torch.tensor(last, device=batch.input_ids.device)


def response_scores(model: nn.Module, batch: PackedBatch) -> ResponseScores:
    """What a model with a scalar head (`model.score`, see `reward_model`) says about the responses of a pack: the
    head's product with the hidden state of each response's own last token, in at least float32."""
    reward_model: Any = model
    hidden = hidden_at(model, batch, last_places(batch), torch.arange(len(batch.lengths), device=batch.lengths.device))
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    weight = whole(reward_model.score.weight).to(hidden.dtype)
    return ResponseScores((hidden * weight).sum(dim=-1).double())


@torch.no_grad()
def response_collisions(model: nn.Module, batch: PackedBatch) -> ResponseLogps:
    """`token_collisions` of the model at the pack's response tokens, and their sums over responses."""
    values = token_collisions(response_hidden(model, batch), head_of(model))
    return ResponseLogps(sum_by_response(values, batch), batch.lengths, batch.num_bytes, values)


# --- the loss of a pack with its gradient made in the forward pass
# When an objective separates by group and the reference's log-probs are known, the coefficient of every token's
# log-prob is known as soon as the logits of its group are: the gradient is taken while they are alive, with three
# products of the head (logits, hidden states, weights) instead of the four that recomputing needs. Chunks end at group
# boundaries; the memory above the result is one chunk of logits. A group far larger than a chunk is taken in several,
# with four products.


LossOf = Callable[[ResponseLogps, Span], Tensor]
# Numbers of a chunk's tokens; and, of their coefficients in the loss, the gradient of the head's product. What either
# takes of the room for logits is free again when the gradient has been used.
Measured = tuple[list[Float[Tensor, " R"]], Callable[..., Float[Tensor, "R V"]]]


class FromLogits(ABC):
    """What a loss is told of tokens, made while their chunk's logits are alive; log-probs are the first of it."""

    num_alive: ClassVar[int] = 1  # tensors of the size of a chunk's logits

    @abstractmethod
    def measure(
        self, head: Head, hidden: Float[Tensor, "C H"], targets: Int[Tensor, " C"], room: Tensor | None, rows: slice
    ) -> Measured:
        """Of the tokens that lie at `rows` of the pack's response tokens."""

    @abstractmethod
    def told(self, values: Sequence[Float[Tensor, " R"]], batch: PackedBatch, span: Span) -> ResponseLogps:
        """The numbers of a run of groups as a loss is told them."""


class FusedLoss(torch.autograd.Function):
    """Summed loss, and detached numbers of every token; the gradient is ready when the forward pass ends."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head, batch: PackedBatch, loss_of: LossOf,
        made: FromLogits | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        made = made or LogpsAlone()
        accumulate = torch.promote_types(hidden.dtype, torch.float32)
        d_hidden = torch.empty_like(hidden)
        # A head that is not trained, as below an adapter, needs none: a third of its work, and its size in memory.
        d_weight = torch.zeros_like(weight, dtype=accumulate) if ctx.needs_input_grad[1] else None
        d_bias = torch.zeros(weight.shape[0], dtype=accumulate, device=weight.device)
        weight_h = weight.to(hidden.dtype)
        most = chunk_rows(weight, made.num_alive)
        # One for all chunks: the C library would map each anew, page by page.
        room = hidden.new_empty(rows_alive(batch, most), len(weight))

        def measure(rows: slice) -> Measured:
            return made.measure(head, hidden[rows], batch.target_ids[rows], room, rows)

        def take(rows: slice, d_product: Float[Tensor, "R V"]) -> None:
            torch.mm(d_product, weight_h, out=d_hidden[rows])
            if d_weight is not None:
                _add_product(d_weight, d_product, hidden[rows])
            if bias is not None:
                d_bias.add_(d_product.sum(dim=0))

        def loss_in(span: Span, values: Sequence[Tensor]) -> Tensor:
            return loss_of(made.told(values, batch, span), span)

        spans = batch.spans(most)
        passes = [_one_pass(_chunks_in(span, most), measure, take, partial(loss_in, span)) for span in spans]
        losses, parts = zip(*passes, strict=True)
        d_weight = None if d_weight is None else d_weight.to(weight.dtype)
        ctx.save_for_backward(d_hidden, d_weight, None if bias is None else d_bias.to(bias.dtype))
        values = [torch.cat(part) for part in zip(*parts, strict=True)]
        ctx.mark_non_differentiable(*values)
        return torch.stack(losses).sum(), *values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        factor = grads[0]
        scaled = [None if d is None else d.mul_(factor.to(d.dtype)) for d in (d_hidden, d_weight, d_bias)]
        return *scaled, None, None, None, None


def _one_pass(
    chunks: Sequence[slice],
    measure: Callable[[slice], Measured],
    take: Callable[[slice, Tensor], None],
    loss_of: Callable[[Sequence[Tensor]], Tensor],
) -> tuple[Float[Tensor, ""], Sequence[Float[Tensor, " R"]]]:
    """The loss of a run of groups and the numbers of its tokens; `take` is handed the gradient of the head's product,
    chunk by chunk. Where there are several, the logits of each are made once for its numbers, of which the
    coefficients of all tokens come, and once more for its gradient."""
    alone = measure(chunks[0]) if len(chunks) == 1 else None
    values = alone[0] if alone else [torch.cat(x) for x in zip(*(measure(rows)[0] for rows in chunks), strict=True)]
    with torch.enable_grad():
        leaves = [value.detach().requires_grad_() for value in values]
        loss = loss_of(leaves)
        coefficients = torch.autograd.grad(loss, leaves, allow_unused=True)
    begin = chunks[0].start
    for rows in chunks:
        _, gradient = alone or measure(rows)
        own = slice(rows.start - begin, rows.stop - begin)
        take(rows, gradient(*(None if each is None else each[own] for each in coefficients)))
        del gradient  # holds what is of the chunk's size
    return loss.detach(), values


def _chunks_in(span: Span, most: int) -> list[slice]:
    """Response tokens of a run of groups, in chunks whose logits are alive at once: all of them, unless they are those
    of one group that is far larger than a chunk."""
    rows = span["R"]
    if rows.stop - rows.start <= WHOLE * most:
        return [rows]
    return [slice(start, min(start + most, rows.stop)) for start in range(rows.start, rows.stop, most)]


def rows_alive(batch: PackedBatch, most: int) -> int:
    """How many response tokens of a pack have their logits alive at once in the fused loss, where a chunk has `most`
    of several groups."""
    return max(rows.stop - rows.start for span in batch.spans(most) for rows in _chunks_in(span, most))


class LogpsAlone(FromLogits):
    """Of every token its log-prob, of every response their sum."""

    def measure(
        self, head: Head, hidden: Float[Tensor, "C H"], targets: Int[Tensor, " C"], room: Tensor | None, rows: slice
    ) -> Measured:
        """In kernels where they know the head."""
        return (_softmax_in_kernels if _kernels_take(hidden, head) else _softmax)(head, hidden, targets, room)

    def told(self, values: Sequence[Float[Tensor, " R"]], batch: PackedBatch, span: Span) -> ResponseLogps:
        """Log-probs of which derivatives can be taken."""
        (token_logps,) = values
        return ResponseLogps(sums_in(token_logps, batch, span), *sizes_in(batch, span), token_logps)


def _softmax(
    head: Head, hidden: Float[Tensor, "R H"], targets: Int[Tensor, " R"], room: Float[Tensor, "C V"] | None
) -> Measured:
    logits = head.logits(hidden, room)
    slope = head.slope(logits)
    logits.sub_(logits.amax(dim=-1, keepdim=True))
    target_logits = logits.gather(1, targets[:, None])
    weights = logits.exp_()  # in place, and once: the softmax is weights / total
    total = weights.sum(dim=-1, keepdim=True)

    def gradient(coefficients: Float[Tensor, " R"]) -> Float[Tensor, "R V"]:
        d_logits = weights.mul_(-coefficients[:, None] / total)
        d_logits.scatter_add_(1, targets[:, None], coefficients[:, None])
        return head.gradient_of_product(d_logits, slope, hidden.dtype)

    return [(target_logits - total.log()).squeeze(1)], gradient


def _kernels_take(hidden: Tensor, head: Head) -> bool:
    return hidden.is_cuda and hidden.dtype in KERNEL_DTYPES and head.softcap is None


def _softmax_in_kernels(
    head: Head, hidden: Float[Tensor, "R H"], targets: Int[Tensor, " R"], room: Float[Tensor, "C V"] | None
) -> Measured:
    """The same in two kernels, on half-precision logits that become their gradient."""
    from dpo_ref.models.kernels import become_gradient, target_logps

    logits = head.product(hidden, room)
    values, normalisers = target_logps(logits, targets, head.scale)

    def gradient(coefficients: Float[Tensor, " R"]) -> Float[Tensor, "R V"]:
        become_gradient(logits, targets, head.scale, normalisers, coefficients)
        return logits

    return [values], gradient


def _add_product(total: Tensor, d_product: Tensor, hidden: Tensor) -> None:
    """total += d_product^T hidden, in the total's precision."""
    if total.dtype == hidden.dtype:
        total.addmm_(d_product.T, hidden)
    else:
        total += d_product.T @ hidden


def sums_in(values: Float[Tensor, " R"], batch: PackedBatch, span: Span) -> Float[Tensor, " N"]:
    """Values of the tokens of a run of groups, summed over each of its responses, in float64."""
    owners = batch.response_index[span["R"]] - span["N"].start
    zeros = values.new_zeros(span["N"].stop - span["N"].start, dtype=torch.float64)
    return zeros.index_add(0, owners, values.double())


def sizes_in(batch: PackedBatch, span: Span) -> tuple[Int[Tensor, " N"], Int[Tensor, " N"]]:
    """Scored tokens and bytes of the responses of a run of groups."""
    return batch.lengths[span["N"]], batch.num_bytes[span["N"]]
