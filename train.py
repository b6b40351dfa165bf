"""Train a policy on preferences: `python train.py objective=dpo beta=0.02 reference=initial data=lab`."""

import sys
from pathlib import Path

from dpo_ref.cli import stopping

if __name__ == "__main__":
    stopping.end_at_once()

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from dpo_ref.cli import command_line, resume_sweep, schemas
from dpo_ref.tracking.terminal import guard_streams

schemas.register()


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> object:
    """One run, or one job of a sweep: a job that fails leaves its status behind and lets the others run; its end is
    for `cli/sweep.py`."""
    from dpo_ref.cli.run_folder import Job
    from dpo_ref.cli.train import STOPPED, run_job

    launched = HydraConfig.get()
    overrides = list(launched.overrides.task)
    choices = {group: choice for group, choice in launched.runtime.choices.items() if choice is not None}
    if launched.mode == RunMode.MULTIRUN:
        directory = Path(launched.runtime.output_dir)
        ended = run_job(cfg, Job(directory, overrides, choices, sweep=directory.parent.name))
        if ended == STOPPED:
            raise KeyboardInterrupt  # the whole sweep
        return ended
    directory = schemas.run_directory(cfg.output_dir, choices.get("experiment", "default"), overrides)
    ended = run_job(cfg, Job(directory, overrides, choices, sweep=None))
    if ended.code:
        sys.exit(ended.code)
    return ended


if __name__ == "__main__":
    guard_streams()
    with stopping.in_one_line():
        sys.argv[1:] = command_line.checked(resume_sweep.written_out(sys.argv[1:]), "train")
        schemas.note_swept_keys(sys.argv[1:])
        main()
