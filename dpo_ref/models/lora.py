"""The options of an adapter that is trained, fresh ones (LoRA, arXiv:2106.09685): where they go and what they begin
with, and what of the model is trained then and what is not.
"""

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import nn

from dpo_ref.models.adapters import (
    START,
    STARTS,
    TRAINED,
    is_quantised,
    load_adapter,
    lora_layers,
    peft_for,
    plain_name,
    subtract_start,
    whole_modules,
)
from dpo_ref.models.low_rank import in_one_product

ALL_LINEAR = "all-linear"
QUANTISED = ("int8", "nf4")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterOptions:
    """The adapter that is trained instead of the weights, if one is.

    `adapter` goes on training a saved one, a folder or hub name. `lora_rank` trains a fresh one: s B A beside the
    weights, with s = `lora_alpha` / rank (alpha is twice the rank unless given), or / sqrt(rank) with `lora_rslora`
    (arXiv:2312.03732). `lora_targets` are the layers that get one: all linear ones but the head, a list of names, or
    a regular expression that the whole name matches; `lora_parameters` are parameters that are no layers, such as the
    experts of a mixture (mlp.experts.gate_up_proj). `lora_rank_pattern` and `lora_alpha_pattern` are other values for
    some layers, by the end of their names. `lora_dora` also trains the norms of the rows (arXiv:2402.09353).
    `lora_init` is what A and B begin with: zeros in B with A uniform (default) or normal (gaussian), or the principal
    part of the weights (pissa, arXiv:2404.02948; olora, arXiv:2406.01775), which is subtracted again, so that the
    policy begins as the model in any case. `lora_modules_to_save` are modules trained whole. `lora_dropout` can only
    be 0. `weights` is what holds the linear layers and embeddings below the adapter: float32, bfloat16, or int8 and
    nf4 by bitsandbytes on CUDA; auto is bfloat16 on CUDA.
    """

    adapter: str | None = None
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    lora_targets: str | list[str] = ALL_LINEAR
    lora_parameters: list[str] | None = None
    lora_rank_pattern: dict[str, int] | None = None
    lora_alpha_pattern: dict[str, float] | None = None
    lora_rslora: bool = False
    lora_dora: bool = False
    lora_init: Literal["default", "gaussian", "pissa", "olora"] = "default"
    lora_modules_to_save: list[str] | None = None
    weights: Literal["auto", "float32", "bfloat16", "int8", "nf4"] = "auto"

    @property
    def trained(self) -> bool:
        """Whether an adapter is trained."""
        return self.adapter is not None or self.lora_rank is not None

    @property
    def below(self) -> str:
        """What holds the weights below the adapter, for `held_in`; without one all are trained, in float32: an update
        of lr 5e-7 would vanish in less."""
        return self.weights if self.trained else "float32"

    def put_on(self, model: nn.Module) -> Any:
        """Put the adapter into the model's layers, in place; it alone is trained. Returns peft's view of the model,
        None where no adapter is asked for. Raises ValueError naming the option."""
        if not self.trained:
            return None
        saved = self.adapter
        layers = _fresh(model, self) if saved is None else load_adapter(model, saved, "model.adapter", trainable=True)
        for _, weight in _trainable(model):
            weight.data = weight.data.float()
        in_one_product(model)
        return layers


def held_in(weights: str, device: torch.device) -> str:
    """What holds the weights below an adapter on a device, of `model.weights`. Raises ValueError for what needs
    another."""
    if weights in QUANTISED and device.type != "cuda":
        raise ValueError(f"model.weights={weights} needs a CUDA device; write float32 or bfloat16")
    if weights != "auto":
        return weights
    return "bfloat16" if device.type == "cuda" else "float32"


def check_adapter_options(options: AdapterOptions) -> None:
    """Raise ValueError for options that would have no effect, and for combinations that are not defined."""
    values = {f.name: getattr(options, f.name) for f in fields(options) if getattr(options, f.name) != f.default}
    given = [name for name in values if name not in ("adapter", "weights")]
    if options.weights != "auto" and not options.trained:
        raise ValueError(
            f"model.weights={options.weights} is for weights that are not trained, below an adapter (model.lora_rank, "
            "model.adapter): trained ones are float32, as small updates vanish in less; optim=adamw_bf16 rounds them "
            "so that they do not"
        )
    if options.adapter is not None and given:
        raise ValueError(
            f"model.adapter has a rank and an alpha of its own, and settings for the rest; leave model.{given[0]} out"
        )
    if options.lora_dropout:
        raise ValueError(
            f"model.lora_dropout={options.lora_dropout:g}: dropout is noise in every log-ratio, and the policy would "
            "no longer be its reference at step 0; leave it out"
        )
    if options.lora_rank is None:
        if given:
            value = values[given[0]]
            shown = f"{value:g}" if isinstance(value, float) else value
            raise ValueError(f"model.{given[0]}={shown} has no effect without model.lora_rank")
        return
    if options.lora_rank < 1:
        raise ValueError(f"model.lora_rank={options.lora_rank} must be at least 1; null trains all weights")
    plain = options.lora_init not in STARTS and not options.lora_dora
    if options.lora_parameters and not plain:
        other = "lora_dora" if options.lora_dora else f"lora_init={options.lora_init}"
        raise ValueError(f"model.{other} is defined for layers, and model.lora_parameters are none; leave one out")
    if options.lora_dora and options.lora_init in STARTS:
        raise ValueError(f"model.lora_dora has no start of its own; leave model.lora_init={options.lora_init} out")


# --- a fresh adapter


def _fresh(model: Any, options: AdapterOptions) -> Any:
    check_adapter_options(options)
    rank, targets = options.lora_rank, _targets(model, options.lora_targets)
    for key, names, known in _named(model, options, targets):
        _check_names(key, names, known)
    settings = {
        "r": rank,
        "lora_alpha": 2 * rank if options.lora_alpha is None else options.lora_alpha,  # pyright: ignore
        "target_modules": targets,
        "target_parameters": options.lora_parameters,
        "rank_pattern": options.lora_rank_pattern or {},
        "alpha_pattern": options.lora_alpha_pattern or {},
        "use_rslora": options.lora_rslora,
        "use_dora": options.lora_dora,
        "init_lora_weights": "gaussian" if options.lora_init == "gaussian" else True,
        "modules_to_save": options.lora_modules_to_save,
        "task_type": "CAUSAL_LM",
    }
    with peft_for("model.lora_rank") as peft:
        layers = peft.get_peft_model(model, peft.LoraConfig(**settings))
    _check_ranks(model)
    if options.lora_init in STARTS:
        _begin_at(model, options.lora_init)
    return layers


@torch.no_grad()
def _begin_at(model: nn.Module, start: str) -> None:
    try:
        subtract_start(model, start)
    except ValueError as error:
        raise ValueError(f"model.lora_init={start}: {error}") from error
    for _, layer in lora_layers(model):
        for factors in (layer.lora_A, layer.lora_B):
            factors[TRAINED].weight.copy_(factors[START].weight)


def _targets(model: nn.Module, targets: str | list[str]) -> str | list[str]:
    """What peft is told: a single name is one, and no regular expression."""
    if isinstance(targets, list) or targets == ALL_LINEAR:
        return targets
    if re.fullmatch(r"[\w.]+", targets):
        return [targets]
    try:
        pattern = re.compile(targets)
    except re.error as error:
        raise ValueError(f"model.lora_targets={targets} is no regular expression: {error}") from error
    if not any(pattern.fullmatch(name) for name in _layer_names(model)):
        raise ValueError(
            f"model.lora_targets={targets} matches no layer; the whole name must match, such as "
            f"{_layer_names(model)[0]}"
        )
    return targets


def _layer_names(model: nn.Module) -> list[str]:
    """The layers that can have low-rank factors: linear ones, embeddings, those of transformers' GPT-2."""
    kinds = (nn.Linear, nn.Embedding)
    return [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, kinds) or is_quantised(layer) or type(layer).__name__ == "Conv1D"
    ]


def _named(
    model: nn.Module, options: AdapterOptions, targets: str | list[str]
) -> list[tuple[str, Iterable[str], list[str]]]:
    """Each option that names parts of the model, the names, and those that there are."""
    layers, modules = _layer_names(model), [name for name, _ in model.named_modules() if name]
    stacked = [name for name, weight in model.named_parameters() if weight.ndim == 3]
    adapted = layers + [name for name in stacked if options.lora_parameters]
    return [
        ("lora_targets", targets if isinstance(targets, list) else [], layers),
        ("lora_parameters", options.lora_parameters or [], stacked),
        ("lora_rank_pattern", options.lora_rank_pattern or {}, adapted),
        ("lora_alpha_pattern", options.lora_alpha_pattern or {}, adapted),
        ("lora_modules_to_save", options.lora_modules_to_save or [], modules),
    ]


def _check_names(key: str, names: Iterable[str], known: list[str]) -> None:
    """Raise ValueError for a name that matches nothing, with those that are near."""
    for name in names:
        pattern = re.compile(rf"(.*\.)?{name}" if key.endswith("pattern") else rf"(.*\.)?{re.escape(name)}")
        if any(pattern.fullmatch(full) for full in known):
            continue
        ends = sorted({full.rpartition(".")[2] for full in known})
        near = difflib.get_close_matches(name.rpartition(".")[2], ends, n=3) or ends
        hint = f"; did you mean {' or '.join(near[:6])}?" if near else "; this model has none"
        raise ValueError(f"model.{key}: {name} matches nothing of this model that it could be{hint}")


def _check_ranks(model: nn.Module) -> None:
    for name, layer in lora_layers(model):
        smallest = min(layer.in_features, layer.out_features)
        if layer.r[TRAINED] > smallest > 1:  # one output has rank 1 whatever is asked: a gate
            raise ValueError(
                f"model.lora_rank: {layer.r[TRAINED]} is larger than the smaller side of {plain_name(name)}, "
                f"{layer.in_features} x {layer.out_features}; give it {smallest} at most, alone with "
                "model.lora_rank_pattern"
            )


# --- what is trained


def trained_summary(model: Any) -> tuple[str, ...]:
    """Lines for the user: what is trained of a model with an adapter and how much that is, and what stays as it is
    that one could think were trained."""
    count = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    own = sum(weight.numel() for name, weight in model.named_parameters() if f".{START}." not in name)
    below = own - count
    frozen = [line for part in FROZEN for line in part(model)]
    trained = "; ".join(_trained_parts(model))
    lines = (f"trained: {trained}: {count:,} weights beside {below:,} that stay ({count / below:.2%})",)
    return (*lines, "not trained: " + "; ".join(frozen)) if frozen else lines


def _trained_parts(model: nn.Module) -> list[str]:
    layers = lora_layers(model)
    ranks = "/".join(map(str, sorted({layer.r[TRAINED] for _, layer in layers})))
    modules = whole_modules(model)
    parts = [f"rank {ranks} on {_counted(_kind(name, layer) for name, layer in layers)}"] if layers else []
    whole = [f"the whole of {_counted(name.rpartition('.')[2] for name in modules)}"] if modules else []
    tokens = [f"single tokens of {plain_name(name).rpartition('.')[0]}" for name in _tokens(model)]
    biases = sum(name.endswith("bias") and ".lora_" not in name for name, weight in _trainable(model))
    return [*parts, *whole, *tokens, *([f"{biases} biases"] if biases else [])]


def _counted(kinds: Iterable[str]) -> str:
    return ", ".join(f"{kind} ({number})" if number > 1 else kind for kind, number in Counter(kinds).items())


def _kind(name: str, layer: Any) -> str:
    last = plain_name(name).rpartition(".")[2]
    return f"{last}.{layer.parameter_name}" if hasattr(layer, "parameter_name") else last


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]


def _tokens(model: nn.Module) -> list[str]:
    return [name for name, _ in _trainable(model) if "trainable_tokens_delta" in name]


def _frozen_experts(model: nn.Module) -> list[str]:
    """Experts that are one parameter, which no option about layers reaches."""
    adapted = {id(layer.get_param()) for _, layer in lora_layers(model) if hasattr(layer, "parameter_name")}
    stacked = [
        (plain_name(name), weight)
        for name, weight in model.named_parameters()
        if weight.ndim == 3 and not weight.requires_grad and id(weight) not in adapted
    ]
    ends = sorted({".".join(name.split(".")[-3:]) for name, _ in stacked})
    count = sum(weight.numel() for _, weight in stacked)
    reach = f"model.lora_parameters=[{','.join(ends)}]"
    return [f"the experts, {count:,} weights that are no layers ({reach} trains them)"] if stacked else []


def _frozen_routers(model: nn.Module) -> list[str]:
    names = {plain_name(name): weight for name, weight in model.named_parameters()}
    routers = [name for name in names if ROUTER.search(name)]
    adapted = any(ROUTER.search(plain_name(name) + ".") for name, _ in lora_layers(model))
    return ["the router"] if routers and not adapted and not any(names[name].requires_grad for name in routers) else []


ROUTER = re.compile(r"\.(gate|router)\.")


def _frozen_ends(model: Any) -> list[str]:
    """Embedding and head."""
    adapted = {id(layer) for _, layer in lora_layers(model)}
    ends = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    frozen = [
        name
        for name, layer in ends.items()
        if id(layer) not in adapted and not any(weight.requires_grad for weight in layer.parameters())
    ]
    return [f"{' and '.join(frozen)}"] if frozen else []


FROZEN: tuple[Callable[[Any], list[str]], ...] = (_frozen_experts, _frozen_routers, _frozen_ends)
