"""`hydra/launcher=side_by_side` where Hydra looks for it: it takes launchers from this package alone."""

from dpo_ref.cli import side_by_side


class SideBySideLauncher(side_by_side.Launching):
    """Runs the jobs of a multirun side by side."""
