"""Softmax over a large vocabulary in two CUDA kernels: the log-probability of a row's target, and its gradient.

Written out in tensors, `logps.FusedLoss` passes some eight times over float32 logits; here half-precision logits are
read twice and written once, as their own gradient, with arithmetic in float32. Needs Triton, which comes with torch's
CUDA builds; imported only where there is a CUDA device.
"""
# pyright: reportMissingImports=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 4096  # logits a program looks at together


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
    _logps[(len(logits),)](logits, logits.shape[1], scale, targets, values, normalisers, BLOCK=BLOCK)
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
    grid = (rows, triton.cdiv(vocab, BLOCK))
    _gradient[grid](logits, vocab, scale, targets, normalisers, coefficients, BLOCK=BLOCK)
