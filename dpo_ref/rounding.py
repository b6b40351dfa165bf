"""AdamW whose weights and moments are bfloat16, kept honest by stochastic rounding.

At lr 5e-7 an update is far below half a unit of a bfloat16 weight's last place: rounded to nearest it is lost, every
time. Rounded up with the probability that makes its expectation exact, it is not. Weights, gradients and moments take
8 bytes a parameter where float32 weights take 16; that is what lets 8 B parameters train on one card.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


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
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        beta1, beta2 = group["betas"]
        grad = parameter.grad.float()  # pyright: ignore[reportOptionalMemberAccess]
        skip = torch.zeros((), device=parameter.device) if self.found_inf is None else self.found_inf
        keep = skip == 0
        state["step"] += keep
        mean = state["exp_avg"].float().lerp_(grad, 1 - beta1)
        square = state["exp_avg_sq"].float().lerp_(grad.square(), 1 - beta2)
        correction1, correction2 = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]
        weights = parameter.float().mul_(1 - group["lr"] * group["weight_decay"])
        weights -= group["lr"] * (mean / correction1) / ((square / correction2).sqrt_() + group["eps"])
        for target, value in ((parameter, weights), (state["exp_avg"], mean), (state["exp_avg_sq"], square)):
            stochastic_round_(target, torch.where(keep, value, target.float()))
