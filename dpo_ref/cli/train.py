"""One job of `train.py`: its folder, its configuration on disk, what it was made with, how it ended, and what to type
next.
"""

import math
import platform
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from dpo_ref.cli.bandit import run_bandit
from dpo_ref.cli.build import Built, build, cache_reference, report_data
from dpo_ref.cli.resolve import RunConfig, resolve, saved_config, strength_of
from dpo_ref.files import write_json
from dpo_ref.generation.sampling import generate
from dpo_ref.models import checkpoint
from dpo_ref.reports import training_curve
from dpo_ref.reports.model_card import write_card
from dpo_ref.tracking.terminal import progress, run_summary
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


def restore(cfg: DictConfig, job: Job) -> tuple[DictConfig, Job]:
    """The configuration of the run that `resume` names, with the few changes a run survives.

    Raises ValueError for a folder that holds no run and for an override that would make it another run.
    """
    directory = Path(cfg.resume).expanduser()
    if not (directory / "config.yaml").is_file():
        raise ValueError(f"resume={cfg.resume} is not a run's folder: it has no config.yaml")
    saved = saved_config(directory, f"resume={cfg.resume}")
    check_configuration(directory)
    saved.setdefault("evaluation", cfg.evaluation)  # runs from before there was one
    if saved.get("bandit") is not None:
        raise ValueError(f"resume={cfg.resume} is the run of a bandit, which has no checkpoints; start it anew")
    for override in job.overrides:
        key = override.lstrip("+").partition("=")[0]
        if not key.startswith(MAY_CHANGE):
            raise ValueError(
                f"{override} cannot change when a run goes on; only {', '.join(MAY_CHANGE[:-1])} can. "
                "Leave it out, or start a new run"
            )
        OmegaConf.update(saved, key, OmegaConf.select(cfg, key))
    saved.resume = cfg.resume
    record = OmegaConf.load(directory / "summary.json")
    assert isinstance(record, DictConfig)
    if record.status == "stopped" and saved.trainer.get("stop_when_degenerate"):
        raise ValueError(
            f"resume={cfg.resume}: the run ended at step {record.steps} because its policy was degenerate "
            f"({'; '.join(record.degenerate)}); trainer.stop_when_degenerate=false goes on all the same"
        )
    sweep = record.get("sweep", job.sweep)
    return saved, Job(directory, list(record.overrides), dict(record.choices), sweep)  # pyright: ignore


def check_configuration(directory: Path) -> None:
    """Raise ValueError naming the keys of a run's config.yaml that were changed since a checkpoint was saved."""
    state = checkpoint.newest_state(directory / "checkpoints")
    if state is None:
        return
    before = _flat(OmegaConf.to_container(OmegaConf.create(state["configuration"])))
    now = _flat(OmegaConf.to_container(OmegaConf.load(directory / "config.yaml")))
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


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    if not isinstance(content, Mapping) or not content:
        return {prefix: content}
    parts = (_flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in content.items())
    return {key: value for part in parts for key, value in part.items()}


def open_folder(cfg: DictConfig, job: Job) -> None:
    """Make the run's folder and write its configuration. Raises ValueError if it holds a run or cannot be made."""
    if not cfg.resume and (job.directory / "metrics.jsonl").exists():
        raise ValueError(f"{job.directory} already holds a run: resume={job.directory} goes on with it")
    try:
        job.directory.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(cfg, job.directory / "config.yaml")
    except OSError as error:
        raise ValueError(
            f"the run's folder {job.directory} cannot be written: {error.strerror}; see output_dir"
        ) from error


def make_folder(cfg: DictConfig, job: Job) -> None:
    """The folder of a run that goes on, after somebody removed it."""
    job.directory.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, job.directory / "config.yaml")
    record(cfg, job, "running")


def record(cfg: DictConfig, job: Job, status: str, **found: Any) -> dict[str, Any]:
    """Write summary.json: what the run was, what it was made with, how it stands."""
    summary = {
        "status": status,
        "error": None,
        "overrides": list(job.overrides),
        "choices": {key: value for key, value in job.choices.items() if not key.startswith("hydra/")},
        "sweep": job.sweep,
        "beta": strength_of(cfg),
        "seed": cfg.seed,
        "policy": "policy",
        **provenance(),
        **found,
    }
    write_json(job.directory / "summary.json", summary)
    return summary


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


def run_job(cfg: DictConfig, job: Job) -> int:
    """Run one job to its end and say how it ended; the exit code. Never raises for what a user can put right."""
    built, first_step = None, 0
    try:
        if cfg.resume:
            cfg, job = restore(cfg, job)
        run = resolve(cfg, job.choices, job.overrides)
        if run.stage in ASIDE:
            ASIDE[run.stage](run, job.directory)
            return 0
        open_folder(cfg, job)
        if not cfg.resume:
            record(cfg, job, "running")
        if run.bandit is not None:
            _bandit(cfg, job, run)
            return 0
        with tracking_of(cfg, job, run) as tracker:
            built = build(run, job.directory, tracker)
            built.training.folder = RunFolder(OmegaConf.to_yaml(cfg), partial(make_folder, cfg, job))
            first_step = built.training.resume() if cfg.resume else 0
            steps = built.training.train(first_step)
            conclude(cfg, job, built, steps)
        command = NEXT_OF_SCORES if run.objective.of_scores else NEXT
        run_summary(
            f"{run.objective.name} on {cfg.model.path}", summary_rows(built.training), [command.format(job.directory)]
        )
    except Interrupted as stop:
        assert built is not None
        record(cfg, job, "interrupted", **run_summary_fields(built, first_step))
        print(f"\n{stop}; go on with\n  python train.py resume={job.directory}")
        return 130
    except (ValueError, OSError) as error:
        _record_failure(cfg, job, error)
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        _record_failure(cfg, job, error)
        traceback.print_exc()
        return 1
    return 0


def _record_failure(cfg: DictConfig, job: Job, error: Exception) -> None:
    """Leave the status and the traceback in the run's folder, where there is one."""
    if not job.directory.is_dir():
        return
    try:
        record(cfg, job, "failed", error=f"{type(error).__name__}: {error}")
        (job.directory / "error.txt").write_text(traceback.format_exc())
    except OSError as second:
        print(f"the run's status could not be written either: {second}", file=sys.stderr)


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
