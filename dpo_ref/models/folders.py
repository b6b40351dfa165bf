"""Folders of models, tokenizers and adapters as strangers bring them: what is refused before transformers reads them,
and what is checked of the model that it made.

Nothing of a folder is run, neither code that its files name nor a pickle, and no weight is ever drawn at random in the
place of one that is not there.
"""

import copy
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpo_ref.data.chat_templates import ChatText
from dpo_ref.files.digests import DIGESTS, file_digest
from dpo_ref.files.hub import note_commit
from dpo_ref.models.shards import held

TEXT_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")  # of a tokenizer, on the hub
MODEL_FILES = (*TEXT_FILES, "model*.safetensors")
ADAPTER_SETTINGS, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_FILES = (DIGESTS, ADAPTER_SETTINGS, ADAPTER_WEIGHTS)
SETTINGS = (
    "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json",
    "processor_config.json", "preprocessor_config.json", "adapter_config.json",
)  # fmt: skip
UNKNOWN_LORA = (  # settings of a LoRA adapter under which it computes something else than W + s B A
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "monteclora_config", "use_bdlora",
    "use_qalora", "velora_config",
)  # fmt: skip
WEIGHTS, INDEX, CARD = "model.safetensors", "model.safetensors.index.json", "README.md"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack", "*.h5")
CODE = ("auto_map", "custom_pipelines", "custom_generate")
KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
# What older folders hold beside their weights: buffers that are computed, and a head that is the embedding.
WITHOUT_EFFECT = re.compile(
    r"inv_freq$|masked_bias$|attn\.bias$|attention\.bias$|position_ids$|(^|\.)lm_head\.weight$"
)
SHOWN = 5  # names in one sentence
LARGE = 2**28  # weights that a machine can hold: below, transformers says more exactly what does not fit
AGAIN = "save, copy or download it again"


@contextmanager
def opened(path: str, key: str, revision: str | None, files: Sequence[str], failure: str) -> Iterator[Path]:
    """The folder at `path`, or that of a hub name with its `files`, for transformers to read from.

    Raises ValueError naming `key`, with `failure` and the reason, for code in it, for settings that are none, for
    whatever a library makes of its files, and where they change meanwhile. What does not fit into memory is passed on.
    """
    try:
        folder = _local(path, revision, files)
        before = _stamps(folder)
        check_digests(folder, files)
        check_settings(folder)
        yield folder
        if _stamps(folder) != before:
            raise ValueError("its files changed while they were read; type the command again once they are whole")
    except Exception as error:  # a stranger's files bring any error out of transformers
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "memory" in str(error)):
            raise
        raise ValueError(f"{key}={path}: {failure}: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """What an error says, as one line."""
    return " ".join(str(error).split())[:400] or type(error).__name__


def _local(path: str, revision: str | None, files: Sequence[str]) -> Path:
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    folder = snapshot_download(path, revision=revision, allow_patterns=list(files), ignore_patterns=["*/*"])
    note_commit(path, revision, folder)
    return Path(folder)


def _stamps(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What changes when a file of the folder does."""
    files = (*folder.glob("*"), *folder.glob("*/*.safetensors"))  # shards may lie in folders of their own
    stamps = {str(file.relative_to(folder)): file.stat() for file in files if file.is_file()}
    return {name: (stamp.st_ino, stamp.st_size, stamp.st_mtime_ns) for name, stamp in stamps.items()}


# --- before anything is loaded


def read_settings(file: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError for anything else."""
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file.name} is no JSON ({reason_of(error)}); {AGAIN}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file.name} is no JSON object but a {type(settings).__name__}; {AGAIN}")
    return settings


def check_digests(folder: Path, patterns: Sequence[str] = ("*",)) -> None:
    """Raise ValueError for a file of these patterns that is not what was written, in a folder whose writer left
    digests: policies and reward models of runs."""
    digests = read_settings(folder / DIGESTS) if (folder / DIGESTS).is_file() else {}
    for name, digest in digests.items():
        inside = Path(name).name == name and any(fnmatch(name, pattern) for pattern in patterns)
        if inside and not ((folder / name).is_file() and file_digest(folder / name) == digest):
            raise ValueError(
                f"{name} is not as it was written ({DIGESTS} has another digest): {AGAIN}; if it was changed on "
                f"purpose, delete {DIGESTS}"
            )


def check_settings(folder: Path) -> None:
    """Raise ValueError for settings that are no JSON or that name code: dpo_ref runs none of a folder, and asks
    nobody whether it should."""
    for file in (folder / name for name in SETTINGS):
        if file.is_file():
            _check_code(file.name, read_settings(file))
    if (folder / "config.json").is_file() and (folder / "adapter_config.json").is_file():
        raise ValueError(
            "it is a model with an adapter beside it (adapter_config.json), which would change what the model says; "
            "move the adapter to a folder of its own and name that with model.adapter or reference.adapter"
        )


def _check_code(name: str, settings: Mapping[str, Any]) -> None:
    for key in CODE:
        if settings.get(key):
            raise ValueError(
                f"{name} names code of its own ({key}: {_shortened(settings[key])}), and dpo_ref runs no code from "
                f"model folders; if transformers knows the architecture by itself, take {key} out of {name}"
            )
    kernel = next((settings[key] for key in KERNELS if "/" in str(settings.get(key))), None)
    if kernel is not None:
        raise ValueError(
            f"{name} names code on the hub that computes attention ({_shortened(kernel)}), and dpo_ref runs no code "
            f"from model folders; take it out of {name}"
        )
    for inner in settings.values():
        if isinstance(inner, dict):
            _check_code(name, inner)


def _shortened(value: Any) -> str:
    text = ", ".join(map(str, value.values())) if isinstance(value, dict) else str(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the tensors in a model folder, of the files' headers.

    Raises ValueError for weights that are no safetensors, that are cut short, or not all there.
    """
    return shapes_in(weight_files(folder))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files with a model folder's weights. Raises ValueError where there are none, or not all."""
    chosen = read_settings(folder / "config.json").get("transformers_weights")
    if chosen is not None:
        raise ValueError(f"config.json names other weights (transformers_weights: {chosen}); call them {WEIGHTS}")
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise ValueError(_no_weights(folder, WEIGHTS))
    shards = read_settings(folder / INDEX).get("weight_map")
    names = sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else []
    if not names:
        raise ValueError(f"{INDEX} names no files; {AGAIN}")
    outside = [name for name in names if not _is_inside(Path(name)) or not name.endswith(".safetensors")]
    if outside:
        raise ValueError(f"{INDEX} names {outside[0]}, which is no safetensors file of this folder; {AGAIN}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{_listed(missing)} of {INDEX} {_are(missing)} not in the folder; copy or download it again")
    return [folder / name for name in names]


def _is_inside(path: Path) -> bool:
    """Whether a path leads nowhere out of the folder that it is relative to."""
    return not path.is_absolute() and ".." not in path.parts


def _no_weights(folder: Path, needed: str) -> str:
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if not pickles:
        return f"it has no weights: {needed} is not there; {AGAIN}"
    return (
        f"its weights are no safetensors but {_listed(pickles)}, a format that can run code when it is read, and only "
        f"safetensors are read; if you trust it, read it with transformers or peft (use_safetensors=False) and "
        f"save_pretrained writes {needed}"
    )


def shapes_in(files: Sequence[Path]) -> dict[str, tuple[int, ...]]:
    """The names and shapes of tensors. Raises ValueError for a file that is no whole safetensors file."""
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            size = file.stat().st_size
            raise ValueError(
                f"{file.name} is damaged or cut short: its {size:,} bytes are no safetensors file "
                f"({reason_of(error)}); copy or download it again"
            ) from error
    return shapes


def check_adapter(folder: Path) -> None:
    """Raise ValueError for what is no LoRA adapter of a causal language model, for one with settings that are not
    known here, for weights that are no safetensors, and for damaged ones."""
    if not (folder / ADAPTER_SETTINGS).is_file():
        inner = sorted(path.parent for path in folder.glob(f"*/{ADAPTER_SETTINGS}"))
        hint = f"; one is in {inner[0]}" if inner else ""
        raise ValueError(f"it is no adapter: it has no {ADAPTER_SETTINGS}{hint}")
    settings = read_settings(folder / ADAPTER_SETTINGS)
    kind, task = settings.get("peft_type"), settings.get("task_type")
    if kind != "LORA":
        raise ValueError(f"{ADAPTER_SETTINGS} says peft_type: {kind}, and adapters here are LORA")
    if task not in (None, "CAUSAL_LM"):
        raise ValueError(f"{ADAPTER_SETTINGS} says task_type: {task}, and adapters here are of causal language models")
    unknown = next((key for key in UNKNOWN_LORA if settings.get(key)), None)
    if unknown is not None:
        raise ValueError(
            f"{ADAPTER_SETTINGS} says {unknown}: {_shortened(settings[unknown])}, which changes how the adapter "
            "computes and is not known here; merge it with peft (merge_and_unload) and give the merged folder"
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ValueError(_no_weights(folder, ADAPTER_WEIGHTS))
    shapes_in([folder / ADAPTER_WEIGHTS])


def check_sizes(config: Any, family: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError for a config.json that describes a far larger model than the weights are, before it takes the
    memory; `family` is the class of transformers that builds it. Nothing is allocated here."""
    layers = config.get_text_config().num_hidden_layers
    if layers > len(shapes):
        raise ValueError(f"config.json says num_hidden_layers={layers:,}, and the weights are {len(shapes)} tensors")
    try:
        with torch.device("meta"):
            described = family.from_config(copy.deepcopy(config), trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"config.json describes no model that can be built: {reason_of(error)}") from error
    size, stored = sum(p.numel() for p in described.parameters()), sum(math.prod(shape) for shape in shapes.values())
    packed = getattr(config, "quantization_config", None) is not None  # several weights in one number
    if size > LARGE and size > 2 * stored and not packed:
        raise ValueError(
            f"config.json describes {size:,} weights, and the folder holds {stored:,}; put the config.json there that "
            "was saved with them"
        )


# --- of the model that was loaded


def _listed(names: Sequence[str]) -> str:
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest


def _are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def check_complete(info: Mapping[str, Any]) -> None:
    """Raise ValueError for weights that are not those of the model, of what transformers says of its loading: shapes,
    tensors that are not there, tensors that it has no place for."""
    for name, stored, described in sorted(info["mismatched_keys"]):
        raise ValueError(
            f"{name} is {list(stored)} in the weights and {list(described)} by config.json "
            f"({len(info['mismatched_keys'])} such); put the config.json there that was saved with the weights"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"it lacks weights, such as {_listed(missing)}; nothing is put in their place: {AGAIN}, with the "
            "config.json that belongs to it"
        )
    surplus = sorted(name for name in info["unexpected_keys"] if not WITHOUT_EFFECT.search(name))
    if surplus:
        raise ValueError(
            f"its weights hold {_listed(surplus)}, for which the model of config.json has no place: they belong to "
            "another config.json, or to an adapter or a head that has to be merged or taken out first"
        )


@torch.no_grad()
def own_weights(model: nn.Module) -> None:
    """Give the model memory of its own where its weights are those of the file, as they are on a CPU without a change
    of dtype: who writes over the file would change them under the run, or end it."""
    for parameter in model.parameters():
        if not parameter.untyped_storage().resizable():
            parameter.data = parameter.data.clone()


@torch.no_grad()
def check_finite(model: nn.Module, title: str) -> None:
    """Raise ValueError for weights that are nan or infinite, with their names. One sum of each tensor, which is not
    finite where an entry is not; it may overflow as well, and only then is each entry looked at."""
    weights = [(name, weight) for name, weight in model.named_parameters() if weight.is_floating_point()]
    sums = torch.stack([held(weight).sum(dtype=torch.float32).cpu() for _, weight in weights])
    suspects = [weights[index] for index in (~sums.isfinite()).nonzero().flatten().tolist()]
    names = [name for name, weight in suspects if not held(weight).isfinite().all()]
    if names:
        raise ValueError(f"{title}: {_listed(names)} {_are(names)} not finite (nan or infinite); {AGAIN}")


STRETCHED = ("linear", "dynamic", "yarn")  # rotary embeddings whose positions `factor` multiplies


def positions_of(config: Any) -> int | None:
    """How many tokens a model has positions for, by its config.json; None where that says nothing. Rotary embeddings
    that are stretched have `factor` times as many as before; some folders count those already."""
    settings = config.get_text_config()
    positions = getattr(settings, "max_position_embeddings", None)
    if not positions or positions < 1:
        return None
    rotary = getattr(settings, "rope_parameters", None) or {}
    if rotary.get("rope_type") not in STRETCHED:
        return positions
    before = rotary.get("original_max_position_embeddings") or positions
    return max(positions, int(before * (rotary.get("factor") or 1)))


def stored_positions(folder: str, key: str = "model.path", revision: str | None = None) -> int | None:
    """How many tokens the model in a folder has positions for; its weights are not read."""
    from transformers import AutoConfig

    with opened(folder, key, revision, ("config.json",), "no model could be loaded") as found:
        return positions_of(AutoConfig.from_pretrained(found, trust_remote_code=False))


def rows_of(model: Any) -> int:
    """How many tokens a model has a row for, in its embedding and in its head."""
    heads = (model.get_input_embeddings(), model.get_output_embeddings())
    return min(head.weight.shape[0] for head in heads if head is not None)


def padding_note(tokenizer: Any, model: Any, title: str) -> list[str]:
    """What is said of an embedding with rows for more tokens than there are: a padded vocabulary, as many models have
    for the sake of speed."""
    rows, tokens = rows_of(model), max(tokenizer.get_vocab().values(), default=-1) + 1
    if rows <= tokens:
        return []
    return [
        f"{title}: its embedding has {rows:,} rows and its tokenizer {tokens:,} tokens; the rest is padding, which is "
        "never sampled"
    ]


def check_vocabulary(tokenizer: Any, model: Any, title: str) -> None:
    """Raise ValueError for tokens that can occur in a text and have no row in the model's embedding. Special tokens
    that no template writes, such as padding that was added, cannot: their text is encoded as other text is."""
    rows = rows_of(model)
    beyond = {token: index for token, index in tokenizer.get_vocab().items() if index >= rows}
    written = [str(tokenizer.chat_template), str(tokenizer.bos_token), str(tokenizer.eos_token)]
    if beyond:  # also what a template puts together, such as '<|' + role + '|>'
        written += ChatText(tokenizer).sample
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    occurring = [token for token in beyond if token not in special or any(token in text for text in written)]
    if occurring:
        first = min(occurring, key=lambda token: beyond[token])
        raise ValueError(
            f"{title}: its tokenizer has {len(tokenizer):,} tokens and the model's embedding {rows:,} rows: "
            f"{first!r} is token {beyond[first]}; use the tokenizer that the model was saved with, or save the model "
            f"after resize_token_embeddings({len(tokenizer)})"
        )
