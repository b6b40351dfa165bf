"""What happens at the end of a multirun: every job is evaluated, and one table and one plot are made."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

ENTRY_POINT = Path(__file__).parents[2] / "evaluate.py"


class SweepReport(Callback):
    """Runs `evaluate.py sweep=<folder>` when a multirun's jobs are done.

    Jobs that fail do not raise (see `train.run_job`), so this is called whatever they came to; after a kill the same
    command can be typed by hand.
    """

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Evaluate in a process of its own, so that no memory of the last job is held."""
        if config.stage != "train":
            return
        if _print_bandits(Path(config.hydra.sweep.dir)):
            return
        tracking = config.hydra.runtime.choices["tracking"]
        command = [sys.executable, str(ENTRY_POINT), f"sweep={config.hydra.sweep.dir}", f"tracking={tracking}"]
        print("evaluating the sweep; by hand: python evaluate.py " + " ".join(command[2:]), flush=True)
        subprocess.run(command, check=False)


def _print_bandits(folder: Path) -> bool:
    """Print the table of the jobs that trained no language model; whether there are any."""
    from dpo_ref.cli.bandit import print_sweep

    return print_sweep(folder)
