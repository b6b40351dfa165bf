"""`hydra/sweeper=unfinished` where Hydra looks for it: it takes sweepers from this package alone."""

from dataclasses import dataclass

from hydra.core.config_store import ConfigStore

from dpo_ref.cli import resume_sweep


class UnfinishedSweeper(resume_sweep.UnfinishedJobs):
    """Runs the jobs of a multirun that have not come to their ends."""


@dataclass
class UnfinishedConfig:
    """`hydra/sweeper=unfinished`."""

    _target_: str = "hydra_plugins.unfinished.UnfinishedSweeper"
    params: dict[str, str] | None = None  # keys to sweep over, beside those of the command line


ConfigStore.instance().store(
    group="hydra/sweeper", name=resume_sweep.SWEEPER, node=UnfinishedConfig, provider="dpo_ref"
)
