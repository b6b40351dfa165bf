"""What `evaluate.py` does: generate, measure, score and report one policy, or every job of a sweep."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from dpo_ref.component import Component
from dpo_ref.data.groups import Groups
from dpo_ref.data.packing import pack
from dpo_ref.data.tokenise import encode_prompts, end_of_turn_ids, length_limit, tokenise
from dpo_ref.distributed import best_device
from dpo_ref.evaluation.diagnostics.diagnose import Diagnosed, Diagnosis, metrics_of
from dpo_ref.evaluation.diagnostics.pairs import content_of
from dpo_ref.evaluation.diagnostics.token_statistics import DiagnosticContext
from dpo_ref.evaluation.heldout import heldout_metrics, reference_pairs, score_pairs
from dpo_ref.evaluation.judging.judges import JudgeContext
from dpo_ref.evaluation.kl import SampleKl, sample_groups, sample_kl, sequence_k1
from dpo_ref.evaluation.policy import Loaded, Settings, Subject, loaded
from dpo_ref.evaluation.results import (
    RESULTS,
    Evaluated,
    Evaluation,
    folder_at,
    in_order,
    read_evaluation,
    read_json,
    stored_in,
    write_evaluation,
)
from dpo_ref.evaluation.stages import (
    BASELINE_SEED,
    deciding,
    diagnose_stage,
    generate_stage,
    generation_key,
    judge_stage,
    measure_stage,
    read_diagnosis,
    read_evaluated,
    score_stage,
    with_judgments,
)
from dpo_ref.files import cache_folder
from dpo_ref.generation.engine import PromptSet, answered, held_out
from dpo_ref.generation.records import Generation, read_generations
from dpo_ref.generation.sampling import never_sampled
from dpo_ref.lab import models as lab_models
from dpo_ref.models import checkpoint
from dpo_ref.models.loading import ModelSource, check_folder, load_reference, load_tokenizer
from dpo_ref.references.interface import Reference, ReferenceContext
from dpo_ref.tracking.terminal import progress
from dpo_ref.types import PreferenceData, digest


def _answers(subject: Subject, settings: Settings, folder: Path) -> list[Generation]:
    model = loaded(subject.path, subject.text, subject.adapter)
    if not settings.prompts.questions:
        raise ValueError("the data has no prompts to answer: hold some out with data.eval_fraction or data.eval_path")
    engine, seed = settings.generation(model.policy), settings.seed
    options = settings.generation_identity()
    key = generation_key(engine.weights(), model.text_identity, settings.prompts, seed, options)
    return generate_stage(folder, key, lambda kept: answered(engine, settings.prompts, seed, progress, kept))


def _about(subject: Subject, settings: Settings, scorer: str, metrics: Mapping[str, float]) -> Evaluation:
    asked = {**settings.generation.plain(), "seed": settings.seed}
    before = subject.folder / "evaluation.json"
    if settings.stage == "score" and before.is_file():  # the answers are those of then
        asked = read_evaluation(subject.folder).generation
    return Evaluation(
        name=subject.name,
        scorer=scorer,
        metrics=dict(metrics),
        objective=subject.objective,
        reference=subject.reference,
        beta=subject.beta,
        seed=subject.seed,
        generation=asked,
    )


def _flat(diagnosis: Diagnosis | None) -> dict[str, float]:
    return {} if diagnosis is None else metrics_of(diagnosis)


def _diagnosis(subject: Subject, settings: Settings, generations: Sequence[Generation]) -> dict[str, float]:
    """The flat numbers of the configured diagnosis, which is made or read."""
    key = diagnose_key(subject, settings)
    return _flat(diagnose_stage(subject.folder, key, lambda: diagnosed(subject, settings, generations)))


def _diagnosed_again(subject: Subject, settings: Settings) -> Evaluated:
    """A stored evaluation with a diagnosis of its own answers; everything else stays."""
    if subject.initial is None:
        raise ValueError(
            f"stage=diagnose has no effect: policy={subject.path} is no run, and has no initial policy to compare with"
        )
    before = read_evaluated(subject.folder)
    stale = _flat(read_diagnosis(subject.folder))
    kept = {name: value for name, value in before.evaluation.metrics.items() if name not in stale}
    found = _diagnosis(subject, settings, before.generations)
    evaluation = replace(before.evaluation, metrics=kept | found)
    write_evaluation(subject.folder, evaluation)
    return replace(before, evaluation=evaluation)


@torch.no_grad()
def assess(subject: Subject, settings: Settings, baseline: Evaluated | None) -> Evaluated | None:
    """Run the stages asked for; None after `stage=generate`. `baseline` is what the win rate is against."""
    folder = subject.folder
    if settings.judge is not None and baseline is None:
        raise ValueError(
            f"judge={settings.judge.name} compares with a baseline; policy={subject.path} is no run with an initial "
            "policy: give baseline=<run or model folder>"
        )
    if settings.stage == "report":
        return read_evaluated(folder)
    if settings.stage == "judge":
        return _judged(settings, folder, read_evaluated(folder), baseline)
    if settings.stage == "diagnose":
        return _diagnosed_again(subject, settings)
    if settings.stage == "score":
        generations = read_generations(folder / "generations.jsonl")
        stored = folder / "measurements.json"
        metrics = read_json(stored)["metrics"] if stored.is_file() else {}
        metrics |= _flat(read_diagnosis(folder))
    else:
        generations = _answers(subject, settings, folder)
        if settings.stage == "generate":
            return None
        metrics = {}
        if subject.initial is not None:
            metrics = measure_stage(
                folder, measure_key(subject, settings), lambda: measured(subject, settings, generations)
            )
            metrics |= _diagnosis(subject, settings, generations)
    scores = settings.scorer(generations)
    about = _about(subject, settings, scores.name, metrics)
    found = score_stage(folder, about, generations, scores.values, baseline, settings.seed, settings.thresholds)
    return _judged(settings, folder, found, baseline)


def _judged(settings: Settings, folder: Path, found: Evaluated, baseline: Evaluated | None) -> Evaluated:
    """With the judge's numbers: asked for now, or those of the same answers that are stored; a baseline has none."""
    if settings.judge is None or baseline is None:
        return with_judgments(folder, found, baseline)
    judge = settings.judge(JudgeContext(settings.judge.name, cache_folder(), _judge_model, progress))
    return judge_stage(folder, judge, found, baseline, settings.seed, progress)


def _judge_model(path: str) -> Loaded:
    check_folder(lab_models.locate(path), "judge.model")
    return loaded(path)


def baseline_of(
    path: str, name: str, settings: Settings, text: str | None = None, adapter: str | None = None
) -> Evaluated:
    """The evaluation that others are compared with. A model's answers are kept in the cache and shared by all runs."""
    if (Path(path) / RESULTS / "evaluation.json").is_file():
        aside = folder_at(Path(path) / RESULTS, settings.generation.options["temperature"])
        return read_evaluated(aside if (aside / "evaluation.json").is_file() else Path(path) / RESULTS)
    model = loaded(path, text, adapter)
    key = digest(
        [deciding(settings.generation.plain()), settings.seed, settings.prompts.content(), model.text_identity]
    )
    folder = cache_folder() / "evaluations" / f"{settings.generation(model.policy).weights()[:16]}-{key[:16]}"
    other_draws = replace(settings, stage="all", judge=None, seed=settings.seed + BASELINE_SEED)
    found = assess(Subject(name, path, folder, adapter, text), other_draws, None)
    assert found is not None
    return found


# --- what is measured with several models: KL on the policy's own samples, held-out pairs


def measured(subject: Subject, settings: Settings, generations: Sequence[Generation]) -> dict[str, float]:
    """KL to the initial policy and to the loss reference, where the samples allow it, and the held-out pairs."""
    with loaded(subject.path).precision():
        return _measured(subject, settings, generations)


def _measured(subject: Subject, settings: Settings, generations: Sequence[Generation]) -> dict[str, float]:
    ours, initial = loaded(subject.path), initial_of(subject)
    groups = settings.data_options.bound(tokenise)(settings.data.eval, ours.tokenizer).groups
    reference = loss_reference(subject, settings, groups)
    found: dict[str, float] = {}
    own = "best_of" not in settings.generation.options  # else they are not the policy's own samples
    if own and all(g.temperature == g.top_p == 1 and g.tokens == "drawn" for g in generations):
        never = never_sampled(ours.tokenizer, ours.model.get_output_embeddings().weight.shape[0])
        to_initial = sample_kl(ours.model, initial.model, generations, never, progress)
        found |= to_initial.metrics("initial") | to_initial.end_metrics()
        found |= _kl_to_reference(subject, settings, generations, reference, to_initial, never)
    if groups.have_pairs.any():
        ends = end_of_turn_ids(ours.tokenizer)
        policy, start = (score_pairs(m.model, groups, ends, progress) for m in (ours, initial))
        found |= heldout_metrics(policy, start, reference_pairs(reference, groups, start, best_device()))
    return found


def measure_key(subject: Subject, settings: Settings) -> str:
    """Digest of what measurements depend on: the answers, the models they are compared with, the held-out pairs."""
    assert subject.loss_reference is not None
    answers = read_json(subject.folder / "generations.key.json")["key"]
    others = [initial_of(subject).weights, subject.loss_reference.name, subject.loss_reference.options]
    pairs = [(group.group_id, group.logps) for group in settings.data.eval]
    return digest([answers, others, pairs, settings.data_options.plain()])


def initial_of(subject: Subject) -> Loaded:
    """The policy as it was before training."""
    assert subject.initial is not None
    return loaded(subject.initial, subject.initial_text, subject.initial_adapter)


def loss_reference(subject: Subject, settings: Settings, groups: Groups) -> Reference:
    """The loss reference for these groups, by the run's own configuration of it. Raises ValueError if it is not what
    the run was trained against."""
    assert subject.loss_reference is not None
    initial = initial_of(subject)
    context = ReferenceContext(
        policy=initial.model,
        tokenizer=initial.tokenizer,
        uses_reference=subject.reference != "none",
        load=_load,
        load_tokenizer=lambda path, revision=None: load_tokenizer(lab_models.locate(path), revision),
        text_identity=initial.text_identity,
        groups=groups,
        pack=settings.data_options.bound(pack),
        progress=progress,
        device=best_device(),
        cache=cache_folder(),
    )
    reference: Reference = subject.loss_reference(context)
    reference.load_state_dict(checkpoint.read_reference(subject.checkpoint) if subject.checkpoint else {})
    subject.check_reference(reference)
    return reference


def live_reference(subject: Subject, settings: Settings, groups: Groups) -> Reference:
    """The same reference, asked for what no table holds: sampled answers, texts of other files."""
    assert subject.loss_reference is not None
    live = subject.loss_reference.live or subject.loss_reference
    return loss_reference(replace(subject, loss_reference=live), settings, groups)


def is_initial(reference: Reference, subject: Subject) -> bool:
    """Whether the loss reference is the initial policy, reading the same text."""
    same = reference.weights == initial_of(subject).weights
    return same and not reference.own_text and not reference.state_dict()


def _load(source: ModelSource) -> torch.nn.Module:
    if source == ModelSource(source.path):
        return loaded(source.path).model
    return load_reference(source, lab_models.locate(source.path), best_device(), "auto")


def _kl_to_reference(
    subject: Subject,
    settings: Settings,
    generations: Sequence[Generation],
    reference: Reference,
    to_initial: SampleKl,
    never: torch.Tensor,
) -> dict[str, float]:
    """KL(policy || loss reference) on the same samples: Rao-Blackwellised where the reference is a model of the same
    vocabulary, else the mean log-ratio of whole answers (k1). Empty where it is no distribution."""
    assert subject.loss_reference is not None
    if not reference.normalised:
        return {}
    ours = loaded(subject.path)
    if is_initial(reference, subject):
        return to_initial.metrics("loss_reference")
    on_samples = live_reference(subject, settings, sample_groups(generations)[0])
    model = getattr(on_samples, "model", None)
    if model is not None:
        return sample_kl(ours.model, model, generations, never, progress).metrics("loss_reference")
    return sequence_k1(ours.model, on_samples, generations).metrics("loss_reference")


# --- what a diagnosis needs of a subject and its settings: models, held-out groups, answers, the loss reference


def diagnose_key(subject: Subject, settings: Settings) -> str:
    """Digest of what a diagnosis depends on: what measurements do, its options, the content of its pair files."""
    options = settings.diagnostic.plain()
    files = content_of(options["pairs"]) if options.get("pairs") else None
    return digest([measure_key(subject, settings), settings.diagnostic.name, options, files, settings.seed])


def diagnosed(subject: Subject, settings: Settings, generations: Sequence[Generation]) -> Diagnosed | None:
    """The configured diagnosis of a policy that a run has trained."""
    with loaded(subject.path).precision():
        return settings.diagnostic(_context(subject, settings, generations))


def _context(subject: Subject, settings: Settings, generations: Sequence[Generation]) -> DiagnosticContext:
    ours, initial = loaded(subject.path), initial_of(subject)
    prepare = settings.data_options.bound(tokenise)
    groups = prepare(settings.data.eval, ours.tokenizer).groups
    with_pairs, samples = groups.where(groups.have_pairs), sample_groups(generations)[0]
    reference = loss_reference(subject, settings, with_pairs)
    temperatures = {(g.temperature, g.top_p) for g in generations}
    return DiagnosticContext(
        policy=ours.model,
        initial=initial.model,
        tokenizer=ours.tokenizer,
        ends=frozenset(end_of_turn_ids(ours.tokenizer)),
        never=never_sampled(ours.tokenizer, ours.model.get_output_embeddings().weight.shape[0]),
        heldout=with_pairs,
        samples=samples,
        why_no_samples=None if temperatures == {(1.0, 1.0)} else _other_samples(temperatures),
        reference_name=reference.name,
        same_as_initial=is_initial(reference, subject),
        heldout_reference=lambda: reference,
        reference_on=partial(live_reference, subject, settings),
        tokenise=lambda of: prepare(of, ours.tokenizer).groups,
        device=best_device(),
        seed=settings.seed,
        progress=progress,
    )


def _other_samples(found: set[tuple[float, float]]) -> str:
    drawn = ", ".join(f"temperature {temperature:g} and top-p {top_p:g}" for temperature, top_p in sorted(found))
    return f"they were drawn with {drawn}, not from the policy itself: generation.temperature=1 generation.top_p=1"


# --- what an evaluation asks, and at which temperatures


OF_STORED = ("score", "judge")  # stages that look at the answers of every temperature that are there


def check_temperature(parts: Mapping[str, Component], overrides: Sequence[str]) -> None:
    """Raise ValueError where the temperature that is given would have no effect."""
    said = {override.lstrip("+").partition("=")[0] for override in overrides}
    own = "prompts" in parts and parts["prompts"].options.get("temperatures") is not None
    if own and said & {"generation", "generation.temperature"}:
        raise ValueError(
            "generation.temperature has no effect: prompts.temperatures gives every category its own; leave one out"
        )


def prompts_of(subject: Subject, parts: Mapping[str, Component], data: PreferenceData, seed: int) -> PromptSet:
    """What is asked: the data's held-out prompts, or `prompts=`. Data brings its limits on length."""
    named = parts.get("prompts")
    asked = held_out(data.test_prompts) if named is None else named(seed, progress)
    limits = parts["data"] if named is None else named.options.get("data")
    return asked if limits is None else _fitting(subject, asked, limits)


def _fitting(subject: Subject, asked: PromptSet, limits: Component) -> PromptSet:
    """The prompts that are not longer than their data's limit, by which training drops them too; says how many."""
    tokenizer = loaded(subject.path).tokenizer
    limit = limits.options["max_prompt_length"] or length_limit(tokenizer, limits.options["max_length"])
    sizes = map(len, encode_prompts(tokenizer, [question.prompt for question in asked.questions]))
    kept = [question for question, size in zip(asked.questions, sizes, strict=True) if size <= limit]
    if len(kept) < (count := len(asked.questions)):
        print(f"{count - len(kept)} of {count} prompts left out: longer than {limit} tokens")
    return replace(asked, questions=tuple(kept))


def at_each(settings: Settings, subject: Subject) -> list[Settings]:
    """The settings for each temperature, the evaluation proper's first; of stored answers, for those there are."""
    options = settings.generation.options
    temperatures = in_order(options["temperature"])
    if settings.stage in OF_STORED:
        temperatures = [*temperatures[:1], *stored_in(subject.folder)]
    made = [replace(settings.generation, options=options | {"temperature": one}) for one in temperatures]
    return [replace(settings, generation=one) for one in made]


def at_other(subject: Subject, settings: Settings, baseline: Evaluated | None) -> Subject:
    """The subject at a further temperature, where nothing is measured that does not depend on it. Raises ValueError
    for a baseline that was not evaluated there."""
    temperature = settings.generation.options["temperature"]
    if baseline is not None and (was := baseline.evaluation.generation.get("temperature")) != temperature:
        raise ValueError(
            f"the baseline was evaluated at temperature {was} and not at {temperature:g}: evaluate it with the same "
            "list in generation.temperature"
        )
    return replace(subject, folder=folder_at(subject.folder, temperature), initial=None, loss_reference=None)
