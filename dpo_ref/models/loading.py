"""Load causal language models and their tokenizers through transformers, and the policy that a run trains."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dpo_ref.component import component, configuration
from dpo_ref.data.chat_templates import install_template, text_identity
from dpo_ref.data.tokenise import end_of_turn_ids
from dpo_ref.files.digests import DIGESTS, file_digest
from dpo_ref.models.adapters import other_base
from dpo_ref.models.attention import KERNELS, resolve_backend
from dpo_ref.models.checkpoint import save_policy, weights_digest
from dpo_ref.models.experts import (
    Router,
    Routing,
    check_adapted,
    check_router_loss,
    freeze,
    router_coefficient,
    routers_of,
    routing_note,
    training_mode,
)
from dpo_ref.models.folders import (
    ADAPTER_SETTINGS,
    MODEL_FILES,
    TEXT_FILES,
    WITHOUT_EFFECT,
    check_complete,
    check_finite,
    check_sizes,
    check_vocabulary,
    opened,
    own_weights,
    padding_note,
    positions_of,
    stored_shapes,
    weight_files,
)
from dpo_ref.models.frozen import hold_in_bfloat16
from dpo_ref.models.layers import CHECKPOINTING, check_checkpointing, compile_layers
from dpo_ref.models.logps import (
    FusedLoss,
    LossOf,
    head_of,
    response_hidden,
    response_logps,
    sum_by_response,
)
from dpo_ref.models.lora import AdapterOptions, check_adapter_options, held_in, trained_summary
from dpo_ref.models.packable import install, kernel_refuses
from dpo_ref.models.sharding import (
    ALONE,
    Holding,
    Parallel,
    check_in_step,
    make_room,
    one_after_another,
    without_weights,
)
from dpo_ref.models.shards import read
from dpo_ref.types import PackedBatch, ResponseLogps, Span

# --- a model and what determines what it says


@dataclass(frozen=True)
class TrainedModel(ABC):
    """A model, the tokenizer and template it is used with, and the dtype it computes in.

    The weights are loaded when first asked for: a model that is served elsewhere need not be loaded here. They are
    float32 whatever the compute dtype: at lr 5e-7 an update vanishes in bfloat16. `path` is as the user wrote it,
    `folder` its folder or hub name; `on_top` is what changes the weights of that folder, if anything does.
    """

    load: Callable[[], nn.Module]
    tokenizer: Any
    compute_dtype: torch.dtype = torch.float32
    path: str = ""
    folder: str = ""
    on_top: str | None = None
    compiled: bool = False
    adapter: Any = None  # peft's view of the model, where an adapter is trained instead of its weights
    notes: tuple[str, ...] = ()  # what the user is told of how it runs
    router_loss: float = 0.0  # coefficient of a mixture's load-balancing loss
    holding: Holding = field(default_factory=Holding)  # how it is trained on all ranks
    writes: ClassVar[bool]  # whether it can be asked for answers

    @cached_property
    def model(self) -> Any:
        """The model, with packed attention installed where its architecture allows."""
        return self.load()

    @cached_property
    def weights(self) -> str:
        """Digest of the weights as they are when it is first asked for."""
        return weights_digest(self.model)

    @cached_property
    def text_identity(self) -> str:
        """Digest of tokenizer and template."""
        return text_identity(self.tokenizer)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def positions(self) -> int | None:
        """How many tokens the model has positions for."""
        return positions_of(self.model.config)

    def precision(self) -> AbstractContextManager[Any]:
        """The context in which every forward pass of policy and reference runs.

        A run stays in it from end to end, so autocast must keep no half-precision copies of the weights: it would go
        on using them after the optimiser's step.
        """
        if self.compute_dtype is torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.compute_dtype, cache_enabled=False)

    @cached_property
    def routers(self) -> tuple[Router, ...]:
        """Those of a mixture of experts."""
        return routers_of(self.model)

    def routing(self, num_tokens: int) -> Routing:
        """What observes them in an optimiser step whose packs have so many tokens; compiled layers hide theirs."""
        top_k = getattr(self.model.config, "num_experts_per_tok", 1)
        return Routing(() if self.compiled else self.routers, top_k, self.router_loss, num_tokens)

    def train(self) -> None:
        """Training mode."""
        training_mode(self.model, self.routers)

    @abstractmethod
    def outputs(self, batch: PackedBatch) -> Any:
        """What an objective is handed of this model for the responses of a pack."""

    @abstractmethod
    def loss(self, batch: PackedBatch, loss_of: Callable[[Any, Span], Tensor]) -> tuple[Tensor, Any]:
        """The summed loss of a pack, differentiable in the weights, and the model's detached outputs. `loss_of` is the
        loss of a run of groups by the outputs for these."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write a folder that transformers loads without our code."""


@dataclass(frozen=True)
class Policy(TrainedModel):
    """A causal language model: asked for log-probs of responses, and for answers."""

    writes: ClassVar[bool] = True

    def outputs(self, batch: PackedBatch) -> ResponseLogps:
        """Log-probs of the pack's responses."""
        return response_logps(self.model, batch)

    def loss(self, batch: PackedBatch, loss_of: LossOf) -> tuple[Float[Tensor, ""], ResponseLogps]:
        """The gradient is made in the forward pass (`FusedLoss`): what `loss_of` returns must not depend on other
        groups."""
        hidden, head = response_hidden(self.model, batch), head_of(self.model)
        loss, values = FusedLoss.apply(hidden, head.weight, head.bias, head, batch, loss_of)  # pyright: ignore
        return loss, ResponseLogps(sum_by_response(values, batch), batch.lengths, batch.num_bytes, values)

    def save(self, folder: Path) -> None:
        """Weights (a trained adapter merged into them), config, tokenizer, chat template, and what ends an answer."""
        ends = end_of_turn_ids(self.tokenizer)
        save_policy(folder, self.model, self.tokenizer, self.adapter, ends, self.holding)


# --- loading


def compute_dtype(requested: str, device: torch.device, key: str = "model.dtype") -> torch.dtype:
    """The dtype asked for: auto is bfloat16 on CUDA, float32 on a CPU. ValueError, naming `key`, for bfloat16 on a
    CPU."""
    if requested == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if requested == "bfloat16" and device.type == "cpu":
        raise ValueError(f"{key}=bfloat16 needs a CUDA device; on a CPU write {key}=float32 (or auto)")
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[requested]


LOCATORS: dict[str, Callable[[str], str]] = {}  # by a path's beginning, such as lab: what gives the folder it names


def locate(path: str) -> str:
    """What transformers can load: a local folder or hub name as it is, what a locator makes of any other path."""
    scheme = path[: path.find(":") + 1]
    return LOCATORS[scheme](path) if scheme in LOCATORS else path


ADAPTED = {"reference.path": "reference"}  # the group whose option puts an adapter on the model that a key names


def check_folder(path: str, key: str, needed: str = "config.json") -> None:
    """Raise ValueError if `path` is a local folder without the file `needed`, or looks local and does not exist."""
    if path[: path.find(":") + 1] in LOCATORS:
        return
    folder = Path(path).expanduser()
    if folder.is_dir() and not (folder / needed).is_file():
        inner = folder / "policy" / "config.json"
        hint = f"; the run's policy is in {folder / 'policy'}" if inner.is_file() else ""
        if needed == "config.json" and (folder / ADAPTER_SETTINGS).is_file():
            hint = f"; it is an adapter: name its base here and it with {ADAPTED.get(key, 'model')}.adapter"
        raise ValueError(f"{key}={path} is not a model folder: it has no {needed}{hint}")
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
    if not folder.exists() and looks_local and "/" in path:
        raise ValueError(f"{key}={path} does not exist")


def check_revision(path: str, revision: str | None, key: str) -> None:
    """Raise ValueError for a revision of what is no name on the hub; `key` is the group that says it."""
    here = path[: path.find(":") + 1] in LOCATORS or Path(path).expanduser().exists()
    if revision is not None and here:
        raise ValueError(f"{key}.revision={revision} has no effect: {key}.path={path} is on this machine, not the hub")


def load_tokenizer(path: str, key: str = "model.path", revision: str | None = None) -> Any:
    """The tokenizer in a local folder or on the hub; no code from the folder. Raises ValueError naming `key`."""
    from transformers import AutoTokenizer

    with opened(path, key, revision, TEXT_FILES, "no tokenizer could be loaded") as folder:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        _share_vocabulary(tokenizer, folder)
    return tokenizer


_VOCABULARIES: dict[str, Any] = {}  # by the names and digests of a tokenizer's files


def _share_vocabulary(tokenizer: Any, folder: Path) -> None:
    """Give tokenizers of equal files one vocabulary. Every thread remembers words for every vocabulary that it ever
    met, also when that is gone (tokenizers 0.23): each job of a sweep would leave some 100 KiB."""
    if tokenizer.is_fast:
        files = sorted(file for name in TEXT_FILES for file in folder.glob(name) if file.name != DIGESTS)
        backend = tokenizer.backend_tokenizer
        content = " ".join(f"{file.name} {file_digest(file)}" for file in files)
        backend.model = _VOCABULARIES.setdefault(content, backend.model)


def prepared_tokenizer(
    folder: str,
    template: str,
    template_options: dict[str, Any] | None,
    max_length: int | None,
    revision: str | None = None,
) -> Any:
    """The tokenizer at `folder` with its chat template and its length as `pretrained` says."""
    check_folder(folder, "model.path")
    tokenizer = load_tokenizer(folder, revision=revision)
    install_template(tokenizer, template, template_options)
    if max_length is not None:
        tokenizer.model_max_length = max_length
    return tokenizer


def _without_dropout(config: Any) -> Any:
    """Dropout off: policy and reference must be the same function. For the noise of experts see `training_mode`."""
    names = [name for name in vars(config) if "dropout" in name or name.endswith("pdrop")]
    for name in names:
        if isinstance(getattr(config, name), float):
            setattr(config, name, 0.0)
    return config


def _check_writes(config: Any) -> None:
    """Raise ValueError for a classifier, which transformers would give a language-model head of random weights."""
    kinds = [name for name in config.architectures or () if name.endswith("ForSequenceClassification")]
    if kinds:
        raise ValueError(f"it is a {kinds[0]}, which scores answers and writes none: scorer=reward_model scorer.path=")


class LoadedModel(NamedTuple):
    """A causal language model, and what the user is told of how it runs."""

    model: Any
    notes: tuple[str, ...]


def load_model(
    path: str,
    device: torch.device | None,
    attention: str,
    key: str = "model.path",
    revision: str | None = None,
    hold: Callable[[nn.Module], None] | None = None,
    **how: Any,
) -> LoadedModel:
    """A causal language model in float32, packed where its architecture allows; safetensors only, no code from the
    folder. `hold` changes what holds its weights before they go to the device. `how` is handed to transformers:
    another dtype, a quantisation; with `device=None` it also says where the weights go. Raises ValueError naming
    `key` for what is no model."""
    from transformers import AutoModelForCausalLM

    check_folder(path, key)
    model = pretrained_model(AutoModelForCausalLM, _check_writes, path, key, revision, **how)
    if hold is not None:
        hold(model)
    if device is not None:
        model.to(device)
    check_finite(model, f"{key}={path}")
    with _quietly():  # some architectures say that they keep their own attention
        return LoadedModel(model, _install_packing(model, attention, f"{key}={path}"))


def pretrained_model(
    family: Any, check: Callable[[Any], None], path: str, key: str, revision: str | None, **how: Any
) -> Any:
    """A model of a class of transformers, with all weights of its folder and none besides, in eval mode; `check`
    raises ValueError for a config that is not wanted. `how` is handed to transformers."""
    with opened(path, key, revision, MODEL_FILES, "no model could be loaded") as folder, _quietly():
        config = _config_of(folder, family, check)
        options = {"dtype": torch.float32, "use_safetensors": True, "trust_remote_code": False} | how
        model, info = family.from_pretrained(
            folder, config=config, ignore_mismatched_sizes=True, output_loading_info=True, **options
        )
        check_complete(info)
        own_weights(model)
    return model.eval()


def _config_of(folder: Path, family: Any, check: Callable[[Any], None]) -> Any:
    from transformers import AutoConfig

    config = _without_dropout(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    check(config)
    check_sizes(config, family, stored_shapes(folder))
    return config


@contextmanager
def _quietly() -> Iterator[None]:
    """transformers without its progress bar, as one at a time is shown, ours, and without its table of weights that
    do not fit, which are an error here."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _install_packing(model: nn.Module, attention: str, title: str) -> tuple[str, ...]:
    """Install packed attention where the architecture allows it; what the user is told where it does not."""
    backend = resolve_backend(attention)
    reason = install(model, backend)
    if reason is not None:
        return (f"{title} runs one response at a time, unpacked: {reason}",)
    refusal = kernel_refuses(model, backend) if backend in KERNELS else None
    if refusal is None:
        return ()
    if attention != "auto":
        raise ValueError(f"{title} cannot run with attention={attention}: {refusal}; use auto or sdpa")
    return (f"{title} attends piece by piece, as with sdpa: {refusal}",)


IN_4_BITS = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16}
QUANTISED = {
    "8bit": {"load_in_8bit": True},
    "4bit": IN_4_BITS,
    "int8": {"load_in_8bit": True},  # as model.weights has it, and nf4
    "nf4": IN_4_BITS | {"bnb_4bit_quant_type": "nf4"},
}


def quantisation_options(quantisation: str, title: str) -> dict[str, Any]:
    """What transformers is told. Raises ValueError, beginning with the `title`, without bitsandbytes."""
    if quantisation not in QUANTISED:
        return {}
    try:
        import bitsandbytes  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"{title} needs bitsandbytes: pip install -r requirements-reference.txt") from error
    from transformers import BitsAndBytesConfig

    return {"quantization_config": BitsAndBytesConfig(**QUANTISED[quantisation])}


def placement(device: str, quantised: bool, policy: torch.device) -> tuple[torch.device | None, dict[str, Any]]:
    """Where the model is moved after loading, or how transformers spreads it while loading."""
    if device == "spread":
        try:
            import accelerate  # noqa: F401
        except ImportError as error:
            raise ValueError(
                "reference.device=spread needs accelerate: pip install -r requirements-reference.txt"
            ) from error
        return None, {"device_map": "auto"}
    target = policy if device == "auto" else torch.device(device)
    return (None, {"device_map": {"": target}}) if quantised else (target, {})


def load_below(
    folder: str, weights: str, device: torch.device, attention: str, revision: str | None, key: str = "model.path"
) -> LoadedModel:
    """A model without its adapter, its own weights held as `model.weights` says."""
    held = held_in(weights, device)
    how = quantisation_options(held, f"model.weights={held}")
    where, placing = placement("auto", bool(how), device)
    hold = hold_in_bfloat16 if held == "bfloat16" else None
    return load_model(folder, where, attention, key, revision, hold=hold, **how, **placing)


def _check_options(
    path: str,
    revision: str | None,
    dtype: str,
    attention: str,
    router_loss: int | float | str | None,
    compile: bool,
    **rest: Any,
) -> None:
    """Raise ValueError for options that would have no effect."""
    check_revision(path, revision, "model")
    check_router_loss(router_loss, compile)
    if attention in KERNELS and dtype == "float32":
        raise ValueError(
            f"model.attention={attention} computes in half precision and has no effect with model.dtype=float32; use "
            "model.attention=sdpa"
        )
    check_adapter_options(AdapterOptions(**{name: rest[name] for name in configuration(AdapterOptions)}))


@component(check=_check_options)
def pretrained(
    device: torch.device,
    adapter: AdapterOptions,
    parallel: Parallel = ALONE,
    *,
    path: str,
    revision: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    attention: Literal["auto", "flash_attn", "varlen", "sdpa", "eager"] = "auto",
    gradient_checkpointing: Literal["off", "selective", "full", "offload"] = "off",
    compile: bool = False,
    template: str = "auto",
    template_options: dict[str, Any] | None = None,
    max_length: int | None = None,
    router_loss: int | float | str | None = None,
    freeze_router: bool = False,
) -> Policy:
    """The policy to train: a local folder, a hub name, or a model of the lab (`lab:initial`), all of its weights or an
    adapter (`AdapterOptions`). `revision` is a branch, tag or commit of the hub's; the run's summary.json says which
    commit it was.

    `dtype` is the compute dtype: auto is bfloat16 on CUDA, float32 on a CPU. `gradient_checkpointing` recomputes
    activations in the backward pass: `full` keeps the layers' inputs alone and costs a third more time, `selective`
    keeps the products of matrices and attention as well and recomputes only what is cheap, `offload` is full with the
    layers' inputs in main memory, to and from where they are copied while layers compute. `compile` compiles every
    decoder layer with dynamic shapes: packs of any length run without compiling again. `template` is the chat
    template: the tokenizer's own (auto), or zephyr, tulu, llama3, llama31, chatml, hermes, alpaca or plain, of which
    llama31 and hermes write tools and calls, hermes thoughts as well; `template_options` are settings that the
    template looks at, such as enable_thinking. `max_length` is what the model is meant for, in tokens;
    data.max_length goes before it.

    Of a mixture of experts, `router_loss` is the coefficient of its load-balancing loss, which is added to any
    objective's once an optimiser step: a number, `config` for the one in the model's config, or null for none;
    `freeze_router` leaves its routers as they are.
    """
    computes_in = compute_dtype(dtype, device)
    check_checkpointing(gradient_checkpointing, device)
    folder = locate(path)
    tokenizer = prepared_tokenizer(folder, template, template_options, max_length, revision)
    bare = None if adapter.trained or not parallel.in_parts else model_without_weights(folder, "model.path", revision)
    options = Prepared(router_loss, freeze_router, gradient_checkpointing, compile)
    with one_after_another(parallel.in_parts and bare is None):
        loaded = LoadedModel(bare, ()) if bare else load_below(folder, adapter.below, device, attention, revision)
        trained, balancing, notes = _prepared(loaded.model, adapter, options)
        holding = parallel.holding(loaded.model, computes_in)
    if bare is not None:
        loaded = fill(bare, folder, attention, "model.path", revision)
    if parallel.in_parts:
        check_in_step(loaded.model, f"model.path={path}")
    check_vocabulary(tokenizer, loaded.model, f"model.path={path}")
    notes = (*loaded.notes, *padding_note(tokenizer, loaded.model, f"model.path={path}"), *notes)
    return Policy(
        lambda: loaded.model, tokenizer, computes_in, path, folder, compiled=compile, adapter=trained, notes=notes,
        router_loss=balancing, holding=holding,
    )  # fmt: skip


class Prepared(NamedTuple):
    """How a policy is trained, of the options of `pretrained`."""

    router_loss: int | float | str | None
    freeze_router: bool
    gradient_checkpointing: str
    compile: bool


def _prepared(model: Any, adapter: AdapterOptions, options: Prepared) -> tuple[Any, float, tuple[str, ...]]:
    """Make a model ready to be trained, in place: peft's view of it where an adapter is trained, the coefficient of
    its load-balancing loss, and what the user is told."""
    trained = adapter.put_on(model)
    routers = routers_of(model)
    check_adapted(model, routers)
    balancing = router_coefficient(model, routers, options.router_loss)
    notes = routing_note(model, routers, balancing)
    if options.freeze_router:
        freeze(model, routers)
    if trained is not None:
        notes += trained_summary(model)
    if adapter.adapter is not None:
        notes += other_base(adapter.adapter, "model.adapter", model)
    CHECKPOINTING[options.gradient_checkpointing](model)
    if options.compile:
        compile_layers(model)
    return trained, balancing, notes


# --- a model of which each rank reads its part


def model_without_weights(path: str, key: str, revision: str | None) -> Any:
    """The model in a folder with weights that take no memory, for `fill` once they are sharded; None where its files
    hold others than it computes with, which transformers puts together when it loads all of them."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    check_folder(path, key)
    with opened(path, key, revision, MODEL_FILES, "no model could be loaded") as folder, _quietly():
        config = _config_of(folder, AutoModelForCausalLM, _check_writes)
        with without_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False).eval()
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        files = stored_shapes(folder)
        shapes = {name: tuple(value.shape) for name, value in _own_tensors(model).items()}
        if set(folder.glob("*.safetensors")) != set(weight_files(folder)):  # of which all would be read
            return None
        surplus = {name for name in files.keys() - _names(model) if not WITHOUT_EFFECT.search(name)}
        return None if surplus or shapes != {name: files.get(name) for name in shapes} else model


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The weights and buffers that its files hold, tied ones once."""
    kept, state = dict(model.named_parameters()), model.state_dict(keep_vars=True)
    return kept | {name: buffer for name, buffer in model.named_buffers() if name in state}


def _names(model: nn.Module) -> set[str]:
    """Those and the other names of tied weights."""
    return {*model.state_dict(keep_vars=True)}


def fill(model: Any, path: str, attention: str, key: str, revision: str | None) -> LoadedModel:
    """Read what this rank holds of a model without weights, and no more, from its files; packed where its architecture
    allows. All ranks come here. Raises ValueError as `load_model` does."""
    make_room(model)
    title = f"{key}={path}"
    with opened(path, key, revision, MODEL_FILES, "no model could be loaded") as folder:
        read(folder, {name: value.detach() for name, value in _own_tensors(model).items()})
    check_finite(model, title)
    with _quietly():
        return LoadedModel(model, _install_packing(model, attention, title))
