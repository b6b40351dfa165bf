"""AdamW's update with stochastic rounding as one CUDA kernel a tensor.

Written out in tensors, the update of `optim.RoundedAdamW` passes some forty times over the weights: random bits,
masks, casts. The kernel reads weight, gradient and moments once and writes them once. Needs Triton, which comes with
torch's CUDA builds; imported only where there is a CUDA device.
"""
# pyright: reportMissingImports=false, reportIndexIssue=false

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # entries a program updates


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


def update(
    weights: Tensor, state: dict[str, Tensor], group: dict[str, Any], seeds: Tensor, index: int, skip: Tensor
) -> None:
    """One step of AdamW on a bfloat16 parameter and its bfloat16 moments, in place; nothing where `skip` is not 0.

    `state["step"]` counts this step already. Random bits are a function of the `index`-th of `seeds` and the entry's
    place: the same whatever the number of programs.
    """
    (beta1, beta2), size = group["betas"], weights.numel()
    if not (weights.is_contiguous() and weights.grad.is_contiguous()):  # pyright: ignore[reportOptionalMemberAccess]
        raise ValueError("optim=adamw_bf16 on CUDA needs weights and gradients that are contiguous in memory")
    _update[(triton.cdiv(size, BLOCK),)](
        weights, weights.grad, state["exp_avg"], state["exp_avg_sq"], size, seeds, index, state["step"], skip,
        group["lr"], group["weight_decay"], beta1, beta2, math.log(beta1), math.log(beta2), group["eps"], BLOCK=BLOCK,
    )  # fmt: skip
