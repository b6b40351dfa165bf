"""A reference that follows the policy as its bias-corrected exponential moving average: BEMA (arXiv:2508.00180)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from dpo_ref.component import component
from dpo_ref.models.adapters import copy_of_trained
from dpo_ref.references.interface import Reference, ReferenceContext
from dpo_ref.references.policies import FollowingReference, check_moving, due, identity_of
from dpo_ref.types import digest

EMA, START = "ema/", "start/"  # before the names of the weights in a checkpoint


class Decay(NamedTuple):
    """How fast the average forgets, and how much of the way from the start is added to it."""

    ema_power: float  # kappa
    bias_power: float  # eta
    lag: float  # rho
    multiplier: float  # gamma
    min_ema_multiplier: float

    def share(self, step: int) -> float:
        """beta_t = max((rho + gamma t)^-kappa, floor): the policy's share in the average."""
        return max((self.lag + self.multiplier * step) ** -self.ema_power, self.min_ema_multiplier)

    def correction(self, step: int) -> float:
        """alpha_t = (rho + gamma t)^-eta."""
        return (self.lag + self.multiplier * step) ** -self.bias_power


class BemaReference(FollowingReference):
    """EMA_t + alpha_t (theta_t - theta_0), renewed every `every` optimiser steps after `burn_in`, at which theta_0 is
    taken. EMA and theta_0 lie in host memory, in float32 or more: they are looked at when the reference moves."""

    def __init__(
        self, model: nn.Module, identity: str, weights: str, decay: Decay, every: int, burn_in: int = 0
    ) -> None:
        super().__init__("bema", model, identity, weights)
        self.decay, self.every, self.burn_in = decay, every, burn_in
        self._ema, self._start = ({n: _in_host_memory(w) for n, w in self.own_weights().items()} for _ in range(2))

    def update(self, policy: nn.Module, step: int, made: Bool[Tensor, ""]) -> None:
        """Take a step where it is due and was made, which is decided on the device."""
        if step == self.burn_in:
            self._begin(policy, made)
        elif due(step, self.every, self.burn_in):
            self._move(policy, self.decay.share(step), self.decay.correction(step), made)

    @torch.no_grad()
    def _begin(self, policy: nn.Module, made: Bool[Tensor, ""]) -> None:
        """theta_0 and EMA <- theta."""
        ours = dict(policy.named_parameters())
        for name, start in self._start.items():
            start.copy_(torch.where(made, ours[name], start.to(ours[name].device)))
            self._ema[name].copy_(start)

    @torch.no_grad()
    def _move(self, policy: nn.Module, share: float, correction: float, made: Bool[Tensor, ""]) -> None:
        """EMA <- (1 - beta_t) EMA + beta_t theta; reference <- EMA + alpha_t (theta - theta_0)."""
        ours = dict(policy.named_parameters())
        for name, weight in self.own_weights().items():
            ema, start = self._ema[name].to(weight.device), self._start[name].to(weight.device)
            theta = ours[name].to(ema.dtype)
            ema = torch.where(made, ema.lerp(theta, share), ema)
            self._ema[name].copy_(ema)
            weight.copy_(torch.where(made, ema + correction * (theta - start), weight))

    def state_dict(self) -> dict[str, Tensor]:
        """The reference's own weights, EMA and theta_0."""
        ema, start = ({f"{prefix}{n}": w for n, w in kept.items()} for prefix, kept in self._kept().items())
        return self.own_weights() | ema | start

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take all three from a checkpoint. Raises ValueError if they are another model's."""
        super().load_state_dict({n: w for n, w in state.items() if not n.startswith((EMA, START))})
        if not {f"{prefix}{name}" for prefix in self._kept() for name in self.own_weights()} <= state.keys():
            raise ValueError("the checkpoint's reference has no average of these weights (EMA and theta_0)")
        self._ema, self._start = (
            {name: _in_host_memory(state[f"{prefix}{name}"]) for name in self.own_weights()} for prefix in self._kept()
        )

    def _kept(self) -> dict[str, dict[str, Tensor]]:
        return {EMA: self._ema, START: self._start}


def _in_host_memory(weight: Tensor) -> Tensor:
    """A copy of a weight in host memory, in float32 or more."""
    return weight.detach().to("cpu", torch.promote_types(weight.dtype, torch.float32), copy=True)


def _check(every: int, burn_in: int, cache: str, **decay: Any) -> None:
    check_moving("bema", every, burn_in, cache)
    for name in ("ema_power", "bias_power", "multiplier"):
        if not 0 <= decay[name] < float("inf"):
            raise ValueError(f"reference.{name}={decay[name]} must be a finite number of at least 0")
    if decay["lag"] < 1:
        raise ValueError(
            f"reference.lag={decay['lag']} must be at least 1 optimiser step: below it the policy's share in the "
            "average, (lag + multiplier step)^-ema_power, could exceed 1"
        )
    if not 0 <= decay["min_ema_multiplier"] <= 1:
        raise ValueError(
            f"reference.min_ema_multiplier={decay['min_ema_multiplier']} must lie in [0, 1]: it is a share"
        )


@component(check=_check)
def bema(
    context: ReferenceContext,
    *,
    ema_power: float = 0.5,
    bias_power: float = 0.2,
    lag: int = 10,
    multiplier: float = 1.0,
    min_ema_multiplier: float = 0.0,
    every: int = 400,
    burn_in: int = 0,
    cache: str = "off",
) -> Reference:
    """The policy's bias-corrected exponential moving average, EMA_t + alpha_t (theta_t - theta_0) (arXiv:2508.00180).

    With t the optimiser step, EMA <- (1 - beta_t) EMA + beta_t theta_t, beta_t = max((lag + multiplier t)^-ema_power,
    min_ema_multiplier) and alpha_t = (lag + multiplier t)^-bias_power; both at every `every`-th step after `burn_in`,
    when theta_0 and EMA are the policy's weights. Until then the reference is the policy before training. Names and
    defaults are those of TRL 1.16 (update_freq, update_after), whose use as a reference of DPO this is: the paper
    averages what is fine-tuned. A large `bias_power` leaves the EMA alone, `ema_power=0` no average.
    """
    weights, decay = context.policy.weights, Decay(ema_power, bias_power, lag, multiplier, min_ema_multiplier)
    initially = identity_of(context.policy.model, weights, context.policy.text_identity)
    identity = digest([initially, "bema", list(decay), every, burn_in])
    return BemaReference(copy_of_trained(context.policy.model), identity, weights, decay, every, burn_in)
