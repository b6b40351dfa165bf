"""Kernels of our own on CUDA: the softmax of the head with its gradient, and the optimiser's rounded update.

Needs Triton, which comes with torch's CUDA builds; imported only where there is a CUDA device. Each has its formula in
tensors elsewhere, which is what runs without CUDA and what the tests compare with.
"""
# pyright: reportMissingImports=false, reportIndexIssue=false

import math
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

# --- softmax over a large vocabulary: the log-probability of a row's target, and its gradient
# In tensors `logps.FusedLoss` passes some eight times over float32 logits. Here half-precision logits are read twice
# and written once, as their own gradient, with arithmetic in float32.


LOGITS = 4096  # that a program looks at together


@triton.jit
def _logps(logits, vocab: tl.constexpr, scale, targets, values, normalisers, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    begin = logits + row * vocab
    largest = tl.full((), -float("inf"), tl.float32)
    total = tl.zeros((), tl.float32)  # sum of exp(logit - largest) so far
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        block = tl.load(begin + columns, mask=columns < vocab, other=-float("inf")).to(tl.float32) * scale
        higher = tl.maximum(largest, tl.max(block, 0))
        total = total * tl.exp(largest - higher) + tl.sum(tl.exp(block - higher), 0)
        largest = higher
    normaliser = largest + tl.log(total)
    target = tl.load(begin + tl.load(targets + row)).to(tl.float32) * scale
    tl.store(values + row, target - normaliser)
    tl.store(normalisers + row, normaliser)


@triton.jit
def _gradient(logits, vocab: tl.constexpr, scale, targets, normalisers, coefficients, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    places = logits + row * vocab + columns
    inside = columns < vocab
    probabilities = tl.exp(tl.load(places, mask=inside, other=0).to(tl.float32) * scale - tl.load(normalisers + row))
    hit = tl.where(columns == tl.load(targets + row), 1.0, 0.0)
    gradient = tl.load(coefficients + row) * (hit - probabilities) * scale
    tl.store(places, gradient.to(logits.dtype.element_ty), mask=inside)


def target_logps(
    logits: Float[Tensor, "R V"], targets: Int[Tensor, " R"], scale: float
) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
    """log softmax(scale * logits) at each row's target, and the log-normalisers, in float32."""
    values, normalisers = logits.new_empty((2, len(logits)), dtype=torch.float32)
    _logps[(len(logits),)](logits, logits.shape[1], scale, targets, values, normalisers, BLOCK=LOGITS)
    return values, normalisers


def become_gradient(
    logits: Float[Tensor, "R V"],
    targets: Int[Tensor, " R"],
    scale: float,
    normalisers: Float[Tensor, " R"],
    coefficients: Float[Tensor, " R"],
) -> None:
    """Turn logits in place into the gradient of sum_r coefficient_r log softmax(scale * logits)_r[target_r]."""
    rows, vocab = logits.shape
    grid = (rows, triton.cdiv(vocab, LOGITS))
    _gradient[grid](logits, vocab, scale, targets, normalisers, coefficients, BLOCK=LOGITS)


# --- AdamW's update with stochastic rounding
# In tensors the update of `training/optim.py` passes some forty times over the weights: random bits, masks, casts.
# Here weight, gradient and moments are read once and written once.


ENTRIES = 2048  # that a program updates


@triton.jit
def _rounded(value, bits):
    """One of the two bfloat16 neighbours of `value`, unbiased: see `optim.stochastic_round_`."""
    noise = (bits & 0xFFFF).to(tl.int32, bitcast=True)
    rounded = ((value.to(tl.int32, bitcast=True) + noise) & -65536).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(value) < float("inf"), rounded, value).to(tl.bfloat16)


@triton.jit(do_not_specialize=["index"])
def _update(
    weights, grads, means, squares, size, seeds, index, step, found_inf, lr, decay, beta1, beta2, log1, log2, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < tl.where(tl.load(found_inf) == 0, size, 0)
    count = tl.load(step).to(tl.float64)
    correction1, correction2 = (1 - tl.exp(count * log1)).to(tl.float32), (1 - tl.exp(count * log2)).to(tl.float32)
    weight = tl.load(weights + places, mask=inside, other=0).to(tl.float32)
    grad = tl.load(grads + places, mask=inside, other=0).to(tl.float32)
    mean = tl.load(means + places, mask=inside, other=0).to(tl.float32)
    square = tl.load(squares + places, mask=inside, other=0).to(tl.float32)
    mean += (grad - mean) * (1 - beta1)
    square += (grad * grad - square) * (1 - beta2)
    weight = weight * (1 - lr * decay) - lr * (mean / correction1) / (tl.sqrt(square / correction2) + eps)
    first, second, _, _ = tl.randint4x(tl.load(seeds + index), places)
    tl.store(weights + places, _rounded(weight, first), mask=inside)
    tl.store(means + places, _rounded(mean, first >> 16), mask=inside)
    tl.store(squares + places, _rounded(square, second), mask=inside)


def update_rounded(
    weights: Tensor, state: dict[str, Tensor], group: dict[str, Any], seeds: Tensor, index: int, skip: Tensor
) -> None:
    """One step of AdamW on a bfloat16 parameter and its bfloat16 moments, in place; nothing where `skip` is not 0.

    `state["step"]` counts this step already. Random bits are a function of the `index`-th of `seeds` and the entry's
    place: the same whatever the number of programs.
    """
    (beta1, beta2), size = group["betas"], weights.numel()
    if not (weights.is_contiguous() and weights.grad.is_contiguous()):  # pyright: ignore[reportOptionalMemberAccess]
        raise ValueError("optim=adamw_bf16 on CUDA needs weights and gradients that are contiguous in memory")
    _update[(triton.cdiv(size, ENTRIES),)](
        weights, weights.grad, state["exp_avg"], state["exp_avg_sq"], size, seeds, index, state["step"], skip,
        group["lr"], group["weight_decay"], beta1, beta2, math.log(beta1), math.log(beta2), group["eps"],
        BLOCK=ENTRIES,
    )  # fmt: skip
