"""From a resolved configuration to a finished run folder: builds the parts, runs, and writes down how it ended."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dpo_ref import lab_models
from dpo_ref.allocator import keep_memory
from dpo_ref.attention import resolve_backend
from dpo_ref.cache import cache_folder
from dpo_ref.config import TrainRun
from dpo_ref.data.hygiene import inspect, short_report, summed_counts
from dpo_ref.data.packing import pack
from dpo_ref.data.token_cache import tokenised_once
from dpo_ref.data.token_groups import Together
from dpo_ref.data.tokenise import Tokenised, tokenise
from dpo_ref.models import LoadedModel, best_device, check_folder, load_model, text_identity
from dpo_ref.references.frozen import weights_digest
from dpo_ref.references.interface import Reference, ReferenceContext
from dpo_ref.session import Session, groups_for
from dpo_ref.tracking import Tracker
from dpo_ref.tracking.metrics_file import MetricsFile
from dpo_ref.tracking.terminal import TrainingProgress, progress
from dpo_ref.types import PreferenceData, TokenGroup

NUM_SAMPLES = 8  # generations shown in the tracker at the end of a run


def tokenised(run: TrainRun, data: PreferenceData, tokenizer: Any) -> tuple[Tokenised, Tokenised]:
    """Train and held-out groups, numbered as one list, from the cache where they are."""
    train, held_out = (
        tokenised_once(groups, tokenizer, run.data.bound(tokenise), text_identity(tokenizer), cache_folder(), progress)
        for groups in (data.train, data.eval)
    )
    return train, Tokenised(held_out.groups.numbered_from(len(data.train)), held_out.counts)


def prepared(
    run: TrainRun, data: PreferenceData, tokenizer: Any
) -> tuple[Sequence[TokenGroup], Sequence[TokenGroup], dict[str, int]]:
    """Train and held-out groups as the objective needs them, and what happened to rows; prints what they are like."""
    train, held_out = tokenised(run, data, tokenizer)
    for line in short_report(inspect(data, train, held_out)):
        print(line)
    counts = summed_counts(data.reading, train.counts, held_out.counts)
    if not len(train.groups):
        raise ValueError("nothing is left to train on: every row was dropped; see data.max_length, data.over_length")
    return groups_for(run.objective, train.groups), groups_for(run.objective, held_out.groups), counts


def build_reference(
    run: TrainRun, loaded: LoadedModel, groups: Sequence[TokenGroup], device: torch.device
) -> Reference:
    """The loss reference, tabulated unless told otherwise; prints which one it is."""

    def load(path: str) -> torch.nn.Module:
        return load_model(lab_models.locate(path), device, run.model.options["attention"], "reference.path")

    context = ReferenceContext(
        policy=loaded.model,
        uses_reference=run.objective.uses_reference,
        load=load,
        text_identity=text_identity(loaded.tokenizer),
        groups=groups,
        pack=run.data.bound(pack),
        progress=progress,
        device=device,
        cache=cache_folder(),
    )
    with loaded.precision():
        reference = run.reference(context)
    print(f"reference: {reference.name}" + (f" ({reference.identity[:12]})" if reference.weights else ""))
    return reference


def check_paths(run: TrainRun) -> None:
    """Refuse folders that hold no model and a backend that is not here, before any data is read."""
    resolve_backend(run.model.options["attention"])
    for key, component in (("model.path", run.model), ("reference.path", run.reference)):
        path = component.options.get("path")
        if path is not None and not path.startswith(lab_models.SCHEME):
            check_folder(path, key)


def build(run: TrainRun, directory: Path, tracker: Tracker) -> Session:
    """Load the model, the data and the reference of a run."""
    keep_memory()
    check_paths(run)
    torch.manual_seed(run.seed)
    device = best_device()
    data = run.data(run.seed, progress)
    loaded: LoadedModel = run.model(lab_models.locate, device)
    train_groups, eval_groups, counts = prepared(run, data, loaded.tokenizer)
    optim = run.optim(loaded.model, run.trainer.num_steps(len(train_groups)))
    return Session(
        directory=directory,
        loaded=loaded,
        policy_weights=weights_digest(loaded.model),
        reference=build_reference(run, loaded, Together(train_groups, eval_groups), device),
        objective=run.objective,
        optim=optim,
        train_groups=train_groups,
        eval_groups=eval_groups,
        counts=counts,
        sample_prompts=data.test_prompts[:NUM_SAMPLES],
        pack=run.data.bound(pack),
        tokens_per_batch=run.data.options["tokens_per_batch"],
        config=run.trainer,
        seed=run.seed,
        tracker=tracker,
        metrics_file=MetricsFile(directory / "metrics.jsonl"),
        show=TrainingProgress(),
    )


def cache_reference(run: TrainRun) -> None:
    """`stage=cache_reference`: fill the reference's table and stop. ValueError for a run that has none to fill."""
    if not run.objective.uses_reference or run.reference.options.get("cache") != "auto":
        raise ValueError(f"stage=cache_reference: reference={run.reference.name} has no table to fill")
    device = best_device()
    data = run.data(run.seed, progress)
    loaded = run.model(lab_models.locate, device)
    train_groups, eval_groups, _ = prepared(run, data, loaded.tokenizer)
    reference = build_reference(run, loaded, Together(train_groups, eval_groups), device)
    folder = cache_folder() / "reference" / reference.identity
    print(f"cached {len(train_groups) + len(eval_groups):,} groups in {folder}")
