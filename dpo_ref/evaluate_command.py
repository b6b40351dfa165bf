"""`python evaluate.py ...` from its composed configuration to the table, the page and the tracker."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from dpo_ref.allocator import keep_memory
from dpo_ref.checkpoint import run_of
from dpo_ref.command_line import typed_words
from dpo_ref.compatibility_command import Request, run_compatibility, title_of
from dpo_ref.components import component, components
from dpo_ref.evaluate_tracking import track_sweep
from dpo_ref.evaluation.compatibility import CompatibilityOptions
from dpo_ref.evaluation.findings import drift, headline
from dpo_ref.evaluation.records import Evaluated, read_json
from dpo_ref.evaluation.report import DIAGNOSTICS, write_report
from dpo_ref.evaluation.sweep import cells
from dpo_ref.evaluation.sweep_jobs import collect, results_folder
from dpo_ref.evaluation.sweep_report import sweep_tables, write_sweep
from dpo_ref.evaluation.terminal import results_table
from dpo_ref.evaluator import Evaluator
from dpo_ref.export_command import check_export, run_export
from dpo_ref.push import HubOptions, publish
from dpo_ref.stages import COMPATIBILITY, EXPORT, PUSH, WINRATE, check_stage, words
from dpo_ref.subjects import subject_of
from dpo_ref.tracking.terminal import run_summary
from dpo_ref.types import digest
from dpo_ref.winrate_command import WinRateRequest, annotation_words, run_winrates


def _print(table: Any) -> None:
    from rich.console import Console

    Console().print(table)


def _evaluate_policy(evaluator: Evaluator, cfg: DictConfig) -> None:
    outcome = evaluator.one(cfg.policy, cfg.output_dir)
    folder, baseline, found = outcome.subject.folder, outcome.baseline, outcome.found
    if found is None:
        run_summary("generated", {"generations": str(folder / "generations.jsonl")}, [])
        return
    evaluated = [baseline, found] if baseline else [found]
    page = write_report(folder, evaluated)
    pictures = [path for name in ("report.png", DIAGNOSTICS) if (path := folder / name).is_file()]
    evaluator.conclude(outcome, [page, *pictures])
    evaluations = [each.evaluation for each in evaluated]
    _print(results_table(evaluations))
    run_summary(headline(evaluations), {"report": str(page), "plot": str(folder / "report.png")})


def _sources(sweep: Any) -> list[str]:
    """`sweep=` as a list. Raises ValueError for anything but a folder, a pattern or a list of these."""
    found = list(sweep) if isinstance(sweep, ListConfig) else [sweep]
    if not found or not all(isinstance(one, str) for one in found):
        raise ValueError(f"sweep={sweep} must be a folder, a pattern or a list of these")
    return found


def _shared(baselines: Sequence[Evaluated]) -> Evaluated | None:
    """The baseline of all jobs; None where they have none or several, of which no single one would be true."""
    if len({digest([asdict(one.evaluation)]) for one in baselines}) <= 1:  # by value: NaN is what was not measured
        return next(iter(baselines), None)
    print("the jobs have different baselines: each is compared with its own, and none is shown", file=sys.stderr)
    return None


def _evaluate_sweep(evaluator: Evaluator, cfg: DictConfig) -> None:
    """Evaluate every completed job, then write the table whatever the others came to."""
    sources, baselines = _sources(cfg.sweep), []
    folder = Path(cfg.output_dir).expanduser() if cfg.output_dir else results_folder(sources)
    for job in collect(*sources):
        if not job.finished:
            continue
        try:
            outcome = evaluator.one(str(job.folder))
        except (ValueError, OSError) as error:
            print(f"{job.name} could not be evaluated: {error}", file=sys.stderr)
            continue
        baselines += [outcome.baseline] if outcome.baseline else []
        if outcome.found is not None:
            evaluator.conclude(outcome)
    jobs, baseline = collect(*sources), _shared(baselines)
    write_sweep(folder, jobs, baseline)
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    track_sweep(evaluator.tracking, config, folder, jobs)
    initial = baseline.evaluation if baseline else None
    for table in sweep_tables(jobs, initial):
        _print(table)
    evaluations = [*([initial] if initial else []), *(cell.evaluation for cell in cells(jobs))]
    title = headline(evaluations) if len(evaluations) > 1 else "no job has a result"
    rows = {"report": str(folder / "report.html"), "plot": str(folder / "sweep.png"), "panels": str(folder / "panels")}
    if initial and (moved := drift(initial, evaluations[1:])):
        rows["drift"] = moved
    run_summary(title, rows)


def _request(evaluator: Evaluator, cfg: DictConfig, overrides: Sequence[str]) -> Request:
    """The run that would be trained with each reference: a run's policy brings its data and model options."""
    subject, run = subject_of(cfg.policy, None)
    parts = evaluator.parts(run, cfg.policy)
    folder = run_of(Path(cfg.policy)) or Path(cfg.policy)
    said = overrides if run is None or evaluator.own_data else read_json(folder / "summary.json")["overrides"]
    words = [] if subject.path == "lab:initial" else ["model=pretrained", *typed_words({"model.path": subject.path})]
    if run is not None:
        changed = {name: run.model[name] for name in ("dtype", "attention") if run.model[name] != "auto"}
        words += typed_words({f"model.{name}": value for name, value in changed.items()})
    seed = cfg.seed if subject.seed is None else subject.seed
    words += typed_words({"seed": seed}) if seed else []
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    return Request(
        name=subject.name if run is not None else title_of(cfg.policy),
        words=(*words, *(word for word in said if word.lstrip("+").startswith("data"))),
        data=parts["data"],
        data_seed=seed,
        tracking=parts["tracking"],
        references=tuple(config["references"]),
        options=CompatibilityOptions(**config["compatibility"]),
        seed=cfg.seed,
        output_dir=cfg.output_dir,
        config=config,
    )


def _export(evaluator: Evaluator, cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Write the file of `export=` from the evaluation of `policy=`."""
    export = component("export", cfg.export, evaluator.choices["export"])
    check_export(export, words(overrides), cfg.policy)
    subject, run = subject_of(cfg.policy, cfg.output_dir)
    run_export(subject, export, lambda: evaluator.settings(subject, evaluator.parts(run, cfg.policy)))


def _win_rates(cfg: DictConfig, choices: dict[str, str]) -> WinRateRequest:
    """What is asked about models that were judged before."""
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    annotations, tracking = annotation_words(config["annotations"]), components(cfg, choices, "evaluate")["tracking"]
    return WinRateRequest(annotations, cfg.df_gamed, tracking, cfg.seed, cfg.output_dir, config)


def run_evaluation(cfg: DictConfig, choices: dict[str, str], overrides: Sequence[str]) -> None:
    """Evaluate `policy=` or `sweep=`, or look at `references=` or at `annotations=`. Raises ValueError for what does
    not go together."""
    check_stage(cfg, overrides)
    if cfg.stage == PUSH:
        publish(cfg.policy, HubOptions(**cfg.hub))
        return
    if cfg.stage == COMPATIBILITY:
        keep_memory()
        run_compatibility(_request(Evaluator(cfg, choices, overrides), cfg, overrides))
        return
    if cfg.stage == WINRATE:
        run_winrates(_win_rates(cfg, choices))
        return
    if (cfg.policy is None) == (cfg.sweep is None) and cfg.stage != EXPORT:
        raise ValueError("give policy=<run or model folder> or sweep=<multirun folder, runs, patterns>, one of them")
    keep_memory()
    evaluator = Evaluator(cfg, choices, overrides)
    if cfg.stage == EXPORT:
        _export(evaluator, cfg, overrides)
        return
    (_evaluate_policy if cfg.sweep is None else _evaluate_sweep)(evaluator, cfg)
    if evaluator.lost is not None:
        raise evaluator.lost
