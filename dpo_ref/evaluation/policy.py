"""Whom an evaluation is about, the models it needs, and how it is done."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from dpo_ref.component import Component
from dpo_ref.data.chat_templates import text_identity
from dpo_ref.distributed import best_device
from dpo_ref.evaluation.results import Thresholds
from dpo_ref.generation.engine import PromptSet
from dpo_ref.models import checkpoint
from dpo_ref.models.adapters import load_adapter
from dpo_ref.models.checkpoint import weights_digest
from dpo_ref.models.loading import LoadedModel, Policy, check_folder, compute_dtype, load_model, load_tokenizer
from dpo_ref.references.interface import Reference
from dpo_ref.types import PreferenceData


@dataclass(frozen=True, slots=True)
class Subject:
    """A policy to evaluate, and what its run says about it; a plain model folder says nothing."""

    name: str
    path: str
    folder: Path  # where results go
    adapter: str | None = None  # on top of the model at `path`
    text: str | None = None  # the folder whose tokenizer and template it is used with; None: its own
    initial: str | None = None
    initial_text: str | None = None  # as `text`, for the initial policy
    initial_adapter: str | None = None
    reference: str | None = None  # name of the loss reference
    loss_reference: Component | None = None  # as the run configured it
    checkpoint: Path | None = None  # the run's last
    objective: str | None = None
    beta: float | None = None
    seed: int | None = None
    identities: Mapping[str, str] | None = None  # what the run was trained against
    run: Path | None = None  # the run's folder
    group: str | None = None  # what trackers join its runs under
    steps: int = 0  # optimiser steps the policy was trained for

    def check_reference(self, reference: Reference) -> None:
        """Raise ValueError if the loss reference is not the run's. Its dtype may differ with the device."""
        was = self.identities
        if was is None or reference.identity == was["loss_reference"]:
            return
        if reference.weights and reference.weights == was["loss_reference_weights"]:
            return
        raise ValueError(
            f"policy={self.path} was trained against reference={self.reference} {was['loss_reference'][:12]}, and "
            f"that is {reference.identity[:12]} now: its model, tokenizer or template has changed. reference=... on "
            "the command line evaluates against another one on purpose"
        )


def against(subject: Subject, reference: Component) -> Subject:
    """The subject measured against another loss reference than its run's, on purpose. Raises ValueError for a policy
    that no run has trained."""
    if subject.loss_reference is None:
        raise ValueError(
            f"reference={reference.name} has no effect: policy={subject.path} is no run, and has no initial policy"
        )
    return replace(subject, loss_reference=reference, reference=reference.name, identities=None, checkpoint=None)


class Loaded:
    """A model and what determines its answers; loaded once, whatever asks for it. `text` is the folder whose tokenizer
    and template it is to be used with, its own unless given."""

    def __init__(self, path: str, text: str | None, adapter: str | None) -> None:
        from dpo_ref.lab import models as lab_models

        point = lab_models.locate(path)
        run = checkpoint.run_of(Path(point))
        self.place = point if run is None else str(run / "policy")
        check_folder(self.place, "policy")
        self.tokenizer = load_tokenizer(text or self.place)
        self.path, self.adapter = path, adapter
        self.checkpoint = None if run is None else Path(point)

    @cached_property
    def model(self) -> Any:
        """The model, loaded when first asked for."""
        model = load_model(self.place, best_device(), "auto", "policy").eval()
        if self.checkpoint is not None:
            checkpoint.load_policy(self.checkpoint, model)
        if self.adapter is not None:
            load_adapter(model, self.adapter, "model.adapter", trainable=False)
        return model

    @cached_property
    def weights(self) -> str:
        """Digest of the weights."""
        return weights_digest(self.model)

    def precision(self) -> AbstractContextManager[Any]:
        """The dtype it computes in."""
        return LoadedModel(self.model, self.tokenizer, compute_dtype("auto", best_device())).precision()

    @property
    def policy(self) -> Policy:
        """As engines take it."""
        return Policy(
            self.path,
            self.place,
            self.tokenizer,
            lambda: self.model,
            lambda: self.weights,
            self.precision,
            self._on_top(),
        )

    def _on_top(self) -> str | None:
        if self.checkpoint is not None:
            return f"the weights of {self.checkpoint}"
        return None if self.adapter is None else f"the adapter {self.adapter}"

    @cached_property
    def text_identity(self) -> str:
        """Digest of tokenizer and template."""
        return text_identity(self.tokenizer)


@lru_cache(maxsize=3)  # the initial policy, a loss reference and the policy at hand
def loaded(path: str, text: str | None = None, adapter: str | None = None) -> Loaded:
    """The model at `path`, with the tokenizer of the folder `text`, and with an adapter on top."""
    return Loaded(path, text, adapter)


@dataclass(frozen=True, slots=True)
class Settings:
    """How to evaluate: the data, and what was configured."""

    data: PreferenceData
    data_options: Component
    prompts: PromptSet
    generation: Component
    scorer: Component
    seed: int
    stage: str
    thresholds: Thresholds
    diagnostic: Component
    judge: Component | None = None

    def generation_identity(self) -> dict[str, Any]:
        """The options of generation, and what stands for the weights of a scorer that chooses among answers."""
        members = [value for value in self.generation.options.values() if isinstance(value, Component)]
        hooks = [(member, member.hooks.identity) for member in members]
        weights = {f"{one.name} weights": one.bound(identity)() for one, identity in hooks if identity is not None}
        return self.generation.plain() | weights
