"""From a resolved configuration to a training run: data, policy, rounds, reference, optimiser."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from dpo_ref.cli.cache import check_cache, look_after_cache, record_uses
from dpo_ref.cli.ranks import agree
from dpo_ref.cli.resolve import RunConfig
from dpo_ref.cli.table_export import check_export, export_reference
from dpo_ref.component import Component
from dpo_ref.data.anomalies import anomalies
from dpo_ref.data.chat_templates import template_notes, text_identity
from dpo_ref.data.groups import ConcatGroups, Groups, SelectedGroups, TokenGroups
from dpo_ref.data.inspection import (
    drawn,
    examples_of,
    inspect,
    score_margins,
    short_report,
    summed_counts,
    tokens_by_role,
)
from dpo_ref.data.packing import pack
from dpo_ref.data.scoring import scoring
from dpo_ref.data.tokenise import Tokenised, length_limit, tokenise, tokenised_once, within
from dpo_ref.distributed import best_device, keep_memory, memory_explained
from dpo_ref.evaluation.in_training import EvaluationContext, InitialPolicy, in_memory
from dpo_ref.files.cache import cache_folder
from dpo_ref.files.writing import write_json, write_text
from dpo_ref.models.asked import ModelLoader, Workspace
from dpo_ref.models.attention import resolve_backend
from dpo_ref.models.averages import policies_at
from dpo_ref.models.folders import stored_positions
from dpo_ref.models.loading import TrainedModel, check_folder, locate, prepared_tokenizer
from dpo_ref.models.lora import AdapterOptions
from dpo_ref.models.next_token import vocabulary_of
from dpo_ref.models.reward_model import with_score_head
from dpo_ref.models.sharding import ALONE, Parallel
from dpo_ref.objectives.interface import Objective
from dpo_ref.references import interface as references
from dpo_ref.references.columns import check_certificate
from dpo_ref.references.interface import Reference, ReferenceContext
from dpo_ref.reports import training_curve
from dpo_ref.reports.data import Looked, ReferenceMargins, data_page, reference_margins_panel
from dpo_ref.reports.plots import write_png
from dpo_ref.tracking.run_record import RunRecord
from dpo_ref.tracking.terminal import progress, run_summary, say, show_example
from dpo_ref.tracking.tracker import Tracker
from dpo_ref.training.model_selection import ModelSelection
from dpo_ref.training.optim import optimisation
from dpo_ref.training.quantiles import QuantileContext
from dpo_ref.training.reference_margins import by_reference, chosen_pairs, given_margins, margins_of, told_of
from dpo_ref.training.rounds import OfflineRounds, Rounds, RoundsContext, groups_for, objective_groups, offline
from dpo_ref.training.run import SampleEvaluation, TrainingRun
from dpo_ref.types import Asked, PreferenceData

NUM_EXAMPLES = 8  # on the data page
NUM_SAMPLED = 200  # groups whose tokens are counted by role there
SCORED = "What the reference has scored is kept: the same command with a smaller pack goes on from there"
NUM_SAMPLES, SAMPLE_TOKENS = 8, 96  # answers shown in the tracker at the end of a run, tokens of each
MARGINS = "reference_margins"  # files in the folder of a run whose pairs the reference chose or weighed
NOTHING_LEFT = "nothing is left to train on: every row was dropped; see data.max_length, data.over_length"


class Built(NamedTuple):
    """A training run, prompts whose answers are shown at its end, and what became of the data's rows."""

    config: RunConfig
    training: TrainingRun
    prompts: Sequence[Asked]  # held out, to be answered
    counts: dict[str, int]


def build(config: RunConfig, directory: Path, tracker: Tracker) -> Built:
    """Load the data, the model and the reference of a run."""
    keep_memory()
    check_cache()
    look_after_cache()
    check_paths(config)
    torch.manual_seed(config.seed)
    work = workspace(config, directory)
    data = config.data(config.seed, progress)
    policy = trained_model(config, work.device)
    groups, held_out, counts = prepare_groups(config, data, policy, tracker)
    rounds = rounds_of(config, work, policy, data, groups)
    agree({"the training data": rounds.data.digest, "the held-out data": held_out.digest})
    fitting = (config.data.hooks.held_out or objective_groups)(config.objective, held_out)
    optim = config.optim.bound(optimisation)(config.optim, policy.model, rounds.num_steps)
    agree({"the policy": policy.weights})  # as the optimiser leaves them: one turns them into bfloat16
    check_selection(config, rounds.num_steps, len(fitting))
    with memory_explained(policy.model, optim.optimizer, SCORED):
        reference = reference_of(config, work, policy, rounds, fitting)
    if asks_reference(config):
        rounds, chosen = choose_pairs(config, work, policy, reference, rounds)
        counts |= chosen
        optim = config.optim.bound(optimisation)(config.optim, policy.model, rounds.num_steps)
        check_selection(config, rounds.num_steps, len(fitting))
    with memory_explained(policy.model, optim.optimizer, SCORED):
        looked_at = ConcatGroups(rounds.known_by(rounds.num_steps), fitting)
        objective = prepared(config, work, policy, reference, looked_at)
    record = RunRecord(directory / "metrics.jsonl", tracker)
    training = TrainingRun(work, policy, reference, objective, optim, rounds, fitting, record)
    training.evaluation = evaluation_of(config, training, data, held_out)
    training.selection = config.selection and ModelSelection(config.selection)
    record_uses(directory)
    return Built(config, training, data.test_prompts, counts)


def workspace(config: RunConfig, directory: Path) -> Workspace:
    """Where and with what a run works. No model is kept once it has been asked."""
    loader = ModelLoader(best_device(), config.model.options["attention"])
    return Workspace(directory, cache_folder(), config.seed, progress, loader)


def trained_model(config: RunConfig, device: torch.device) -> TrainedModel:
    """The policy, or the reward model made of it."""
    policy = config.model(device, config.model.bound(AdapterOptions)(), parallel_of(config))
    say(*policy.notes)
    return with_score_head(policy, config.seed) if config.objective.of_scores else policy


def parallel_of(config: RunConfig) -> Parallel:
    """How the ranks of a run hold the model."""
    return config.parallel() if config.parallel else ALONE


def check_paths(config: RunConfig) -> None:
    """Refuse folders that hold no model, a certificate that is none and a backend that is not here, before any data is
    read."""
    resolve_backend(config.model.options["attention"])
    check_folder(config.model.options["path"], "model.path")
    for reference in (config.reference, *config.reference.parts):
        _check_reference_paths(reference)


def _check_reference_paths(reference: Component) -> None:
    path = reference.options.get("path")
    if reference.model_path is not None:
        check_folder(reference.model_path, "reference.path")
    elif path is not None:
        policies_at(path, "reference.path")
    if adapter := reference.options.get("adapter"):
        check_folder(adapter, "reference.adapter", "adapter_config.json")
    if certificate := reference.options.get("certificate"):
        check_certificate(certificate)


# --- data


def tokenizer_of(config: RunConfig) -> Any:
    """The policy's tokenizer with its template, without the policy."""
    names = ("template", "template_options", "max_length", "revision")
    options = {name: config.model.options[name] for name in names}
    return prepared_tokenizer(locate(config.model.options["path"]), **options)


def tokenise_data(
    config: RunConfig, data: PreferenceData, tokenizer: Any, positions: int | None
) -> tuple[Tokenised, Tokenised]:
    """Train and held-out groups, numbered as one list, from the cache where they are; none is longer than the model's
    positions."""
    write, identity = within(config.data.bound(tokenise), tokenizer, positions), text_identity(tokenizer)
    train, held_out = (
        tokenised_once(groups, tokenizer, write, identity, cache_folder(), progress)
        for groups in (data.train, data.eval)
    )
    if any(part.counts.keys() - {"groups"} for part in (train, held_out)):  # no group was as long: nothing to tell
        say(*_shortened(config, tokenizer, positions))
    return train, Tokenised(held_out.groups.numbered_from(len(data.train)), held_out.counts)


def _shortened(config: RunConfig, tokenizer: Any, positions: int | None) -> list[str]:
    """What is said where the model has fewer positions than the data may have tokens."""
    limit = length_limit(tokenizer, config.data.options["max_length"])
    if positions is None or positions >= limit:
        return []
    what = config.data.options["over_length"]
    return [
        f"data.max_length={positions} instead of {limit:,}, as the model has no more positions "
        f"(max_position_embeddings): longer groups follow data.over_length={what}"
    ]


def prepare_groups(
    config: RunConfig, data: PreferenceData, policy: TrainedModel, tracker: Tracker
) -> tuple[TokenGroups, TokenGroups, dict[str, int]]:
    """Train and held-out groups, and what happened to rows; says what they are like."""
    tokenizer = policy.tokenizer
    train, held_out = tokenise_data(config, data, tokenizer, policy.positions)
    say(*short_report(inspect(data, train, held_out)))
    counts = summed_counts(data.reading, train.counts, held_out.counts)
    if not len(train.groups):
        raise ValueError(NOTHING_LEFT)
    say(*template_notes(tokenizer))
    (example,) = examples_of(tokenizer, train.groups[:1])
    show_example(example.short_rows())
    tracker.table("data/example", ["part", "text", "scored"], example.rows(), step=0)
    return train.groups, held_out.groups, counts


def rounds_of(
    config: RunConfig, work: Workspace, policy: TrainedModel, data: PreferenceData, groups: TokenGroups
) -> Rounds:
    """How training groups come about: as they are, unless the data component says otherwise."""
    context = RoundsContext(
        work=work,
        policy=policy,
        objective=config.objective,
        groups=groups,
        first_index=len(data.train) + len(data.eval),
        max_length=length_limit(policy.tokenizer, config.data.options["max_length"], policy.positions),
        pack=config.data.bound(pack),
        config=config.trainer,
    )
    sampled = config.generation and config.generation.bound(config.generation.hooks.sampled)  # pyright: ignore
    handed_over = (context, sampled) if sampled else (context,)
    rounds = config.data.bound(config.data.hooks.rounds or offline)(*handed_over)
    say(*rounds.notes)
    return rounds


def report_data(config: RunConfig, directory: Path) -> None:
    """`stage=data`: read and tokenise, and write what the data is like to data.html. No model is loaded, unless the
    reference chooses or weighs pairs: then it is asked, as before a run."""
    if asks_reference(config):
        check_paths(config)
    data = config.data(config.seed, progress)
    tokenizer = tokenizer_of(config)
    positions = stored_positions(locate(config.model.options["path"]), revision=config.model.options["revision"])
    train, held_out = tokenise_data(config, data, tokenizer, positions)
    hygiene, write = inspect(data, train, held_out), within(config.data.bound(tokenise), tokenizer, positions)
    shown, sample = (drawn(train.groups, count, config.seed) for count in (NUM_EXAMPLES, NUM_SAMPLED))
    looked = Looked(
        examples=examples_of(tokenizer, shown),
        roles=tokens_by_role(tokenizer, shown),
        sampled=tokens_by_role(tokenizer, sample),
        num_sampled=len(sample),
        findings=anomalies(data, train, held_out, lambda groups: write(groups, tokenizer), progress),
    )
    title = f"{config.data.name} for {config.model.options['path']}"
    directory.mkdir(parents=True, exist_ok=True)
    preferred = preferred_by_reference(config, directory, data, train.groups)
    write_text(directory / "data.html", data_page(hygiene, score_margins(data.train), looked, title, preferred))
    report = short_report(hygiene)
    report += [f"  {name}: {said}" for name, said in (preferred.told if preferred else {}).items()]
    found = [f"{finding.count:,} {finding.name}" for finding in looked.findings if finding.count]
    found = [line for line in found if not any(line in said for said in report)]
    say(*report, *template_notes(tokenizer), *(f"  {line}" for line in found))
    run_summary(f"data={config.data.name}", {"page": str(directory / "data.html")})


def preferred_by_reference(
    config: RunConfig, directory: Path, data: PreferenceData, groups: TokenGroups
) -> ReferenceMargins | None:
    """Margins of the training pairs: by log-probs that came with the rows, or by the reference where it chooses among
    them, whose table is kept for the run; None where neither is."""
    choice, given = config.data.bound(by_reference)(), config.reference.hooks.given
    if choice.options and not given:
        work = workspace(config, directory)
        policy, ours = trained_model(config, work.device), objective_groups(config.objective, groups)
        reference = build_reference(config, work, policy, ours)
        say_which(reference)
        with policy.precision(), torch.no_grad():
            margins = margins_of(reference, ours, config.data.bound(pack), work.device)[0]
        whose = f"reference={reference.name}"
    else:
        margins = given_margins(data.train) * (config.reference.options["strength"] if given else 1.0)
        whose = "the log-probs that came with the rows (reference=columns)"
    return ReferenceMargins(margins, choice.keeps(margins), told_of(margins, choice), whose) if len(margins) else None


# --- the reference


def build_reference(config: RunConfig, work: Workspace, policy: TrainedModel, groups: Groups) -> Reference:
    """The loss reference, precomputed unless told otherwise."""
    reference = references.build(config.reference, reference_context(config, work, policy, groups))
    if config.objective.divergences:
        check_next_tokens(reference, policy, config.objective.asking)
        reference.notes += (
            f"reference: asked at every step, as {config.objective.asking} looks at its next-token distributions",
        )
    return reference


def check_next_tokens(reference: Reference, policy: TrainedModel, asking: str) -> None:
    """Raise ValueError for a reference without next-token distributions over the policy's vocabulary; `asking` is what
    the user wrote that looks at them."""
    ours, theirs = vocabulary_of(policy.model), reference.vocabulary
    if theirs is None:
        raise ValueError(
            f"{asking} looks at next-token distributions beside the policy's, and reference={reference.name} reads "
            "another text or has no model in memory: use one with the policy's tokenizer, template and system prompt, "
            "such as reference=initial"
        )
    if theirs != ours:
        raise ValueError(
            f"{asking} compares next-token distributions, and the head of reference={reference.name} has "
            f"{theirs:,} rows where the policy's has {ours:,}; use a reference with the policy's vocabulary"
        )


def reference_context(config: RunConfig, work: Workspace, policy: TrainedModel, groups: Groups) -> ReferenceContext:
    """What the loss reference is built from."""
    objective = config.objective
    return ReferenceContext(
        work, policy, groups, config.data.bound(pack), objective.uses_reference, objective.needs_tokens,
        config.data.bound(scoring)(), spans_serve=not objective.divergences,
    )  # fmt: skip


def say_which(reference: Reference) -> None:
    """How the reference came about, and which one it is."""
    whose = reference.provenance or (reference.identity[:12] if reference.weights else reference.name)
    told = f"reference: {reference.name}" + (f" ({whose})" if whose != reference.name else "")
    say(*reference.notes, told + (f", its log-probs times {reference.strength:g}" if reference.strength != 1 else ""))


def reference_of(
    config: RunConfig, work: Workspace, policy: TrainedModel, rounds: Rounds, held_out: Groups
) -> Reference:
    """The run's loss reference, for the rows that the run comes to: one shorter than an epoch has no others scored.

    Raises ValueError for one that only knows rows from before training, where the run makes others."""
    whole = _is_given(config.reference) or asks_reference(config)
    known = rounds.known if whole else rounds.known_by(rounds.num_steps)
    reference = build_reference(config, work, policy, ConcatGroups(known, held_out))
    say_which(reference)
    if rounds.live and not reference.live:
        raise ValueError(
            f"reference={reference.name} is a table of what is known before training, and data={config.data.name} "
            "goes on sampling: use a model with the policy's tokenizer and template"
        )
    return reference


def asks_reference(config: RunConfig) -> bool:
    """Whether the reference chooses or weighs training pairs: then it scores all of them."""
    return bool(config.data.bound(by_reference)().options)


def choose_pairs(
    config: RunConfig, work: Workspace, policy: TrainedModel, reference: Reference, rounds: Rounds
) -> tuple[Rounds, dict[str, int]]:
    """The round of the pairs that the reference keeps, and what became of the others; says it, and writes the margins
    into the run's folder. Raises ValueError where none is kept."""
    choice = config.data.bound(by_reference)()
    with policy.precision(), torch.no_grad():
        chosen = chosen_pairs(choice, reference, rounds.known, rounds.pack, work.device)
    say(chosen.line(choice))
    write_json(work.directory / f"{MARGINS}.json", chosen.record(choice, reference))
    write_png(work.directory / f"{MARGINS}.png", [reference_margins_panel(chosen.margins, chosen.kept)])
    return OfflineRounds(chosen.groups, config.trainer, rounds.pack, config.seed), chosen.counts


def prepared(
    config: RunConfig, work: Workspace, policy: TrainedModel, reference: Reference, groups: Groups
) -> Objective:
    """The objective with what it looks at beside log-probs, where that is made before training, of samples of the
    reference."""
    objective = config.objective
    if objective.prepare is None:
        return objective

    def model() -> nn.Module:
        """The reference as a model, which is loaded where there is something to draw."""
        if config.reference.name in ("auto", "initial"):
            return policy.model
        live = config.reference.live or config.reference
        found = build_reference(replace(config, reference=live), work, policy, SelectedGroups(groups, [])).model
        if found is None:
            raise ValueError(
                f"objective={objective.name} draws samples of the reference, and reference={reference.name} has "
                "another tokenizer or template than the policy"
            )
        return found

    with policy.precision():
        return replace(objective, quantiles=objective.prepare(QuantileContext(work, policy, reference, model, groups)))


def _is_given(reference: Component) -> bool:
    """Whether the data brings its log-probs, or those of a part of it."""
    return reference.hooks.given or any(map(_is_given, reference.parts))


def _has_table(reference: Component) -> bool:
    """Whether a reference, or a part of it, is computed before training and kept."""
    return reference.options.get("cache") == "auto" or any(map(_has_table, reference.parts))


def cache_reference(config: RunConfig, directory: Path) -> None:
    """`stage=cache_reference`: fill the reference's table, write its log-probs to the folder `export_to` if there is
    one, and stop. ValueError for a run that has no table to fill, and for what cannot be exported."""
    has_table = _has_table(config.reference)
    if not config.objective.uses_reference or not (has_table or config.export_to):
        raise ValueError(f"stage=cache_reference: reference={config.reference.name} has no table to fill")
    check_export(config)
    work = workspace(config, directory)
    data, policy = config.data(config.seed, progress), trained_model(config, work.device)
    tokenised = tokenise_data(config, data, policy.tokenizer, policy.positions)
    train, held_out = (groups_for(config.objective, part.groups) for part in tokenised)
    context = reference_context(config, work, policy, ConcatGroups(train, held_out))
    reference = references.build(config.reference, context)
    say_which(reference)
    for table in reference.tables:
        say(f"cached {len(train) + len(held_out):,} groups in {work.cache / 'reference' / table}")
    if config.export_to is not None:
        counts = summed_counts(data.reading, *(part.counts for part in tokenised))
        export_reference(config, reference, context, (train, held_out), counts)


# --- evaluation while training


def check_selection(config: RunConfig, num_steps: int, num_held_out: int) -> None:
    """Raise ValueError where the run has too few evaluations to choose a policy by, or to end before its last step."""
    if config.selection is None:
        return
    key, patience = config.selection.key, config.selection.patience
    option, every = "trainer.eval_every", config.trainer.eval_every
    if key.startswith("evaluation/") and config.evaluation is not None:
        option, every = "evaluation.every", config.evaluation.options["every"]
    elif not num_held_out:
        raise ValueError(
            f"trainer.keep_best={key}: nothing is held out; add data.eval_fraction=0.1 or data.eval_path=<file>"
        )
    evaluations = (num_steps - 1) // (every or num_steps)
    if not evaluations:
        raise ValueError(
            f"trainer.keep_best={key} has no effect: the run has {num_steps} steps, and {option}={every}; use a "
            "smaller one"
        )
    if patience is not None and patience >= evaluations:
        raise ValueError(
            f"trainer.patience={patience} has no effect: the run has {evaluations} evaluations before its end; use a "
            f"smaller {option}, or leave it out"
        )


def evaluation_of(
    config: RunConfig, training: TrainingRun, data: PreferenceData, held_out: TokenGroups
) -> SampleEvaluation | None:
    """What evaluates the policy while it is trained, where that is asked for; the policy is as before training.

    Raises ValueError where it could stop nothing."""
    if config.evaluation is None:
        return None
    every, num_steps = config.evaluation.options["every"], training.rounds.num_steps
    if config.trainer.stop_when_degenerate and every >= num_steps:
        raise ValueError(
            f"trainer.stop_when_degenerate=true has no effect: the run has {num_steps} steps, and "
            f"evaluation.every={every}; use a smaller one"
        )
    policy = training.policy
    standing = in_memory(training.reference, policy, training.initial_weights)
    context = EvaluationContext(
        work=training.work,
        policy=policy,
        initial=InitialPolicy(policy.model, standing, training.initial_weights, policy.holding),
        prompts=data.test_prompts,
        pairs=held_out.where(held_out.have_pairs),
        max_length=length_limit(policy.tokenizer, config.data.options["max_length"], policy.positions),
        thresholds=config.degeneration,
    )
    evaluation = config.evaluation(context)
    say(*evaluation.notes)
    return SampleEvaluation(evaluation.measure, every, training_curve.in_brief)
