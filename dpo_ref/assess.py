"""What `evaluate.py` does: generate, measure, score and report one policy, or every job of a sweep."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from dpo_ref import lab_models
from dpo_ref.cache import cache_folder
from dpo_ref.config import Component, component
from dpo_ref.data.packing import pack
from dpo_ref.data.templates import text_identity
from dpo_ref.data.token_groups import TokenGroups
from dpo_ref.data.tokenise import encode_prompts, end_of_turn_ids, length_limit, tokenise
from dpo_ref.evaluation.heldout import PairScores, heldout_metrics, reference_pairs, score_pairs
from dpo_ref.evaluation.kl import sample_kl
from dpo_ref.evaluation.records import Evaluated, Evaluation, read_json
from dpo_ref.evaluation.stages import generate_stage, generation_key, measure_stage, read_evaluated, score_stage
from dpo_ref.generation.records import Generation, read_generations
from dpo_ref.generation.sampling import never_sampled
from dpo_ref.models import (
    LoadedModel,
    best_device,
    check_folder,
    compute_dtype,
    load_model,
    load_tokenizer,
)
from dpo_ref.references.frozen import weights_digest
from dpo_ref.references.interface import ReferenceContext
from dpo_ref.tracking.terminal import progress
from dpo_ref.types import PreferenceData, digest

BASELINE_SEED = 1_000_003  # added to the seed: answers that are compared share no random numbers


@dataclass(frozen=True, slots=True)
class Subject:
    """A policy to evaluate, and what its run says about it; a plain model folder says nothing."""

    name: str
    path: str
    folder: Path  # where results go
    text: str | None = None  # the folder whose tokenizer and template it is used with; None: its own
    initial: str | None = None
    initial_text: str | None = None  # as `text`, for the initial policy
    reference: str | None = None  # name of the loss reference
    loss_reference: Component | None = None  # as the run configured it
    objective: str | None = None
    beta: float | None = None
    seed: int | None = None


def subject_of(path: str, output_dir: str | None) -> tuple[Subject, DictConfig | None]:
    """What `policy=` names, and the configuration of its run if it is one. ValueError for a run without a policy."""
    run = Path(path).expanduser()
    if not (run / "summary.json").is_file():
        name = path.removeprefix(lab_models.SCHEME).rstrip("/").rpartition("/")[2]
        default = Path(output_dir or f"outputs/evaluations/{name}")
        return Subject(name, path, default), None
    summary = read_json(run / "summary.json")
    if not (run / "policy" / "config.json").is_file():
        raise ValueError(f"policy={path}: the run is {summary['status']} and has saved no policy yet")
    config = OmegaConf.load(run / "config.yaml")
    assert isinstance(config, DictConfig)
    folder = Path(output_dir) if output_dir else run / "evaluation"
    subject = Subject(
        name=run.name,
        path=str(run / "policy"),
        folder=folder,
        initial=config.model.path,
        initial_text=_text_of(run, config),
        reference=summary["reference"],
        loss_reference=component("reference", config.reference, summary["choices"]["reference"]),
        objective=summary["objective"],
        beta=summary["beta"],
        seed=summary["seed"],
    )
    return subject, config


def _text_of(run: Path, config: DictConfig) -> str | None:
    """The folder whose tokenizer the initial policy is used with: the run's, where the run set a template."""
    changed = config.model.template != "auto" or config.model.template_options or config.model.max_length
    return str(run / "policy") if changed else None


class Loaded:
    """A model and what determines its answers; loaded once, whatever asks for it. `text` is the folder whose tokenizer
    and template it is to be used with, its own unless given."""

    def __init__(self, path: str, text: str | None) -> None:
        self.place = lab_models.locate(path)
        check_folder(self.place, "policy")
        self.tokenizer = load_tokenizer(text or self.place)
        self.model = load_model(self.place, best_device(), "auto", "policy").eval()
        self.weights = weights_digest(self.model)
        self.precision = LoadedModel(self.model, self.tokenizer, compute_dtype("auto", best_device())).precision

    @cached_property
    def text_identity(self) -> str:
        """Digest of tokenizer and template."""
        return text_identity(self.tokenizer)


@lru_cache(maxsize=3)  # the initial policy, a loss reference and the policy at hand
def loaded(path: str, text: str | None = None) -> Loaded:
    """The model at `path`, with the tokenizer of the folder `text`."""
    return Loaded(path, text)


@dataclass(frozen=True, slots=True)
class Settings:
    """How to evaluate: the data, and what was configured."""

    data: PreferenceData
    data_options: Component
    generation: Component
    scorer: Component
    seed: int
    stage: str


def _answers(subject: Subject, settings: Settings, folder: Path) -> list[Generation]:
    model = loaded(subject.path, subject.text)
    prompts, options = settings.data.test_prompts, settings.generation.options
    if not prompts:
        raise ValueError("the data has no prompts to answer: hold some out with data.eval_fraction or data.eval_path")
    key = generation_key(model.weights, model.text_identity, prompts, settings.seed, options)
    with model.precision():
        return generate_stage(
            folder, key, lambda: settings.generation(model.model, model.tokenizer, prompts, settings.seed, progress)
        )


def _measured(subject: Subject, settings: Settings, generations: list[Generation]) -> dict[str, float]:
    """What needs both models: KL to the initial policy on own samples, held-out pairs."""
    assert subject.initial is not None
    ours, initial = loaded(subject.path), loaded(subject.initial, subject.initial_text)
    found: dict[str, float] = {}
    if settings.generation.options["temperature"] == settings.generation.options["top_p"] == 1.0:
        never = never_sampled(ours.tokenizer, ours.model.get_output_embeddings().weight.shape[0])
        found |= sample_kl(ours.model, initial.model, generations, never, progress).metrics("initial")
    groups = settings.data_options.bound(tokenise)(settings.data.eval, ours.tokenizer).groups
    if any(group.pairs for group in groups):
        ends = end_of_turn_ids(ours.tokenizer)
        policy, start = (score_pairs(m.model, groups, ends, progress) for m in (ours, initial))
        found |= heldout_metrics(policy, start, _reference_scores(subject, settings, start, groups))
    return found


def _measure_key(subject: Subject, settings: Settings) -> str:
    """Digest of what measurements depend on: the answers, the models they are compared with, the held-out pairs."""
    assert subject.initial is not None
    answers = read_json(subject.folder / "generations.key.json")["key"]
    assert subject.loss_reference is not None
    others = [loaded(subject.initial, subject.initial_text).weights, subject.loss_reference.options]
    pairs = [group.group_id for group in settings.data.eval]
    return digest([answers, others, subject.reference, pairs, settings.data_options.options])


def _reference_scores(subject: Subject, settings: Settings, start: PairScores, groups: TokenGroups) -> PairScores:
    """The loss reference's log-probs of the held-out pairs, by the run's own configuration of it."""
    assert subject.initial is not None
    assert subject.loss_reference is not None
    initial = loaded(subject.initial, subject.initial_text)
    context = ReferenceContext(
        policy=initial.model,
        tokenizer=initial.tokenizer,
        uses_reference=subject.reference != "none",
        load=lambda path: loaded(path).model,
        load_tokenizer=lambda path: load_tokenizer(lab_models.locate(path)),
        text_identity=initial.text_identity,
        groups=groups,
        texts=lambda number: settings.data.eval[number],
        pack=settings.data_options.bound(pack),
        progress=progress,
        device=best_device(),
        cache=cache_folder(),
    )
    return reference_pairs(subject.loss_reference(context), groups, start)


def _about(subject: Subject, settings: Settings, scorer: str, metrics: Mapping[str, float]) -> Evaluation:
    return Evaluation(
        name=subject.name,
        scorer=scorer,
        metrics=dict(metrics),
        objective=subject.objective,
        reference=subject.reference,
        beta=subject.beta,
        seed=subject.seed,
        generation={**settings.generation.options, "seed": settings.seed},
    )


def fitting(settings: Settings, tokenizer: Any) -> Settings:
    """The settings without prompts longer than the data's limit, which training dropped too; says how many."""
    options = settings.data_options.options
    limit = options["max_prompt_length"] or length_limit(tokenizer, options["max_length"])
    prompts = settings.data.test_prompts
    sizes = map(len, encode_prompts(tokenizer, prompts))
    kept = [prompt for prompt, size in zip(prompts, sizes, strict=True) if size <= limit]
    if len(kept) < len(prompts):
        print(f"{len(prompts) - len(kept)} of {len(prompts)} prompts left out: longer than {limit} tokens")
    return replace(settings, data=settings.data._replace(test_prompts=kept))


@torch.no_grad()
def assess(subject: Subject, settings: Settings, baseline: Evaluated | None) -> Evaluated | None:
    """Run the stages asked for; None after `stage=generate`. `baseline` is what the win rate is against."""
    folder = subject.folder
    if settings.stage == "report":
        return read_evaluated(folder)
    if settings.stage == "score":
        generations = read_generations(folder / "generations.jsonl")
        stored = folder / "measurements.json"
        metrics = read_json(stored)["metrics"] if stored.is_file() else {}
    else:
        generations = _answers(subject, settings, folder)
        if settings.stage == "generate":
            return None
        metrics = {}
        if subject.initial is not None:
            metrics = measure_stage(
                folder, _measure_key(subject, settings), lambda: _measured(subject, settings, generations)
            )
    scores = settings.scorer(generations)
    about = _about(subject, settings, scores.name, metrics)
    return score_stage(folder, about, generations, scores.values, baseline, settings.seed)


def baseline_of(path: str, name: str, settings: Settings, text: str | None = None) -> Evaluated:
    """The evaluation that others are compared with. A model's answers are kept in the cache and shared by all runs."""
    if (Path(path) / "evaluation" / "evaluation.json").is_file():
        return read_evaluated(Path(path) / "evaluation")
    prompts, model = [list(prompt) for prompt in settings.data.test_prompts], loaded(path, text)
    key = digest([settings.generation.options, settings.seed, prompts, model.text_identity])
    folder = cache_folder() / "evaluations" / f"{model.weights[:16]}-{key[:16]}"
    other_draws = replace(settings, stage="all", seed=settings.seed + BASELINE_SEED)
    found = assess(Subject(name, path, folder, text), other_draws, None)
    assert found is not None
    return found
