"""Averages of policies in weight space: θ = Σ wᵢ θᵢ with Σ wᵢ = 1, tensor by tensor, from folders to a folder.

Equal weights of several runs or checkpoints are a model soup (arXiv:2203.05482); two policies and a share between them
are interpolation (WiSE-FT, arXiv:2109.01903; towards the initial policy: WARP, arXiv:2406.16768), and a share beyond
1 extrapolates (ExPO, arXiv:2404.16792).
"""

import glob
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dpo_ref.data.chat_templates import text_identity
from dpo_ref.models import checkpoint
from dpo_ref.models.checkpoint import as_writing_fails, state_digest
from dpo_ref.models.folders import MODEL_FILES, WEIGHTS, WITHOUT_EFFECT, opened, read_settings, shapes_in, weight_files
from dpo_ref.models.loading import check_folder, load_tokenizer, locate

# --- the weights of a folder, read when they are asked for


FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES_OF_FLOATS = {dtype: name for name, dtype in FLOATS.items()}


class StoredWeights(Mapping[str, Tensor]):
    """The tensors of safetensors files by their names; of a name in several files the last one counts. Nothing is kept
    in memory."""

    def __init__(self, files: Sequence[Path], left_out: Collection[str] = ()) -> None:
        opened_files: list[Any] = [safe_open(file, "pt") for file in files]
        named = {name: file for file in opened_files for name in file.keys()}  # noqa: SIM118
        self._files = {name: file for name, file in named.items() if name not in left_out}

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, which is not read."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The dtype of a tensor as safetensors calls it, such as BF16."""
        return str(self._files[name].get_slice(name).get_dtype())


# --- the policies of an average, which must be alike


@dataclass(frozen=True, slots=True)
class PolicyFiles:
    """Where a policy is: `folder` and `text` (its tokenizer and template) are folders or hub names, `checkpoint` is
    one of its run, whose weights go before those in `folder`; `name` is what the user wrote."""

    name: str
    folder: str
    text: str
    checkpoint: Path | None = None


def names_in(entry: str, key: str) -> list[str]:
    """What a name that the user wrote at `key` stands for: a folder with checkpoints for each that is complete, the
    oldest first, a pattern for what it matches, any other for itself. Raises ValueError where a pattern matches
    nothing."""
    path = Path(entry).expanduser()
    if any(mark in entry for mark in "*?[") and not path.exists():
        matched = [folder for folder in sorted(map(Path, glob.glob(str(path)))) if folder.is_dir()]
        if not matched:
            raise ValueError(f"{key}={entry} matches no folder")
        return [name for folder in matched for name in names_in(str(folder), key)]
    if path.is_dir() and checkpoint.saved_in(path):
        return list(map(str, checkpoint.complete_in(path)))
    return [entry]


def files_of(name: str) -> PolicyFiles:
    """The policy at a name: a checkpoint, a run, which stands for its policy, or a model's folder or hub name."""
    named = Path(name).expanduser()
    run = checkpoint.run_of(named)
    if run is not None:
        return PolicyFiles(name, str(run / "policy"), str(run / "policy"), named)
    folder = str(named / "policy") if (named / "summary.json").is_file() else locate(name)
    return PolicyFiles(name, folder, folder)


def policies_at(path: str | list[str], key: str) -> list[PolicyFiles]:
    """The policies that the user named at `key`: those of a list; of one name, those of a run's checkpoints or of
    whatever it stands for. Raises ValueError for what is not there."""
    entries = path if isinstance(path, list) else [str(_checkpoints_of(Path(path).expanduser()) or path)]
    files = [files_of(name) for entry in entries for name in names_in(entry, key)]
    for policy in files:
        check_folder(policy.folder, key)
    return files


def _checkpoints_of(run: Path) -> Path | None:
    return run / "checkpoints" if (run / "checkpoints").is_dir() else None


@dataclass(frozen=True, slots=True)
class OpenedPolicy:
    """A policy of an average, its files at hand."""

    name: str
    folder: Path
    config: Any
    tokenizer: Any
    weights: StoredWeights
    digest: str  # of the stored weights


def open_policies(policies: Sequence[PolicyFiles], key: str = "policies") -> list[OpenedPolicy]:
    """The policies with their files at hand, in this order. Raises ValueError naming `key` for what is no model, for a
    damaged checkpoint, and for policies that are not alike, with the first difference."""
    whole = [_open(policy, key) for policy in policies]
    for other in whole[1:]:
        check_alike(whole[0], other, key)
    return whole


def _open(policy: PolicyFiles, key: str) -> OpenedPolicy:
    from transformers import AutoConfig

    check_folder(policy.folder, key)
    with opened(policy.folder, key, None, MODEL_FILES, "no model could be read") as folder:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError("its weights are quantised, and such have no average; name the policy in full precision")
        files = weight_files(folder)
        shapes_in(files)
        if policy.checkpoint is not None:
            files = [*files, _checkpoint_weights(policy.checkpoint, StoredWeights(files))]
        tied = bool(config.get_text_config().tie_word_embeddings)
        weights = StoredWeights(files, _without_effect(StoredWeights(files), tied))
        digest = state_digest(weights)
    return OpenedPolicy(policy.name, folder, config, load_tokenizer(policy.text, key), weights, digest)


def _without_effect(names: Iterable[str], tied: bool) -> set[str]:
    """What older folders hold beside their weights: computed buffers, and a head where that is the embedding."""
    without = {name for name in names if WITHOUT_EFFECT.search(name)}
    return without if tied else {name for name in without if not name.endswith("lm_head.weight")}


def _checkpoint_weights(saved: Path, base: StoredWeights) -> Path:
    """The file with a checkpoint's weights, whole. Raises ValueError for those of an adapter."""
    checkpoint.check_files(saved, [checkpoint.WEIGHTS])
    file = saved / checkpoint.WEIGHTS
    if surplus := sorted(StoredWeights([file]).keys() - base.keys()):
        kind = "the weights of an adapter" if ".lora_" in surplus[0] else "weights under the names of another version"
        raise ValueError(
            f"{saved} holds {kind}, such as {surplus[0]}, and no whole policy; the run's last one can be averaged: "
            f"name {checkpoint.run_of(saved)}"
        )
    return file


# What may differ: it is about how a config was saved, about training alone, or the tokenizer's (which is compared)
MAY_DIFFER = {
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "pad_token_id", "torch_dtype",
    "transformers_version", "use_cache",
}  # fmt: skip


def check_alike(first: OpenedPolicy, other: OpenedPolicy, key: str) -> None:
    """Raise ValueError, with the first difference, unless the weights of both mean the same function of the same
    tokens: architecture, shapes, tokenizer and chat template."""
    differences = (_config_difference, _shape_difference, _text_difference)
    found = next((words for difference in differences if (words := difference(first, other))), None)
    if found is not None:
        raise ValueError(f"{key}: {first.name} and {other.name} cannot be averaged: {found}")


def _config_difference(first: OpenedPolicy, other: OpenedPolicy) -> str | None:
    ours, theirs = (_architecture(policy.config) for policy in (first, other))
    for name in ("model_type", *sorted(ours.keys() | theirs.keys())):
        if ours.get(name) != theirs.get(name):
            return f"{name} is {ours.get(name)} in the one's config.json and {theirs.get(name)} in the other's"
    return None


def _architecture(config: Any) -> dict[str, Any]:
    described = json.loads(config.to_json_string(use_diff=False))
    return {
        name: value
        for name, value in described.items()
        if name not in MAY_DIFFER and "dropout" not in name and not name.endswith("pdrop")
    }


def _shape_difference(first: OpenedPolicy, other: OpenedPolicy) -> str | None:
    for name in sorted(first.weights.keys() | other.weights.keys()):
        having = [policy for policy in (first, other) if name in policy.weights]
        if len(having) == 1:
            return f"{name} is among the weights of {having[0].name} alone"
        ours, theirs = first.weights.shape(name), other.weights.shape(name)
        if ours != theirs:
            return f"{name} is {list(ours)} in the one and {list(theirs)} in the other"
    return None


def _text_difference(first: OpenedPolicy, other: OpenedPolicy) -> str | None:
    if text_identity(first.tokenizer) == text_identity(other.tokenizer):
        return None
    if first.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        return "their tokenizers have different vocabularies"
    if first.tokenizer.chat_template != other.tokenizer.chat_template:
        return "their chat templates differ; a run trained with model.template=... has that of its policy/"
    return "their tokenizers split texts differently"


# --- the average


def check_weights(weights: Sequence[float], num_policies: int, key: str = "weights") -> None:
    """Raise ValueError, naming `key`, unless there is a finite weight for every policy and they sum to 1."""
    if len(weights) != num_policies:
        raise ValueError(f"{key} are {len(weights)} and policies {num_policies}; give one weight for each policy")
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"{key}={list(weights)} must be finite")
    total = math.fsum(weights)
    if abs(total - 1) > 1e-6:
        scaled = f": [{', '.join(f'{weight / total:g}' for weight in weights)}] do" if total > 0 else ""
        raise ValueError(f"{key}={list(weights)} sum to {total:g} and must sum to 1{scaled}")


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ wᵢ tᵢ of tensors of one shape, in float64 whatever their dtype; a weight of 0 leaves its tensor out."""
    terms = [(tensor, weight) for tensor, weight in zip(tensors, weights, strict=True) if weight != 0]
    total = terms[0][0].double() * terms[0][1]
    for tensor, weight in terms[1:]:
        total.add_(tensor.double(), alpha=weight)
    return total


def write_average(folder: Path, policies: Sequence[OpenedPolicy], weights: Sequence[float]) -> str:
    """Fill an empty folder with the average of policies that are alike, as a model that transformers loads: config,
    tokenizer and template of the last of them. Returns the digest of its weights.

    Every tensor is summed in float64, in an order that does not depend on that of the policies, rounded once to the
    widest dtype in which any of them stores it, and written: no model is in memory. Raises ValueError for weights that
    do not sum to 1, and for a sum that is not finite.
    """
    check_weights(weights, len(policies))
    ordered = sorted(zip(policies, weights, strict=True), key=lambda pair: (pair[0].digest, pair[1]))
    stored, factors = [policy.weights for policy, _ in ordered], [weight for _, weight in ordered]
    dtypes = {name: _widest([weights.dtype(name) for weights in stored], name) for name in stored[0]}

    def tensor(name: str) -> Tensor:
        return _average(name, [weights[name] for weights in stored], factors, dtypes[name])

    shapes = {name: stored[0].shape(name) for name in dtypes}
    with as_writing_fails():
        write_tensors(folder / WEIGHTS, dtypes, shapes, tensor)
    _write_settings(folder, policies[-1], set(dtypes.values()))
    return state_digest(StoredWeights([folder / WEIGHTS]))


def _widest(dtypes: Sequence[str], name: str) -> str:
    """The dtype that holds values of all of these. Raises ValueError for numbers that are not averaged."""
    if len(set(dtypes)) == 1:
        return dtypes[0]
    if unknown := [dtype for dtype in dtypes if dtype not in FLOATS]:
        raise ValueError(f"{name} is stored as {unknown[0]} in one policy and otherwise in another")
    widest = FLOATS[dtypes[0]]
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, FLOATS[dtype])
    return NAMES_OF_FLOATS[widest]


def _average(name: str, tensors: Sequence[Tensor], weights: Sequence[float], dtype: str) -> Tensor:
    if dtype not in FLOATS:
        if any(not torch.equal(tensors[0], tensor) for tensor in tensors[1:]):
            raise ValueError(f"{name} holds {dtype} numbers that differ between the policies, and has no average")
        return tensors[0]
    total = weighted_sum(tensors, weights).to(FLOATS[dtype])
    if not total.isfinite().all():
        raise ValueError(f"the average of {name} is not finite (nan or infinite) in {dtype}")
    return total


def write_tensors(
    file: Path, dtypes: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], tensor: Callable[[str], Tensor]
) -> None:
    """Write a safetensors file, a tensor at a time: the header's length as 8 bytes, the header as JSON, the bytes of
    the tensors (github.com/huggingface/safetensors, Format); the widest stand first, which aligns all of them."""
    sizes = {name: math.prod(shapes[name]) * BYTES[dtypes[name]] for name in dtypes}
    names, start = sorted(dtypes, key=lambda name: (-BYTES[dtypes[name]], name)), 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name in names:
        offsets = [start, start + sizes[name]]
        header[name] = {"dtype": dtypes[name], "shape": list(shapes[name]), "data_offsets": offsets}
        start += sizes[name]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            out.write(tensor(name).contiguous().reshape(-1).view(torch.uint8).numpy().data)


BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2, "I8": 1,
    "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip


def _write_settings(folder: Path, policy: OpenedPolicy, dtypes: set[str]) -> None:
    """Config, generation config, tokenizer and template of a policy, for weights of these dtypes."""
    policy.config.dtype = next((FLOATS[name] for name in FLOATS if name in dtypes), None)
    policy.config.save_pretrained(folder)
    generation = policy.folder / "generation_config.json"
    if generation.is_file():
        (folder / generation.name).write_bytes(generation.read_bytes())
    policy.tokenizer.save_pretrained(folder)


# --- what an average says of itself


AVERAGE = "average.json"


@dataclass(frozen=True, slots=True)
class Average:
    """What a folder's `average.json` says: the policies and their weights; where it lies on the path between two of
    them, if it does; the run as whose policy it is evaluated, if there is one."""

    policies: tuple[str, ...]
    weights: tuple[float, ...]
    digests: tuple[str, ...]  # of the policies' weights
    share: float | None
    run: str | None

    def is_of(self, policies: Sequence[OpenedPolicy], weights: Sequence[float]) -> bool:
        """Whether it is the average of these policies, by the digests of their weights."""
        asked = [(policy.digest, weight) for policy, weight in zip(policies, weights, strict=True)]
        return sorted(asked) == sorted(zip(self.digests, self.weights, strict=True))


def read_average(folder: Path) -> Average | None:
    """What a folder says of the average that it holds; None for one that holds none. Raises ValueError for a record
    in another form."""
    if not (folder / AVERAGE).is_file():
        return None
    record = read_settings(folder / AVERAGE)
    try:
        members = [(str(m["name"]), float(m["weight"]), str(m["weights_digest"])) for m in record["policies"]]
        names, weights, digests = zip(*members, strict=True)
        share = None if record["share"] is None else float(record["share"])
        run = None if record["run"] is None else str(record["run"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / AVERAGE} is no record of an average ({error!r}); make it again") from error
    return Average(names, weights, digests, share, run)


def run_averaged_in(folder: Path) -> Path | None:
    """The run as whose policy a folder's average is evaluated; None where it is of none or that is not there."""
    average = read_average(folder)
    run = None if average is None or average.run is None else Path(average.run)
    return run if run is not None and (run / "summary.json").is_file() else None
