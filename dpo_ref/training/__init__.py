"""From groups to a trained policy: rounds, steps, metrics, and the run around them."""
