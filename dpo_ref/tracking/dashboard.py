"""A dashboard of a W&B project, as a view that is made by a program. What it shows is handed in."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

NAME = "Reference policies"
MISSING = "the dashboard needs wandb-workspaces: pip install -r requirements-wandb.txt"
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
        raise ValueError(MISSING) from error

    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=[
            workspaces.Section(
                name=section.name, panels=[panel.panel(panels) for panel in section.panels], is_open=section.is_open
            )
            for section in sections
        ],
        settings=workspaces.WorkspaceSettings(x_axis="step", max_runs=50),
        runset_settings=workspaces.RunsetSettings(groupby=[workspaces.Config(name) for name in GROUPED_BY]),
    )


def save(entity: str, project: str, sections: Sequence[Section]) -> str:
    """Store the view with the service; its address. Raises ValueError, with what to type, where that fails."""
    view = workspace(entity, project, sections)
    try:
        return str(view.save().url)
    except Exception as error:  # no key, no network, no such project: all are the user's to mend
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the view was not saved ({type(error).__name__}: {reason}). It needs an API key (`wandb login`), the "
            f"network and runs in {entity}/{project}; offline runs are uploaded with `wandb sync`"
        ) from error
