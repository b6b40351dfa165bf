"""The folder of a training run: what stands in it whenever its process is killed, who may write to it, and how a run
that it holds goes on.
"""

import platform
import shlex
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from dpo_ref.cli.resolve import strength_of
from dpo_ref.cli.saved_run import (
    check_servers,
    check_unchanged,
    configuration_in,
    read_run,
    read_summary,
    refuse_unused_trust,
    with_digest,
)
from dpo_ref.distributed import on_cuda, own_folder, ranks
from dpo_ref.evaluation.policy import FINISHED, SUMMARY
from dpo_ref.evaluation.sweep import SEARCH, climb_in, stands_at
from dpo_ref.files.digests import sealed
from dpo_ref.files.holding import held, new_folder, not_writable
from dpo_ref.files.writing import write_json, write_text
from dpo_ref.models import checkpoint
from dpo_ref.tracking.redaction import without_keys
from dpo_ref.tracking.terminal import say, visible
from dpo_ref.training.run import PATIENCE

CONFIG, ERROR = "config.yaml", "error.txt"
SHARED = ("checkpoints", "rounds")  # what all ranks read in the folder of a run
COPIED = ("*.json*", "training_evaluation/**/*.json*")  # what each rank goes on from
TRAINED = ("metrics.jsonl", "checkpoints", "policy")  # what a run leaves once it trains
SAME_RUN = ("output_dir", "resume", "tracking", "search", "parallel")  # may differ when a sweep is typed again
MAY_CHANGE = (
    "generation.url",
    "trainer.max_steps", "trainer.epochs", "trainer.save_every", "trainer.save_minutes", "trainer.eval_every",
    "trainer.stop_when_degenerate", "trainer.keep_best", "trainer.patience", "evaluation.every",
    "data.tokens_per_batch", "model.gradient_checkpointing", "device", "parallel",
    "tracking", "search", "resume", "trust",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Job:
    """Where a job runs and what was asked for."""

    directory: Path
    overrides: Sequence[str]
    choices: Mapping[str, str]
    sweep: str | None  # the multirun's folder name

    @property
    def group(self) -> str:
        """What the tracker joins: the jobs of a multirun, or a run with its evaluations."""
        return self.sweep or self.directory.name


def restore(cfg: DictConfig, job: Job) -> tuple[DictConfig, Job]:
    """The configuration of the run that `resume` names, with the few changes a run survives.

    Raises ValueError for a folder that holds no run and for an override that would make it another run.
    """
    directory, key = Path(cfg.resume).expanduser(), f"resume={cfg.resume}"
    _check_begun(directory, key)
    run = read_run(directory, key)
    saved, summary = run.config, run.summary
    check_servers(saved, cfg.trust, key)
    refuse_unused_trust(saved, cfg.trust)
    check_configuration(directory, saved)
    check_unchanged(directory, key)
    for group in ("evaluation", "parallel"):  # runs from before there was one
        saved.setdefault(group, cfg[group])
    if saved.get("bandit") is not None:
        raise ValueError(f"{key} is the run of a bandit, which has no checkpoints; start it anew")
    _search_as_now(cfg, job, saved, summary)
    for override in job.overrides:
        option = override.lstrip("+").partition("=")[0]
        if _says_the_same(option, cfg, saved, job.choices, summary["choices"]):
            continue
        if not option.startswith(MAY_CHANGE):
            raise ValueError(
                f"{override} cannot change when a run goes on; only {', '.join(MAY_CHANGE[:-2])} can. "
                "Leave it out, or start a new run"
            )
        OmegaConf.update(saved, option, OmegaConf.select(cfg, option), merge=option not in job.choices)
        if option in job.choices:
            summary["choices"][option] = job.choices[option]
    saved.resume, saved.trust = cfg.resume, cfg.trust
    if summary["status"] == "stopped":
        _refuse_stopped(key, saved, summary)
    return saved, Job(directory, summary["overrides"], summary["choices"], summary.get("sweep", job.sweep))


def _search_as_now(cfg: DictConfig, job: Job, saved: DictConfig, summary: dict[str, Any]) -> None:
    """A search has a say for as long as its command runs: without one the run goes on to its end."""
    saved.search = cfg.get("search")
    summary["choices"].pop("search", None)
    if saved.search is not None:
        summary["choices"]["search"] = job.choices["search"]


def _refuse_stopped(key: str, saved: DictConfig, summary: Mapping[str, Any]) -> None:
    """Raise ValueError for a run that ended before its last step by an option that would end it again."""
    ended = f"{key}: the run ended at step {summary.get('steps')} because"
    if summary.get("stopped_by") == SEARCH:
        return
    if summary.get("stopped_by") == PATIENCE:
        best = summary.get("best") or {}
        if saved.trainer.get("patience") is not None:
            raise ValueError(
                f"{ended} {best.get('metric')} was no better than at step {best.get('step')} for "
                f"trainer.patience={saved.trainer.patience} evaluations; trainer.patience=null goes on all the same"
            )
    elif saved.trainer.get("stop_when_degenerate"):
        raise ValueError(
            f"{ended} its policy was degenerate ({'; '.join(map(str, summary.get('degenerate') or []))}); "
            "trainer.stop_when_degenerate=false goes on all the same"
        )


def _says_the_same(
    key: str, cfg: DictConfig, saved: DictConfig, chosen: Mapping[str, str], were: Mapping[str, str]
) -> bool:
    """Whether a word of the command line says what the run has."""
    if key in chosen:
        return chosen[key] == were.get(key)
    missing = object()
    return OmegaConf.select(saved, key, default=missing) == OmegaConf.select(cfg, key)


def check_configuration(directory: Path, saved: DictConfig) -> None:
    """Raise ValueError naming the keys of a run's config.yaml that were changed since a checkpoint was saved."""
    state = checkpoint.newest_state(directory / "checkpoints")
    if state is None:
        return
    text, origin = state.get("configuration"), f"resume={directory}: its newest checkpoint's state"
    checkpointed = configuration_in(text if isinstance(text, str) else "", origin)
    before = dict(options_in(OmegaConf.to_container(checkpointed)))
    now = dict(options_in(OmegaConf.to_container(saved)))
    changed = [
        f"{key} was {before.get(key)} and is {now.get(key)} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(MAY_CHANGE)
    ]
    if changed:
        raise ValueError(
            f"resume={directory}: {directory / 'config.yaml'} was changed: {'; '.join(changed)}. A run goes on only "
            "as it was: change it back, or start a new run"
        )


def _check_begun(directory: Path, key: str) -> None:
    """Raise ValueError for a folder without a run, and for one whose run was killed before it trained anything."""
    if (directory / CONFIG).is_file() and (directory / SUMMARY).is_file():
        return
    if any((directory / name).exists() for name in TRAINED):
        missing = next(name for name in (CONFIG, SUMMARY) if not (directory / name).is_file())
        raise ValueError(f"{key} cannot go on without its {missing}: put that back, or train again")
    if not (directory / SUMMARY).is_file():
        raise ValueError(
            f"{key} is not a run's folder: it has no {CONFIG} and no {SUMMARY}. If its run was killed as it began, "
            "nothing was trained: type its command again"
        )
    summary = read_summary(directory, key, ("overrides",))
    command = shlex.join(["python", "train.py", *summary["overrides"]])
    again = f"type the command of the sweep {summary['sweep']}" if summary.get("sweep") else f"type {command}"
    raise ValueError(f"{key}: nothing was trained before that run was ended; {again} again")


def left_by_sweep(cfg: DictConfig, job: Job) -> tuple[DictConfig, Job] | None:
    """A job of a sweep as it is to be run now: anew, or where the same command's job was stopped; None where that has
    come to its end. Raises ValueError where the folder holds another run."""
    directory, key = job.directory, f"output_dir={job.directory}"
    if job.sweep is None or cfg.resume or not (directory / CONFIG).is_file():
        return cfg, job
    saved, now = (
        dict(options_in(OmegaConf.to_container(tree, resolve=True))) for tree in (read_run(directory, key).config, cfg)
    )
    for option in sorted(saved.keys() | now.keys()):
        if not option.startswith(SAME_RUN) and saved.get(option) != now.get(option):
            was, wanted = saved.get(option), now.get(option)
            raise ValueError(f"{directory} holds another run, with {option}={was}, not {wanted}: see output_dir")
    summary = read_summary(directory, key)
    status = summary["status"]
    if status in FINISHED and not _climbs_on(cfg, summary, key):
        print(f"kept: {directory} is {status}")
        return None
    if cfg.get("bandit") is not None:  # it has no checkpoints
        (directory / "metrics.jsonl").unlink(missing_ok=True)
        return cfg, job
    print(f"going on with {directory}, which is {status}")
    cfg = cfg.copy()
    cfg.resume = str(directory)
    return restore(cfg, replace(job, overrides=()))


def _climbs_on(cfg: DictConfig, summary: Mapping[str, Any], key: str) -> bool:
    """Whether a search ended the job of this record at a rung, and lets it go further now, or no search does."""
    climb = climb_in(summary, key)
    if climb is None or not stands_at(summary, climb):
        return False
    return cfg.get("search") is None or len(climb.rungs) < cfg.search.rung


def options_in(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a configuration under its whole key."""
    for key, value in tree.items():
        yield from options_in(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]


@contextmanager
def opened(cfg: DictConfig, job: Job) -> Iterator[Job]:
    """The job in its folder, which no other process writes to; a new run's configuration stands in it. Raises
    ValueError if the folder holds a run already, is in use or cannot be written."""
    if cfg.output_dir is None and job.sweep is None and not cfg.resume:
        job = replace(job, directory=Path(ranks().first(lambda: str(new_folder(job.directory)))))
    with own_folder(job.directory, held(job.directory, say), COPIED, SHARED) as directory:
        job = replace(job, directory=directory)
        if not cfg.resume:
            _begin(cfg, job)
        yield job


def folder_of_all(own: Path) -> Path:
    """The run's folder, where this rank has one that stands for it."""
    return own if ranks().is_first else (own / SHARED[0]).resolve().parent


def _begin(cfg: DictConfig, job: Job) -> None:
    """Whenever this is killed, the same command starts over, or the configuration is there and `resume` goes on."""
    if any((job.directory / name).exists() for name in TRAINED):
        raise ValueError(f"{job.directory} already holds a run: resume={job.directory} goes on with it")
    try:
        for name in (CONFIG, SUMMARY, ERROR):  # of an attempt that trained nothing
            (job.directory / name).unlink(missing_ok=True)
        record(cfg, job, "running")
        write_config(cfg, job)
    except OSError as error:
        raise not_writable(job.directory, error) from error


def make_folder(cfg: DictConfig, job: Job) -> None:
    """The folder of a run that goes on, after somebody removed it."""
    job.directory.mkdir(parents=True, exist_ok=True)
    write_config(cfg, job)
    record(cfg, job, "running")


def write_config(cfg: DictConfig, job: Job) -> None:
    """Write config.yaml, with the digest of what it says as its first line."""
    write_text(job.directory / CONFIG, with_digest(OmegaConf.to_yaml(cfg, resolve=True)))


def record(cfg: DictConfig, job: Job, status: str, **entries: Any) -> dict[str, Any]:
    """Write summary.json: what the run was, what it was made with, how it stands. What it says besides stays."""
    before = read_summary(job.directory, str(job.directory)) if (job.directory / SUMMARY).is_file() else {}
    summary = {
        **before,
        "status": status,
        "error": None,
        "overrides": list(job.overrides),
        "choices": {key: value for key, value in job.choices.items() if not key.startswith("hydra/")},
        "sweep": job.sweep,
        "beta": strength_of(cfg),
        "seed": cfg.seed,
        "policy": "policy",
        **provenance(),
        **entries,
    }
    write_json(job.directory / SUMMARY, sealed(summary))
    return summary


def record_end(cfg: DictConfig, job: Job, status: str, error: Exception | None = None) -> None:
    """Say in the run's folder what ended this attempt. The record of a finished run is of its policy, and stays."""
    words = None if error is None else in_words(error)
    try:
        if error is not None:
            write_text(job.directory / ERROR, visible(without_keys("".join(traceback.format_exception(error)))))
        if read_summary(job.directory, str(job.directory))["status"] not in FINISHED:
            record(cfg, job, status, error=words)
    except (OSError, ValueError) as second:
        print(f"the run's status could not be written either: {second}", file=sys.stderr)


def record_death(folder: Path, words: str) -> None:
    """Say in a run's folder that its process is gone, which could not say so itself."""
    with suppress(OSError, ValueError):
        summary = read_summary(folder, str(folder))
        if summary["status"] == "running":
            write_json(folder / SUMMARY, sealed({**summary, "status": "failed", "error": words}))


def in_words(error: Exception) -> str:
    return without_keys(f"{type(error).__name__}: {error}")


def record_refusal(cfg: DictConfig, job: Job, error: Exception) -> None:
    """For the table of a sweep: a job that was refused before it had a run that this could spoil."""
    with suppress(OSError, ValueError):  # a folder that is in use or cannot be written is why it was refused
        if job.sweep is None or any((job.directory / name).exists() for name in (*TRAINED, CONFIG)):
            return
        with held(job.directory, say):
            record(cfg, job, "failed", error=in_words(error))


# --- what a run was made with: library versions, machine, state of the source tree


LIBRARIES = ("torch", "transformers", "tokenizers", "datasets", "hydra-core", "omegaconf", "wandb")


def _git(*arguments: str) -> str | None:
    root = Path(__file__).parents[2]
    try:
        process = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return process.stdout.strip()


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:  # W&B, where tracking=none
        return None


def provenance() -> dict[str, Any]:
    """Versions (null for what is not installed), device and git commit, with `dirty` true when the tree differs from
    the commit."""
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "versions": {name: _version(name) for name in LIBRARIES} | {"python": platform.python_version()},
        "device": torch.cuda.get_device_name() if on_cuda() else platform.machine(),
        "threads": torch.get_num_threads(),
        "git": {"commit": _git("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)},
    }
