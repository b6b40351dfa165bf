"""One job of `train.py`: what is run, how it ended, and what to type next."""

import math
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from dpo_ref.cli.bandit import run_bandit
from dpo_ref.cli.build import NUM_SAMPLES, SAMPLE_TOKENS, Built, build, cache_reference, report_data
from dpo_ref.cli.check import check_run
from dpo_ref.cli.command_line import NEXT_OF_SCORES, ON_QUESTIONS, script
from dpo_ref.cli.halving import check_search, climbed, ladder_of
from dpo_ref.cli.ranks import SaidByFirst, check_batch, lost_another, note_end, of_rank, said_by_first, together
from dpo_ref.cli.recipes import RECORD, PlannedRecipe, recipe_in, recipe_of, run_recipe
from dpo_ref.cli.resolve import RunConfig, resolve, strength_of
from dpo_ref.cli.run_folder import (
    Job,
    folder_of_all,
    in_words,
    left_by_sweep,
    make_folder,
    opened,
    record,
    record_end,
    record_refusal,
    restore,
    write_config,
)
from dpo_ref.cli.starting_point import complete_run
from dpo_ref.component import Component
from dpo_ref.data.tokenise import encode_prompts
from dpo_ref.distributed import AUTO, HELPS, OutOfMemory, best_device, on_device, ran_out, ranks
from dpo_ref.files.cache import releasing
from dpo_ref.files.hub import commit_of
from dpo_ref.files.writing import with_remedy
from dpo_ref.generation.sampling import generate
from dpo_ref.reports import training_curve
from dpo_ref.reports.model_card import write_card
from dpo_ref.tracking.redaction import refuse_credentials, without_keys
from dpo_ref.tracking.terminal import progress, run_summary, say
from dpo_ref.tracking.tracker import NoTracker, RunInfo, Tracker, policy_artifact, reference_artifact
from dpo_ref.tracking.weights_and_biases import known_id
from dpo_ref.training.run import Interrupted, RunFolder, TrainingRun
from dpo_ref.types import Asked

NEXT = "policy={}"  # what to type after a run, behind evaluate.py
ASIDE = {"cache_reference": cache_reference, "data": report_data, "check": check_run}  # stages that train nothing


class Ended(NamedTuple):
    """How a job ended: the exit status, and what went wrong."""

    code: int
    error: str | None = None


STOPPED = Ended(130, "stopped")  # by a signal


# --- a run from its start to its end


def run_summary_fields(built: Built, steps: int) -> dict[str, Any]:
    """What a training run contributes to its summary."""
    training, reference = built.training, built.training.reference
    return {
        "objective": training.objective.name,
        "reference": _reference_title(reference.name, built.config.reference),
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
        "stopped_by": training.stopped_by,
        "best": _best(training),
        "search": climbed(built.config, training, steps),
        "data": built.counts,
        "held_out_prompts": len(built.prompts),
        "scores_answers": built.training.objective.of_scores,
        "sources": sources_of(built.config),
        "metrics": {name: value for name, value in training.record.last.items() if math.isfinite(value)},
        "wandb": training.record.tracker.location,
    }


def sources_of(config: RunConfig) -> dict[str, dict[str, str | None]]:
    """What a run fetched from the hub, by the option that names it: the name, the revision asked for, the commit."""
    data, model, reference = config.data.options, config.model.options, config.reference.options
    parts = {"data.sources": data.get("sources"), "reference.parts": [part.options for part in config.reference.parts]}
    path, one = reference.get("path"), config.reference.model_path
    parts |= {"reference.path": [{"path": each} for each in (path if isinstance(path, list) else [])]}
    named = [("model.path", model), ("reference.path", reference | {"path": one}), ("data.path", data)]
    named += [("data.hub", (data.get("hub") or {}) | {"revision": data.get("revision")})]
    named += [(f"{key}[{index}]", part) for key, list_ in parts.items() for index, part in enumerate(list_ or ())]
    adapters = [(f"{group}.adapter", {"path": options.get("adapter")}) for group, options in
                (("model", model), ("reference", reference))]  # fmt: skip
    asked = {key: (options.get("path"), options.get("revision")) for key, options in (*named, *adapters)}
    return {
        key: {"path": path, "revision": revision, "commit": commit_of(path, revision)}
        for key, (path, revision) in asked.items()
        if path is not None and commit_of(path, revision) is not None
    }


def _best(training: TrainingRun) -> dict[str, Any] | None:
    """The policy that is kept, by which metric, where that need not be the last."""
    best = training.selection and training.selection.best
    if training.selection is None or best is None:
        return None
    criterion = training.selection.criterion
    return {"metric": criterion.key, "better": criterion.better, "value": best.value, "step": best.step}


def _reference_title(kind: str, reference: Component) -> str:
    """A reference as tables show it: its kind, and which model it is where there is a choice."""
    parts = [_reference_title(part.name, part) for part in reference.parts]
    which = [reference.options[key] for key in ("path", "model", "adapter") if reference.options.get(key)][:1]
    named = [name for value in which for name in (value if isinstance(value, list) else [value])]
    return " ".join([kind, *named]) + (f" of {', '.join(parts)}" if parts else "")


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
    return run.tracking(info) if ranks().is_first else NoTracker()


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
    if built.prompts and training.policy.writes and ranks().first(lambda: not isinstance(tracker, NoTracker)):
        _show_samples(built, steps)
    if not ranks().is_first:
        return
    if training.evaluation is not None:
        tracker.image("evaluation/curves", training_curve.write_picture(job.directory))
    status = "completed" if training.stopped_at is None else "stopped"
    summary = record(cfg, job, status, **run_summary_fields(built, steps))
    broken = {"degenerate": "; ".join(summary["degenerate"])} if training.evaluation else {}
    chosen = {f"best/{name}": value for name, value in (summary["best"] or {}).items()}
    tracker.summary({"status": status, **broken, **chosen, **summary["identities"]})
    write_card(job.directory, summary, OmegaConf.to_container(cfg, resolve=True), None)  # pyright: ignore
    name = known_id(job.directory, "train") or job.directory.name
    tracker.artifact(policy_artifact(name, job.directory / "policy", summary))
    tracker.artifact(reference_artifact(summary))


def _show_samples(built: Built, steps: int) -> None:
    """A few of the policy's answers, for the tracker. The run has trained and is saved: what keeps the policy from
    answering is said, and fails nothing."""
    try:
        _track_samples(built, steps)
    except Exception as error:  # of whatever kind, as no model, text or memory is worth the run
        say(f"no sample answers are shown: {without_keys(in_words(error))}")


def _track_samples(built: Built, steps: int) -> None:
    training, policy = built.training, built.training.policy
    samples = []
    with policy.precision():
        for room, prompts in _by_room(built).items():
            samples += generate(policy.model, policy.tokenizer, prompts, training.work.seed, max_new_tokens=room)
    rows = [[sample.prompt[-1]["content"], sample.output, sample.finish_reason] for sample in samples]
    training.record.tracker.table("samples", ["prompt", "output", "finish_reason"], rows, step=steps)


def _by_room(built: Built) -> dict[int, list[Asked]]:
    """The prompts by how many tokens their answers may have; says how many leave none."""
    policy, prompts = built.training.policy, built.prompts[:NUM_SAMPLES]
    positions = math.inf if policy.positions is None else policy.positions
    sizes = map(len, encode_prompts(policy.tokenizer, prompts))
    rooms = [int(min(SAMPLE_TOKENS, positions - size)) for size in sizes]
    if left_out := sum(room < 1 for room in rooms):
        say(f"{left_out} of {len(prompts)} sample prompts left out: the model's {positions} positions leave no answer")
    return {
        room: [prompt for prompt, its_room in zip(prompts, rooms, strict=True) if its_room == room]
        for room in dict.fromkeys(rooms)
        if room >= 1
    }


def _bandit(cfg: DictConfig, job: Job, run: RunConfig) -> None:
    with tracking_of(cfg, job, run) as tracker:
        results = run_bandit(run, job.directory, tracker, progress)
        record(cfg, job, "completed", **results, wandb=tracker.location)
        tracker.summary({"status": "completed"})
    findings = {"findings" if index == 0 else "": sentence for index, sentence in enumerate(results["findings"])}
    files = {name: str(job.directory / name) for name in ("report.html", "report.png", "metrics.jsonl")}
    run_summary(f"{run.objective.name} in the bandit of {run.bandit and run.bandit.name}", findings | files)


@releasing()
def run_job(cfg: DictConfig, job: Job) -> Ended:
    """Run one job and say how it ended. Never raises for what a user can put right."""
    try:
        with on_device(cfg.get("device", AUTO)), together(cfg, job):
            ended = _run_job(cfg, job)
            note_end(ended.error or "")
            return ended
    except (ValueError, OSError) as error:
        record_refusal(cfg, job, error)
        return _failed(error)
    except Exception as error:
        print(without_keys(traceback.format_exc()), file=sys.stderr)
        return Ended(1, in_words(error))


def _run_job(cfg: DictConfig, job: Job) -> Ended:
    if recipe := _recipe(cfg, job):
        return Ended(run_recipe(recipe))
    cfg = cfg if cfg.resume else completed(cfg, job)
    left = left_by_sweep(cfg, job)
    if left is None:
        return Ended(0)
    cfg, job = restore(cfg, job) if cfg.resume else left
    with on_device(cfg.get("device", AUTO)):
        return _run_here(cfg, job)


def _recipe(cfg: DictConfig, job: Job) -> PlannedRecipe | None:
    """The chain of runs that is asked for, or gone on with, if it is one."""
    folder = Path(cfg.resume or "").expanduser()
    if cfg.resume and (folder / RECORD).is_file():
        return recipe_in(folder, job.overrides)
    if cfg.get("recipe") is None:
        return None
    if job.sweep is not None:
        raise ValueError("a recipe is a chain of runs, and no job of a multirun: type one command for each value")
    if cfg.stage != "train":
        raise ValueError(f"stage={cfg.stage} has no place in a recipe; leave recipe out, or stage")
    return recipe_of(cfg, job.choices["recipe"], job.directory, job.overrides)


def _run_here(cfg: DictConfig, job: Job) -> Ended:
    """Run a job on the device that it names."""
    run = resolve(cfg, job.choices, job.overrides)
    check_batch(run.trainer.batch_size)
    check_search(run, job.sweep)
    refuse_credentials(OmegaConf.to_container(cfg, resolve=True), "")
    if run.stage in ASIDE:
        ASIDE[run.stage](run, job.directory)
        return Ended(0)
    with opened(cfg, job) as at_hand:
        return _run_recorded(cfg, at_hand, run)


def completed(cfg: DictConfig, job: Job) -> DictConfig:
    """The tree with what its null options mean for the model that is trained."""
    if cfg.get("bandit") is not None or cfg.stage == "data":
        return cfg
    with on_device(cfg.device):
        return complete_run(cfg, resolve(cfg, job.choices, job.overrides), best_device())


def _failed(error: Exception) -> Ended:
    words = without_keys(str(with_remedy(error)))
    if not isinstance(error, SaidByFirst) and not said_by_first(in_words(error)):
        print(f"error: {of_rank()}{words}", file=sys.stderr)
    note_end(in_words(error))
    return Ended(1, words)


def _run_recorded(cfg: DictConfig, job: Job, run: RunConfig) -> Ended:
    """Run in the folder that this process holds, where the record then says how it ended."""
    try:
        (_bandit if run.bandit is not None else _train)(cfg, job, run)
    except Interrupted as stop:
        print(f"\n{stop}; go on with {script('train.py')} resume={job.directory}")
        return STOPPED
    except KeyboardInterrupt:  # before the first step, after the last, or a second one
        record_end(cfg, job, "interrupted")
        again = "the same command" if run.bandit is not None else f"{script('train.py')} resume={job.directory}"
        print(f"\nstopped; go on with {again}")
        return STOPPED
    except (ValueError, OSError) as error:
        record_end(cfg, job, "failed", error)
        return _failed(error)
    except Exception as error:
        record_end(cfg, job, "failed", error)
        if gone := lost_another(error):
            again = f"{script('train.py')} resume={folder_of_all(job.directory)}"
            return _failed(ValueError(f"{gone}. Go on with {again}"))
        if ran_out(error):
            return _failed(OutOfMemory(f"memory ran out before the first step: {HELPS}"))
        print(without_keys(traceback.format_exc()), file=sys.stderr)
        return Ended(1, in_words(error))
    return Ended(0)


def _train(cfg: DictConfig, job: Job, run: RunConfig) -> None:
    with tracking_of(cfg, job, run) as tracker:
        built = build(run, job.directory, tracker)
        built.training.folder = RunFolder(OmegaConf.to_yaml(cfg, resolve=True), partial(make_folder, cfg, job))
        ladder = ladder_of(run, built.training.rounds.num_steps)
        built.training.rung = ladder and ladder.ends_at
        first_step = built.training.resume() if cfg.resume else 0
        if cfg.resume:
            write_config(cfg, job)
        try:
            steps = built.training.train(first_step)
        except Interrupted:
            record(cfg, job, "interrupted", **run_summary_fields(built, first_step))
            raise
        conclude(cfg, job, built, steps)
    of_policy = NEXT if built.prompts else f"{NEXT} {ON_QUESTIONS}"
    policy = (NEXT_OF_SCORES if run.objective.of_scores else of_policy).format(job.directory)
    title = f"{run.objective.name} on {cfg.model.path}"
    run_summary(title, summary_rows(built.training), [f"{script('evaluate.py')} {policy}"])


# --- what a run did, in the words of the terminal's closing summary


TOLD = (
    "train/loss", "train/rewards/accuracies", "eval/loss", "eval/rewards/accuracies", "on_policy/reward_mean",
    "on_policy/server_gap",
)  # fmt: skip


def summary_rows(training: TrainingRun) -> dict[str, str]:
    """Where a run's results are, and its most telling numbers from the first to the last."""
    record, folder = training.record, training.work.directory
    rows = {"folder": str(folder), "policy": str(folder / "policy")}
    for name in TOLD:
        if name in record.last:
            rows[name] = f"{record.first[name]:.4f} -> {record.last[name]:.4f}"
    if training.evaluation is not None:
        rows |= _evaluation_told(training, training.evaluation.degenerate)
    rows |= _end_told(training)
    if record.tracker.location:
        rows["W&B"] = record.tracker.location
    return rows


def _evaluation_told(training: TrainingRun, degenerate: Sequence[str]) -> dict[str, str]:
    rows = training_curve.evaluations(training.record.path)
    curves = str(training.work.directory / training_curve.PICTURE)
    words = {"evaluation": training_curve.in_words(rows), "curves": curves}
    return words | ({"degenerate": "; ".join(degenerate)} if degenerate else {})


def _end_told(training: TrainingRun) -> dict[str, str]:
    """Where the run ended, if before its last step, and which policy is kept, if that need not be the last."""
    words, selection = {}, training.selection
    if training.stopped_at is not None:
        words["stopped"] = f"at step {training.stopped_at} of {training.rounds.num_steps} ({training.stopped_by})"
    if selection is not None and selection.best is not None:
        key, initial = selection.criterion.key, training.record.first.get(selection.criterion.key)
        words["best"] = f"{key} {selection.best.value:.4f} at step {selection.best.step}: this is the policy"
        if initial is not None and selection.criterion.improves(initial, selection.best.value):
            words["best"] += f"; before training it was better, {initial:.4f}"
    return words
