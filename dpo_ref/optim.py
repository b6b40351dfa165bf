"""Optimisers: AdamW on float32 weights, or on bfloat16 weights with stochastic rounding."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from dpo_ref.rounding import RoundedAdamW
from dpo_ref.schedules import SCHEDULES


@dataclass(frozen=True, slots=True)
class Optimisation:
    """An optimiser, its learning rate as a function of the 0-based step, and the norm gradients are clipped to."""

    optimizer: torch.optim.Optimizer
    lr_at: Callable[[int], float]
    max_grad_norm: float | None


def _scaled(step: int, lr: float, factor: Callable[[int], float]) -> float:
    return lr * factor(step)


def _check(**options: float | None) -> None:
    """Raise ValueError naming the first option that is out of its range."""
    ranges = {"lr": (0.0, float("inf")), "warmup_ratio": (-1e-12, 1.0), "weight_decay": (-1e-12, float("inf"))}
    for name, value in options.items():
        low, high = ranges.get(name, (0.0, float("inf")))
        if value is not None and not low < value <= high:
            raise ValueError(f"optim.{name}={value} is out of range: it must lie above {max(low, 0.0)}")


def _parameter_groups(policy: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay applies to matrices and embeddings, not to biases and norms."""
    trainable = [p for p in policy.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _optimisation(
    optimizer: torch.optim.Optimizer, num_steps: int, lr: float, schedule: str, warmup_ratio: float, norm: float | None
) -> Optimisation:
    factor = partial(SCHEDULES[schedule], num_steps=num_steps, warmup_steps=round(warmup_ratio * num_steps))
    return Optimisation(optimizer, partial(_scaled, lr=lr, factor=factor), norm)


Schedule = Literal["constant", "linear", "cosine"]


def adamw(
    policy: nn.Module,
    num_steps: int,
    *,
    lr: float = 5e-7,
    schedule: Schedule = "linear",
    warmup_ratio: float = 0.1,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = 1.0,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
) -> Optimisation:
    """Decoupled-weight-decay Adam (arXiv:1711.05101) over the policy's trainable weights, in float32.

    `warmup_ratio` is a share of `num_steps`. Raises ValueError for options out of range.
    """
    _check(lr=lr, warmup_ratio=warmup_ratio, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
    groups = _parameter_groups(policy, weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), eps=eps, fused=True)
    return _optimisation(optimizer, num_steps, lr, schedule, warmup_ratio, max_grad_norm)


def adamw_bf16(
    policy: nn.Module,
    num_steps: int,
    *,
    lr: float = 5e-7,
    schedule: Schedule = "linear",
    warmup_ratio: float = 0.1,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = 1.0,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
) -> Optimisation:
    """The same update on bfloat16 weights and moments with stochastic rounding (`rounding.py`): half the memory.

    Turns the policy's weights into bfloat16 in place. Raises ValueError for options out of range.
    """
    _check(lr=lr, warmup_ratio=warmup_ratio, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
    policy.to(torch.bfloat16)
    groups = _parameter_groups(policy, weight_decay)
    optimizer = RoundedAdamW(groups, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay)
    return _optimisation(optimizer, num_steps, lr, schedule, warmup_ratio, max_grad_norm)
