"""References that follow the policy while it is trained: step by step (TR-DPO, arXiv:2404.09656), at the beginning of
each round, as its bias-corrected moving average (BEMA, arXiv:2508.00180).
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from dpo_ref.component import RunPlan, component, configuration
from dpo_ref.models.logps import response_logps
from dpo_ref.models.next_token import NextTokens, next_tokens, vocabulary_of
from dpo_ref.models.shards import fill, held, held_of
from dpo_ref.objectives.interface import Objective
from dpo_ref.references.interface import Reference, ReferenceContext
from dpo_ref.references.policies import identity_of
from dpo_ref.types import PackedBatch, ResponseLogps, digest


class FollowingReference(Reference):
    """A copy of the policy that goes after it. It has weights of its own where they are trained: of an adapter's
    policy the adapter's, on the policy's base."""

    notes = ("reference: it moves, so it is asked at every step and nothing is cached",)

    def __init__(self, name: str, model: nn.Module, identity: str, weights: str) -> None:
        self.name, self.identity, self.weights = name, identity, weights
        self._own = {name for name, weight in model.named_parameters() if weight.requires_grad}
        self._model = model.eval().requires_grad_(False)

    @property
    def model(self) -> nn.Module:
        """The copy as it is now."""
        return self._model

    @torch.no_grad()
    def logps(self, batch: PackedBatch) -> ResponseLogps:
        """A forward pass of the copy as it is now."""
        return response_logps(self._model, batch)

    @property
    def vocabulary(self) -> int:
        """The policy's."""
        return vocabulary_of(self._model)

    def next_tokens(self, batch: PackedBatch) -> NextTokens:
        """A forward pass of the copy's trunk as it is now."""
        return next_tokens(self._model, batch)

    def own_weights(self) -> dict[str, Tensor]:
        """The weights that the copy does not share with the policy."""
        return {name: weight.detach() for name, weight in self._model.named_parameters() if name in self._own}

    def state_dict(self) -> dict[str, Tensor]:
        """The copy's own weights."""
        return self.own_weights()

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the copy's weights from a checkpoint; what it shared until then it has for itself afterwards. Raises
        ValueError if they are another model's."""
        weights = dict(self._model.named_parameters())
        if not self._own <= state.keys() <= weights.keys() or not state:
            raise ValueError("the checkpoint's reference has other weights than this one, or none")
        for name in state.keys() - self._own:
            module, _, last = name.rpartition(".")
            own = nn.Parameter(weights[name].detach().clone(), requires_grad=False)
            self._model.get_submodule(module).register_parameter(last, own)
        self._own = set(state)
        for name, weight in self.own_weights().items():
            fill(weight, state[name])


def due(step: int, every: int, burn_in: int) -> bool:
    """Whether a reference that moves every `every` optimiser steps once `burn_in` are done moves after step `step`."""
    return step > burn_in and (step - burn_in) % every == 0


class MovingReference(FollowingReference):
    """A copy of the policy that takes a step of `share` towards it every `every` optimiser steps after `burn_in`."""

    def __init__(
        self, model: nn.Module, identity: str, weights: str, share: float, every: int, burn_in: int = 0
    ) -> None:
        super().__init__("moving", model, identity, weights)
        self.share, self.every, self.burn_in = share, every, burn_in

    @torch.no_grad()
    def update(self, policy: nn.Module, step: int, made: Bool[Tensor, ""]) -> None:
        """reference <- share policy + (1 - share) reference, where the step is due and was made; that is decided on
        the device."""
        if not due(step, self.every, self.burn_in):
            return
        ours = held_of(policy)
        for name, own in self.own_weights().items():
            weight = held(own)
            weight.copy_(torch.where(made, weight.lerp(ours[name], self.share), weight))


class RoundReference(FollowingReference):
    """The policy as it was when the round of training began."""

    notes = ("reference: the policy at the beginning of each round, asked at every step; nothing is cached",)

    @torch.no_grad()
    def begin_round(self, policy: nn.Module) -> None:
        """reference <- policy."""
        ours = held_of(policy)
        for name, weight in self.own_weights().items():
            held(weight).copy_(ours[name])


def _check_steps(kind: str, every: int, burn_in: int, cache: str) -> None:
    """Raise ValueError for a reference that moves with a table, or at no steps."""
    if cache != "off":
        raise ValueError(
            f"reference.cache={cache}: reference={kind} changes while the policy is trained, so its log-probs cannot "
            "be cached; leave reference.cache out"
        )
    if every < 1:
        raise ValueError(f"reference.every={every} must be at least 1 optimiser step")
    if burn_in < 0:
        raise ValueError(f"reference.burn_in={burn_in} must be at least 0 optimiser steps")


def _check_moving(share: float, every: int, burn_in: int, reset: str | None, cache: str, **_: Any) -> None:
    _check_steps("moving", every, burn_in, cache)
    if not 0 < share <= 1:
        raise ValueError(f"reference.share={share} must lie in (0, 1]: 1 replaces the reference by the policy")
    for name, value in {"share": share, "every": every, "burn_in": burn_in}.items():
        if reset is not None and value != configuration(moving)[name].default:
            raise ValueError(
                f"reference.{name}={value} has no effect with reference.reset={reset}, which replaces the reference "
                "at the beginning of each round and leaves it as it is until the next; leave one of them out"
            )


def _check_rounds(objective: Objective, plan: RunPlan) -> None:
    """Refuse a reference that is replaced each round where there is one round."""
    reset, data = plan.components["reference"].options["reset"], plan.components["data"]
    if reset is not None and data.hooks.rounds is None:
        raise ValueError(
            f"reference.reset={reset} replaces the reference at the beginning of each round, and data={data.name} has "
            "one; use data=on_policy, or leave it out: reference.share and reference.every say how it moves"
        )


@component(check=_check_moving, check_run=_check_rounds, follows=True)
def moving(
    context: ReferenceContext,
    *,
    share: float = 0.6,
    every: int = 512,
    burn_in: int = 0,
    reset: Literal["round"] | None = None,
    cache: str = "off",
) -> Reference:
    """The policy as it was, following it as it is trained (arXiv:2404.09656).

    Once `burn_in` optimiser steps are done, every `every` further ones reference <- share policy + (1 - share)
    reference: `share=1` is the paper's hard update, a share between its soft one; `every=1` with a small share is an
    exponential moving average. `reset=round` makes it the policy at the beginning of each round of data=on_policy
    instead, as in iterative DPO (SPPO, arXiv:2405.00675). Its log-probs are computed at every step: `cache` can only
    be off.
    """
    weights, model = context.policy.weights, context.policy.holding.copy(context.policy.model)
    initially = identity_of(context.policy.model, weights, context.policy.text_identity)
    if reset is not None:
        return RoundReference("moving", model, digest([initially, "moving", reset]), weights)
    identity = digest([initially, "moving", share, every, burn_in])
    return MovingReference(model, identity, weights, share, every, burn_in)


# --- the policy's bias-corrected exponential moving average


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
    taken. EMA and theta_0 lie in host memory, in float32 or more, as they are looked at when the reference moves; of
    sharded weights they are sharded, where these are."""

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
        ours = held_of(policy)
        for name, kept in self._start.items():
            start = held(kept)
            start.copy_(torch.where(made, ours[name], start.to(ours[name].device)))
            held(self._ema[name]).copy_(start)

    @torch.no_grad()
    def _move(self, policy: nn.Module, share: float, correction: float, made: Bool[Tensor, ""]) -> None:
        """EMA <- (1 - beta_t) EMA + beta_t theta; reference <- EMA + alpha_t (theta - theta_0)."""
        ours = held_of(policy)
        for name, own in self.own_weights().items():
            weight = held(own)
            ema, start = (held(kept[name]).to(weight.device) for kept in (self._ema, self._start))
            theta = ours[name].to(ema.dtype)
            ema = torch.where(made, ema.lerp(theta, share), ema)
            held(self._ema[name]).copy_(ema)
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
        own = self.own_weights()  # which may be other weights by now
        self._ema, self._start = ({name: _in_host_memory(weight) for name, weight in own.items()} for _ in range(2))
        for prefix, kept in self._kept().items():
            for name, value in kept.items():
                fill(value, state[f"{prefix}{name}"])

    def _kept(self) -> dict[str, dict[str, Tensor]]:
        return {EMA: self._ema, START: self._start}


def _in_host_memory(weight: Tensor) -> Tensor:
    """A copy of a weight in host memory, in float32 or more; of a part of one, where it is."""
    device = weight.device if held(weight) is not weight else torch.device("cpu")
    return weight.detach().to(device, torch.promote_types(weight.dtype, torch.float32), copy=True)


def _check_bema(every: int, burn_in: int, cache: str, **decay: Any) -> None:
    _check_steps("bema", every, burn_in, cache)
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


@component(check=_check_bema, follows=True)
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
    return BemaReference(context.policy.holding.copy(context.policy.model), identity, weights, decay, every, burn_in)
