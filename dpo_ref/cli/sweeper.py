"""What our sweepers share: the jobs that a command line sweeps over, and the launcher that runs them."""

from collections.abc import Mapping, Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from dpo_ref.cli.side_by_side import job_config


class JobSweeper(Sweeper):
    """Sweeps over the values of a command line and those that `hydra.sweeper.params` has."""

    def __init__(self, params: Mapping[str, str] | None) -> None:
        self._params = params or {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """What Hydra hands over before the sweep."""
        self._config, self._loader = config, hydra_context.config_loader
        self._launcher: Any = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def swept(self, arguments: Sequence[str]) -> tuple[list[Override], list[list[str]]]:
        """The overrides, and the words of each job."""
        words = [*(f"{key}={value}" for key, value in self._params.items()), *arguments]
        overrides = OverridesParser.create(config_loader=self._loader).parse_overrides(words)
        (lists,) = BasicSweeper.split_arguments(overrides, None)
        return overrides, [list(job) for job in lists]

    def job_config(self, index: int, words: Sequence[str]) -> DictConfig:
        """The tree of a job, with its folder."""
        return job_config(self._loader, self._config, index, list(words))
