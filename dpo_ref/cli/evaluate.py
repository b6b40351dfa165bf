"""`python evaluate.py ...` from its composed configuration to the table, the page and the tracker."""

import gc
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from dpo_ref.cli.averages import STAGE as MERGE
from dpo_ref.cli.averages import MergeRequest, run_merge
from dpo_ref.cli.averages import check_words as check_merge_words
from dpo_ref.cli.cache import look_after_cache
from dpo_ref.cli.command_line import python, typed_words
from dpo_ref.cli.compatibility import CompatibilityRequest, run_compatibility, title_of
from dpo_ref.cli.exports import STAGE as EXPORT
from dpo_ref.cli.exports import check_export, publish, run_export
from dpo_ref.cli.resolve import component, components, refuse_of_rounds
from dpo_ref.cli.saved_run import check_servers, check_unchanged, read_run, read_summary, refuse_unused_trust
from dpo_ref.cli.schemas import HubOptions
from dpo_ref.cli.side_by_side import SideJob, at_a_time, run_side_by_side, swept_names
from dpo_ref.cli.starting_point import complete_evaluation
from dpo_ref.cli.winrates import STAGE as WINRATE
from dpo_ref.cli.winrates import WinRateRequest, annotation_words, check_words, run_winrates
from dpo_ref.component import Component, configuration
from dpo_ref.distributed import best_device, evaluation_memory, keep_memory, own_folder, ranks
from dpo_ref.evaluation.compatibility import CompatibilityOptions
from dpo_ref.evaluation.evaluate import at_each, at_other, baseline_of, check_temperature, evaluate_policy, prompts_of
from dpo_ref.evaluation.judging.judge import JudgeLost
from dpo_ref.evaluation.policy import (
    SUMMARY,
    EvaluationSettings,
    PolicyToEvaluate,
    TrainedRun,
    against,
)
from dpo_ref.evaluation.results import (
    RESULTS,
    STORED,
    Evaluated,
    Evaluation,
    Thresholds,
    join_temperatures,
    with_curve,
)
from dpo_ref.evaluation.stages import without_judge
from dpo_ref.evaluation.sweep import SweptRun, cells, collect, results_folder, results_of_checkpoint
from dpo_ref.files.cache import cache_folder
from dpo_ref.files.holding import held
from dpo_ref.lab.models import SCHEME
from dpo_ref.models import checkpoint
from dpo_ref.models.asked import ModelLoader, ModelPath, Workspace
from dpo_ref.models.averages import Average, read_average, run_averaged_in
from dpo_ref.models.folders import stored_positions
from dpo_ref.models.lora import AdapterOptions
from dpo_ref.reports.findings import findings
from dpo_ref.reports.model_card import write_card
from dpo_ref.reports.policy import DIAGNOSTICS, track_evaluation, write_report
from dpo_ref.reports.sweep import sweep_tables, track_sweep, write_sweep
from dpo_ref.reports.tables import headline, lacking, results_table
from dpo_ref.tracking.redaction import refuse_credentials, without_keys
from dpo_ref.tracking.terminal import progress, run_summary, say, show
from dpo_ref.tracking.terminal import words as written
from dpo_ref.types import PreferenceData, digest

# --- one policy evaluated as it was configured, and its baseline


# What does not change a policy's results
SAME_RESULTS = ("policy", "sweep", "output_dir", "stage", "tracking", "trust", "n_jobs")
NOT_ASKED = "the judge was lost before it was asked about this policy, so there is no win rate"
MEMORY = (
    "a smaller generation.batch_size, a smaller generation.max_new_tokens (or data.max_length, where a held-out pair "
    "is too long), and nothing else on the device. Answers that were written are kept: the same command goes on from "
    "there"
)


@dataclass(frozen=True, slots=True)
class EvaluationOutcome:
    """Whom an evaluation was about, as what it was configured, and what it came to; `evaluated` is None after
    `stage=generate`."""

    subject: PolicyToEvaluate
    config: dict[str, Any]
    training: dict[str, Any] | None  # the configuration of the run that trained the policy
    baseline: Evaluated | None
    evaluated: Evaluated | None


class Evaluator:
    """The configured evaluation; data of the same options and seed is read once."""

    def __init__(self, cfg: DictConfig, choices: dict[str, str], overrides: Sequence[str]) -> None:
        self.cfg, self.choices, self.overrides = cfg, choices, overrides
        keys = [override.lstrip("+").partition("=")[0] for override in overrides]
        self.own_data = any(key.partition(".")[0] == "data" for key in keys)
        self.thresholds = Thresholds(**OmegaConf.to_container(cfg.degeneration))  # pyright: ignore[reportCallIssue]
        self._data: dict[str, PreferenceData] = {}
        self.tracking = component("tracking", cfg.tracking, choices["tracking"])
        self.lost: JudgeLost | None = None  # why the judge is asked no more

    @cached_property
    def _loader(self) -> ModelLoader:
        """Keeps the initial policy, the loss reference and the policy at hand. Made where it is used: a process that
        has looked for a GPU cannot hand it to those it forks."""
        return ModelLoader(best_device(), keep=3)

    def tree(self, run: DictConfig | None, path: str) -> tuple[DictConfig, dict[str, str]]:
        """Configuration and choices, with the data of the evaluated run unless the command line names another."""
        cfg, choices = self.cfg.copy(), dict(self.choices)
        if run is not None and not self.own_data:
            cfg.data = run.data
            folder = _run_at(path) or Path(path)
            choices["data"] = read_summary(folder, f"policy={path}")["choices"]["data"]
        saved = path if run is None else str((_run_at(path) or Path(path)) / "policy")
        return complete_evaluation(cfg, saved, best_device()), choices

    def parts(self, run: DictConfig | None, path: str) -> dict[str, Component]:
        """The components of an evaluation."""
        parts = components(*self.tree(run, path), "evaluate")
        check_temperature(parts, self.overrides)
        refuse_of_rounds(parts["generation"], self.overrides)
        return parts

    def data_seed(self, subject: PolicyToEvaluate) -> int:
        """The seed that data is drawn with: that of the subject's run, so that held-out data was not trained on."""
        return self.cfg.seed if subject.run is None else subject.run.summary["seed"]

    def settings(self, subject: PolicyToEvaluate, parts: dict[str, Component]) -> EvaluationSettings:
        """How to evaluate a subject."""
        data, seed = parts["data"], self.data_seed(subject)
        key = f"{data} {seed}"
        if key not in self._data:
            self._data[key] = data(seed, progress)._replace(train=())  # a sweep keeps the held-out data of each seed
        work = Workspace(subject.folder, cache_folder(), self.cfg.seed, progress, self._loader)
        policy = self._loader.policy(subject.model)
        positions = stored_positions(policy.folder, "policy", subject.model.revision)
        prompts = prompts_of(policy.tokenizer, positions, parts, self._data[key], seed, progress)
        return EvaluationSettings(work, self._data[key], prompts, parts, self.cfg.stage, self.thresholds)

    def one(self, path: str, output_dir: str | None = None) -> EvaluationOutcome:
        """Evaluate one policy. Where the judge stops answering, this one and all that follow do without it."""
        subject, run = subject_of(path, output_dir, self.cfg.trust)
        if self.cfg.sweep is None:
            refuse_unused_trust(run, self.cfg.trust)
        holding = held(subject.folder, say, self.work())
        with own_folder(subject.folder, holding, STORED) as folder, evaluation_memory("the evaluation", MEMORY):
            subject = replace(subject, folder=folder)
            try:
                outcome = self._one(path, subject, run)
            except JudgeLost as lost:
                self.lost, self.cfg = lost, self.cfg.copy()
                self.cfg.judge = None
                return self._without_judge(self._one(path, subject, run), lost.short)
            return outcome if self.lost is None else self._without_judge(outcome, NOT_ASKED)

    def _without_judge(self, outcome: EvaluationOutcome, why: str) -> EvaluationOutcome:
        if outcome.evaluated is None:
            return outcome
        return replace(outcome, evaluated=without_judge(outcome.subject.folder, outcome.evaluated, why))

    def work(self) -> str:
        """What is equal for evaluations that leave the same in a policy's folder."""
        config: Any = OmegaConf.to_container(self.cfg, resolve=True)
        return digest([{key: value for key, value in config.items() if key not in SAME_RESULTS}])

    def _one(self, path: str, subject: PolicyToEvaluate, run: DictConfig | None) -> EvaluationOutcome:
        parts = self.parts(run, path)
        if "reference" in parts:
            subject = against(subject, parts["reference"])
        settings, *others = at_each(self.settings(subject, parts), subject)
        curve = [self.at_temperature(subject, other) for other in others]
        baseline = self.baseline(subject, settings)
        config: Any = OmegaConf.to_container(self.tree(run, path)[0], resolve=True)
        evaluated = evaluate_policy(subject, settings, baseline)
        if evaluated is not None and curve:
            evaluated = join_temperatures(
                subject.folder, evaluated, [other for other, _ in curve if other is not None]
            )
        if baseline is not None and curve:
            baseline = with_curve(baseline, [other for _, other in curve if other is not None])
        return EvaluationOutcome(subject, config, _plain(run), baseline, evaluated)

    def at_temperature(
        self, subject: PolicyToEvaluate, settings: EvaluationSettings
    ) -> tuple[Evaluated | None, Evaluated | None]:
        """One policy at a further temperature, and the baseline at the same."""
        baseline = self.baseline(subject, settings)
        return evaluate_policy(at_other(subject, settings, baseline), settings, baseline), baseline

    def baseline(self, subject: PolicyToEvaluate, settings: EvaluationSettings) -> Evaluated | None:
        """Whom the win rate is against: what `baseline=` names, else the run's initial policy."""
        if self.cfg.baseline is not None:
            return baseline_of(ModelPath(self.cfg.baseline, key="baseline"), Path(self.cfg.baseline).name, settings)
        return None if subject.run is None else baseline_of(subject.run.initial, "initial", settings)

    def conclude(self, outcome: EvaluationOutcome, files: Sequence[Path] = ()) -> None:
        """Fill in the policy's model card, and log the evaluation as a run of its own."""
        subject, evaluated, run = outcome.subject, outcome.evaluated, outcome.subject.run
        assert evaluated is not None
        if run is not None and subject.folder == run.folder / RESULTS:
            record = read_summary(run.folder, f"policy={run.folder}")
            write_card(run.folder, record, outcome.training or {}, evaluated.evaluation)
        track_evaluation(self.tracking, outcome.config, subject, evaluated, outcome.baseline, files)


def _plain(cfg: DictConfig | None) -> dict[str, Any] | None:
    return None if cfg is None else OmegaConf.to_container(cfg, resolve=True)  # pyright: ignore[reportReturnType]


# --- the command


def _evaluate_policy(evaluator: Evaluator, cfg: DictConfig) -> None:
    outcome = evaluator.one(cfg.policy, cfg.output_dir)
    if not ranks().is_first:
        return
    folder, baseline, policy = outcome.subject.folder, outcome.baseline, outcome.evaluated
    if policy is None:
        run_summary("generated", {"generations": str(folder / "generations.jsonl")}, [])
        return
    evaluated = [baseline, policy] if baseline else [policy]
    page = write_report(folder, evaluated)
    pictures = [path for name in ("report.png", DIAGNOSTICS) if (path := folder / name).is_file()]
    evaluator.conclude(outcome, [page, *pictures])
    evaluations = [each.evaluation for each in evaluated]
    show(results_table(evaluations))
    rows = {"report": str(page), "plot": str(folder / "report.png")}
    run_summary(headline(evaluations), rows | _missing_rows(evaluations))
    if evaluator.lost is not None:
        raise evaluator.lost


def _missing_rows(evaluations: Sequence[Evaluation]) -> dict[str, str]:
    sentences = lacking(evaluations)
    return {"missing": " ".join(sentences)} if sentences else {}


def _sources(sweep: Any) -> list[str]:
    """`sweep=` as a list. Raises ValueError for anything but a folder, a pattern or a list of these."""
    sources = list(sweep) if isinstance(sweep, ListConfig) else [sweep]
    if not sources or not all(isinstance(source, str) for source in sources):
        raise ValueError(f"sweep={sweep} must be a folder, a pattern or a list of these")
    return sources


def _distinct(baselines: Sequence[Evaluated]) -> list[Evaluated]:
    """Each once, by value: NaN is what was not measured."""
    return list({digest([asdict(baseline.evaluation)]): baseline for baseline in baselines}.values())


def _shared_baseline(baselines: Sequence[Evaluated]) -> Evaluated | None:
    """The baseline of all jobs; None where they have none or several, of which no single one would be true."""
    if len(_distinct(baselines)) <= 1:
        return next(iter(baselines), None)
    print("the jobs have different baselines: each is compared with its own, and none is shown", file=sys.stderr)
    return None


@dataclass(frozen=True, slots=True)
class JobEvaluation:
    """What a sweep needs to know of the evaluation of one of its jobs, beside what lies in the job's folder."""

    baseline: Evaluated | None = None  # with its answers
    failed: bool = False
    lost: str | None = None  # what is said of a judge that stopped answering


def _evaluate_job(evaluator: Evaluator, job: SweptRun) -> JobEvaluation:
    try:
        outcome = evaluator.one(str(job.folder))
    except (ValueError, OSError) as error:
        print(f"{job.name} could not be evaluated: {without_keys(str(error))}", file=sys.stderr)
        return JobEvaluation(failed=True)
    if outcome.evaluated is not None:
        evaluator.conclude(outcome)
    return JobEvaluation(outcome.baseline, lost=str(evaluator.lost) if evaluator.lost else None)


def _one_after_the_other(evaluator: Evaluator, jobs: Sequence[SweptRun]) -> Iterator[JobEvaluation]:
    for job in jobs:
        yield _evaluate_job(evaluator, job)
        gc.collect()  # what refers to itself, such as models, before the next job loads its own


def _at_the_same_time(evaluator: Evaluator, jobs: Sequence[SweptRun], n_jobs: int) -> Iterator[JobEvaluation]:
    """Each with what it needs: the first to come makes the answers of a common baseline, and the others wait for
    those."""
    beside = [
        SideJob(name, partial(_evaluate_job, evaluator, job), lambda done: "not evaluated" if done.failed else None)
        for name, job in zip(_job_names(jobs), jobs, strict=True)
    ]
    for job, end in zip(jobs, run_side_by_side(beside, n_jobs), strict=True):
        if end.error:
            print(f"{job.name} could not be evaluated: {end.error}", file=sys.stderr)
        yield end.value or JobEvaluation(failed=True)


def _job_names(jobs: Sequence[SweptRun]) -> list[str]:
    """What tells each from the others; their folders' names where that is not enough."""
    numbers = [{"beta": job.beta, "seed": job.seed, "step": job.step, "share": job.share} for job in jobs]
    varied = [[f"{key}={value:g}" for key, value in row.items() if value is not None] for row in numbers]
    names = swept_names([[*job.options, *words] for job, words in zip(jobs, varied, strict=True)])
    return names if len(set(names)) == len(names) else [job.name for job in jobs]


def _evaluate_sweep(evaluator: Evaluator, cfg: DictConfig) -> None:
    """Evaluate every completed job, then write the table whatever the others came to."""
    sources, baselines, failed, lost = _sources(cfg.sweep), [], [], None
    folder = Path(cfg.output_dir).expanduser() if cfg.output_dir else results_folder(sources)
    finished = [job for job in collect(*sources) if job.finished]
    n_jobs = min(at_a_time(cfg.n_jobs, "n_jobs"), len(finished))
    several = partial(_at_the_same_time, n_jobs=n_jobs) if n_jobs > 1 else _one_after_the_other
    for job, evaluation in zip(finished, several(evaluator, finished), strict=True):
        baselines = _distinct([*baselines, evaluation.baseline]) if evaluation.baseline else baselines
        failed += [job.name] if evaluation.failed else []
        lost = lost or evaluation.lost
    jobs, baseline = collect(*sources), _shared_baseline(baselines)
    write_sweep(folder, jobs, baseline)
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    track_sweep(evaluator.tracking, config, folder, jobs)
    _show_sweep(folder, jobs, baseline.evaluation if baseline else None)
    if failed:
        raise ValueError(f"not evaluated: {', '.join(failed)} (why stands above); the same command goes on with them")
    if lost:
        raise ValueError(lost)


def _show_sweep(folder: Path, jobs: Sequence[SweptRun], initial: Evaluation | None) -> None:
    """The table, what it says, and where all of it is."""
    show(*sweep_tables(jobs, initial))
    swept = cells(jobs)
    evaluations = [*([initial] if initial else []), *(cell.evaluation for cell in swept)]
    sentences = findings(swept, initial)
    show(*map(written, sentences))
    title = f"sweep of {len(jobs)} runs" if sentences else headline(evaluations) if swept else "no job has a result"
    page = (folder / "report.html").resolve()
    left = {"report": folder / "report.html", "plot": folder / "sweep.png", "panels": folder / "panels"}
    rows = {name: str(path) for name, path in left.items() if path.exists()}
    opens = f"{python()} -m webbrowser {shlex.quote(page.as_uri())}"
    run_summary(title, rows | _missing_rows(evaluations), [opens])


def _request(evaluator: Evaluator, cfg: DictConfig, overrides: Sequence[str]) -> CompatibilityRequest:
    """The run that would be trained with each reference: a run's policy brings its data and model options."""
    subject, run = subject_of(cfg.policy, None, cfg.trust)
    parts = evaluator.parts(run, cfg.policy)
    folder = _run_at(cfg.policy) or Path(cfg.policy)
    own = run is None or evaluator.own_data
    typed = overrides if own else read_summary(folder, f"policy={cfg.policy}")["overrides"]
    path = subject.model.path
    words = [] if path == "lab:initial" else ["model=pretrained", *typed_words({"model.path": path})]
    if run is not None:
        changed = {name: run.model[name] for name in ("dtype", "attention") if run.model[name] != "auto"}
        words += typed_words({f"model.{name}": value for name, value in changed.items()})
    seed = evaluator.data_seed(subject)
    words += typed_words({"seed": seed}) if seed else []
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    return CompatibilityRequest(
        name=subject.name if run is not None else title_of(cfg.policy),
        words=(*words, *(word for word in typed if word.lstrip("+").startswith("data"))),
        data=parts["data"],
        tracking=parts["tracking"],
        options=CompatibilityOptions(**config["compatibility"]),
        seed=cfg.seed,
        output_dir=cfg.output_dir,
        config=config,
    )


def _export(evaluator: Evaluator, cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Write the file of `export=` from the evaluation of `policy=`."""
    export = component("export", cfg.export, evaluator.choices["export"])
    check_export(export, words(overrides), cfg.policy)
    subject, run = subject_of(cfg.policy, cfg.output_dir, cfg.trust)
    run_export(subject, export, lambda: evaluator.settings(subject, evaluator.parts(run, cfg.policy)))


def _win_rates(cfg: DictConfig, choices: dict[str, str]) -> WinRateRequest:
    """What is asked about models that were judged before."""
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    annotations, tracking = annotation_words(config["annotations"]), components(cfg, choices, "evaluate")["tracking"]
    return WinRateRequest(annotations, cfg.df_gamed, tracking, cfg.seed, cfg.output_dir, config)


def _merge(cfg: DictConfig) -> MergeRequest:
    """Which policies are averaged, and how."""
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    asked = (config[key] for key in ("policies", "weights", "shares", "output_dir"))
    return MergeRequest(*asked, find=lambda path: subject_of(path, None, cfg.trust)[0])


def run_evaluation(cfg: DictConfig, choices: dict[str, str], overrides: Sequence[str]) -> None:
    """Evaluate `policy=` or `sweep=`, or look at `references=` or at `annotations=`. Raises ValueError for what does
    not go together."""
    check_stage(cfg, overrides)
    refuse_credentials(OmegaConf.to_container(cfg, resolve=True), "")
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
    if cfg.stage == MERGE:
        run_merge(_merge(cfg))
        return
    if (cfg.policy is None) == (cfg.sweep is None) and cfg.stage != EXPORT:
        raise ValueError("give policy=<run or model folder> or sweep=<multirun folder, runs, patterns>, one of them")
    if cfg.sweep is None and "n_jobs" in words(overrides):
        raise ValueError("n_jobs has no effect: it is how many policies of sweep=... are evaluated at the same time")
    keep_memory()
    look_after_cache()
    evaluator = Evaluator(cfg, choices, overrides)
    if cfg.stage == EXPORT:
        _export(evaluator, cfg, overrides)
        return
    (_evaluate_policy if cfg.sweep is None else _evaluate_sweep)(evaluator, cfg)


# --- the stages that stand apart, and which words of the command line have an effect on which stage


COMPATIBILITY, PUSH = "compatibility", "push"
STAGES_OF = {  # where options that belong to single stages have an effect
    "degeneration": ("all", "score"),
    "judge": ("all", "judge"),
    "diagnostic": ("all", "diagnose"),
    "annotations": (WINRATE,),
    "df_gamed": (WINRATE,),
    "policies": (MERGE,),
    "weights": (MERGE,),
    "shares": (MERGE,),
    "hub": (PUSH,),
    "export": (EXPORT,),
    "prompts": ("all", "generate", "score", "judge"),  # the baseline answers the same
}


def words(overrides: Sequence[str]) -> set[str]:
    """The top-level keys that the command line says something about."""
    return {override.lstrip("+").partition("=")[0].partition(".")[0] for override in overrides}


def check_stage(cfg: Any, overrides: Sequence[str]) -> None:
    """Raise ValueError for options that have no effect on the stage, and for those it lacks."""
    given = words(overrides)
    for key, stages in STAGES_OF.items():
        if key in given and cfg.stage not in stages:
            raise ValueError(f"{key} has no effect on stage={cfg.stage}: it belongs to stage={' and '.join(stages)}")
    if cfg.stage == "judge" and cfg.judge is None:
        raise ValueError("stage=judge needs judge=<who compares the answers>, such as judge=alpaca_eval")
    if cfg.stage == WINRATE:
        check_words(given)
    if cfg.stage == MERGE:
        check_merge_words(given)
    if cfg.stage == PUSH and (others := given - {"policy", "stage", "hub"}):
        raise ValueError(f"{min(others)} has no effect on stage=push; leave it out")
    if cfg.stage == EXPORT and cfg.export is None:
        raise ValueError("stage=export needs export=<format>, such as export=alpaca_eval")
    if cfg.stage == COMPATIBILITY:
        _check_compatibility(cfg, given)
        return
    for key in ("references", "compatibility"):
        if key in given:
            raise ValueError(f"{key} has no effect: it belongs to stage=compatibility")


def _check_compatibility(cfg: Any, given: set[str]) -> None:
    for key in ("baseline", "sweep", "reference", "prompts", "generation", "scorer"):
        if key in given:
            hint = "candidates are listed in references=[...]" if key == "reference" else "leave it out"
            raise ValueError(f"{key} has no effect on stage=compatibility; {hint}")
    if cfg.policy is None:
        raise ValueError("stage=compatibility needs policy=<run or model folder>")
    if not cfg.references:
        raise ValueError("stage=compatibility needs references, such as references='[initial, none, some/model]'")


# --- what `policy=` names


NEEDED = ("beta", "objective", "reference", "identities", "steps", "git", "versions", "data")  # of a run's record


def subject_of(path: str, output_dir: str | None, trust: Any) -> tuple[PolicyToEvaluate, DictConfig | None]:
    """What `policy=` names, and the configuration of its run if it is one or a checkpoint of one; `trust` are the
    servers that it may ask. ValueError for a run without a policy."""
    named = Path(path).expanduser()
    folder = _run_at(path) or named
    average = read_average(named)
    if average is not None and folder == named:
        if average.run is not None:
            say(f"policy={path}: its run {average.run} is not there, so nothing is compared with the initial policy")
        return _average_alone(named, average, output_dir), None
    if not (folder / SUMMARY).is_file():
        name = path.removeprefix(SCHEME).rstrip("/").rpartition("/")[2]
        return PolicyToEvaluate(name, Path(output_dir or f"outputs/evaluations/{name}"), ModelPath(path)), None
    option = f"policy={path}"
    if not (folder / "policy" / "config.json").is_file():
        status = read_summary(folder, option)["status"]
        raise ValueError(f"{option}: the run is {status} and has saved no policy yet")
    run = read_run(folder, option, NEEDED)
    config, summary = run.config, run.summary
    check_unchanged(folder, option)
    check_servers(config, trust, option)
    run = _trained_run(folder, config, summary)
    if average is not None:
        return replace(_average_alone(named, average, output_dir), run=run), config
    if folder != named:
        return _at_checkpoint(run, named, output_dir), config
    results, model = Path(output_dir or folder / RESULTS), ModelPath(str(folder / "policy"))
    return PolicyToEvaluate(folder.name, results, model, run), config


def _run_at(path: str) -> Path | None:
    """The run that a checkpoint belongs to, or as whose policy an average is evaluated."""
    named = Path(path).expanduser()
    return checkpoint.run_of(named) or run_averaged_in(named)


def _average_alone(folder: Path, average: Average, output_dir: str | None) -> PolicyToEvaluate:
    """An average, its results beside its weights; named by its folder, of a path by that of the path too."""
    names = folder.resolve().parts[-1 if average.share is None else -2 :]
    return PolicyToEvaluate(" ".join(names), Path(output_dir or folder / RESULTS), ModelPath(str(folder)))


def _at_checkpoint(run: TrainedRun, saved: Path, output_dir: str | None) -> PolicyToEvaluate:
    """The policy as a checkpoint of its run has it."""
    summary = {**run.summary, "steps": checkpoint.read_state(saved)["step"], "best": None}
    results = Path(output_dir or results_of_checkpoint(saved))
    at_hand = replace(run, summary=summary, checkpoint=saved)
    return PolicyToEvaluate(f"{run.folder.name} {saved.name}", results, ModelPath(str(saved)), at_hand)


def _trained_run(folder: Path, config: DictConfig, summary: Mapping[str, Any]) -> TrainedRun:
    """A run as its policy has it, which may be an earlier one than the last."""
    best, saved = summary.get("best") or {}, checkpoint.complete_in(folder / "checkpoints")
    if isinstance(best.get("step"), int):
        summary = {**summary, "steps": best["step"]}
        saved = [path for path in saved if path.name == checkpoint.name_of(best["step"])]
    given = OmegaConf.to_container(config.model)
    assert isinstance(given, dict)
    adapter = AdapterOptions(**{name: given[name] for name in configuration(AdapterOptions) if name in given})
    return TrainedRun(
        folder,
        summary,
        ModelPath(
            config.model.path,
            _text_of(folder, config),
            adapter.adapter,
            adapter.below,
            revision=config.model.get("revision"),
        ),
        component("reference", config.reference, summary["choices"]["reference"]),
        saved[-1] if saved else None,
        adapter,
    )


def _text_of(run: Path, config: DictConfig) -> str | None:
    """The folder whose tokenizer the initial policy is used with: the run's, where the run set a template."""
    changed = config.model.template != "auto" or config.model.template_options or config.model.max_length
    return str(run / "policy") if changed else None
