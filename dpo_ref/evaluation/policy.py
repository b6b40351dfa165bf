"""Whom an evaluation is about, the models it needs, and how it is done."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpo_ref.component import Component
from dpo_ref.evaluation.results import Thresholds
from dpo_ref.files.digests import unsealed
from dpo_ref.generation.engine import PromptSet
from dpo_ref.models.asked import ModelPath, Workspace
from dpo_ref.models.loading import Policy
from dpo_ref.models.lora import AdapterOptions
from dpo_ref.references.interface import Reference
from dpo_ref.types import PreferenceData

SUMMARY = "summary.json"  # what a run was, what it was made with, how it stands
FINISHED = (
    "completed",
    "stopped",
)  # the statuses of runs that left a policy: at their end, or where one of their options ended them
FORM: dict[str, type | tuple[type, ...]] = {
    "status": str,
    "error": (str, type(None)),
    "overrides": list,
    "choices": dict,
    "sweep": (str, type(None)),
    "beta": (float, int, type(None)),
    "seed": int,
    "objective": str,
    "reference": str,
    "identities": dict,
    "steps": int,
    "best": (dict, type(None)),
    "stopped_by": (str, type(None)),
    "git": dict,
    "versions": dict,
    "data": dict,
}
LARGEST = 2**24  # bytes; a summary has a few thousand


def read_summary(folder: Path, key: str, needed: Sequence[str] = ("status",)) -> dict[str, Any]:
    """The record in a run's folder; `key` says who names it. Raises ValueError, with the file and what can be done,
    for one that cannot be read, has another form, or lacks what is `needed`: so ends a run that failed early."""
    path = folder / SUMMARY
    kept = f"its policy is a model like any other ({folder / 'policy'}), the rest only training it again brings back"
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it is larger than {LARGEST:,} bytes")
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"{key}: {path} cannot be read ({error}); {kept}") from error
    summary = unsealed(text, f"{key}: {path}", kept)
    wrong = [
        name
        for name, form in FORM.items()
        if name in summary and (not isinstance(summary[name], form) or isinstance(summary[name], bool))
    ]
    if wrong:
        raise ValueError(f"{key}: {path} is no record of a run ({', '.join(wrong)}); {kept}")
    if missing := [name for name in needed if name not in summary]:
        raise ValueError(
            f"{key}: {path} lacks {', '.join(missing)}; python train.py resume={folder} goes on and completes it"
        )
    return summary


@dataclass(frozen=True, slots=True)
class TrainedRun:
    """The run that trained a policy, and the models it was trained with."""

    folder: Path
    summary: Mapping[str, Any]  # its summary.json, with the steps of the checkpoint at hand
    initial: ModelPath
    loss_reference: Component  # as the run configured it
    checkpoint: Path | None  # the one at hand, else the run's last
    adapter: AdapterOptions  # what it trained instead of the weights

    @property
    def group(self) -> str:
        """What trackers join its evaluations under."""
        return self.summary.get("sweep") or self.folder.name


@dataclass(frozen=True, slots=True)
class PolicyToEvaluate:
    """A policy to evaluate, and the run that trained it; a plain model folder has none."""

    name: str
    folder: Path  # where results go
    model: ModelPath
    run: TrainedRun | None = None

    def summary(self, *keys: str) -> dict[str, Any]:
        """These entries of its run's summary; each is None for a plain model folder."""
        return {key: None if self.run is None else self.run.summary[key] for key in keys}

    def check_reference(self, reference: Reference) -> None:
        """Raise ValueError if the loss reference is not the run's. Its dtype may differ with the device."""
        entries = self.summary("reference", "identities")
        was = entries["identities"]
        if was is None or reference.identity == was["loss_reference"]:
            return
        if reference.weights and reference.weights == was["loss_reference_weights"]:
            return
        raise ValueError(
            f"policy={self.model.path} was trained against reference={entries['reference']} "
            f"{was['loss_reference'][:12]}, and that is {reference.identity[:12]} now: its model, tokenizer or "
            "template has changed. reference=... on the command line evaluates against another one on purpose"
        )


def against(subject: PolicyToEvaluate, reference: Component) -> PolicyToEvaluate:
    """The subject measured against another loss reference than its run's, on purpose. Raises ValueError for a policy
    that no run has trained."""
    if subject.run is None:
        raise ValueError(
            f"reference={reference.name} has no effect: policy={subject.model.path} is no run, and has no initial "
            "policy"
        )
    summary = {**subject.run.summary, "reference": reference.name, "identities": None}
    return replace(subject, run=replace(subject.run, summary=summary, loss_reference=reference, checkpoint=None))


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """How to evaluate: the data, and what was configured, by group."""

    work: Workspace
    data: PreferenceData
    prompts: PromptSet
    parts: Mapping[str, Component]
    stage: str
    thresholds: Thresholds
    aside: bool = False  # at a further temperature, where nothing is measured that does not depend on it

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
        return self.work.loader.policy(subject.model)

    def initial(self, subject: PolicyToEvaluate) -> Policy:
        """The policy as it was before training."""
        assert subject.run is not None
        return self.work.loader.policy(subject.run.initial)

    def initial_as_trained(self, subject: PolicyToEvaluate) -> Policy:
        """The same with the layers of a fresh adapter, which a reference that moves has weights for; the weights below
        are the initial policy's own."""
        assert subject.run is not None
        initial, adapter = self.initial(subject), subject.run.adapter
        if adapter.lora_rank is None:
            return initial
        model = copy.deepcopy(initial.model, {id(weight): weight for weight in initial.model.parameters()})
        adapter.put_on(model)
        return replace(initial, load=lambda: model)

    def measures(self, subject: PolicyToEvaluate) -> bool:
        """Whether a subject is compared with the models of its run."""
        return subject.run is not None and not self.aside

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
