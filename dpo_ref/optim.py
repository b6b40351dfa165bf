"""The optimiser: AdamW on float32 weights, decay on matrices only."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn

from dpo_ref.schedules import SCHEDULES


@dataclass(frozen=True, slots=True)
class Optimisation:
    """An optimiser, its learning rate as a function of the 0-based step, and the norm gradients are clipped to."""

    optimizer: torch.optim.Optimizer
    lr_at: Callable[[int], float]
    max_grad_norm: float | None


def _scaled(step: int, lr: float, factor: Callable[[int], float]) -> float:
    return lr * factor(step)


def adamw(
    policy: nn.Module,
    num_steps: int,
    *,
    lr: float = 5e-7,
    schedule: Literal["constant", "linear", "cosine"] = "linear",
    warmup_ratio: float = 0.1,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = 1.0,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
) -> Optimisation:
    """Decoupled-weight-decay Adam (arXiv:1711.05101) over the policy's trainable weights.

    Decay applies to matrices and embeddings, not to biases and norms. `warmup_ratio` is a share of `num_steps`.
    Raises ValueError for options out of range.
    """
    for name, value, low, high in (
        ("lr", lr, 0.0, float("inf")),
        ("warmup_ratio", warmup_ratio, -1e-12, 1.0),
        ("weight_decay", weight_decay, -1e-12, float("inf")),
        ("max_grad_norm", 1.0 if max_grad_norm is None else max_grad_norm, 0.0, float("inf")),
    ):
        if not low < value <= high:
            raise ValueError(f"optim.{name}={value} is out of range: it must lie above {max(low, 0.0)}")
    trainable = [p for p in policy.parameters() if p.requires_grad]
    parameter_groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in parameter_groups if group["params"]], lr=lr, betas=(beta1, beta2), eps=eps, fused=True
    )
    factor = partial(SCHEDULES[schedule], num_steps=num_steps, warmup_steps=round(warmup_ratio * num_steps))
    return Optimisation(optimizer, partial(_scaled, lr=lr, factor=factor), max_grad_norm)
