"""From a resolved configuration to a finished run folder: builds the parts, runs, and writes down how it ended."""

from pathlib import Path
from typing import Any

import torch

from dpo_ref.cli.resolve import TrainRun
from dpo_ref.data.chat_templates import ChatText, text_identity
from dpo_ref.data.groups import Groups, Together, TokenGroups
from dpo_ref.data.inspection import example_of, inspect, score_margins, short_report, summed_counts
from dpo_ref.data.packing import pack
from dpo_ref.data.tokenise import Tokenised, length_limit, tokenise, tokenised_once
from dpo_ref.distributed import best_device, keep_memory
from dpo_ref.evaluation.in_training import EvaluationContext, InitialPolicy, TrainingEvaluation, in_memory
from dpo_ref.files import cache_folder, write_text
from dpo_ref.lab import models as lab_models
from dpo_ref.models.attention import resolve_backend
from dpo_ref.models.checkpoint import weights_digest
from dpo_ref.models.loading import (
    LoadedModel,
    ModelSource,
    check_folder,
    load_reference,
    load_tokenizer,
    prepared_tokenizer,
)
from dpo_ref.models.reward_model import with_own_head, with_score_head
from dpo_ref.references.interface import Reference, ReferenceContext
from dpo_ref.references.other_tokenizer import TextTable
from dpo_ref.references.table import Table
from dpo_ref.reports.data import data_page
from dpo_ref.tracking.run_record import RunRecord
from dpo_ref.tracking.terminal import TrainingProgress, progress, run_summary, show_example
from dpo_ref.tracking.tracker import Tracker
from dpo_ref.training.rounds import Supply, SupplyContext, at_hand, groups_for
from dpo_ref.training.run import Session
from dpo_ref.types import PreferenceData, ResponseLogps, ResponseScores

NUM_EXAMPLES = 8  # on the data page
NUM_SAMPLES = {ResponseLogps: 8, ResponseScores: 0}  # generations shown in the tracker at the end of a run
HEADS = {ResponseLogps: with_own_head, ResponseScores: with_score_head}


def tokenised(run: TrainRun, data: PreferenceData, tokenizer: Any) -> tuple[Tokenised, Tokenised]:
    """Train and held-out groups, numbered as one list, from the cache where they are."""
    train, held_out = (
        tokenised_once(groups, tokenizer, run.data.bound(tokenise), text_identity(tokenizer), cache_folder(), progress)
        for groups in (data.train, data.eval)
    )
    return train, Tokenised(held_out.groups.numbered_from(len(data.train)), held_out.counts)


def prepared(
    run: TrainRun, data: PreferenceData, tokenizer: Any, tracker: Tracker
) -> tuple[TokenGroups, TokenGroups, dict[str, int]]:
    """Train and held-out groups, and what happened to rows; prints what they are like."""
    train, held_out = tokenised(run, data, tokenizer)
    found = inspect(data, train, held_out)
    for line in short_report(found):
        print(line)
    counts = summed_counts(data.reading, train.counts, held_out.counts)
    if not len(train.groups):
        raise ValueError("nothing is left to train on: every row was dropped; see data.max_length, data.over_length")
    if ChatText(tokenizer).leaves_out_bos:
        print("  the chat template writes no BOS, which the tokenizer adds by itself; see model.template")
    example = example_of(tokenizer, train.groups[0]).rows()
    show_example(example)
    tracker.table("data/example", ["part", "text", "scored"], example, step=0)
    return train.groups, held_out.groups, counts


def supply_of(
    run: TrainRun, loaded: LoadedModel, data: PreferenceData, groups: TokenGroups, directory: Path
) -> Supply:
    """How training groups come about: as they are, unless the data component says otherwise."""
    context = SupplyContext(
        directory=directory,
        policy=loaded.model,
        tokenizer=loaded.tokenizer,
        objective=run.objective,
        groups=groups,
        first_number=len(data.train) + len(data.eval),
        max_length=length_limit(loaded.tokenizer, run.data.options["max_length"]),
        pack=run.data.bound(pack),
        config=run.trainer,
        seed=run.seed,
        device=next(loaded.model.parameters()).device,
        progress=progress,
    )
    return run.data.bound(run.data.hooks.rounds or at_hand)(context)


def report_data(run: TrainRun, directory: Path, title: str) -> None:
    """`stage=data`: read and tokenise, and write what the data is like to data.html; no model is loaded."""
    data = run.data(run.seed, progress)
    options = {name: run.model.options[name] for name in ("template", "template_options", "max_length")}
    tokenizer = prepared_tokenizer(lab_models.locate(run.model.options["path"]), **options)
    train, held_out = tokenised(run, data, tokenizer)
    found = inspect(data, train, held_out)
    drawn = torch.randperm(len(train.groups), generator=torch.Generator().manual_seed(run.seed))[:NUM_EXAMPLES]
    examples = [example_of(tokenizer, train.groups[int(place)]) for place in drawn]
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / "data.html", data_page(found, score_margins(data.train), examples, title))
    print("\n".join(short_report(found)))
    run_summary(f"data={run.data.name}", {"page": str(directory / "data.html")})


def build_reference(run: TrainRun, loaded: LoadedModel, groups: Groups, device: torch.device) -> Reference:
    """The loss reference, tabulated unless told otherwise; prints which one it is."""

    def load(source: ModelSource) -> torch.nn.Module:
        return load_reference(source, lab_models.locate(source.path), device, run.model.options["attention"])

    context = ReferenceContext(
        policy=loaded.model,
        tokenizer=loaded.tokenizer,
        uses_reference=run.objective.uses_reference,
        load=load,
        load_tokenizer=lambda path, revision=None: load_tokenizer(lab_models.locate(path), revision),
        text_identity=text_identity(loaded.tokenizer),
        groups=Together(groups, *groups.others),
        pack=run.data.bound(pack),
        progress=progress,
        device=device,
        cache=cache_folder(),
        needs_tokens=run.objective.needs_tokens,
    )
    with loaded.precision():
        reference = run.reference(context)
    whose = getattr(reference, "provenance", reference.identity[:12] if reference.weights else reference.name)
    print(f"reference: {reference.name}" + (f" ({whose})" if whose != reference.name else ""))
    return reference


def reference_of(run: TrainRun, loaded: LoadedModel, supply: Supply, eval_groups: Groups) -> Reference:
    """The run's loss reference. Raises ValueError for one that only knows rows from before training, where the run
    makes others."""
    device = next(loaded.model.parameters()).device
    reference = build_reference(run, loaded, Together(supply.known, eval_groups), device)
    if supply.live and any(isinstance(part, Table | TextTable) for part in getattr(reference, "parts", [reference])):
        raise ValueError(
            f"reference={reference.name} is a table of what is known before training, and data={run.data.name} "
            "goes on sampling: use a model with the policy's tokenizer, and cache: off in reference.parts"
        )
    return reference


def evaluation_of(
    run: TrainRun, session: Session, data: PreferenceData, held_out: TokenGroups
) -> TrainingEvaluation | None:
    """What evaluates the policy while it is trained, where that is asked for; the policy is as before training.

    Raises ValueError where it could stop nothing."""
    if run.evaluation is None:
        return None
    if run.trainer.stop_when_degenerate and run.evaluation.options["every"] >= session.supply.num_steps:
        raise ValueError(
            f"trainer.stop_when_degenerate=true has no effect: the run has {session.supply.num_steps} steps, and "
            f"evaluation.every={run.evaluation.options['every']}; use a smaller one"
        )
    policy, tokenizer = session.loaded.model, session.loaded.tokenizer
    limit = length_limit(tokenizer, run.data.options["max_length"])
    positions = getattr(policy.config, "max_position_embeddings", None)
    context = EvaluationContext(
        directory=session.directory,
        policy=policy,
        initial=InitialPolicy(policy, in_memory(session.reference, policy, session.policy_weights)),
        initial_weights=session.policy_weights,
        tokenizer=tokenizer,
        text_identity=text_identity(tokenizer),
        prompts=data.test_prompts,
        pairs=held_out.where(held_out.have_pairs),
        max_length=limit if positions is None else min(limit, positions),
        thresholds=run.degeneration,
        seed=run.seed,
        progress=progress,
    )
    return run.evaluation(context)


def check_paths(run: TrainRun) -> None:
    """Refuse folders that hold no model and a backend that is not here, before any data is read."""
    resolve_backend(run.model.options["attention"])
    for key, component in (("model.path", run.model), ("reference.path", run.reference)):
        path = component.options.get("path")
        if path is not None and not path.startswith(lab_models.SCHEME):
            check_folder(path, key)
    if adapter := run.reference.options.get("adapter"):
        check_folder(adapter, "reference.adapter", "adapter_config.json")


def build(run: TrainRun, directory: Path, tracker: Tracker) -> Session:
    """Load the model, the data and the reference of a run."""
    keep_memory()
    check_paths(run)
    torch.manual_seed(run.seed)
    device = best_device()
    data = run.data(run.seed, progress)
    loaded = HEADS[run.objective.asks](run.model(lab_models.locate, device), run.seed)
    train_groups, held_out, counts = prepared(run, data, loaded.tokenizer, tracker)
    supply = supply_of(run, loaded, data, train_groups, directory)
    eval_groups = supply.held_out(held_out)
    optim = run.optim(loaded.model, supply.num_steps)
    session = Session(
        directory=directory,
        loaded=loaded,
        policy_weights=weights_digest(loaded.model),
        reference=reference_of(run, loaded, supply, eval_groups),
        objective=run.objective,
        optim=optim,
        supply=supply,
        eval_groups=eval_groups,
        counts=counts,
        sample_prompts=data.test_prompts[: NUM_SAMPLES[run.objective.asks]],
        pack=run.data.bound(pack),
        tokens_per_batch=run.data.options["tokens_per_batch"],
        config=run.trainer,
        seed=run.seed,
        record=RunRecord(directory / "metrics.jsonl", tracker),
        show=TrainingProgress(),
    )
    session.evaluation = evaluation_of(run, session, data, held_out)
    return session


def cache_reference(run: TrainRun) -> None:
    """`stage=cache_reference`: fill the reference's table and stop. ValueError for a run that has none to fill."""
    if not run.objective.uses_reference or run.reference.options.get("cache") != "auto":
        raise ValueError(f"stage=cache_reference: reference={run.reference.name} has no table to fill")
    device = best_device()
    data = run.data(run.seed, progress)
    loaded = run.model(lab_models.locate, device)
    train, held_out = tokenised(run, data, loaded.tokenizer)
    train_groups, eval_groups = (groups_for(run.objective, found.groups) for found in (train, held_out))
    reference = build_reference(run, loaded, Together(train_groups, eval_groups), device)
    folder = cache_folder() / "reference" / reference.identity
    print(f"cached {len(train_groups) + len(eval_groups):,} groups in {folder}")
