"""Learning-rate schedules: pure functions from the optimiser step to a factor."""

import math


def warmup(step: int, warmup_steps: int) -> float:
    """Linear from 1/warmup_steps at the first step (0) to 1."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def constant(step: int, num_steps: int, warmup_steps: int) -> float:
    """1 after the warm-up."""
    return warmup(step, warmup_steps)


def linear(step: int, num_steps: int, warmup_steps: int) -> float:
    """Straight from 1 after the warm-up towards 0, which the step after the last would reach."""
    done = max(0, step - warmup_steps) / max(1, num_steps - warmup_steps)
    return warmup(step, warmup_steps) * (1.0 - done)


def cosine(step: int, num_steps: int, warmup_steps: int) -> float:
    """Half a cosine from 1 after the warm-up towards 0, which the step after the last would reach."""
    done = max(0, step - warmup_steps) / max(1, num_steps - warmup_steps)
    return warmup(step, warmup_steps) * 0.5 * (1.0 + math.cos(math.pi * done))


SCHEDULES = {"constant": constant, "linear": linear, "cosine": cosine}
