"""Low-rank adapters (LoRA, arXiv:2106.09685) through peft: saved ones put into a model's layers, switched off, merged,
saved again. How a fresh one is made stands in `lora.py`.

A layer that peft has put around another computes with an effective weight: W + s B A for LoRA with the scaling s, that
with the norm of each of its rows (columns where the layer stores W transposed) replaced by a learnt one for DoRA
(arXiv:2402.09353, equation 5), a trained copy for a module that is trained whole, or W with some rows replaced for
single tokens. Everything that is read off a model here goes by that weight or by the model below.
"""

import copy
import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from dpo_ref.files.digests import file_digest
from dpo_ref.models.folders import (
    ADAPTER_FILES,
    ADAPTER_SETTINGS,
    ADAPTER_WEIGHTS,
    check_adapter,
    check_finite,
    opened,
    read_settings,
    shapes_in,
)

TRAINED = "default"  # the name peft has for the adapter that is trained
START = "start"  # and ours for the factors it was made from, where these are subtracted (`lora.py`)
BASE, BELOW = ".base_layer", "_below"
PREFIX = "base_model.model."  # of names in an adapter's file
FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
PARTS = {*FACTORS, "modules_to_save", "trainable_tokens_delta", "trainable_tokens_original"}  # an adapter's own
AROUND = re.compile(r"\.(base_layer|original_module|token_adapter)(?=\.|$)")  # what peft writes into names of a model


@contextmanager
def peft_for(key: str) -> Iterator[Any]:
    """The package, with what it lets pass turned into an error: weights that an adapter lacks. Raises ValueError
    naming the option that needs it where it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise ValueError(f"{key} needs peft: pip install -r requirements-reference.txt") from error
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # it asks transformers in a way of yesterday
        warnings.filterwarnings("ignore", module="peft")  # tied weights and biases, for which `merge` looks itself
        warnings.filterwarnings("error", message="Found missing adapter keys")
        yield peft


# --- saved adapters


def load_adapter(model: nn.Module, adapter: str, key: str, trainable: bool) -> Any:
    """Put a saved adapter into the model's layers, in place and without its dropout. Returns peft's view of the model.

    Raises ValueError naming `key` for what is no adapter of this model, and for one whose function cannot be computed
    here exactly.
    """
    failure = "it cannot be put on this model"
    with peft_for(key) as peft, opened(adapter, key, None, ADAPTER_FILES, failure) as folder:
        check_adapter(folder)
        start = _start_of(folder)
        config = peft.LoraConfig.from_pretrained(str(folder))
        config.lora_dropout, config.init_lora_weights = 0.0, True  # drawn, then replaced by what was saved
        with _remembering(model, folder):
            layers = peft.PeftModel.from_pretrained(model, str(folder), is_trainable=trainable, config=config)
        _check_used(folder, layers, peft)
        _check_layers(layers)
        if start is not None:
            subtract_start(model, start)
    check_finite(layers, f"{key}={adapter}")
    return layers


def _check_used(folder: Path, layers: nn.Module, peft: Any) -> None:
    """Raise ValueError unless the tensors of the file are those of the adapter, and weights of the base."""
    stored = shapes_in([folder / ADAPTER_WEIGHTS]).keys()
    placed = peft.get_peft_model_state_dict(layers, save_embedding_layers=False).keys()
    surplus = sorted(stored - placed - layers.state_dict().keys())
    if surplus:
        raise ValueError(f"it holds {surplus[0]}, for which this model has no layer ({len(surplus)} such)")
    missing = sorted(placed - stored)
    if missing:
        raise ValueError(f"it lacks {missing[0]}, which adapter_config.json says is trained ({len(missing)} such)")


def _check_layers(model: nn.Module) -> None:
    """Raise ValueError for a layer of peft whose effective weight is not known here."""
    for name, layer in _wrapped(model):
        kind = f"{type(layer).__module__.removeprefix('peft.tuners.')}.{type(layer).__name__}"
        variants = {type(variant).__name__ for variant in layer.lora_variant.values()} if _is_lora(layer) else set()
        if kind not in KNOWN or variants - {"DoraLinearVariant", "DoraEmbeddingVariant"}:
            raise ValueError(f"{name} would become a {kind} {' '.join(sorted(variants))}, which is not known here")
        if _is_lora(layer) and any(layer.lora_bias.values()) and (variants or layer.get_base_layer().bias is None):
            raise ValueError(f"{name} would have a bias of its adapter (lora_bias) that no plain layer can take")


KNOWN = {
    *(f"lora.layer.{name}" for name in ("Linear", "Embedding", "ParamWrapper")),
    "lora.bnb.Linear8bitLt",
    "lora.bnb.Linear4bit",
    "peft.utils.other.ModulesToSaveWrapper",
    "peft.utils.other.TrainableTokensWrapper",
    "trainable_tokens.layer.TrainableTokensLayer",
}


@contextmanager
def _remembering(model: nn.Module, folder: Path) -> Iterator[None]:
    """Within, the weights of the model that an adapter brings are put in their place; as they were they stay beside
    them, in buffers: biases that were trained with it, embeddings that were saved with it."""
    names = {name.removeprefix(PREFIX).replace(BASE, "") for name in shapes_in([folder / ADAPTER_WEIGHTS])}
    weights = {name: weight for name, weight in model.named_parameters(remove_duplicate=False) if name in names}
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in weights}
    before = {name: weight.detach() for name, weight in weights.items()}
    for weight in {id(weight): weight for weight in weights.values()}.values():
        weight.data = weight.data.clone()  # what is brought is not written over what others may share
    yield
    for name, weight in weights.items():
        if weight.requires_grad or not torch.equal(weight, before[name]):
            owners[name].register_buffer(name.rpartition(".")[2] + BELOW, before[name], persistent=False)
        else:
            weight.data = before[name]


def other_base(adapter: str, key: str, model: Any) -> tuple[str, ...]:
    """A line for the user where a saved adapter names another base than the model it is put on. Folders move, so
    names are compared by their last part, and two folders at hand by their weights."""
    with opened(adapter, key, None, ADAPTER_FILES, "it cannot be put on this model") as folder:
        named = read_settings(folder / ADAPTER_SETTINGS).get("base_model_name_or_path")
    path = str(model.name_or_path)
    if not named or not path or _last_part(named) == _last_part(path) or _same_weights(Path(named), Path(path)):
        return ()
    return (f"{key}={adapter} was made on {named}, by its {ADAPTER_SETTINGS}, and is put on {path}",)


def _last_part(path: str) -> str:
    """The name of a model: of a hub name, of a folder, or of a folder of the hub's cache."""
    parts = [part for part in path.split("/") if part]
    cached = [part.rpartition("--")[2] for part in parts if part.startswith("models--")]
    name = (cached or parts[-1:] or [""])[0].lower()
    return name.removesuffix("-bnb-4bit").removesuffix("-unsloth")


def _same_weights(one: Path, other: Path) -> bool:
    files = [sorted(folder.glob("*.safetensors")) if folder.is_dir() else [] for folder in (one, other)]
    names = [[(file.name, file.stat().st_size) for file in those] for those in files]
    if not files[0] or names[0] != names[1]:
        return False
    return all(file_digest(mine) == file_digest(theirs) for mine, theirs in zip(*files, strict=True))


# --- the layers of peft in a model


def _is_lora(module: Any) -> bool:
    return hasattr(module, "lora_A")


def _is_whole(module: Any) -> bool:
    return hasattr(module, "modules_to_save")


def _has_tokens(module: Any) -> bool:
    return hasattr(module, "token_adapter")


def _wrapped(model: nn.Module) -> list[tuple[str, Any]]:
    """What peft has put around modules, with the names of these."""
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "_disable_adapters")]


def lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """The layers that have low-rank factors, with their names."""
    return [(name, layer) for name, layer in _wrapped(model) if _is_lora(layer)]


def whole_modules(model: nn.Module) -> list[str]:
    """The modules that are trained whole, by their names."""
    return [plain_name(name) for name, layer in _wrapped(model) if _is_whole(layer)]


def changes_something(model: nn.Module) -> bool:
    """Whether the model has an adapter that computes something else than the model below it."""
    return any(is_kind(layer) and changes(layer) for _, layer in _wrapped(model) for is_kind, changes, _ in KINDS)


def copy_of_trained(model: nn.Module) -> Any:
    """A copy of the model that has weights of its own where they are trained, and shares those that stay."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters() if not weight.requires_grad})


@torch.no_grad()
def copy_of_base(model: nn.Module) -> Any:
    """The model below its adapter as a model of its own, frozen, which shares the weights with it."""
    shared = {id(weight): _sharing(weight) for weight in model.parameters()}
    below = copy.deepcopy(model, dict(shared))
    for name, layer in _wrapped(below):
        if not AROUND.search(name):  # else it went with the one around it
            parent, _, last = name.rpartition(".")
            base = layer.get_base_layer() if _is_lora(layer) else layer.original_module
            setattr(below.get_submodule(parent), last, base)
    for module in below.modules():
        for name in [name for name, _ in module.named_buffers(recurse=False) if _is_below(name)]:
            brought = module.get_parameter(name.removesuffix(BELOW))
            _replace(below, brought, nn.Parameter(module.get_buffer(name), requires_grad=False))
            delattr(module, name)
    vars(below).pop("peft_config", None)  # which peft leaves at what it has put layers into
    return below


def _sharing(weight: nn.Parameter) -> nn.Parameter:
    """A frozen parameter of the same values in the same memory; a quantised one, which nobody changes, as it is."""
    return nn.Parameter(weight.data, requires_grad=False) if type(weight) is nn.Parameter else weight


def _replace(model: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """Put a parameter in the place of another, wherever that is used."""
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if weight is old:
                module.register_parameter(name, new)


def plain_name(name: str) -> str:
    """The name that a module or weight has without adapters."""
    return AROUND.sub("", name)


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """The model as it is without its adapter."""
    wrapped = [module for _, module in _wrapped(model)]
    for module in wrapped:
        module._disable_adapters = True
    try:
        with _below(model):
            yield
    finally:
        for module in wrapped:
            module._disable_adapters = False


@contextmanager
def _below(model: nn.Module) -> Iterator[None]:
    """The weights that an adapter brought replaced by those of the model below."""
    pairs = [
        (module.get_parameter(name.removesuffix(BELOW)), value)
        for module in model.modules()
        for name, value in module.named_buffers(recurse=False)
        if name.endswith(BELOW)
    ]
    brought = [parameter.data for parameter, _ in pairs]
    for parameter, value in pairs:
        parameter.data = value
    try:
        yield
    finally:
        for (parameter, _), value in zip(pairs, brought, strict=True):
            parameter.data = value


def effective_weight(layer: Any) -> Float[Tensor, "..."]:
    """The weight that a layer computes with, as the layer stores it, differentiable in what is trained of it; that of
    a layer without an adapter is its own."""
    if not _is_lora(layer):
        return layer.weight  # what trains a whole module or single tokens gives its own
    weight = _base_weight(layer)
    if layer.disable_adapters:
        return weight
    with torch.autocast(weight.device.type, enabled=False):
        return _with_factors(layer, weight.to(torch.promote_types(weight.dtype, torch.float32)))


def _with_factors(layer: Any, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    factors = layer.lora_embedding_A if len(layer.lora_embedding_A) else layer.lora_A
    deltas = [layer.get_delta_weight(name) for name in (TRAINED, START) if name in factors]
    weight = weight + sum(deltas[1:], start=deltas[0])
    if TRAINED not in layer.lora_magnitude_vector:
        return weight
    magnitude = layer.lora_magnitude_vector[TRAINED]
    rows = weight.T if magnitude.fan_in_fan_out else weight
    scale = magnitude.weight / torch.linalg.norm(rows, dim=1).detach()  # as in section 4.3 of its paper
    return weight * (scale[None] if magnitude.fan_in_fan_out else scale[:, None])


def _base_weight(layer: Any) -> Float[Tensor, "..."]:
    """The weight below an adapter, no longer quantised."""
    if hasattr(layer, "parameter_name"):
        return layer.get_param()
    base = layer.get_base_layer()
    return dequantised(base) if is_quantised(base) else base.weight


def is_quantised(layer: nn.Module) -> bool:
    """Whether bitsandbytes holds the layer's weight."""
    return type(layer).__name__ in ("Linear8bitLt", "Linear4bit")


def dequantised(layer: nn.Module) -> Float[Tensor, "out in"]:
    """The weight that a layer of bitsandbytes computes with."""
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(layer)


def effective_bias(layer: Any) -> Float[Tensor, " out"] | None:
    """The bias that a layer computes with, differentiable in what is trained of it."""
    if _has_tokens(layer):
        return layer.token_adapter.base_layer.bias
    if not _is_lora(layer) or layer.disable_adapters:
        return layer.bias
    if not layer.lora_bias.get(TRAINED):
        return layer.bias
    return layer.bias + layer.scaling[TRAINED] * layer.lora_B[TRAINED].bias


# --- adapters whose start is subtracted


def _principal(
    weight: Float[Tensor, "out in"], rank: int, scaling: float
) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
    """PiSSA (arXiv:2404.02948): s B A is the best approximation of W of this rank."""
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    roots = (values[:rank] / scaling).sqrt()
    return roots[:, None] * right[:rank], left[:, :rank] * roots


def _orthonormal(
    weight: Float[Tensor, "out in"], rank: int, scaling: float
) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
    """OLoRA (arXiv:2406.01775): the first columns of Q and rows of R of W = Q R."""
    q, r = torch.linalg.qr(weight)
    return r[:rank], q[:, :rank]


STARTS = {"pissa": _principal, "olora": _orthonormal}
UNREPEATABLE = ("pissa_niter", "corda", "loftq", "lora_ga")  # drawn, of data, or of quantised weights


def _start_of(folder: Path) -> str | None:
    """What a saved adapter's training began with, where that was taken out of the weights below it. Raises ValueError
    for what the files do not say."""
    init = str(read_settings(folder / ADAPTER_SETTINGS).get("init_lora_weights")).lower()
    if init.startswith(UNREPEATABLE):
        raise ValueError(
            f"{ADAPTER_SETTINGS} says init_lora_weights: {init}, so it belongs to a base that was changed before "
            "training, which its files do not hold; save it again with peft's path_initial_model_for_weight_conversion"
        )
    return init if init in STARTS else None


@torch.no_grad()
def subtract_start(model: nn.Module, start: str) -> None:
    """Subtract, in every layer, the factors that the adapter's training begins with from what the adapter adds:
    W + s (B A - B0 A0). Peft takes them out of W instead; here the weights below an adapter stay the model's.

    Raises ValueError for a layer that is no matrix, or has a norm of its own (DoRA).
    """
    for name, layer in lora_layers(model):
        if hasattr(layer, "parameter_name") or not len(layer.lora_A) or len(layer.lora_magnitude_vector):
            raise ValueError(f"{start} is a start of plain LoRA on linear layers, and {name} is another")
        weight = _base_weight(layer).float()
        rows = weight.T if layer.fan_in_fan_out else weight
        for factors, value in zip(
            (layer.lora_A, layer.lora_B),
            STARTS[start](rows, layer.r[TRAINED], layer.scaling[TRAINED]),
            strict=True,
        ):
            factors[START] = copy.deepcopy(factors[TRAINED]).requires_grad_(False)
            factors[START].weight.copy_(value)
        layer.lora_dropout[START] = nn.Identity()
        layer.scaling[START] = -layer.scaling[TRAINED]
        layer._active_adapter = [TRAINED, START]


# --- the weights of a model and of its adapter


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the model below its adapter, by the names they have without it."""
    below = {plain_name(name.removesuffix(BELOW)): value for name, value in model.named_buffers() if _is_below(name)}
    return _current(model) | below


def _is_below(name: str) -> bool:
    return name.endswith(BELOW)


def _current(model: nn.Module) -> dict[str, Tensor]:
    """The state without what is an adapter's own, by the names it has without adapters."""
    return {plain_name(name): value for name, value in model.state_dict().items() if PARTS.isdisjoint(name.split("."))}


@torch.no_grad()
def effective(model: nn.Module) -> dict[str, Tensor]:
    """All that says what the model computes: its weights by the names they have without adapters, and of each part of
    an adapter that changes something its tensors and its scaling. A fresh adapter changes nothing."""
    state = _current(model)
    for name, layer in _wrapped(model):
        for is_kind, changes, own in KINDS:
            if is_kind(layer) and changes(layer):
                state |= {f"{name}.{key}": value for key, value in own(layer).items()}
    return state


def _lora_changes(layer: Any) -> bool:
    if len(layer.lora_magnitude_vector) or START in layer.lora_A:
        return not torch.equal(effective_weight(layer), _base_weight(layer).float())
    starts_at_zero = layer.lora_embedding_A if len(layer.lora_embedding_A) else layer.lora_B
    return any(bool(factor.any()) for factor in starts_at_zero.parameters())


def _lora_tensors(layer: Any) -> dict[str, Tensor]:
    factors = {name: value for name, value in layer.state_dict().items() if name.split(".")[0] in FACTORS}
    return factors | {"scaling": torch.tensor([*layer.scaling.values()], dtype=torch.float64)}


def _whole_changes(layer: Any) -> bool:
    before = layer.original_module.state_dict()
    return not all(torch.equal(value, before[name]) for name, value in _whole_tensors(layer).items())


def _whole_tensors(layer: Any) -> dict[str, Tensor]:
    return layer.modules_to_save[TRAINED].state_dict()


def _tokens_change(layer: Any) -> bool:
    adapter = layer.token_adapter
    return not torch.equal(adapter.get_merged_weights([TRAINED]), adapter.base_layer.weight)


def _token_tensors(layer: Any) -> dict[str, Tensor]:
    adapter = layer.token_adapter
    indices = torch.tensor(adapter.token_indices[TRAINED])
    return {"token_indices": indices, "token_rows": adapter.trainable_tokens_delta[TRAINED].detach()}


# What peft wraps a module with: whether it is this, whether that changes anything, and its tensors.
KINDS: tuple[tuple[Callable[[Any], bool], Callable[[Any], bool], Callable[[Any], dict[str, Tensor]]], ...] = (
    (_is_lora, _lora_changes, _lora_tensors),
    (_is_whole, _whole_changes, _whole_tensors),
    (_has_tokens, _tokens_change, _token_tensors),
)


# --- what is saved


@torch.no_grad()
def merge(model: Any) -> Any:
    """A model without adapters, in float32, that computes the same with the effective weights. Where the embedding is
    the head as well and an adapter tells them apart, they become two weights."""
    state = _current(model) | _merged(model)
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    embedding, head = (
        effective_weight(layer) for layer in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    if embedding.shape != head.shape or not torch.equal(embedding, head):
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    with torch.device("meta"):
        plain = type(model)(config)
    state = {name: state[name].to(_at_least_float32(state[name])) for name in plain.state_dict()}
    plain.load_state_dict(state, assign=True)
    plain.tie_weights()
    plain.generation_config = copy.deepcopy(model.generation_config)
    for name, buffer in model.named_buffers():  # those that are not in the state
        owner, _, last = plain_name(name).rpartition(".")
        if PARTS.isdisjoint(name.split(".")) and not _is_below(name):
            plain.get_submodule(owner)._buffers[last] = buffer
    return plain.eval()


def _at_least_float32(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32) if value.is_floating_point() else value.dtype


def _merged(model: nn.Module) -> dict[str, Tensor]:
    """The effective weights of the layers of an adapter, and quantised ones as they compute."""
    state = {
        plain_name(f"{name}.weight"): dequantised(layer)
        for name, layer in model.named_modules()
        if is_quantised(layer)
    }
    for name, layer in _wrapped(model):
        if _is_lora(layer):
            weight = f"{name}.{layer.parameter_name if hasattr(layer, 'parameter_name') else 'weight'}"
            state[plain_name(weight)] = effective_weight(layer)
            if any(layer.lora_bias.values()):
                state[plain_name(f"{name}.bias")] = effective_bias(layer)  # pyright: ignore[reportArgumentType]
        elif _is_whole(layer):
            state |= {plain_name(f"{name}.{key}"): value for key, value in _whole_tensors(layer).items()}
        elif _has_tokens(layer):
            state[plain_name(f"{name}.weight")] = layer.weight
    return state


@torch.no_grad()
def adapter_tensors(layers: Any) -> dict[str, Tensor]:
    """The tensors of an adapter as peft names them."""
    with peft_for("model.adapter") as peft:
        # Asked for "auto", peft would look for the model that the adapter names as its own, on the hub too.
        tensors = peft.get_peft_model_state_dict(layers, save_embedding_layers=False)
    state = layers.state_dict()
    brought = [name.removesuffix(BELOW) for name, _ in layers.named_buffers() if _is_below(name)]
    return {name: state[name] for name in brought} | tensors


@torch.no_grad()
def save_adapter(layers: Any, folder: Path, tensors: dict[str, Tensor] | None = None) -> None:
    """Write the adapter, or its `tensors` where they had to be gathered, as peft reads it. One whose start is
    subtracted is written with twice the rank, [A; A0] and [B, -B0], so that it belongs to the model itself and no
    longer to one that was changed first."""
    tensors = adapter_tensors(layers) if tensors is None else tensors
    config = copy.deepcopy(layers.peft_config[TRAINED])
    config.inference_mode = True
    if any(f".{START}." in name for name in tensors):
        tensors = _doubled(tensors)
        _double_rank(config)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.detach().clone() for name, value in tensors.items()}, folder / ADAPTER_WEIGHTS
    )  # tied ones too
    config.save_pretrained(str(folder))


def _doubled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    doubled = {name: value for name, value in tensors.items() if f".{START}." not in name}
    for name, value in tensors.items():
        trained = name.replace(f".{START}.", ".")
        if trained == name:
            continue
        down = ".lora_A." in name
        doubled[trained] = torch.cat([doubled[trained], value if down else -value], dim=0 if down else 1)
    return doubled


def _double_rank(config: Any) -> None:
    """Twice the rank with the same scaling."""
    growth = math.sqrt(2) if config.use_rslora else 2
    config.r, config.lora_alpha = 2 * config.r, growth * config.lora_alpha
    config.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
    config.alpha_pattern = {name: growth * alpha for name, alpha in config.alpha_pattern.items()}
