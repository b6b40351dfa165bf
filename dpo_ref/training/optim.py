"""Optimisers, and the learning rate over a run.

AdamW works on float32 weights, on bfloat16 ones with stochastic rounding, or with 8-bit moments; beside it stand Muon
and RMSprop. A member of the group makes the optimiser of a policy; `optimisation` adds what all of them share: the
learning rate over a run, and clipping.

At lr 5e-7 an update is far below half a unit of a bfloat16 weight's last place: rounded to nearest it is lost, every
time. Rounded up with the probability that makes its expectation exact, it is not. Weights, gradients and moments take
8 bytes a parameter where float32 weights take 16; that is what lets 8 B parameters train on one card.

Every optimiser leaves weights and moments as they are where its `found_inf` is 1, as torch's fused ones do.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dpo_ref.component import LEFT_OPEN, component, configuration
from dpo_ref.models.sharding import Parts


@dataclass(frozen=True, slots=True)
class Optimisation:
    """An optimiser, what it steps of the policy's weights, its learning rate as a function of the 0-based step, and
    the norm gradients are clipped to."""

    optimizer: torch.optim.Optimizer
    parts: Parts
    lr_at: Callable[[int], float]
    max_grad_norm: float | None


# --- learning-rate schedules: pure functions from the optimiser step to a factor
# What stands right of `*` is an option that some schedules have.


def warmup(step: int, warmup_steps: int) -> float:
    """Linear from 1/warmup_steps at the first step (0) to 1."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def constant(step: int, num_steps: int, warmup_steps: int) -> float:
    """1 after the warm-up."""
    return warmup(step, warmup_steps)


def _share(step: int, first: int, last: int) -> float:
    """How much of the way from `first` to `last` is gone; 0 before it."""
    return max(0, step - first) / max(1, last - first)


def linear(step: int, num_steps: int, warmup_steps: int, *, min_lr_ratio: float = 0.0) -> float:
    """Straight from 1 after the warm-up towards `min_lr_ratio`, which the step after the last would reach."""
    share = _share(step, warmup_steps, num_steps)
    return warmup(step, warmup_steps) * (1.0 - (1.0 - min_lr_ratio) * share)


def cosine(step: int, num_steps: int, warmup_steps: int, *, min_lr_ratio: float = 0.0) -> float:
    """Half a cosine from 1 after the warm-up towards `min_lr_ratio`, which the step after the last would reach."""
    fallen = 0.5 * (1.0 - math.cos(math.pi * _share(step, warmup_steps, num_steps)))
    return warmup(step, warmup_steps) * (1.0 - (1.0 - min_lr_ratio) * fallen)


def wsd(step: int, num_steps: int, warmup_steps: int, *, decay_ratio: float = 0.1, min_lr_ratio: float = 0.0) -> float:
    """Warm-up, stable, decay (MiniCPM, arXiv:2404.06395): 1 until the last `decay_ratio` of the steps, then straight
    towards `min_lr_ratio`, which the step after the last would reach."""
    share = _share(step, num_steps - round(decay_ratio * num_steps), num_steps)
    return warmup(step, warmup_steps) * (1.0 - (1.0 - min_lr_ratio) * share)


SCHEDULES = {"constant": constant, "linear": linear, "cosine": cosine, "wsd": wsd}
Schedule = Literal["constant", "linear", "cosine", "wsd"]


# --- options


class _Range(NamedTuple):
    allows: Callable[[float], bool]
    words: str


POSITIVE = _Range(lambda value: 0 < value < math.inf, "a finite number above 0")
NOT_NEGATIVE = _Range(lambda value: 0 <= value < math.inf, "a finite number of at least 0")
DECAY = _Range(lambda value: 0 <= value < 1, "at least 0 and below 1")
RANGES = {
    "lr": POSITIVE,
    "warmup_ratio": _Range(lambda value: 0 <= value <= 1, "from 0 to 1"),
    "warmup_steps": NOT_NEGATIVE,
    "decay_ratio": _Range(lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "min_lr_ratio": DECAY,
    "weight_decay": NOT_NEGATIVE,
    "max_grad_norm": POSITIVE,
    "beta1": DECAY,
    "beta2": DECAY,
    "momentum": DECAY,
    "alpha": DECAY,
    "eps": NOT_NEGATIVE,
}
WARMUP_RATIO = 0.1


def _check(**options: Any) -> None:
    """Raise ValueError naming the first option that is out of its range, or has no effect beside the others."""
    for name, bounds in RANGES.items():
        value = options.get(name)
        if value is not None and not bounds.allows(value):
            raise ValueError(f"optim.{name}={value} is out of range: it must be {bounds.words}")
    schedule = options["schedule"]
    for name in ("decay_ratio", "min_lr_ratio"):
        having = [other for other, factor in SCHEDULES.items() if name in configuration(factor)]
        if options[name] is not None and schedule not in having:
            raise ValueError(
                f"optim.{name}={options[name]} has no effect: optim.schedule={schedule} has none; it is an option of "
                f"optim.schedule={', '.join(having)}"
            )
    if options["warmup_steps"] is not None and options["warmup_ratio"] not in (WARMUP_RATIO, 0):
        raise ValueError(
            f"optim.warmup_steps={options['warmup_steps']} and optim.warmup_ratio={options['warmup_ratio']} say the "
            "same thing; give one of them"
        )
    if options["decay_ratio"] is not None and options["warmup_steps"] is None:
        _check_overlap(options["warmup_ratio"], options["decay_ratio"])


def _check_overlap(warmup_ratio: float, decay_ratio: float) -> None:
    if warmup_ratio + decay_ratio > 1:
        raise ValueError(
            f"optim.warmup_ratio={warmup_ratio} and optim.decay_ratio={decay_ratio} are more than the whole run "
            "together; lower one of them"
        )


def optimisation(
    optimiser: Callable[[nn.Module], torch.optim.Optimizer],
    policy: nn.Module,
    num_steps: int,
    *,
    lr: Annotated[float, LEFT_OPEN] = 5e-7,
    schedule: Schedule = "linear",
    warmup_ratio: float = WARMUP_RATIO,
    warmup_steps: int | None = None,
    decay_ratio: float | None = None,
    min_lr_ratio: float | None = None,
    max_grad_norm: float | None = 1.0,
) -> Optimisation:
    """The policy's optimiser with a learning rate for each of `num_steps`.

    The warm-up takes `warmup_ratio` of the steps, or `warmup_steps`; `decay_ratio` (of the steps; 0.1) and
    `min_lr_ratio` (of `lr`; 0) are options of some schedules. Raises ValueError for options out of range, and for a
    warm-up that is as long as the run.
    """
    _check(
        lr=lr, schedule=schedule, warmup_ratio=warmup_ratio, warmup_steps=warmup_steps, decay_ratio=decay_ratio,
        min_lr_ratio=min_lr_ratio, max_grad_norm=max_grad_norm,
    )  # fmt: skip
    if warmup_steps is not None and warmup_steps >= num_steps > 1:
        raise ValueError(
            f"optim.warmup_steps={warmup_steps}, and the run has {num_steps} steps: it would end before its learning "
            "rate is reached; lower it, or train longer"
        )
    given = {"decay_ratio": decay_ratio, "min_lr_ratio": min_lr_ratio}
    factor = partial(
        SCHEDULES[schedule],
        num_steps=num_steps,
        warmup_steps=round(warmup_ratio * num_steps) if warmup_steps is None else warmup_steps,
        **{name: value for name, value in given.items() if value is not None},
    )
    optimizer = optimiser(policy)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return Optimisation(optimizer, Parts(optimizer), partial(_scaled_lr, lr=lr, factor=factor), max_grad_norm)


def _scaled_lr(step: int, lr: float, factor: Callable[[int], float]) -> float:
    return lr * factor(step)


# --- AdamW


def _parameter_groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Decay applies to matrices and embeddings, not to biases and norms."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _trainable(policy: nn.Module) -> list[nn.Parameter]:
    return [p for p in policy.parameters() if p.requires_grad]


@component(check=_check)
def adamw(
    policy: nn.Module, *, weight_decay: float = 0.0, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8
) -> torch.optim.Optimizer:
    """Decoupled-weight-decay Adam (arXiv:1711.05101) over the policy's trainable weights, in float32."""
    groups = _parameter_groups(_trainable(policy), weight_decay)
    return torch.optim.AdamW(groups, betas=(beta1, beta2), eps=eps, fused=True)


@component(check=_check, of_whole="turns weights into bfloat16 that are float32 in every rank's part")
def adamw_bf16(
    policy: nn.Module, *, weight_decay: float = 0.0, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8
) -> torch.optim.Optimizer:
    """The same update on bfloat16 weights and moments with stochastic rounding: half the memory.

    Turns the policy's weights into bfloat16 in place.
    """
    policy.to(torch.bfloat16)
    return RoundedAdamW(_parameter_groups(_trainable(policy), weight_decay), betas=(beta1, beta2), eps=eps)


@component(check=_check)
def adamw_8bit(
    policy: nn.Module, *, weight_decay: float = 0.0, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8
) -> torch.optim.Optimizer:
    """The same update on float32 weights with moments of 8 bits, quantised in blocks (arXiv:2110.02861): 10 bytes a
    parameter. Raises ValueError without CUDA or without the package bitsandbytes."""
    device = next(policy.parameters()).device
    if device.type != "cuda":
        raise ValueError(
            f"optim=adamw_8bit needs CUDA, and the policy is on {device.type}: use optim=adamw, or optim=rmsprop, "
            "which keeps one moment instead of two"
        )
    return AdamW8bit(_parameter_groups(_trainable(policy), weight_decay), betas=(beta1, beta2), eps=eps)


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


class Skipping(torch.optim.Optimizer):
    """An optimiser whose step may be left out, as the device decides."""

    def __init__(self, params: Any, **defaults: Any) -> None:
        super().__init__(params, {"lr": 0.0, **defaults})
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None  # 1 leaves everything as it is

    def _skip(self, device: torch.device) -> Tensor:
        return torch.zeros((), device=device) if self.found_inf is None else self.found_inf


class RoundedAdamW(Skipping):
    """AdamW (arXiv:1711.05101) on bfloat16 parameters: arithmetic in float32, storage in bfloat16."""

    def __init__(
        self, params: Any, *, betas: tuple[float, float], eps: float, lr: float = 0.0, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every parameter that has a gradient."""
        moving = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not moving:
            return
        device = moving[0][0].device
        skip = self._skip(device)
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


# --- 8-bit moments


class AdamW8bit(Skipping):
    """bitsandbytes' AdamW with what checkpoints and skipped steps need of it: a state of tensors of its own, without
    the tables of 256 values that all its parameters share."""

    MOMENTS = ("state1", "state2", "absmax1", "absmax2")  # the latter of tensors large enough to be quantised

    def __init__(self, params: Any, *, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, betas=betas, eps=eps)
        try:
            from bitsandbytes.optim import AdamW8bit as Quantised  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError("optim=adamw_8bit needs bitsandbytes: pip install bitsandbytes") from error
        self._quantised = Quantised(self.param_groups, betas=betas, eps=eps)
        self._quantised.param_groups = self.param_groups

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every parameter that has a gradient. Waits for the device, as bitsandbytes does."""
        if self.found_inf is not None and bool(self.found_inf):
            return
        self._hand_over()
        self._quantised.step()
        for parameter, state in self._quantised.state.items():
            kept = {name: state[name] for name in self.MOMENTS if name in state}
            self.state[parameter] = kept | {"step": torch.tensor(state["step"])}

    def _hand_over(self) -> None:
        """What a checkpoint restored, to bitsandbytes."""
        for index, group in enumerate(self.param_groups):
            for place, parameter in enumerate(group["params"]):
                if self.state.get(parameter) and not self._quantised.state.get(parameter):
                    self._quantised.init_state(group, parameter, index, place)
                    restored = self.state[parameter]
                    self._quantised.state[parameter] |= restored | {"step": int(restored["step"])}


# --- RMSprop


@component(check=_check)
def rmsprop(policy: nn.Module, *, alpha: float = 0.99, eps: float = 1e-8) -> torch.optim.Optimizer:
    """RMSprop over the policy's trainable weights, in float32: what DPO was published with (arXiv:2305.18290, B). One
    moment, so 12 bytes a parameter instead of AdamW's 16."""
    return RMSprop(_trainable(policy), alpha=alpha, eps=eps)


class RMSprop(Skipping):
    """w -= lr g / (sqrt(v) + eps) with v the moving average of g², as torch.optim.RMSprop has it."""

    def __init__(self, params: Any, *, alpha: float, eps: float) -> None:
        super().__init__(params, alpha=alpha, eps=eps)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, skip = self.state[parameter], self._skip(parameter.device)
        if not state:
            state["square_avg"] = torch.zeros_like(parameter)
        square = state["square_avg"].lerp(grad.square(), 1 - group["alpha"])
        weights = parameter - group["lr"] * grad / (square.sqrt() + group["eps"])
        for target, value in ((parameter, weights), (state["square_avg"], square)):
            target.copy_(torch.where(skip == 0, value, target))


# --- Muon


@component(check=_check, of_whole="orthogonalises whole matrices")
def muon(
    policy: nn.Module,
    *,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
) -> torch.optim.Optimizer:
    """Muon for the matrices of hidden layers, AdamW for embeddings, heads, norms and biases, in float32.

    An update of a matrix has the size of AdamW's (arXiv:2502.16982, 2.2), so that one learning rate serves both.
    `momentum` is Muon's; `beta1`, `beta2` and `eps` are AdamW's. Raises ValueError where no matrix of a hidden layer
    is trained.
    """
    trainable, hidden = _trainable(policy), _hidden_matrices(policy)
    if not hidden:
        raise ValueError("optim=muon is for matrices of hidden layers, and none is trained; use optim=adamw")
    known = {id(p) for p in hidden}
    rest = _parameter_groups([p for p in trainable if id(p) not in known], weight_decay)
    return Muon(hidden, rest, momentum=momentum, weight_decay=weight_decay, betas=(beta1, beta2), eps=eps)


def _hidden_matrices(policy: Any) -> list[nn.Parameter]:
    """Those of the backbone that are no embedding: heads stand outside of it."""
    backbone: nn.Module = policy.base_model
    tables = {id(module.weight) for module in backbone.modules() if isinstance(module, nn.Embedding)}
    return [p for p in _trainable(backbone) if p.ndim == 2 and id(p) not in tables]


class Muon(Skipping):
    """Momentum, orthogonalised (Jordan et al. 2024, kellerjordan.github.io/posts/muon): the update of a matrix is the
    nearest one whose singular values are about 1, times 0.2 sqrt(larger side). `rest` takes AdamW's step."""

    def __init__(
        self,
        matrices: list[nn.Parameter],
        rest: list[dict[str, Any]],
        *,
        momentum: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        super().__init__(matrices, momentum=momentum, weight_decay=weight_decay)
        self._matrices = self.param_groups[0]
        self._adamw = torch.optim.AdamW(rest, betas=betas, eps=eps, fused=True) if rest else None
        if self._adamw is not None:  # the same groups and the same state: one learning rate, one checkpoint
            self.param_groups += self._adamw.param_groups
            self._adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every parameter that has a gradient."""
        for parameter in self._matrices["params"]:
            if parameter.grad is not None:
                self._update(parameter, parameter.grad)
        if self._adamw is not None:
            self._adamw.grad_scale, self._adamw.found_inf = None, self.found_inf  # pyright: ignore[reportAttributeAccessIssue]
            self._adamw.step()

    def _update(self, parameter: Tensor, grad: Tensor) -> None:
        state, skip, group = self.state[parameter], self._skip(parameter.device), self._matrices
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        mean = state["momentum_buffer"].lerp(grad, 1 - group["momentum"])
        direction = orthogonalised(grad.lerp(mean, group["momentum"]))  # Nesterov's
        scale = 0.2 * math.sqrt(max(parameter.shape))
        weights = parameter * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * scale * direction
        for target, value in ((parameter, weights), (state["momentum_buffer"], mean)):
            target.copy_(torch.where(skip == 0, value, target))


def orthogonalised(matrix: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    """U f(S) V' for a matrix U S V', with f(s) between about 0.7 and 1.2: five Newton-Schulz iterations of an odd
    polynomial of degree five, in bfloat16, with the coefficients of Jordan et al."""
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrix.bfloat16() if matrix.shape[0] <= matrix.shape[1] else matrix.bfloat16().T
    x = wide / wide.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if matrix.shape[0] <= matrix.shape[1] else x.T).to(matrix.dtype)
