"""Where a run's numbers go, and what the terminal shows."""
