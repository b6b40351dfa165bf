"""Sources of preference data on disk or on the hub: `data=jsonl`, `data=hh`."""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dpo_ref.data.formats import hh as hh_row
from dpo_ref.data.formats import preference
from dpo_ref.data.rows import BadRow, files, read_groups
from dpo_ref.types import PreferenceData, PromptGroup

log = logging.getLogger(__name__)


ToGroup = Callable[[dict[str, Any], str], PromptGroup]


def _split(groups: list[PromptGroup], fraction: float, seed: int) -> tuple[list[PromptGroup], list[PromptGroup]]:
    """Train and held-out groups; a share of the prompts is held out, so that a prompt is on one side only."""
    if not 0 <= fraction < 1:
        raise ValueError(f"data.eval_fraction={fraction} must lie in [0, 1)")
    prompts = list(dict.fromkeys(group.prompt_id for group in groups))
    drawn = np.random.default_rng(seed).permutation(len(prompts))[: round(fraction * len(prompts))]
    held_out = {prompts[i] for i in drawn}
    return [g for g in groups if g.prompt_id not in held_out], [g for g in groups if g.prompt_id in held_out]


def _report(skipped: list[str], total: int) -> None:
    if skipped:
        log.warning(
            "%d of %d rows skipped (data.on_bad_row=skip), such as: %s", len(skipped), total, "; ".join(skipped[:3])
        )


def _data(train: list[PromptGroup], held_out: list[PromptGroup]) -> PreferenceData:
    prompts = {group.prompt_id: group.prompt for group in held_out}
    return PreferenceData(train, held_out, list(prompts.values()))


def _from_files(
    path: str, eval_path: str | None, eval_fraction: float, to_group: ToGroup, limit: int | None, bad: str, seed: int
) -> PreferenceData:
    if eval_path is not None and eval_fraction:
        raise ValueError("data.eval_path and data.eval_fraction both hold rows out; give one of them")
    train, skipped = read_groups(files(path, "data.path"), to_group, limit, bad)
    _report(skipped, len(train) + len(skipped))
    if eval_path is None:
        return _data(*_split(train, eval_fraction, seed))
    held_out, skipped = read_groups(files(eval_path, "data.eval_path"), to_group, limit, bad)
    _report(skipped, len(held_out) + len(skipped))
    return _data(train, held_out)


def jsonl(
    seed: int,
    *,
    path: str,
    eval_path: str | None = None,
    eval_fraction: float = 0.0,
    limit: int | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
) -> PreferenceData:
    """One's own rows: `prompt`, `chosen`, `rejected`, each text or a list of messages, in .jsonl or .jsonl.gz.

    `path` is a file or a folder of such files. Held out are the rows of `eval_path`, or a share `eval_fraction` of the
    prompts drawn from the seed; by default nothing. `limit` counts usable rows. Raises ValueError naming file and row.
    """
    return _from_files(path, eval_path, eval_fraction, preference, limit, on_bad_row, seed)


def hh(
    seed: int,
    *,
    path: str = "Anthropic/hh-rlhf",
    subset: str | None = None,
    eval_path: str | None = None,
    eval_fraction: float = 0.0,
    limit: int | None = None,
    on_bad_row: Literal["error", "skip"] = "skip",
) -> PreferenceData:
    """Anthropic's hh-rlhf dialogues (arXiv:2204.05862) from a local .jsonl(.gz) file or folder, or from the hub.

    On the hub `subset` names a folder such as harmless-base, and the test split is held out unless told otherwise.
    """
    if Path(path).expanduser().exists() or path.endswith((".jsonl", ".gz")):
        if subset is not None:
            raise ValueError("data.subset names a folder on the hub; with a local data.path it has no effect")
        return _from_files(path, eval_path, eval_fraction, hh_row, limit, on_bad_row, seed)
    train = _from_hub(path, subset, "train", limit, on_bad_row)
    if eval_fraction:
        return _data(*_split(train, eval_fraction, seed))
    if eval_path is not None:
        return _data(train, read_groups(files(eval_path, "data.eval_path"), hh_row, limit, on_bad_row)[0])
    return _data(train, _from_hub(path, subset, "test", limit, on_bad_row))


def _from_hub(name: str, subset: str | None, split: str, limit: int | None, bad: str) -> list[PromptGroup]:
    from datasets import load_dataset

    try:
        rows: Iterable[Any] = load_dataset(name, data_dir=subset, split=split)
    except Exception as error:  # the hub client raises many kinds; all mean that there are no rows
        raise ValueError(
            f"data.path={name} is neither a local file or folder nor to be had from the hub: {error}"
        ) from error
    groups: list[PromptGroup] = []
    skipped: list[str] = []
    row: Any
    for number, row in enumerate(rows, start=1):
        if limit is not None and len(groups) >= limit:
            break
        try:
            groups.append(hh_row(row, f"{name} {split} row {number}"))
        except BadRow as error:
            if bad == "error":
                raise ValueError(f"{name} {split} row {number} {error}; data.on_bad_row=skip leaves it out") from error
            skipped.append(f"row {number} {error}")
    _report(skipped, len(groups) + len(skipped))
    return groups
