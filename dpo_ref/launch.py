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
from dpo_ref.data.packing import pack
from dpo_ref.data.tokenise import tokenise
from dpo_ref.models import LoadedModel, best_device, check_folder, load_model, text_identity
from dpo_ref.references.frozen import weights_digest
from dpo_ref.references.interface import Reference, ReferenceContext
from dpo_ref.session import Session, groups_for
from dpo_ref.tracking import Tracker
from dpo_ref.tracking.metrics_file import MetricsFile
from dpo_ref.tracking.terminal import TrainingProgress, progress
from dpo_ref.types import PreferenceData, TokenGroup

NUM_SAMPLES = 8  # generations shown in the tracker at the end of a run


def tokenised(
    run: TrainRun, data: PreferenceData, tokenizer: Any
) -> tuple[list[TokenGroup], list[TokenGroup], dict[str, int]]:
    """Train and held-out groups as the objective needs them, numbered as one list, and what happened to rows."""
    found = run.data.bound(tokenise)([*data.train, *data.eval], tokenizer)
    print("data: " + ", ".join(f"{count:,} {what}" for what, count in found.counts.items()))
    groups = groups_for(run.objective, found.groups)
    boundary = len(data.train)
    train, held_out = ([g for g in groups if (g.group_index < boundary) is side] for side in (True, False))
    if not train:
        raise ValueError("nothing is left to train on: every row was dropped; see data.max_length, data.over_length")
    return train, held_out, found.counts


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
    data = run.data(run.seed)
    loaded: LoadedModel = run.model(lab_models.locate, device)
    train_groups, eval_groups, counts = tokenised(run, data, loaded.tokenizer)
    optim = run.optim(loaded.model, run.trainer.num_steps(len(train_groups)))
    return Session(
        directory=directory,
        loaded=loaded,
        policy_weights=weights_digest(loaded.model),
        reference=build_reference(run, loaded, [*train_groups, *eval_groups], device),
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
    data = run.data(run.seed)
    loaded = run.model(lab_models.locate, device)
    train_groups, eval_groups, _ = tokenised(run, data, loaded.tokenizer)
    reference = build_reference(run, loaded, [*train_groups, *eval_groups], device)
    folder = cache_folder() / "reference" / reference.identity
    print(f"cached {len(train_groups) + len(eval_groups):,} groups in {folder}")
