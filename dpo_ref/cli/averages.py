"""`evaluate.py stage=merge`: averages of policies in weight space, folders that say what they are of."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from dpo_ref.cli.command_line import python
from dpo_ref.cli.run_folder import provenance
from dpo_ref.evaluation.policy import PolicyToEvaluate, TrainedRun
from dpo_ref.files.digests import seal_folder
from dpo_ref.files.writing import remove_abandoned, replacing_folder, write_json, write_text
from dpo_ref.models.asked import ModelPath
from dpo_ref.models.averages import (
    AVERAGE,
    OpenedPolicy,
    PolicyFiles,
    check_weights,
    files_of,
    names_in,
    open_policies,
    read_average,
    write_average,
)
from dpo_ref.models.folders import CARD
from dpo_ref.models.loading import locate
from dpo_ref.reports.model_card import average_card
from dpo_ref.tracking.terminal import run_summary, say

STAGE = "merge"
HAVE_AN_EFFECT = {"stage", "policies", "weights", "shares", "output_dir", "trust", "hydra"}
INITIAL = "initial"  # among the policies: that which the runs among them began with


@dataclass(frozen=True, slots=True)
class MergeRequest:
    """What was asked for. `policies` is a name, a pattern or a list of these, of which `find` says what each is."""

    policies: Any
    weights: Sequence[float] | None
    shares: Sequence[float] | None
    output_dir: str | None
    find: Callable[[str], PolicyToEvaluate]


def check_words(words: set[str]) -> None:
    """Refuse what has no effect on averages of policies."""
    for key in sorted(words - HAVE_AN_EFFECT):
        raise ValueError(f"{key} has no effect on stage=merge, which reads and writes weights alone; leave it out")


# --- which policies, with which weights


def policy_names(policies: Any) -> list[str]:
    """`policies=` as the names of single policies: of a folder with checkpoints each that is complete, of a pattern
    what it matches. Raises ValueError for none."""
    listed = policies if isinstance(policies, list) else [policies]
    if not listed or not all(isinstance(name, str) and name for name in listed):
        raise ValueError(
            "stage=merge needs policies=<runs, model folders, hub names, `initial`, the checkpoints/ of a run or a "
            "pattern>, one or a list of them: policies='[initial, outputs/default/my_run]'"
        )
    return [name for entry in listed for name in names_in(entry, "policies")]


def _weights_of(request: MergeRequest, names: Sequence[str]) -> dict[float | None, list[float]]:
    """The weights of every average that is asked for, by its share; None where there is no path."""
    if request.shares is None:
        weights = request.weights or [1 / len(names)] * len(names)
        check_weights(weights, len(names))
        return {None: list(weights)}
    if request.weights is not None:
        raise ValueError("shares and weights are two ways to say the same; leave one of them out")
    if len(names) != 2:
        raise ValueError(f"shares lie on the path between two policies, and policies are {len(names)}")
    if len(request.shares) < 2 or len(set(request.shares)) < len(request.shares):
        raise ValueError(f"shares={list(request.shares)} must be two or more that differ; for one use weights")
    return {share: [1 - share, share] for share in request.shares}


def _files_of_initial(initial: ModelPath) -> PolicyFiles:
    if initial.adapter is not None:
        raise ValueError(
            f"policies: the initial policy is {initial.path} with the adapter {initial.adapter} on top; name a "
            "folder in which that is merged"
        )
    folder = locate(initial.path)
    return PolicyFiles(INITIAL, folder, initial.text or folder)


def _common_run(runs: Sequence[TrainedRun | None]) -> TrainedRun | None:
    """The run as whose policy an average is evaluated: the first, where all policies are of runs that began with one
    initial policy."""
    begun = {None if run is None else run.summary["identities"]["initial_policy"] for run in runs}
    return runs[0] if len(begun) == 1 else None


def _initial_of(runs: Sequence[TrainedRun]) -> ModelPath:
    if not runs or _common_run(runs) is None:
        found = "no run among the policies" if not runs else "the runs among the policies began with different ones"
        raise ValueError(f"policies: which initial policy is meant? There is {found}; name its folder instead")
    return runs[0].initial


# --- the command


def run_merge(request: MergeRequest) -> None:
    """Write an average, or one for each share of a path. Raises ValueError for policies that are not alike, weights
    that do not sum to 1, and folders that hold something else."""
    names = policy_names(request.policies)
    averages = _weights_of(request, names)
    default = f"outputs/averages/{datetime.now():%Y-%m-%d_%H-%M-%S}"
    folder = Path(request.output_dir or default).expanduser()
    found = {name: request.find(name).run for name in names if name != INITIAL}
    runs = [found[name] for name in names if name != INITIAL]
    files = {name: files_of(name) for name in found}
    if INITIAL in names:
        files[INITIAL] = _files_of_initial(_initial_of([run for run in runs if run is not None]))
    policies = [files[name] for name in names]
    places = {share: folder if share is None else folder / f"share-{share:g}" for share in averages}
    whole = open_policies(policies)
    for share, place in places.items():
        _write_at(place, whole, averages[share], share, _common_run(runs))
    option = f"sweep={folder}" if request.shares else f"policy={folder}"
    title = (
        f"{len(places)} averages of {len(names)} policies" if request.shares else f"average of {len(names)} policies"
    )
    run_summary(title, {"folder": str(folder)}, [f"{python()} evaluate.py {shlex.quote(option)}"])


def _write_at(
    place: Path,
    policies: Sequence[OpenedPolicy],
    weights: Sequence[float],
    share: float | None,
    run: TrainedRun | None,
) -> None:
    """One average at its place, whole or not at all. What is there already and is of the same weights stays."""
    if place.exists() and any(place.iterdir()):
        there = read_average(place)
        if there is None or not there.is_of(policies, weights):
            raise ValueError(f"{place} holds something else; give another output_dir, or delete it")
        say(f"{place} is there already, of the same policies and weights")
        return
    remove_abandoned(place)
    with replacing_folder(place) as partial:
        digest = write_average(partial, policies, weights)
        members = [
            {"name": policy.name, "weight": weight, "weights_digest": policy.digest}
            for policy, weight in zip(policies, weights, strict=True)
        ]
        described = {"share": share, "run": None if run is None else str(run.folder.resolve())}
        record = {"policies": members, **described, "weights_digest": digest, **provenance()}
        write_json(partial / AVERAGE, record)
        name = " ".join(place.resolve().parts[-1 if share is None else -2 :])
        write_text(partial / CARD, average_card(name, record))
        seal_folder(partial, besides=[CARD])
