"""Whom an evaluation is about, the models it needs, and how it is done."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpo_ref.component import Component
from dpo_ref.evaluation.results import Thresholds
from dpo_ref.generation.engine import PromptSet
from dpo_ref.models.loading import Policy, Workspace
from dpo_ref.references.interface import Reference
from dpo_ref.types import PreferenceData


@dataclass(frozen=True, slots=True)
class PolicyToEvaluate:
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


def against(subject: PolicyToEvaluate, reference: Component) -> PolicyToEvaluate:
    """The subject measured against another loss reference than its run's, on purpose. Raises ValueError for a policy
    that no run has trained."""
    if subject.loss_reference is None:
        raise ValueError(
            f"reference={reference.name} has no effect: policy={subject.path} is no run, and has no initial policy"
        )
    return replace(subject, loss_reference=reference, reference=reference.name, identities=None, checkpoint=None)


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """How to evaluate: the data, and what was configured, by group."""

    work: Workspace
    data: PreferenceData
    prompts: PromptSet
    parts: Mapping[str, Component]
    stage: str
    thresholds: Thresholds

    @property
    def generation(self) -> Component:
        """Who answers, and how."""
        return self.parts["generation"]

    @property
    def judge(self) -> Component | None:
        """Who compares answers, if anyone is asked."""
        return self.parts.get("judge")

    def policy(self, subject: PolicyToEvaluate) -> Policy:
        """The model of a subject."""
        return self.work.loader.policy(subject.path, subject.text, subject.adapter)

    def initial(self, subject: PolicyToEvaluate) -> Policy:
        """The policy as it was before training."""
        assert subject.initial is not None
        return self.work.loader.policy(subject.initial, subject.initial_text, subject.initial_adapter)

    def at(self, temperature: float) -> "EvaluationSettings":
        """The same with answers drawn at one temperature."""
        options = self.generation.options | {"temperature": temperature}
        return replace(self, parts={**self.parts, "generation": replace(self.generation, options=options)})

    def of_baseline(self, seed: int) -> "EvaluationSettings":
        """How a baseline is evaluated: with other draws, and without a judge, who compares with it."""
        parts = {name: part for name, part in self.parts.items() if name != "judge"}
        return replace(self, work=replace(self.work, seed=seed), parts=parts, stage="all")

    def generation_identity(self) -> dict[str, Any]:
        """The options of generation, and what stands for the weights of a scorer that chooses among answers."""
        members = [value for value in self.generation.options.values() if isinstance(value, Component)]
        weights = [(f"{member.name} weights", member, member.hooks.identity) for member in members]
        digests = {name: member.bound(identity)() for name, member, identity in weights if identity is not None}
        return self.generation.plain() | digests
