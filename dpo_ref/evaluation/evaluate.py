"""What `evaluate.py` does: generate, measure, score and report one policy, or every job of a sweep."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dpo_ref.component import Component
from dpo_ref.data.groups import Groups
from dpo_ref.data.packing import pack
from dpo_ref.data.scoring import scoring
from dpo_ref.data.tokenise import encode_prompts, end_of_turn_ids, length_limit, tokenise, within
from dpo_ref.distributed import own_folder
from dpo_ref.evaluation.diagnostics.diagnose import Diagnosed, Diagnosis, metrics_of
from dpo_ref.evaluation.diagnostics.pairs import content_of
from dpo_ref.evaluation.diagnostics.token_statistics import DiagnosticContext
from dpo_ref.evaluation.heldout import heldout_metrics, reference_pairs, score_pairs
from dpo_ref.evaluation.judging.judges import JudgeContext
from dpo_ref.evaluation.kl import SampleKl, sample_groups, sample_kl, sequence_k1
from dpo_ref.evaluation.policy import EvaluationSettings, PolicyToEvaluate
from dpo_ref.evaluation.results import (
    RESULTS,
    STORED,
    Evaluated,
    Evaluation,
    folder_at,
    in_order,
    read_evaluation,
    read_record,
    stored_in,
    write_evaluation,
)
from dpo_ref.evaluation.stages import (
    BASELINE_SEED,
    answers_key,
    deciding,
    diagnose_stage,
    generate_stage,
    generation_key,
    judge_stage,
    measure_stage,
    read_diagnosis,
    read_evaluated,
    score_stage,
    stored_generations,
    with_judgments,
)
from dpo_ref.files.cache import in_use, made_by_one
from dpo_ref.files.digests import Damaged
from dpo_ref.generation.engine import PromptSet, answer, held_out
from dpo_ref.generation.records import Generation, scored_together
from dpo_ref.generation.sampling import never_sampled
from dpo_ref.models import checkpoint
from dpo_ref.models.asked import ModelPath
from dpo_ref.models.logps import hidden_states_kept
from dpo_ref.references.interface import Reference, ReferenceContext, build
from dpo_ref.tracking.terminal import say
from dpo_ref.types import PreferenceData, Progress, digest


def _answers(subject: PolicyToEvaluate, settings: EvaluationSettings, folder: Path) -> list[Generation]:
    model = settings.policy(subject)
    if not settings.prompts.questions:
        raise ValueError(
            "the data holds out no prompts to answer: prompts=jsonl prompts.path=questions.jsonl asks others, and "
            "training with data.eval_fraction or data.eval_path holds some out"
        )
    engine, seed = settings.generation(model), settings.work.seed
    options = settings.generation_identity()
    key = generation_key(engine.weights(), model.text_identity, settings.prompts, seed, options)
    return generate_stage(folder, key, partial(answer, engine, settings.prompts, seed, settings.work.progress))


def _about(
    subject: PolicyToEvaluate, settings: EvaluationSettings, scorer: str, metrics: Mapping[str, float]
) -> Evaluation:
    generation = {**settings.generation.plain(), "seed": settings.work.seed}
    before = subject.folder / "evaluation.json"
    if settings.stage == "score" and before.is_file():  # the answers are those of then
        generation = read_evaluation(subject.folder).generation
    return Evaluation(
        name=subject.name,
        scorer=scorer,
        metrics=dict(metrics),
        generation=generation,
        **subject.summary("objective", "reference", "beta", "seed"),
    )


def _flat(diagnosis: Diagnosis | None) -> dict[str, float]:
    return {} if diagnosis is None else metrics_of(diagnosis)


def _diagnosis(
    subject: PolicyToEvaluate, settings: EvaluationSettings, generations: Sequence[Generation]
) -> dict[str, float]:
    """The flat numbers of the configured diagnosis, which is made or read."""
    key = diagnose_key(subject, settings)
    return _flat(diagnose_stage(subject.folder, key, lambda: diagnose(subject, settings, generations)))


def _diagnosed_again(subject: PolicyToEvaluate, settings: EvaluationSettings) -> Evaluated:
    """A stored evaluation with a diagnosis of its own answers; everything else stays."""
    if not settings.measures(subject):
        raise ValueError(
            f"stage=diagnose has no effect: policy={subject.model.path} is no run, and has no initial policy to "
            "compare with"
        )
    before = read_evaluated(subject.folder)
    stale = _flat(_diagnosis_before(subject.folder))
    metrics = {name: value for name, value in before.evaluation.metrics.items() if name not in stale}
    diagnosis = _diagnosis(subject, settings, before.generations)
    evaluation = replace(before.evaluation, metrics=metrics | diagnosis)
    write_evaluation(subject.folder, evaluation)
    return replace(before, evaluation=evaluation)


def _diagnosis_before(folder: Path) -> Diagnosis | None:
    """What is about to be replaced; none where it is damaged, which is said when it is made again."""
    try:
        return read_diagnosis(folder)
    except Damaged:
        return None


@torch.no_grad()
@hidden_states_kept()
def evaluate_policy(
    subject: PolicyToEvaluate, settings: EvaluationSettings, baseline: Evaluated | None
) -> Evaluated | None:
    """Run the stages asked for; None after `stage=generate`. `baseline` is what the win rate is against."""
    folder = subject.folder
    if settings.judge is not None and baseline is None:
        raise ValueError(
            f"judge={settings.judge.name} compares with a baseline; policy={subject.model.path} is no run with an "
            "initial policy: give baseline=<run or model folder>"
        )
    if settings.stage == "report":
        return read_evaluated(folder)
    if settings.stage == "judge":
        return _with_judge(settings, folder, read_evaluated(folder), baseline)
    if settings.stage == "diagnose":
        return _diagnosed_again(subject, settings)
    if settings.stage == "score":
        generations = stored_generations(folder)
        stored = folder / "measurements.json"
        metrics = read_record(stored)["metrics"] if stored.is_file() else {}
        metrics |= _flat(read_diagnosis(folder))
    else:
        generations = _answers(subject, settings, folder)
        if settings.stage == "generate":
            return None
        metrics = {}
        if settings.measures(subject):
            metrics = measure_stage(
                folder, measure_key(subject, settings), lambda: measure(subject, settings, generations)
            )
            metrics |= _diagnosis(subject, settings, generations)
    scores = scored_together(settings.parts["scorer"], generations)
    about = _about(subject, settings, scores.name, metrics)
    seed = settings.work.seed
    evaluated = score_stage(folder, about, generations, scores.values, baseline, seed, settings.thresholds)
    return _with_judge(settings, folder, evaluated, baseline)


def _with_judge(
    settings: EvaluationSettings, folder: Path, evaluated: Evaluated, baseline: Evaluated | None
) -> Evaluated:
    """With the judge's numbers: asked for now, or those of the same answers that are stored; a baseline has none."""
    if settings.judge is None or baseline is None:
        return with_judgments(folder, evaluated, baseline)
    work = settings.work
    judge = settings.judge(JudgeContext(settings.judge.name, work.cache, work.loader, work.progress))
    return judge_stage(folder, judge, evaluated, baseline, work.seed, work.progress)


def baseline_of(source: ModelPath, name: str, settings: EvaluationSettings) -> Evaluated:
    """The evaluation that others are compared with. A model's answers are kept in the cache and shared by all runs."""
    results = Path(source.path) / RESULTS
    if (results / "evaluation.json").is_file():
        aside = folder_at(results, settings.generation.options["temperature"])
        return read_evaluated(aside if (aside / "evaluation.json").is_file() else results)
    work = settings.work
    model = work.loader.policy(source)
    key = digest([deciding(settings.generation.plain()), work.seed, settings.prompts.content(), model.text_identity])
    folder = work.cache / "evaluations" / f"{settings.generation(model).weights()[:16]}-{key[:16]}"
    other_draws = settings.of_baseline(work.seed + BASELINE_SEED)
    with own_folder(folder, made_by_one(folder), STORED) as own:  # one evaluated beside this has the same
        evaluated = evaluate_policy(PolicyToEvaluate(name, own, source), other_draws, None)
    assert evaluated is not None
    in_use(folder)
    return evaluated


# --- what is measured with several models: KL on the policy's own samples, held-out pairs


def measure(
    subject: PolicyToEvaluate, settings: EvaluationSettings, generations: Sequence[Generation]
) -> dict[str, float]:
    """KL to the initial policy and to the loss reference, where the samples allow it, and the held-out pairs."""
    with settings.policy(subject).precision():
        return _measure(subject, settings, generations)


def _measure(
    subject: PolicyToEvaluate, settings: EvaluationSettings, generations: Sequence[Generation]
) -> dict[str, float]:
    ours, initial, progress = settings.policy(subject), settings.initial(subject), settings.work.progress
    prepare = within(settings.parts["data"].bound(tokenise), ours.tokenizer, ours.positions)
    groups = prepare(settings.data.eval, ours.tokenizer).groups
    reference = loss_reference(subject, settings, groups)
    metrics: dict[str, float] = {}
    own = "best_of" not in settings.generation.options  # else they are not the policy's own samples
    if own and all(g.temperature == g.top_p == 1 and g.tokens == "drawn" for g in generations):
        never = never_sampled(ours.tokenizer, ours.model.get_output_embeddings().weight.shape[0])
        to_initial = sample_kl(ours.model, initial.model, generations, never, progress)
        metrics |= to_initial.metrics("initial") | to_initial.end_metrics()
        metrics |= _kl_to_reference(subject, settings, generations, reference, to_initial, never)
    if groups.have_pairs.any():
        ends = end_of_turn_ids(ours.tokenizer)
        policy, start = (score_pairs(m.model, groups, ends, progress) for m in (ours, initial))
        metrics |= heldout_metrics(policy, start, reference_pairs(reference, groups, start, settings.work.device))
    return metrics


def measure_key(subject: PolicyToEvaluate, settings: EvaluationSettings) -> str:
    """Digest of what measurements depend on: the answers, the models they are compared with, the held-out pairs."""
    assert subject.run is not None
    answers = answers_key(subject.folder)
    reference = subject.run.loss_reference
    others = [settings.initial(subject).weights, reference.name, reference.plain()]
    pairs = [(group.group_id, group.logps) for group in settings.data.eval]
    return digest([answers, others, pairs, settings.parts["data"].plain()])


def loss_reference(subject: PolicyToEvaluate, settings: EvaluationSettings, groups: Groups) -> Reference:
    """The loss reference for these groups, by the run's own configuration of it. Raises ValueError if it is not what
    the run was trained against."""
    run = subject.run
    assert run is not None
    state = checkpoint.read_reference(run.checkpoint) if run.checkpoint else {}
    context = ReferenceContext(
        settings.work,
        settings.initial_as_trained(subject) if state else settings.initial(subject),
        groups,
        settings.parts["data"].bound(pack),
        uses_reference=run.summary["reference"] != "none",
        scoring=settings.parts["data"].bound(scoring)(),
    )
    reference = build(run.loss_reference, context)
    say(*reference.notes)
    reference.load_state_dict(state)
    subject.check_reference(reference)
    return reference


def live_reference(subject: PolicyToEvaluate, settings: EvaluationSettings, groups: Groups) -> Reference:
    """The same reference, asked for what no table holds: sampled answers, texts of other files."""
    run = subject.run
    assert run is not None
    live = replace(run, loss_reference=run.loss_reference.live or run.loss_reference)
    return loss_reference(replace(subject, run=live), settings, groups)


def _kl_to_reference(
    subject: PolicyToEvaluate,
    settings: EvaluationSettings,
    generations: Sequence[Generation],
    reference: Reference,
    to_initial: SampleKl,
    never: torch.Tensor,
) -> dict[str, float]:
    """KL(policy || loss reference) on the same samples: Rao-Blackwellised where the reference is a model of the same
    vocabulary, else the mean log-ratio of whole answers (k1). Empty where it is no distribution."""
    if not reference.normalised:
        return {}
    ours, progress = settings.policy(subject), settings.work.progress
    if reference.equals(settings.initial(subject)):
        return to_initial.metrics("loss_reference")
    on_samples = live_reference(subject, settings, sample_groups(generations)[0])
    if on_samples.model is not None:
        return sample_kl(ours.model, on_samples.model, generations, never, progress).metrics("loss_reference")
    return sequence_k1(ours.model, on_samples, generations).metrics("loss_reference")


# --- what a diagnosis needs of a subject and its settings: models, held-out groups, answers, the loss reference


def diagnose_key(subject: PolicyToEvaluate, settings: EvaluationSettings) -> str:
    """Digest of what a diagnosis depends on: what measurements do, its options, the content of its pair files."""
    diagnostic = settings.parts["diagnostic"]
    options = diagnostic.plain()
    files = content_of(options["pairs"]) if options.get("pairs") else None
    return digest([measure_key(subject, settings), diagnostic.name, options, files, settings.work.seed])


def diagnose(
    subject: PolicyToEvaluate, settings: EvaluationSettings, generations: Sequence[Generation]
) -> Diagnosed | None:
    """The configured diagnosis of a policy that a run has trained."""
    policy = settings.policy(subject)
    with policy.precision():
        prepare = within(settings.parts["data"].bound(tokenise), policy.tokenizer, policy.positions)
        groups = prepare(settings.data.eval, policy.tokenizer).groups
        heldout = groups.where(groups.have_pairs)
        context = DiagnosticContext(
            work=settings.work,
            policy=policy,
            initial=settings.initial(subject),
            heldout=heldout,
            generations=generations,
            reference=loss_reference(subject, settings, heldout),
            reference_on=partial(live_reference, subject, settings),
            tokenise=lambda rows: prepare(rows, policy.tokenizer).groups,
        )
        return settings.parts["diagnostic"](context)


# --- what an evaluation asks, and at which temperatures


OF_STORED = ("score", "judge")  # stages that look at the answers of every temperature that are there


def check_temperature(parts: Mapping[str, Component], overrides: Sequence[str]) -> None:
    """Raise ValueError where the temperature that is given would have no effect."""
    keys = {override.lstrip("+").partition("=")[0] for override in overrides}
    own = "prompts" in parts and parts["prompts"].options.get("temperatures") is not None
    if own and keys & {"generation", "generation.temperature"}:
        raise ValueError(
            "generation.temperature has no effect: prompts.temperatures gives every category its own; leave one out"
        )


def prompts_of(
    tokenizer: Any,
    positions: int | None,
    parts: Mapping[str, Component],
    data: PreferenceData,
    seed: int,
    progress: Progress,
) -> PromptSet:
    """What is asked: the data's held-out prompts, or `prompts=`. Data brings its limits on length, in tokens of the
    policy's tokenizer; none is longer than the policy's positions."""
    named = parts.get("prompts")
    prompts = held_out(data.test_prompts) if named is None else named(seed, progress)
    limits = parts["data"] if named is None else named.options.get("data")
    return prompts if limits is None else _fitting(tokenizer, positions, prompts, limits)


def _fitting(tokenizer: Any, positions: int | None, prompts: PromptSet, limits: Component) -> PromptSet:
    """The prompts that are not longer than their data's limit, by which training drops them too; says how many."""
    whole = length_limit(tokenizer, limits.options["max_length"], positions)
    limit = min(limits.options["max_prompt_length"] or whole, whole if positions is None else positions - 1)
    sizes = map(len, encode_prompts(tokenizer, [question.asked(question.prompt) for question in prompts.questions]))
    questions = [question for question, size in zip(prompts.questions, sizes, strict=True) if size <= limit]
    if len(questions) < (count := len(prompts.questions)):
        say(f"{count - len(questions)} of {count} prompts left out: longer than {limit} tokens")
    return replace(prompts, questions=tuple(questions))


def at_each(settings: EvaluationSettings, subject: PolicyToEvaluate) -> list[EvaluationSettings]:
    """The settings for each temperature, the evaluation proper's first; of stored answers, for those there are."""
    temperatures = in_order(settings.generation.options["temperature"])
    if settings.stage in OF_STORED:
        temperatures = [*temperatures[:1], *stored_in(subject.folder)]
    first, *others = [settings.at(temperature) for temperature in temperatures]
    return [first, *(replace(other, aside=True) for other in others)]


def at_other(subject: PolicyToEvaluate, settings: EvaluationSettings, baseline: Evaluated | None) -> PolicyToEvaluate:
    """The subject at a further temperature. Raises ValueError for a baseline that was not evaluated there."""
    temperature = settings.generation.options["temperature"]
    if baseline is not None and (was := baseline.evaluation.generation.get("temperature")) != temperature:
        raise ValueError(
            f"the baseline was evaluated at temperature {was} and not at {temperature:g}: evaluate it with the same "
            "list in generation.temperature"
        )
    return replace(subject, folder=folder_at(subject.folder, temperature))
