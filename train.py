"""Train a policy on preferences: `python train.py objective=dpo beta=0.02 reference=initial data=lab`."""

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from dpo_ref.cli import command_line, schemas

schemas.register()


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> None:
    """One run, or one job of a sweep: a job that fails leaves its status behind and lets the others run."""
    from dpo_ref.cli.train import Job, run_job

    launched = HydraConfig.get()
    overrides = list(launched.overrides.task)
    choices = {group: choice for group, choice in launched.runtime.choices.items() if choice is not None}
    if launched.mode == RunMode.MULTIRUN:
        directory = Path(launched.runtime.output_dir)
        run_job(cfg, Job(directory, overrides, choices, sweep=directory.parent.name))
        return
    directory = schemas.run_directory(cfg.output_dir, choices.get("experiment", "default"), overrides)
    code = run_job(cfg, Job(directory, overrides, choices, sweep=None))
    if code:
        sys.exit(code)


if __name__ == "__main__":
    schemas.note_swept_keys(sys.argv[1:])
    try:
        command_line.check_command_line(sys.argv[1:], "train")
    except ValueError as error:
        sys.exit(f"error: {error}")
    main()
