"""Where a run's numbers go besides `metrics.jsonl`.

A tracker is opened with a `RunInfo` (left of its star) and its options (right of it), never ends a run by failing, and
is closed with `finish`.

Runs leave artifacts behind, and are measured against some. Their names carry the id under which the training is
tracked, so that a policy, its answers and its evaluations are found together, and every evaluation of the same policy
is a version of the same artifact.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What a tracker is told about a run.

    `directory` exists; what the tracker stores goes below it. `group` joins the runs of a multirun, and an evaluation
    with the training it measures. With `resume` the run goes on under the id it had. With `runs_below` those that it
    joins lie below its folder.
    """

    directory: Path
    config: dict[str, Any]
    name: str
    group: str | None
    job_type: str
    resume: bool
    runs_below: bool = False


@dataclass(frozen=True, slots=True)
class Artifact:
    """Something that a run made or used, kept under a name of its own in versions.

    `files` are small and go along as they are. `weights` are files that stay where they are, and are known by path and
    digest. `references` are names and the URIs of what is known by its digest alone.
    """

    name: str
    kind: str
    metadata: Mapping[str, Any]
    files: Sequence[Path] = ()
    weights: Sequence[Path] = ()
    references: Mapping[str, str] = field(default_factory=dict)


@runtime_checkable
class Tracker(Protocol):
    """A place to log to. No method raises because the service behind it fails."""

    url: str | None  # page of the run, if it has one
    location: str | None  # what to show the user: the page, or the folder with what is still to be uploaded

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Numbers at an optimiser step; several calls may name the same step."""
        ...

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, step: int) -> None:
        """A table at an optimiser step, such as sample generations."""
        ...

    def scatter(
        self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, x: str, y: str, title: str
    ) -> None:
        """A table, and two of its columns against each other."""
        ...

    def histogram(self, name: str, values: Iterable[float], *, step: int) -> None:
        """The distribution of values at an optimiser step; those that are not finite are left out."""
        ...

    def image(self, name: str, path: Path) -> None:
        """A picture from a file."""
        ...

    def file(self, path: Path) -> None:
        """A file as it is now, such as a report."""
        ...

    def artifact(self, artifact: Artifact) -> None:
        """A new version of an artifact, as its files are now."""
        ...

    def summary(self, values: Mapping[str, Any]) -> None:
        """Values that describe the run as a whole, by which runs are compared."""
        ...

    def finish(self, exit_code: int) -> None:
        """Close; 0 means that the run did what it was asked to. Further calls do nothing."""
        ...


# --- `tracking=none`: no service; `metrics.jsonl` is written all the same


class NoTracker:
    """Takes everything and keeps nothing."""

    url: str | None = None
    location: str | None = None

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Nothing."""

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, step: int) -> None:
        """Nothing."""

    def scatter(
        self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, x: str, y: str, title: str
    ) -> None:
        """Nothing."""

    def histogram(self, name: str, values: Iterable[float], *, step: int) -> None:
        """Nothing."""

    def image(self, name: str, path: Path) -> None:
        """Nothing."""

    def file(self, path: Path) -> None:
        """Nothing."""

    def artifact(self, artifact: Artifact) -> None:
        """Nothing."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Nothing."""

    def finish(self, exit_code: int) -> None:
        """Nothing."""


def no_tracker(run: RunInfo) -> Tracker:
    """A tracker that logs nowhere."""
    return NoTracker()


# --- what runs leave behind and what they were measured against: names, kinds, contents


SCHEME = "dpo-ref"  # of URIs that name something by its digest, wherever its values are stored
ABOUT = ("objective", "reference", "beta", "seed", "steps", "identities")  # of a run's summary
GENERATIONS = "generations.jsonl"
NUMBERS = "*.json*"


def policy_artifact(training: str, folder: Path, summary: Mapping[str, Any]) -> Artifact:
    """A trained policy's folder: a path and a digest for each of its files."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return Artifact(f"policy-{training}", "model", {name: summary[name] for name in ABOUT}, weights=files)


def reference_artifact(summary: Mapping[str, Any]) -> Artifact:
    """What the policy was trained against: the digest of what the reference is, and that of the values it gave.

    The table itself stays in the cache: any machine that has the model can make it again.
    """
    identities = summary["identities"]
    identity, values = identities["loss_reference"], identities["loss_reference_values"]
    links = {"identity": f"{SCHEME}://reference/{identity}"}
    links |= {"values": f"{SCHEME}://reference/{identity}/{values}"} if values else {}
    about = {"reference": summary["reference"], "provenance": summary["provenance"], **identities}
    return Artifact(f"reference-{identity[:16]}", "reference-table", about, references=links)


def evaluation_artifacts(policy: str, folder: Path, metadata: Mapping[str, Any]) -> Sequence[Artifact]:
    """The answers of an evaluation, and every number about them. `policy` names the evaluated policy."""
    files = sorted(path for path in folder.glob(NUMBERS) if path.name != GENERATIONS and path.name[0] != ".")
    return (
        Artifact(f"generations-{policy}", "generations", metadata, files=[folder / GENERATIONS]),
        Artifact(f"evaluation-{policy}", "evaluation", metadata, files=files),
    )
