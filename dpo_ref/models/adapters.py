"""Low-rank adapters (LoRA, arXiv:2106.09685) through peft: put into a model's layers, switched off, merged, saved."""

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpo_ref.models.folders import ADAPTER_FILES, check_adapter, check_finite, opened, shapes_in

LORA_A, LORA_B, BASE = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer"
FACTORS = (".lora_A.weight", ".lora_B.weight")  # as they are saved


@contextmanager
def _peft(key: str) -> Iterator[Any]:
    """The package, with what it lets pass turned into an error: weights that an adapter lacks. Raises ValueError
    naming the option that needs it where it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise ValueError(f"{key} needs peft: pip install -r requirements-reference.txt") from error
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # it asks transformers in a way of yesterday
        warnings.filterwarnings("error", message="Found missing adapter keys")
        yield peft


def add_lora(model: nn.Module, rank: int, alpha: float | None) -> Any:
    """Put a fresh adapter into every linear layer but the head; it alone is trained. Returns peft's view of the model.

    `alpha` is twice the rank unless given. Raises ValueError for a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"model.lora_rank={rank} must be at least 1; null trains all weights")
    options = {"r": rank, "lora_alpha": 2 * rank if alpha is None else alpha, "target_modules": "all-linear"}
    with _peft("model.lora_rank") as peft:
        return peft.get_peft_model(model, peft.LoraConfig(**options))


def load_adapter(model: nn.Module, adapter: str, key: str, trainable: bool) -> Any:
    """Put a saved adapter into the model's layers, in place. Returns peft's view of the model.

    Raises ValueError naming `key` for what is no adapter of this model.
    """
    with _peft(key) as peft, opened(adapter, key, None, ADAPTER_FILES, "it cannot be put on this model") as folder:
        check_adapter(folder)
        layers = peft.PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
        _check_used(folder, layers)
    check_finite(layers, f"{key}={adapter}")
    return layers


def _check_used(folder: Path, model: nn.Module) -> None:
    """Raise ValueError for weights of an adapter that this model has no layer for."""
    names = shapes_in([folder / "adapter_model.safetensors"])
    placed = model.state_dict().keys()
    factors = [name for name in names if name.endswith(FACTORS)]
    surplus = [name for name in factors if name.removesuffix(".weight") + ".default.weight" not in placed]
    if surplus:
        raise ValueError(f"it holds {surplus[0]}, for which this model has no layer ({len(surplus)} such)")


def _layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "lora_A")]


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """The model as it is without its adapter."""
    layers = _layers(model)
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def effective(model: nn.Module) -> dict[str, Tensor]:
    """The state by the names it has without adapters, and the adapters that change something: a fresh one, whose
    second factor is zero, is left out."""
    state = model.state_dict()
    silent = {name.removesuffix(LORA_B) for name, value in state.items() if name.endswith(LORA_B) and not value.any()}
    return {
        name.replace(BASE, ""): value
        for name, value in state.items()
        if not any(name.endswith(part) and name.removesuffix(part) in silent for part in (LORA_A, LORA_B))
    }


def base_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of `effective` that is not an adapter's."""
    return {name: value for name, value in state.items() if ".lora_" not in name}


@torch.no_grad()
def merge(model: Any) -> Any:
    """A model without adapters that computes the same: W + (alpha / rank) B A."""
    state = base_weights(effective(model))
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            state[f"{name}.weight"] = module.base_layer.weight + module.get_delta_weight("default")
    with torch.device("meta"):
        plain = type(model)(copy.deepcopy(model.config))
    plain.load_state_dict(state, assign=True)
    plain.tie_weights()
    for name, buffer in model.named_buffers():  # those that are not in the state
        owner, _, last = name.rpartition(".")
        plain.get_submodule(owner)._buffers[last] = buffer
    return plain.eval()
