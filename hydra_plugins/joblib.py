"""`hydra/launcher=joblib` where Hydra looks for it: it takes launchers from this package alone."""

from dpo_ref.cli import launchers


class JoblibLauncher(launchers.JoblibLaunching):
    """Runs the jobs of a multirun in joblib's processes."""
