"""Weights & Biases, so that it can be left on: it asks nothing, waits a bounded time and never ends a run.

Measured with wandb 0.31:
- `wandb.init` without a key would ask on a terminal, so it is only called online when a key is configured.
- A service that cannot be reached makes `init` raise after `init_timeout`; the run's id then stays taken in wandb's
  background process until `teardown`.
- `wandb.log(step=...)` drops what comes late; with `step` as a logged value and every metric drawn over it, a
  held-out evaluation may come after the training step it belongs to.
- Offline, every start under one id is a folder of its own; `wandb sync` joins them, in order of start, to one run. A
  resumed run logs the steps since its checkpoint twice, with equal values.
- The agent of a `wandb sweep` has given its run an id, and looks for the run's numbers under no other.
- Logging an artifact, and so a plain table, asks the service and waits for the answer; `Media.bind_to_run` first makes
  a table a file of the run like any other, which also keeps an offline run in one folder.
- An artifact's files are copied to a staging folder outside the run, and an offline run keeps the path of that copy
  only. Copies below the run's folder, added as immutable, keep an offline run in one place.
- A service that has vanished makes an artifact wait 19 s; after the first that fails, the others are left out.
"""

import contextlib
import io
import math
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple
from uuid import uuid4

from dpo_ref.files.writing import write_text
from dpo_ref.tracking.redaction import Redactor, without_keys
from dpo_ref.tracking.terminal import OF_SCRIPTS, say, say_of_one_run, visible
from dpo_ref.tracking.tracker import Artifact, NoTracker, RunInfo, Tracker

# --- starting one


Mode = Literal["online", "offline", "disabled"]
LONGEST_NAME = 128  # characters; the service refuses runs with longer names, groups or job types
QUIET_MODES: dict[str, Mode] = {"offline": "offline", "dryrun": "offline", "disabled": "disabled"}
FORBIDDEN_IN_PROJECT = "/\\#?%:"
DRAWN_OVER_STEP = ("train/*", "eval/*", "evaluation/*", "*")  # the optimiser step a number belongs to


def known_id(directory: Path, job_type: str) -> str | None:
    """The id under which the folder's run of this type was tracked last; None if it never was, or what stands there is
    none."""
    path = directory / f"wandb_id_{job_type}"
    text = path.read_bytes().decode(errors="replace").strip() if path.is_file() else ""
    return text if re.fullmatch(r"[\w-]+", text) else None


def _new_id(job_type: str) -> str:
    """The id that the agent of a `wandb sweep` has given the training it started, else one of our own."""
    agent_id = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") and job_type == "train" else None
    return agent_id or uuid4().hex[:12]


def run_id(run: RunInfo) -> str:
    """The id a resumed run had, else a new one, kept in the run's folder beside what it tracked."""
    previous = known_id(run.directory, run.job_type)
    if run.resume and previous:
        return previous
    path, new = run.directory / f"wandb_id_{run.job_type}", _new_id(run.job_type)
    write_text(path, new)
    return new


def _available(mode: str) -> tuple[Mode, str]:
    """online, offline or disabled, whichever the user's settings allow, and the reason.

    Asks neither the user nor the network; `mode=online` looks past a WANDB_MODE that says otherwise.
    """
    import wandb

    try:
        overrides = wandb.Settings(silent=True, mode="online") if mode == "online" else wandb.Settings(silent=True)
        configured = wandb.setup(overrides).settings.mode
        if configured in QUIET_MODES:
            return QUIET_MODES[configured], f"WANDB_MODE (or `wandb {configured}`) says so"
        has_key = wandb.login(prompt=False, verify=False)
    except Exception as error:  # such as a key of the wrong form
        return "offline", f"the configured API key is of no use ({one_line(error)})"
    return ("online", "") if has_key else ("offline", "no API key is configured")


def _start(arguments: dict[str, Any], options: dict[str, Any], mode: Mode) -> Any:
    """A started run in which every metric is drawn over the optimiser step."""
    import wandb

    run = wandb.init(**arguments, mode=mode, settings=wandb.Settings(**options))
    run.define_metric("step", hidden=True)
    for names in DRAWN_OVER_STEP:
        run.define_metric(names, step_metric="step")
    return run


def _check(project: str, tags: Sequence[str], timeout: int) -> None:
    if not 0 < len(project) <= LONGEST_NAME or set(project) & set(FORBIDDEN_IN_PROJECT):
        raise ValueError(
            f"tracking.project={project!r} must have 1 to {LONGEST_NAME} characters, none of {FORBIDDEN_IN_PROJECT}"
        )
    if any(not 0 < len(tag) <= 64 for tag in tags):
        raise ValueError(f"tracking.tags={list(tags)}: every tag must have 1 to 64 characters")
    if timeout <= 0:
        raise ValueError(f"tracking.timeout={timeout} must be positive; it is in seconds")


def _offline_runs(run: RunInfo) -> str:
    """What was written offline, for a shell: of a sweep, its jobs and their evaluations too."""
    if run.runs_below:
        return f"$(find {shlex.quote(str(run.directory))} -name 'offline-run-*')"
    return f"{shlex.quote(str(run.directory / 'wandb'))}/offline-run-*"


def _open(run: RunInfo, start: Callable[[Mode], Any], mode: Mode, why: str, upload_weights: bool) -> Tracker:
    """The tracker, online if `mode` is and the service answers; says in one line which it became."""
    directory = run.directory
    if mode == "online":
        try:
            tracker = WandbTracker(start("online"), directory, upload_weights)
            announce(f"online at {tracker.location}")
            return tracker
        except Exception as error:  # no network, a refused key, a service in trouble: none is the run's concern
            why = f"the service did not answer ({one_line(error)})"
            end_service()
            hide_in_logs(directory)
    try:
        tracker = WandbTracker(start("offline"), directory, upload_weights)
    except Exception as error:
        announce(f"off ({one_line(error)}); metrics.jsonl has the run's numbers")
        end_service()
        return NoTracker()
    say_of_one_run(
        f"W&B: offline, because {' '.join(why.split())}; upload later with: wandb sync {_offline_runs(run)}"
    )
    return tracker


def wandb_tracker(
    run: RunInfo,
    *,
    project: str = "dpo_ref",
    entity: str | None = None,
    mode: Literal["auto", "online", "offline"] = "auto",
    tags: list[str] | None = None,
    timeout: int = 30,
    upload_weights: bool = False,
) -> Tracker:
    """Start tracking a run with Weights & Biases; says in one line where it goes.

    `auto` is online when an API key is configured and offline at once otherwise (WANDB_MODE, if set, decides).
    A service that does not answer within `timeout` seconds leaves the run offline, under the same id; `timeout` also
    bounds the wait for uploads at the end. With `upload_weights` the files of trained models are sent, which else are
    known to the service by path and digest. Credentials in the configuration are not handed on (`redaction`). Raises
    ValueError for `mode=online` without a key and for names that the service would refuse.
    """
    tags = tags or []
    _check(project, tags, timeout)
    actual_mode, why = ("offline", "tracking.mode=offline") if mode == "offline" else _available(mode)
    if mode == "online" and actual_mode != "online":
        raise ValueError(f"tracking.mode=online: {why}; run `wandb login` first, or write tracking.mode=offline")
    if actual_mode == "disabled":
        announce(f"off, because {why}")
        return NoTracker()
    redactor = Redactor(run.config)
    arguments = {
        "project": project, "entity": entity, "tags": list(map(redactor.text, tags)),
        "name": redactor.text(run.name)[:LONGEST_NAME], "group": redactor.text(run.group or "")[:LONGEST_NAME] or None,
        "job_type": run.job_type, "config": redactor.tree(run.config), "dir": str(run.directory),
        "id": run_id(run), "resume": "allow", "reinit": "create_new", "allow_val_change": True,
    }  # fmt: skip
    options = {
        "console": "off", "silent": True, "init_timeout": timeout, "finish_timeout": timeout,
        "finish_timeout_raises": True,
        "x_disable_meta": redactor.found,  # the metadata holds the command line, and so perhaps the credential
    }  # fmt: skip
    return _open(run, partial(_start, arguments, options), actual_mode, why, upload_weights)


# --- a started run as a tracker: what it is told becomes history, summary, media, files and artifacts


LONGEST_ARTIFACT_NAME = 128  # characters


LONGEST_CELL = 20_000  # characters


def _shown(text: str) -> str:
    """A text of a table: what cannot be seen is spelled, and the middle of an endless one is left out."""
    half = LONGEST_CELL // 2
    short = text if len(text) <= LONGEST_CELL else f"{text[:half]} [...] {text[-half:]}"
    return visible(short, OF_SCRIPTS)


def announce(text: str) -> None:
    """One line to the user about W&B."""
    say(f"W&B: {' '.join(text.split())}")


def one_line(error: Exception) -> str:
    """An error in one line, without keys that the service may have sent back."""
    return f"{type(error).__name__}: {without_keys(str(error))[:200]}"


class WandbTracker:
    """A started `wandb.Run`. A failing call is left out, and the first of them reported in one line."""

    def __init__(self, run: Any, directory: Path, upload_weights: bool) -> None:
        self.url: str | None = None if run.offline else run.url or None
        self.location: str | None = self.url or str(directory / "wandb")
        self._run = run
        self._directory = directory
        self._upload_weights = upload_weights
        self._artifacts_arrive = True
        self._reported = False
        self._finished = False

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Numbers at an optimiser step."""
        self._attempt(lambda: self._run.log({"step": step, **metrics}))

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, step: int) -> None:
        """A table of at most 10,000 rows; a value that is no number, text or None is shown as text."""
        self._attempt(lambda: self._run.log({"step": step, name: self._table(name, columns, rows, step)}))

    def scatter(
        self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, x: str, y: str, title: str
    ) -> None:
        """A table as `<name>_table`, and a picture of two of its columns; rows without numbers there are left out."""
        import wandb

        def write() -> None:
            table = self._table(f"{name}_table", columns, rows, 0)
            self._run.log({name: wandb.plot.scatter(table, x, y, title=title)})

        self._attempt(write)

    def _table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], step: int) -> Any:
        import wandb

        def cell(value: Any) -> Any:
            if isinstance(value, float) and not math.isfinite(value):
                return None
            return value if value is None or isinstance(value, int | float) else _shown(str(value))

        table = wandb.Table(columns=list(columns), data=[[cell(value) for value in row] for row in rows])
        table.bind_to_run(self._run, name, step)
        return table

    def histogram(self, name: str, values: Iterable[float], *, step: int) -> None:
        """The distribution of the finite values, in at most 64 bins; nothing if there are none."""
        import wandb

        finite = [value for value in map(float, values) if math.isfinite(value)]
        if finite:
            self._attempt(lambda: self._run.log({"step": step, name: wandb.Histogram(finite)}))

    def image(self, name: str, path: Path) -> None:
        """A picture from a file."""
        import wandb

        self._attempt(lambda: self._run.log({name: wandb.Image(str(path))}))

    def file(self, path: Path) -> None:
        """A file as it is now; `report.html` opens in the run's Files tab."""
        self._attempt(lambda: self._run.save(str(path), base_path=str(path.parent), policy="now"))

    def artifact(self, artifact: Artifact) -> None:
        """Its small files as copies in the run's folder, its weights by path and digest or, if asked for, uploaded."""
        if self._artifacts_arrive:
            self._artifacts_arrive = self._attempt(lambda: self._run.log_artifact(self._build(artifact)))

    def _build(self, artifact: Artifact) -> Any:
        import wandb

        name = re.sub(r"[^A-Za-z0-9_.-]+", "_", artifact.name)[:LONGEST_ARTIFACT_NAME]
        upload = wandb.Artifact(name, artifact.kind, metadata=dict(artifact.metadata))
        folder = Path(self._run.dir).resolve().parent / "artifacts" / name
        folder.mkdir(parents=True, exist_ok=True)
        for path in artifact.files:
            copy = shutil.copy2(path, folder / path.name)
            upload.add_file(str(copy), name=path.name, policy="immutable", skip_cache=True)
        for path in artifact.weights:
            if self._upload_weights:
                upload.add_file(str(path.resolve()), name=path.name, policy="immutable", skip_cache=True)
            else:
                upload.add_reference(path.resolve().as_uri(), name=path.name)
        with contextlib.redirect_stderr(io.StringIO()):  # wandb warns that it cannot look behind a URI of our own
            for entry, uri in artifact.references.items():
                upload.add_reference(uri, name=entry, checksum=False)
        return upload

    def summary(self, values: Mapping[str, Any]) -> None:
        """Values that describe the whole run."""
        self._attempt(lambda: self._run.summary.update(dict(values)))

    def finish(self, exit_code: int) -> None:
        """Close the run; waits for uploads no longer than the tracker's timeout."""
        if self._finished:
            return
        self._finished = True
        try:
            self._run.finish(exit_code=exit_code)
        except TimeoutError:
            folder = shlex.quote(str(Path(self._run.dir).parent))
            announce(f"not everything was uploaded in time; later: wandb sync --include-online {folder}")
        except Exception as error:  # whatever it is, the run itself is done
            self._report(error)
            end_service()
        hide_in_logs(self._directory)

    def _attempt(self, call: Callable[[], object]) -> bool:
        """Whether it worked."""
        try:
            call()
        except Exception as error:  # a tracker that fails must not end hours of training
            self._report(error)
            return False
        return True

    def _report(self, error: Exception) -> None:
        if not self._reported:
            announce(f"logging failed ({one_line(error)}); the run goes on, metrics.jsonl has its numbers")
        self._reported = True


def end_service() -> None:
    """Stop wandb's background process, which still holds the id of a run that failed to start or to end."""
    import wandb

    with contextlib.suppress(Exception):  # it may be what failed
        wandb.teardown()


def hide_in_logs(directory: Path) -> None:
    """Take keys out of wandb's own logs in a run's folder, where it writes what a service answers."""
    for path in directory.glob("wandb/*/logs/*.log"):
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
        if (clean := without_keys(text)) != text:
            path.write_text(clean, encoding="utf-8", errors="surrogateescape")


# --- the dashboard of a project, as a view that is made by a program: what it shows is handed in


DASHBOARD = "Reference policies"
NO_WORKSPACES = "the dashboard needs wandb-workspaces: pip install -r requirements-wandb.txt"
GROUPED_BY = ("training.objective", "training.reference", "training.beta")  # of both kinds of run


class Curves(NamedTuple):
    """Metrics over the optimiser step, by the keys they are logged under."""

    title: str
    keys: Sequence[str]

    def panel(self, panels: Any) -> Any:
        """As the module `panels` of wandb-workspaces has it."""
        return panels.LinePlot(title=self.title, x="step", y=list(self.keys))


class Plane(NamedTuple):
    """Policies as points of two metrics, by their keys in a run's summary."""

    title: str
    x: str
    y: str

    def panel(self, panels: Any) -> Any:
        """As the module `panels` of wandb-workspaces has it."""
        x, y = panels.SummaryMetric(self.x), panels.SummaryMetric(self.y)
        return panels.ScatterPlot(title=self.title, x=x, y=y)


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the view that can be folded."""

    name: str
    panels: Sequence[Curves | Plane]
    is_open: bool = True


def workspace(entity: str, project: str, sections: Sequence[Section]) -> Any:
    """The view, not saved yet. Raises ValueError where wandb-workspaces is not installed."""
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise ValueError(NO_WORKSPACES) from error

    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=DASHBOARD,
        sections=[
            workspaces.Section(
                name=section.name, panels=[panel.panel(panels) for panel in section.panels], is_open=section.is_open
            )
            for section in sections
        ],
        settings=workspaces.WorkspaceSettings(x_axis="step", max_runs=50),
        runset_settings=workspaces.RunsetSettings(groupby=[workspaces.Config(name) for name in GROUPED_BY]),
    )


def save_dashboard(entity: str, project: str, sections: Sequence[Section]) -> str:
    """Store the view with the service; its address. Raises ValueError, with what to type, where that fails."""
    view = workspace(entity, project, sections)
    try:
        return str(view.save().url)
    except Exception as error:  # no key, no network, no such project: all are the user's to mend
        reason = " ".join(without_keys(str(error)).split())[:200]
        raise ValueError(
            f"the view was not saved ({type(error).__name__}: {reason}). It needs an API key (`wandb login`), the "
            f"network and runs in {entity}/{project}; offline runs are uploaded with `wandb sync`"
        ) from error
