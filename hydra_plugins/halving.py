"""`hydra/sweeper=halving` where Hydra looks for it: it takes sweepers from this package alone."""

from dataclasses import dataclass

from hydra.core.config_store import ConfigStore

from dpo_ref.cli import halving


class HalvingSweeper(halving.Halving):
    """Runs the jobs of a multirun rung by rung."""


@dataclass
class HalvingConfig:
    """`hydra/sweeper=halving`."""

    _target_: str = "hydra_plugins.halving.HalvingSweeper"
    params: dict[str, str] | None = None  # keys to sweep over, beside those of the command line


ConfigStore.instance().store(group="hydra/sweeper", name="halving", node=HalvingConfig, provider="dpo_ref")
