"""One job of `train.py`: its folder, its configuration on disk, what it was made with, how it ended, and what to type
next.
"""

import math
import platform
import shlex
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf

from dpo_ref.cli.bandit import run_bandit
from dpo_ref.cli.build import Built, build, cache_reference, report_data
from dpo_ref.cli.resolve import RunConfig, resolve, saved_config, strength_of
from dpo_ref.evaluation.policy import FINISHED, SUMMARY, read_summary
from dpo_ref.files import held, new_folder, not_writable, write_json, write_text
from dpo_ref.generation.sampling import generate
from dpo_ref.models import checkpoint
from dpo_ref.reports import training_curve
from dpo_ref.reports.model_card import write_card
from dpo_ref.tracking.terminal import progress, run_summary, say
from dpo_ref.tracking.tracker import RunInfo, Tracker, policy_artifact, reference_artifact
from dpo_ref.tracking.weights_and_biases import known_id
from dpo_ref.training.run import Interrupted, RunFolder, TrainingRun

MAY_CHANGE = (
    "trainer.max_steps", "trainer.epochs", "trainer.save_every", "trainer.save_minutes", "trainer.eval_every",
    "trainer.stop_when_degenerate", "evaluation.every", "tracking", "resume",
)  # fmt: skip


NEXT = "python evaluate.py policy={}"  # what to type after a run
NEXT_OF_SCORES = "python evaluate.py policy=<run or model folder> scorer=reward_model scorer.path={}/policy"
ASIDE = {"cache_reference": cache_reference, "data": report_data}  # stages that train nothing
SAMPLE_TOKENS = 96


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


class Ended(NamedTuple):
    """How a job ended: the exit status, and what went wrong."""

    code: int
    error: str | None = None


STOPPED = Ended(130, "stopped")  # by a signal


# --- the run's folder: its configuration, its record, who may write to it


CONFIG, ERROR = "config.yaml", "error.txt"
TRAINED = ("metrics.jsonl", "checkpoints", "policy")  # what a run leaves once it trains
SAME_RUN = ("output_dir", "resume", "tracking")  # what may differ when a sweep's command is typed again


def restore(cfg: DictConfig, job: Job) -> tuple[DictConfig, Job]:
    """The configuration of the run that `resume` names, with the few changes a run survives.

    Raises ValueError for a folder that holds no run and for an override that would make it another run.
    """
    directory, key = Path(cfg.resume).expanduser(), f"resume={cfg.resume}"
    _check_begun(directory, key)
    saved = saved_config(directory, key)
    check_configuration(directory)
    saved.setdefault("evaluation", cfg.evaluation)  # runs from before there was one
    if saved.get("bandit") is not None:
        raise ValueError(f"{key} is the run of a bandit, which has no checkpoints; start it anew")
    for override in job.overrides:
        option = override.lstrip("+").partition("=")[0]
        if not option.startswith(MAY_CHANGE):
            raise ValueError(
                f"{override} cannot change when a run goes on; only {', '.join(MAY_CHANGE[:-1])} can. "
                "Leave it out, or start a new run"
            )
        OmegaConf.update(saved, option, OmegaConf.select(cfg, option))
    saved.resume = cfg.resume
    summary = read_summary(directory, key, ("status", "overrides", "choices"))
    if summary["status"] == "stopped" and saved.trainer.get("stop_when_degenerate"):
        raise ValueError(
            f"{key}: the run ended at step {summary['steps']} because its policy was degenerate "
            f"({'; '.join(summary['degenerate'])}); trainer.stop_when_degenerate=false goes on all the same"
        )
    return saved, Job(directory, summary["overrides"], summary["choices"], summary.get("sweep", job.sweep))


def check_configuration(directory: Path) -> None:
    """Raise ValueError naming the keys of a run's config.yaml that were changed since a checkpoint was saved."""
    state = checkpoint.newest_state(directory / "checkpoints")
    if state is None:
        return
    before = dict(_options(OmegaConf.create(state["configuration"])))
    now = dict(_options(OmegaConf.load(directory / CONFIG)))
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
    saved, now = (dict(_options(tree)) for tree in (saved_config(directory, key), cfg))
    for option in sorted(saved.keys() | now.keys()):
        if not option.startswith(SAME_RUN) and saved.get(option) != now.get(option):
            was, wanted = saved.get(option), now.get(option)
            raise ValueError(f"{directory} holds another run, with {option}={was}, not {wanted}: see output_dir")
    status = read_summary(directory, key)["status"]
    if status in FINISHED:
        print(f"kept: {directory} is {status}")
        return None
    if cfg.get("bandit") is not None:  # it has no checkpoints
        (directory / "metrics.jsonl").unlink(missing_ok=True)
        return cfg, job
    print(f"going on with {directory}, which is {status}")
    cfg = cfg.copy()
    cfg.resume = str(directory)
    return restore(cfg, replace(job, overrides=()))


def _options(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a configuration under its whole key."""
    plain: Any = OmegaConf.to_container(tree) if OmegaConf.is_config(tree) else tree
    for key, value in plain.items():
        yield from _options(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]


@contextmanager
def opened(cfg: DictConfig, job: Job) -> Iterator[Job]:
    """The job in its folder, which no other process writes to; a new run's configuration stands in it. Raises
    ValueError if the folder holds a run already, is in use or cannot be written."""
    if cfg.output_dir is None and job.sweep is None and not cfg.resume:
        job = replace(job, directory=new_folder(job.directory))
    with held(job.directory, say):
        if not cfg.resume:
            _begin(cfg, job)
        yield job


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
    """Write config.yaml."""
    write_text(job.directory / CONFIG, OmegaConf.to_yaml(cfg))


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
    write_json(job.directory / SUMMARY, summary)
    return summary


def _record_end(cfg: DictConfig, job: Job, status: str, error: Exception | None = None) -> None:
    """Say in the run's folder what ended this attempt. The record of a finished run is of its policy, and stays."""
    words = None if error is None else f"{type(error).__name__}: {error}"
    try:
        if error is not None:
            write_text(job.directory / ERROR, "".join(traceback.format_exception(error)))
        if read_summary(job.directory, str(job.directory))["status"] not in FINISHED:
            record(cfg, job, status, error=words)
    except (OSError, ValueError) as second:
        print(f"the run's status could not be written either: {second}", file=sys.stderr)


def _record_refusal(cfg: DictConfig, job: Job, error: Exception) -> None:
    """For the table of a sweep: a job that was refused before it had a run that this could spoil."""
    with suppress(OSError, ValueError):  # a folder that is in use or cannot be written is why it was refused
        if job.sweep is None or any((job.directory / name).exists() for name in (*TRAINED, CONFIG)):
            return
        with held(job.directory, say):
            record(cfg, job, "failed", error=f"{type(error).__name__}: {error}")


# --- a run from its start to its end


def run_summary_fields(built: Built, steps: int) -> dict[str, Any]:
    """What a training run contributes to its summary."""
    training, reference = built.training, built.training.reference
    return {
        "objective": training.objective.name,
        "reference": _reference_title(reference.name, built.config.reference.options),
        "provenance": reference.provenance,
        "identities": {
            "initial_policy": training.initial_weights,
            "loss_reference": reference.identity,
            "loss_reference_weights": reference.weights,
            "loss_reference_values": reference.values_digest or "",
            "kl_reference": training.initial_weights,
        },
        "steps": steps,
        "degenerate": training.evaluation.degenerate if training.evaluation else [],
        "data": built.counts,
        "metrics": {name: value for name, value in training.record.last.items() if math.isfinite(value)},
        "wandb": training.record.tracker.location,
    }


def _reference_title(kind: str, options: Mapping[str, Any]) -> str:
    """A reference as tables show it: its kind, and which model it is where there is a choice."""
    parts = [_reference_title(part["reference"], part) for part in options.get("parts", ())]
    which = [str(options[key]) for key in ("path", "model") if options.get(key)]
    return " ".join([kind, *which]) + (f" of {', '.join(parts)}" if parts else "")


def _tracker(cfg: DictConfig, job: Job, run: RunConfig) -> Tracker:
    usual = "initial" if run.objective.uses_reference else "none"
    about = {
        "objective": run.objective.name,
        "reference": usual if run.reference.name == "auto" else run.reference.name,
    }
    about |= {"beta": strength_of(cfg), "seed": cfg.seed}  # as evaluations say it, to be grouped by
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    info = RunInfo(
        directory=job.directory,
        config={**config, "training": about},
        name=job.directory.name,
        group=job.group,
        job_type="train",
        resume=bool(cfg.resume),
    )
    return run.tracking(info)


@contextmanager
def tracking_of(cfg: DictConfig, job: Job, run: RunConfig) -> Iterator[Tracker]:
    """The run's tracker, which is told whether the run came to its end."""
    tracker, exit_code = _tracker(cfg, job, run), 1
    try:
        yield tracker
        exit_code = 0
    finally:
        tracker.finish(exit_code)


def conclude(cfg: DictConfig, job: Job, built: Built, steps: int) -> None:
    """Save the policy and say everywhere how the run ended."""
    training, tracker = built.training, built.training.record.tracker
    training.finish(steps)
    if training.evaluation is not None:
        tracker.image("evaluation/curves", training_curve.write_picture(job.directory))
    if built.sample_prompts:
        _show_samples(built, steps)
    status = "completed" if training.stopped_at is None else "stopped"
    summary = record(cfg, job, status, **run_summary_fields(built, steps))
    broken = {"degenerate": "; ".join(summary["degenerate"])} if training.evaluation else {}
    tracker.summary({"status": status, **broken, **summary["identities"]})
    write_card(job.directory, summary, OmegaConf.to_container(cfg, resolve=True), None)  # pyright: ignore
    name = known_id(job.directory, "train") or job.directory.name
    tracker.artifact(policy_artifact(name, job.directory / "policy", summary))
    tracker.artifact(reference_artifact(summary))


def _show_samples(built: Built, steps: int) -> None:
    """A few of the policy's answers, for the tracker."""
    training, policy = built.training, built.training.policy
    with policy.precision():
        samples = generate(
            policy.model, policy.tokenizer, built.sample_prompts, training.work.seed, max_new_tokens=SAMPLE_TOKENS
        )
    rows = [[sample.prompt[-1]["content"], sample.output, sample.finish_reason] for sample in samples]
    training.record.tracker.table("samples", ["prompt", "output", "finish_reason"], rows, step=steps)


def _bandit(cfg: DictConfig, job: Job, run: RunConfig) -> None:
    with tracking_of(cfg, job, run) as tracker:
        results = run_bandit(run, job.directory, tracker, progress)
        record(cfg, job, "completed", **results, wandb=tracker.location)
        tracker.summary({"status": "completed"})
    findings = {"findings" if index == 0 else "": sentence for index, sentence in enumerate(results["findings"])}
    files = {name: str(job.directory / name) for name in ("report.html", "report.png", "metrics.jsonl")}
    run_summary(f"{run.objective.name} in the bandit of {run.bandit and run.bandit.name}", findings | files)


def run_job(cfg: DictConfig, job: Job) -> Ended:
    """Run one job and say how it ended. Never raises for what a user can put right."""
    try:
        left = left_by_sweep(cfg, job)
        if left is None:
            return Ended(0)
        cfg, job = restore(cfg, job) if cfg.resume else left
        run = resolve(cfg, job.choices, job.overrides)
        if run.stage in ASIDE:
            ASIDE[run.stage](run, job.directory)
            return Ended(0)
        with opened(cfg, job) as at_hand:
            return _run_recorded(cfg, at_hand, run)
    except (ValueError, OSError) as error:
        _record_refusal(cfg, job, error)
        return _failed(error)
    except Exception as error:
        traceback.print_exc()
        return Ended(1, f"{type(error).__name__}: {error}")


def _failed(error: Exception) -> Ended:
    print(f"error: {error}", file=sys.stderr)
    return Ended(1, str(error))


def _run_recorded(cfg: DictConfig, job: Job, run: RunConfig) -> Ended:
    """Run in the folder that this process holds, where the record then says how it ended."""
    try:
        (_bandit if run.bandit is not None else _train)(cfg, job, run)
    except Interrupted as stop:
        print(f"\n{stop}; go on with\n  python train.py resume={job.directory}")
        return STOPPED
    except KeyboardInterrupt:  # before the first step, after the last, or a second one
        _record_end(cfg, job, "interrupted")
        again = "the same command" if run.bandit is not None else f"python train.py resume={job.directory}"
        print(f"\nstopped; go on with {again}")
        return STOPPED
    except (ValueError, OSError) as error:
        _record_end(cfg, job, "failed", error)
        return _failed(error)
    except Exception as error:
        _record_end(cfg, job, "failed", error)
        traceback.print_exc()
        return Ended(1, f"{type(error).__name__}: {error}")
    return Ended(0)


def _train(cfg: DictConfig, job: Job, run: RunConfig) -> None:
    with tracking_of(cfg, job, run) as tracker:
        built = build(run, job.directory, tracker)
        built.training.folder = RunFolder(OmegaConf.to_yaml(cfg), partial(make_folder, cfg, job))
        first_step = built.training.resume() if cfg.resume else 0
        if cfg.resume:
            write_config(cfg, job)
        try:
            steps = built.training.train(first_step)
        except Interrupted:
            record(cfg, job, "interrupted", **run_summary_fields(built, first_step))
            raise
        conclude(cfg, job, built, steps)
    command = NEXT_OF_SCORES if run.objective.of_scores else NEXT
    run_summary(
        f"{run.objective.name} on {cfg.model.path}", summary_rows(built.training), [command.format(job.directory)]
    )


# --- what a run did, in the words of the terminal's closing summary


TOLD = ("train/loss", "train/rewards/accuracies", "eval/loss", "eval/rewards/accuracies", "on_policy/reward_mean")


def summary_rows(training: TrainingRun) -> dict[str, str]:
    """Where a run's results are, and its most telling numbers from the first to the last."""
    record, folder = training.record, training.work.directory
    rows = {"folder": str(folder), "policy": str(folder / "policy")}
    for name in TOLD:
        if name in record.last:
            rows[name] = f"{record.first[name]:.4f} -> {record.last[name]:.4f}"
    if training.evaluation is not None:
        rows |= _evaluation_told(training, training.evaluation.degenerate)
    if record.tracker.location:
        rows["W&B"] = record.tracker.location
    return rows


def _evaluation_told(training: TrainingRun, degenerate: Sequence[str]) -> dict[str, str]:
    rows = training_curve.evaluations(training.record.path)
    curves = str(training.work.directory / training_curve.PICTURE)
    words = {"evaluation": training_curve.in_words(rows), "curves": curves}
    if training.stopped_at is not None:
        words["stopped"] = f"at step {training.stopped_at} of {training.rounds.num_steps}"
    return words | ({"degenerate": "; ".join(degenerate)} if degenerate else {})


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
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "threads": torch.get_num_threads(),
        "git": {"commit": _git("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)},
    }
