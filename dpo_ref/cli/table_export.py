"""`train.py stage=cache_reference export=<folder>`: a reference's log-probs as rows that others train on, and a
certificate of what they are."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dpo_ref.cli.resolve import RunConfig
from dpo_ref.cli.run_folder import provenance
from dpo_ref.data.chat_templates import install_template
from dpo_ref.data.groups import Groups
from dpo_ref.data.tokenise import length_limit
from dpo_ref.files.hub import commit_of
from dpo_ref.models.asked import ModelSource, Workspace
from dpo_ref.models.loading import QUANTISED, TrainedModel
from dpo_ref.references.export import HELD_OUT, TRAIN, Described, Written, export
from dpo_ref.references.interface import Reference, ReferenceContext
from dpo_ref.references.other_tokenizer import ReferenceText
from dpo_ref.tracking.terminal import run_summary, say

NOTHING_TO_WRITE = {
    "none": "reference=none gives every response 0; rows without reference columns say the same",
    "columns": "the log-probs of reference=columns came with the rows, which have them already",
}


def check_export(config: RunConfig) -> None:
    """Raise ValueError, before anything is read, for what cannot be exported, and for a folder that is not free."""
    if config.export_to is None:
        return
    if reason := NOTHING_TO_WRITE.get(config.reference.name):
        raise ValueError(f"export={config.export_to}: {reason}")
    if config.reference.hooks.follows:
        raise ValueError(
            f"export={config.export_to}: reference={config.reference.name} changes while the policy is trained, so no "
            "log-prob of it holds for a whole run; export takes a reference that stays, such as initial"
        )
    if config.data.hooks.rounds is not None:
        raise ValueError(
            f"export={config.export_to}: data={config.data.name} samples while the policy is trained, and rows are "
            "written of data that is there before, such as data=jsonl data.path=..."
        )
    folder = Path(config.export_to).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"export={config.export_to} is there already; name a new folder, or delete that one")


def export_reference(
    config: RunConfig, reference: Reference, context: ReferenceContext, parts: tuple[Groups, Groups], counts: Any
) -> None:
    """Write the rows of training and held-out groups with the reference's log-probs. `counts` is what became of the
    rows before. Raises ValueError for a reference that moves."""
    if reference.state_dict():
        raise ValueError(f"export={config.export_to}: reference={reference.name} moves, and has no log-probs to keep")
    folder = Path(str(config.export_to)).expanduser()
    described = described_by(config, reference, context, counts)
    with context.policy.precision(), torch.no_grad():
        written = export(folder, reference, context, dict(zip((TRAIN, HELD_OUT), parts, strict=True)), described)
    say(*notes_on(written))
    files = {name: f"{folder / name} ({count:,} rows)" for name, count in written.rows.items()}
    run_summary(f"log-probs of reference={reference.name}", files | {"certificate": str(folder / "certificate.json")})


def notes_on(written: Written) -> list[str]:
    """What readers of the rows have to know: groups left out, and rows of which TRL scores other tokens."""
    notes, kinds = [], written.kinds
    if written.cut:
        notes.append(f"{written.cut:,} groups left out: a limit has cut them, and their log-probs are of a part alone")
    if kinds["behind"]:
        notes.append(
            f"TRL scores what the chat template writes behind the end of a turn as well, and these log-probs do not "
            f"({kinds['behind']:,} groups)"
        )
    if kinds["other"]:
        notes.append(f"TRL would score other tokens in {kinds['other']:,} groups; see docs/references_table.md")
    return notes


# --- what the certificate says of the reference


def described_by(config: RunConfig, reference: Reference, context: ReferenceContext, counts: Any) -> Described:
    """The reference as the run configured it."""
    options, kind = config.reference.plain(), reference.name
    source = SOURCES[kind](config) if kind in SOURCES else None
    weights = context.policy.weights if kind == "prior" else reference.weights
    own = _own_text(config, context.work) if reference.own_text else None
    about = {
        "options": _without_addresses(options),
        "commit": None if source is None else commit_of(source.path, source.revision),
        "dtype": None if source is None else _dtype(context.policy, source),
        "limits": _limits(config, context.policy),
        "left_out": {name: count for name, count in counts.items() if name != "groups"},
        "made_with": provenance()["versions"] | {"commit": provenance()["git"]["commit"]},
    }
    return Described(kind, reference.strength, weights, source, own, about)


def _policy(config: RunConfig) -> ModelSource | None:
    """The policy before training, as `reference=other` would load it; None where it is held in another form."""
    options = config.model.options
    return (
        None
        if options["weights"] in QUANTISED
        else ModelSource(options["path"], options["revision"], options["adapter"])
    )


def _below_adapter(config: RunConfig) -> ModelSource | None:
    options = config.model.options
    return None if options["weights"] in QUANTISED else ModelSource(options["path"], options["revision"])


def _other(config: RunConfig) -> ModelSource | None:
    options, below = config.reference.options, _below_adapter(config)
    if options["path"] is None:  # an adapter alone, on the policy's base
        return below and replace(below, adapter=options["adapter"])
    names = ("path", "revision", "adapter", "dtype", "quantisation")
    return ModelSource(**{name: options[name] for name in names})


# The model whose log-probs of a row's tokens are those of the reference, by kind; others are made of more than one.
SOURCES: dict[str, Callable[[RunConfig], ModelSource | None]] = {
    "initial": _policy,
    "prior": _policy,
    "adapter_base": _below_adapter,
    "other": _other,
}


def _dtype(policy: TrainedModel, source: ModelSource) -> str:
    """What it computed in."""
    half = policy.compute_dtype is not torch.float32 or source.dtype == "bfloat16" or source.quantisation != "none"
    return "bfloat16" if half else "float32"


def _own_text(config: RunConfig, work: Workspace) -> ReferenceText | None:
    """How a reference with text of its own reads; None for several of them."""
    options = config.reference.options
    if "terminator" not in options:
        return None
    named = "tokenizer" if "tokenizer" in options else "path"
    tokenizer = work.loader.tokenizer(options[named], options.get("revision"), f"reference.{named}")
    install_template(tokenizer, options["template"], options["template_options"], "reference")
    return ReferenceText(tokenizer, options["system_prompt"], options["terminator"], options["max_altered"])


def _limits(config: RunConfig, policy: TrainedModel) -> Mapping[str, Any]:
    options = config.data.options
    names = ("max_prompt_length", "max_response_length", "over_length")
    longest = length_limit(policy.tokenizer, options["max_length"], policy.positions)
    return {"max_length": longest} | {name: options[name] for name in names}


def _without_addresses(options: Any) -> Any:
    """Options as they may be published: servers' addresses are nobody else's."""
    if isinstance(options, Mapping):
        return {name: _without_addresses(value) for name, value in options.items() if name != "url"}
    return [_without_addresses(value) for value in options] if isinstance(options, list | tuple) else options
