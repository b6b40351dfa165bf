"""Mixtures of experts: what their routers do with the tokens of an optimiser step, and the loss that balances it.

The load-balancing loss is that of Switch Transformers (arXiv:2101.03961, equations 4 to 6) for the k best of E
experts, over all layers and tokens at once, as transformers' `load_balancing_loss_func` has it:

    E * sum_e f_e P_e

f_e is the number of choices of expert e per token, P_e the mean probability that the router gives it; it is k where
all experts have the same load. Only P has a gradient. It is taken of each pack's own tokens, of which a prompt counts
once however many responses stand behind it; its mean over the tokens of an optimiser step's packs is added once.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dpo_ref.distributed import ranks
from dpo_ref.types import PackedBatch

METRICS = {  # of a training step, and what they are
    "moe/busiest": "load of the busiest expert over the mean load, mean over layers; 1 where all have the same",
    "moe/entropy": "entropy of the load over that of an equal one, mean over layers; 1 where all have the same",
    "moe/idle": "share of experts that no token of the step was sent to",
    "moe/router_loss": "the load-balancing loss, where it is added, without coefficient; k where all loads are equal",
}


@dataclass(frozen=True, slots=True)
class Router:
    """A layer's router: what is called, where in its output the logits are, all of it with an adapter around it, and
    the block that it shares with its experts."""

    module: nn.Module
    index: int
    whole: nn.Module
    block: nn.Module


def routers_of(model: Any) -> tuple[Router, ...]:
    """The routers of a mixture of experts in the order of their layers, as transformers itself would record them;
    none for a dense model."""
    recorded = getattr(model.base_model, "_can_record_outputs", None) or {}
    recorders = recorded.get("router_logits", ())
    found = []
    for recorder in recorders if isinstance(recorders, list | tuple) else (recorders,):
        for name, module in model.named_modules():
            if isinstance(module, recorder.target_class) and (recorder.layer_name or "") in name:
                plain = name.replace(".base_layer", "")  # which peft puts below an adapter
                whole, block = model.get_submodule(plain), model.get_submodule(plain.rpartition(".")[0])
                found.append(Router(module, recorder.index or 0, whole, block))
    return tuple(found)


def training_mode(model: nn.Module, routers: Sequence[Router]) -> None:
    """Training mode for all but the experts and their routers: some of them draw, or disturb what they read, while
    they are trained (`router_jitter_noise`, SparseMixer), and policy and reference must be the same function."""
    model.train()
    for router in routers:
        router.block.eval()


def freeze(model: nn.Module, routers: Sequence[Router]) -> None:
    """Leave the routers as they are. Raises ValueError where that changes nothing, and for an architecture whose
    router is no module of its own."""
    if any(router.index for router in routers):
        raise ValueError(f"model.freeze_router: the router of {type(model).__name__} is no module of its own")
    weights = [weight for router in routers for weight in router.whole.parameters() if weight.requires_grad]
    if not weights:
        why = "it has no experts" if not routers else "an adapter leaves it as it is"
        raise ValueError(f"model.freeze_router=true has no effect on {type(model).__name__}: {why}; leave it out")
    for weight in weights:
        weight.requires_grad_(False)


def check_adapted(model: nn.Module, routers: Sequence[Router]) -> None:
    """Raise ValueError for an adapter on a router whose output is more than a linear layer's."""
    for router in routers:
        adapted = router.whole is not router.module and type(router.whole).__name__ == "Linear"  # peft's
        if adapted and type(router.module) is not nn.Linear:
            raise ValueError(
                f"no adapter can lie on the {type(router.module).__name__} of {type(model).__name__}, which returns "
                "more than a linear layer; name other layers for the adapter, or train without one"
            )


def check_router_loss(router_loss: int | float | str | None, compile: bool) -> None:
    """Raise ValueError for a `model.router_loss` that means nothing, whatever the model."""
    if router_loss is None:
        return
    if router_loss != "config" and not (isinstance(router_loss, float | int) and 0 < router_loss < math.inf):
        raise ValueError(
            f"model.router_loss={router_loss} must be a number above 0, config (the model's own), or null for none"
        )
    if compile:
        raise ValueError("model.router_loss does not go with model.compile=true, which hides routers; leave one out")


def router_coefficient(model: Any, routers: Sequence[Router], asked: int | float | str | None) -> float:
    """The coefficient of the load-balancing loss: what `model.router_loss` says. Raises ValueError for a model that
    has no such loss, and for a config that asks for none."""
    if asked is None:
        return 0.0
    name, key = type(model).__name__, f"model.router_loss={asked}"
    if not routers:
        raise ValueError(f"{key} has no effect on {name}: it has no experts; leave it out")
    stated = getattr(model.config, "router_aux_loss_coef", None)
    if stated is None:
        raise ValueError(f"{key}: {name} balances its experts without a loss (no router_aux_loss_coef in its config)")
    coefficient = stated if isinstance(asked, str) else asked
    if not coefficient:
        raise ValueError(f"{key} has no effect: the config of {name} says router_aux_loss_coef: 0; leave it out")
    return float(coefficient)


def routing_note(model: Any, routers: Sequence[Router], coefficient: float) -> tuple[str, ...]:
    """What the user is told of a mixture of experts."""
    stated = getattr(model.config, "router_aux_loss_coef", None)
    if not routers or not stated:
        return ()
    if coefficient:
        return (f"a mixture of experts: its load-balancing loss is added with coefficient {coefficient:g}",)
    return (f"a mixture of experts, trained without its load-balancing loss (model.router_loss=config: {stated:g})",)


# --- what routers do in an optimiser step


@dataclass
class Routing:
    """The loads of all experts in one optimiser step, and the loss that balances them; nothing for a dense model."""

    routers: Sequence[Router]
    top_k: int  # experts a token is sent to
    coefficient: float  # of the loss; 0: none
    num_tokens: int  # of the step's packs
    _loads: Float[Tensor, "L E"] | None = field(default=None, init=False)
    _loss: Float[Tensor, ""] | None = field(default=None, init=False)  # of the step so far, without a gradient

    @contextmanager
    def observed(self, batch: PackedBatch, counts: bool = True) -> Iterator[list[Tensor]]:
        """Within, the model is asked about a pack; afterwards the list holds what is added to the mean loss of the
        step for it, which is nothing for one that does not count."""
        outputs: list[list[Any]] = [[] for _ in self.routers]
        added: list[Tensor] = []
        with ExitStack() as stack:
            for router, calls in zip(self.routers, outputs, strict=True):
                hook = router.module.register_forward_hook(lambda _, __, output, calls=calls: calls.append(output))
                stack.callback(hook.remove)
            yield added
            if outputs and outputs[0]:
                added += self._take(batch, outputs, counts)

    def _take(self, batch: PackedBatch, outputs: list[list[Any]], counts: bool) -> list[Tensor]:
        rows = _rows(batch, len(outputs[0]))
        logits, loads = [], []
        for router, calls in zip(self.routers, outputs, strict=True):
            layer = torch.cat([_of_tokens(output[router.index]) for output in calls])
            chosen = torch.cat([_choices(output, router.index, self.top_k) for output in calls])
            layer, chosen = (layer, chosen) if rows is None else (layer[rows], chosen[rows])
            logits.append(layer)
            loads.append(_counts(chosen, layer.shape[-1]))
        counted = torch.stack(loads) * counts
        self._loads = counted if self._loads is None else self._loads + counted
        if not self.coefficient:
            return []
        share = counts * len(batch.input_ids) / self.num_tokens
        loss = share * load_balancing_loss(logits, self.top_k)
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()
        return [self.coefficient * loss]

    def metrics(self) -> dict[str, Tensor]:
        """Of the whole step (`METRICS`), scalars on the device."""
        if self._loads is None:
            return {}
        loads, loss = ranks().sum(self._loads), None if self._loss is None else ranks().sum(self._loss)
        share = loads / loads.sum(dim=-1, keepdim=True)
        count = share.shape[-1]
        entropy = -torch.xlogy(share, share).sum(dim=-1) / math.log(count)
        values = (share.amax(dim=-1).mean() * count, entropy.mean(), (loads == 0).double().mean(), loss)
        return {name: value for name, value in zip(METRICS, values, strict=True) if value is not None}


def load_balancing_loss(logits: Sequence[Float[Tensor, "T E"]], top_k: int) -> Float[Tensor, ""]:
    """E sum_e f_e P_e over the tokens and layers of these router logits."""
    probs = torch.cat(list(logits)).to(torch.promote_types(logits[0].dtype, torch.float32)).softmax(dim=-1)
    choices = _counts(probs.topk(top_k, dim=-1).indices, probs.shape[-1]) / len(probs)
    return (choices * probs.mean(dim=0)).sum() * probs.shape[-1]


def _of_tokens(values: Float[Tensor, "..."]) -> Float[Tensor, "T E"]:
    return values.reshape(-1, values.shape[-1])


def _choices(output: Any, index: int, top_k: int) -> Int[Tensor, "T k"]:
    """The experts that a router's output names, else the likeliest."""
    named = [part for part in output if isinstance(part, Tensor) and not part.is_floating_point()]
    chosen = named[-1] if named else output[index].topk(top_k, dim=-1).indices
    return chosen.reshape(-1, chosen.shape[-1])


def _counts(chosen: Int[Tensor, "T k"], num_experts: int) -> Float[Tensor, " E"]:
    counts = torch.zeros(num_experts, dtype=torch.float32, device=chosen.device)
    return counts.scatter_add_(0, chosen.flatten(), torch.ones_like(chosen.flatten(), dtype=torch.float32))


def _rows(batch: PackedBatch, num_calls: int) -> Int[Tensor, " T"] | None:
    """Which of the rows that routers saw are the pack's tokens; None for all of them. A model that runs one response
    at a time reads a prompt again for each: the first counts."""
    sizes = [(prompt, index, size) for prompt, sizes in batch.layout for index, size in enumerate(sizes)]
    if num_calls == 1 or num_calls != len(sizes):
        return None
    kept, start = [], 0
    for prompt, index, size in sizes:
        kept.append(torch.arange(start + (prompt if index else 0), start + prompt + size))
        start += prompt + size
    return torch.cat(kept).to(batch.input_ids.device)
