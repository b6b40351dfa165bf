"""Models that are asked, not trained: references and judged policies, by the paths that users write; in another
precision, quantised, elsewhere than the policy, with an adapter.
"""

from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from dpo_ref.models.adapters import copy_of_base, load_adapter, other_base
from dpo_ref.models.checkpoint import load_policy, run_of
from dpo_ref.models.folders import check_vocabulary
from dpo_ref.models.loading import (
    LoadedModel,
    Policy,
    TrainedModel,
    check_folder,
    compute_dtype,
    load_below,
    load_model,
    load_tokenizer,
    locate,
    placement,
    quantisation_options,
)
from dpo_ref.tracking.terminal import say
from dpo_ref.types import Progress

KEY = "reference.path"
DTYPES = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}
SMALLER = (
    "reference.device=cpu, reference.dtype=bfloat16 or reference.quantisation=4bit take less of it; "
    "stage=cache_reference computes the table alone, before a run that then loads no second model; reference=served "
    "asks a server"
)


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model, and how it is to be loaded; what is left out is as for the policy."""

    path: str
    revision: str | None = None
    adapter: str | None = None
    dtype: str = "auto"
    quantisation: str = "none"
    device: str = "auto"


def load_reference(source: ModelSource, folder: str, policy_device: torch.device, attention: str) -> LoadedModel:
    """The model of `source`, which lies at `folder`, ready to be asked for log-probs.

    Raises ValueError for what is no model, for packages that are missing, and for a second model that does not fit
    into memory, with the options that avoid it.
    """
    how = quantisation_options(source.quantisation, f"reference.quantisation={source.quantisation}")
    device, placing = placement(source.device, bool(how), policy_device)
    try:
        loaded = load_model(
            folder, device, attention, KEY, source.revision, dtype=DTYPES[source.dtype], **how, **placing
        )
        if source.adapter is not None:
            load_adapter(loaded.model, source.adapter, "reference.adapter", trainable=False)
            notes = loaded.notes + other_base(source.adapter, "reference.adapter", loaded.model)
            return LoadedModel(loaded.model, notes)
        return loaded
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        raise ValueError(f"{KEY}={source.path} does not fit into memory beside the policy: {SMALLER}") from error


def on_base_of(policy: TrainedModel, adapter: str) -> nn.Module:
    """The model below the policy's own adapter, if it trains one, with a saved adapter on it instead. It shares the
    weights with the policy, so that there is no second model in memory, and changes nothing of it.

    Raises ValueError for an adapter that was made on another model, by its own record, and for what is no adapter.
    """
    key = "reference.adapter"
    if policy.holding.sharded:
        raise ValueError(
            f"{key}={adapter} goes on the policy's own weights, which parallel=fsdp shards for training: name the "
            "base, reference.path=<model>, or use parallel=ddp"
        )
    model = copy_of_base(policy.model)
    for line in other_base(adapter, key, model):
        raise ValueError(f"{line}; name its base: reference.path=<model> with {key}={adapter}")
    load_adapter(model, adapter, key, trainable=False)
    return model


class ModelPath(NamedTuple):
    """A folder, a hub name or a checkpoint of a run, as the user wrote it, and what the model in it is used with."""

    path: str
    text: str | None = None  # the folder of its tokenizer and template; None: its own
    adapter: str | None = None  # on top of its weights
    weights: str = "float32"  # what holds those, as model.weights says
    key: str = "policy"  # the option that names it
    revision: str | None = None  # on the hub


class ModelLoader:
    """Gives models by the paths that users write, on one device; the last `keep` asked for are loaded once."""

    def __init__(self, device: torch.device, attention: str = "auto", keep: int = 0) -> None:
        self.device, self.keep, self._attention = device, keep, attention
        self._policies = lru_cache(maxsize=keep)(self._policy)
        self._notes: set[str] = set()

    def policy(self, model: ModelPath) -> Policy:
        """A model that is asked, not trained."""
        return self._policies(model)

    def reference(self, source: ModelSource) -> nn.Module:
        """The model of `source`, which nobody may change: that of a policy where nothing tells them apart."""
        plain = source == ModelSource(source.path)
        return self.policy(ModelPath(source.path)).model if self.keep and plain else self.fresh(source)

    def fresh(self, source: ModelSource) -> nn.Module:
        """The model of `source`, of which nobody else knows."""
        return self._announce(load_reference(source, locate(source.path), self.device, self._attention))

    def tokenizer(self, path: str, revision: str | None = None, key: str = KEY) -> Any:
        """The tokenizer of a model that the option `key` names."""
        return load_tokenizer(locate(path), key, revision)

    def _announce(self, loaded: LoadedModel) -> Any:
        """The model; what there is to tell of it is said at the first time, as it may be loaded again."""
        say(*(note for note in loaded.notes if note not in self._notes))
        self._notes.update(loaded.notes)
        return loaded.model

    def _policy(self, model: ModelPath) -> Policy:
        located = locate(model.path)
        run = run_of(Path(located))
        folder = located if run is None else str(run / "policy")
        check_folder(folder, model.key)
        on_top = None if model.adapter is None else f"the adapter {model.adapter}"
        tokenizer = load_tokenizer(model.text or folder, model.key, model.revision)
        return Policy(
            partial(self._weights, model, folder, None if run is None else Path(located), tokenizer),
            tokenizer,
            compute_dtype("auto", self.device),
            model.path,
            folder,
            on_top if run is None else f"the weights of {located}",
        )

    def _weights(self, source: ModelPath, folder: str, checkpoint: Path | None, tokenizer: Any) -> nn.Module:
        model = self._announce(
            load_below(folder, source.weights, self.device, self._attention, source.revision, source.key)
        )
        check_vocabulary(tokenizer, model, f"{source.key}={source.path}")
        if checkpoint is not None:
            load_policy(checkpoint, model)
        if source.adapter is not None:
            load_adapter(model, source.adapter, "model.adapter", trainable=False)
        return model


@dataclass(frozen=True, slots=True)
class Workspace:
    """Where and with what a run works, an evaluation too."""

    directory: Path  # its results
    cache: Path  # what is shared by all runs
    seed: int
    progress: Progress
    loader: ModelLoader

    @property
    def device(self) -> torch.device:
        """Where models are."""
        return self.loader.device
