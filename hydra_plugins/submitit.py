"""`hydra/launcher=submitit_local` and `submitit_slurm` where Hydra looks for them: this package alone."""

from dpo_ref.cli import launchers


class LocalLauncher(launchers.LocalLaunching):
    """Runs the jobs of a multirun in processes of this machine."""


class SlurmLauncher(launchers.SlurmLaunching):
    """Runs the jobs of a multirun on a SLURM cluster."""
