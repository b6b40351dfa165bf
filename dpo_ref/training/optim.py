"""Optimisers: AdamW on float32 weights, or on bfloat16 weights with stochastic rounding.

At lr 5e-7 an update is far below half a unit of a bfloat16 weight's last place: rounded to nearest it is lost, every
time. Rounded up with the probability that makes its expectation exact, it is not. Weights, gradients and moments take
8 bytes a parameter where float32 weights take 16; that is what lets 8 B parameters train on one card.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dpo_ref.component import LEFT_OPEN, component


@dataclass(frozen=True, slots=True)
class Optimisation:
    """An optimiser, its learning rate as a function of the 0-based step, and the norm gradients are clipped to."""

    optimizer: torch.optim.Optimizer
    lr_at: Callable[[int], float]
    max_grad_norm: float | None


def _scaled_lr(step: int, lr: float, factor: Callable[[int], float]) -> float:
    return lr * factor(step)


class _Range(NamedTuple):
    allows: Callable[[float], bool]
    words: str


POSITIVE = _Range(lambda value: 0 < value < math.inf, "a finite number above 0")
NOT_NEGATIVE = _Range(lambda value: 0 <= value < math.inf, "a finite number of at least 0")
DECAY = _Range(lambda value: 0 <= value < 1, "at least 0 and below 1")
RANGES = {
    "lr": POSITIVE,
    "warmup_ratio": _Range(lambda value: 0 <= value <= 1, "from 0 to 1"),
    "weight_decay": NOT_NEGATIVE,
    "max_grad_norm": POSITIVE,
    "beta1": DECAY,
    "beta2": DECAY,
    "eps": NOT_NEGATIVE,
}


def _check(**options: Any) -> None:
    """Raise ValueError naming the first option that is out of its range."""
    for name, bounds in RANGES.items():
        value = options.get(name)
        if value is not None and not bounds.allows(value):
            raise ValueError(f"optim.{name}={value} is out of range: it must be {bounds.words}")


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
    return Optimisation(optimizer, partial(_scaled_lr, lr=lr, factor=factor), norm)


Schedule = Literal["constant", "linear", "cosine"]


@component(check=_check)
def adamw(
    policy: nn.Module,
    num_steps: int,
    *,
    lr: Annotated[float, LEFT_OPEN] = 5e-7,
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
    _check(
        lr=lr, warmup_ratio=warmup_ratio, weight_decay=weight_decay, max_grad_norm=max_grad_norm, beta1=beta1,
        beta2=beta2, eps=eps,
    )  # fmt: skip
    groups = _parameter_groups(policy, weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), eps=eps, fused=True)
    return _optimisation(optimizer, num_steps, lr, schedule, warmup_ratio, max_grad_norm)


@component(check=_check)
def adamw_bf16(
    policy: nn.Module,
    num_steps: int,
    *,
    lr: Annotated[float, LEFT_OPEN] = 5e-7,
    schedule: Schedule = "linear",
    warmup_ratio: float = 0.1,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = 1.0,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
) -> Optimisation:
    """The same update on bfloat16 weights and moments with stochastic rounding: half the memory.

    Turns the policy's weights into bfloat16 in place. Raises ValueError for options out of range.
    """
    _check(
        lr=lr, warmup_ratio=warmup_ratio, weight_decay=weight_decay, max_grad_norm=max_grad_norm, beta1=beta1,
        beta2=beta2, eps=eps,
    )  # fmt: skip
    policy.to(torch.bfloat16)
    groups = _parameter_groups(policy, weight_decay)
    optimizer = RoundedAdamW(groups, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay)
    return _optimisation(optimizer, num_steps, lr, schedule, warmup_ratio, max_grad_norm)


# --- stochastic rounding


def stochastic_round_(target: Tensor, value: Float[Tensor, "..."]) -> None:
    """Write float32 `value` into bfloat16 `target`; each entry becomes one of its two neighbours, unbiased.

    bfloat16 is the upper half of float32: adding 16 random bits below and cutting them off rounds up with probability
    (distance to the lower neighbour) / (their distance). Draws from the device's default generator, whose state is in
    every checkpoint. Infinities and NaN are kept as they are.
    """
    bits = value.view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device)
    rounded = (bits + noise).bitwise_and_(-65536).view(torch.float32)
    target.copy_(torch.where(value.isfinite(), rounded, value))


class RoundedAdamW(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101) on bfloat16 parameters: arithmetic in float32, storage in bfloat16."""

    def __init__(self, params: Any, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None  # 1 leaves everything as it is, decided on the device

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every parameter that has a gradient."""
        moving = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not moving:
            return
        device = moving[0][0].device
        skip = torch.zeros((), device=device) if self.found_inf is None else self.found_inf
        states = [self._state_of(parameter) for parameter, _ in moving]
        torch._foreach_add_([state["step"] for state in states], skip == 0)
        update = _one_kernel if device.type == "cuda" else _written_out
        update(moving, states, skip)

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state


Moving = list[tuple[Tensor, dict[str, Any]]]  # parameters that have a gradient, each with its group's options


def _written_out(moving: Moving, states: list[dict[str, Tensor]], skip: Tensor) -> None:
    """The update in tensors, on any device."""
    for (parameter, group), state in zip(moving, states, strict=True):
        beta1, beta2 = group["betas"]
        grad = parameter.grad.float()  # pyright: ignore[reportOptionalMemberAccess]
        mean = state["exp_avg"].float().lerp_(grad, 1 - beta1)
        square = state["exp_avg_sq"].float().lerp_(grad.square(), 1 - beta2)
        correction1, correction2 = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]
        weights = parameter.float().mul_(1 - group["lr"] * group["weight_decay"])
        weights -= group["lr"] * (mean / correction1) / ((square / correction2).sqrt_() + group["eps"])
        for target, value in ((parameter, weights), (state["exp_avg"], mean), (state["exp_avg_sq"], square)):
            stochastic_round_(target, torch.where(skip == 0, value, target.float()))


def _one_kernel(moving: Moving, states: list[dict[str, Tensor]], skip: Tensor) -> None:
    """The same in one kernel a tensor."""
    from dpo_ref.models.kernels import update_rounded

    seeds = torch.randint(2**31 - 1, (len(moving),), device=skip.device)  # of the generator that checkpoints keep
    for index, ((parameter, group), state) in enumerate(zip(moving, states, strict=True)):
        update_rounded(parameter, state, group, seeds, index, skip)


# --- learning-rate schedules: pure functions from the optimiser step to a factor


def warmup(step: int, warmup_steps: int) -> float:
    """Linear from 1/warmup_steps at the first step (0) to 1."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def constant(step: int, num_steps: int, warmup_steps: int) -> float:
    """1 after the warm-up."""
    return warmup(step, warmup_steps)


def linear(step: int, num_steps: int, warmup_steps: int) -> float:
    """Straight from 1 after the warm-up towards 0, which the step after the last would reach."""
    share = max(0, step - warmup_steps) / max(1, num_steps - warmup_steps)
    return warmup(step, warmup_steps) * (1.0 - share)


def cosine(step: int, num_steps: int, warmup_steps: int) -> float:
    """Half a cosine from 1 after the warm-up towards 0, which the step after the last would reach."""
    share = max(0, step - warmup_steps) / max(1, num_steps - warmup_steps)
    return warmup(step, warmup_steps) * 0.5 * (1.0 + math.cos(math.pi * share))


SCHEDULES = {"constant": constant, "linear": linear, "cosine": cosine}
