"""A training run around its loop: logging, held-out evaluation, checkpoints, interruption, the final policy."""

import resource
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dpo_ref.files import write_json
from dpo_ref.models import checkpoint
from dpo_ref.models.loading import TrainedModel, Workspace, graphs_compiled
from dpo_ref.objectives.interface import Objective
from dpo_ref.references.interface import Reference
from dpo_ref.tracking.run_record import RunRecord
from dpo_ref.tracking.terminal import TrainingProgress
from dpo_ref.training.metrics import mean_of
from dpo_ref.training.optim import Optimisation
from dpo_ref.training.rounds import Rounds
from dpo_ref.training.trainer import Step, evaluate, train
from dpo_ref.types import TokenGroup

HISTOGRAM_EVERY = 50  # optimiser steps


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far: the device's if it is CUDA, else the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@dataclass
class SampleEvaluation:
    """What is measured on answers of the policy, every `every` optimiser steps: metrics, and why it is degenerate."""

    measure: Callable[[int], tuple[Mapping[str, float], list[str]]]  # after an optimiser step
    every: int
    degenerate: list[str] = field(default_factory=list)  # at the last of them; empty if it was not

    def due(self, step: int) -> bool:
        """Whether the policy is evaluated after this step, were it not the last."""
        return step % self.every == 0


@dataclass
class TrainingRun:
    """Everything a run needs, built; `train` goes to the end or to an interruption."""

    work: Workspace
    policy: TrainedModel
    reference: Reference
    objective: Objective
    optim: Optimisation
    rounds: Rounds
    held_out: Sequence[TokenGroup]
    record: RunRecord
    evaluation: SampleEvaluation | None = None  # while training
    stopped_at: int | None = field(default=None, init=False)  # where a degenerate policy ended the run
    initial_weights: str = field(init=False)  # digest of the policy before training
    _started: float = field(default=0.0, init=False)  # when the step under way began
    _bar: TrainingProgress = field(default_factory=TrainingProgress, init=False)

    def __post_init__(self) -> None:
        self.initial_weights = self.policy.weights

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.work.directory / "checkpoints"

    def fingerprint(self) -> dict[str, Any]:
        """What must be equal for a resumed run to be the same run."""
        return {
            "policy": self.initial_weights,
            "kl_reference": self.initial_weights,  # what evaluation measures KL to
            "objective": self.objective.name,
            "reference": self.reference.identity,
            "reference_values": self.reference.values_digest,
            "seed": self.work.seed,
            "num_groups": self.rounds.num_groups,
        }

    def resume(self) -> int:
        """Restore the newest checkpoint; returns the number of steps done. ValueError if it is another run's."""
        saved = checkpoint.complete_in(self.checkpoints)
        if not saved:
            self.record.go_on_after(-1)
            return 0
        state = checkpoint.read_state(saved[-1])
        for name, value in self.fingerprint().items():
            if state[name] != value:
                raise ValueError(
                    f"resume={self.work.directory}: {name} was {state[name]} and is {value} now; a run goes on only "
                    "as it was. Start a new run (model.path may be this run's policy folder) instead"
                )
        checkpoint.load(saved[-1], self.policy.model, self.optim.optimizer)
        self.reference.load_state_dict(checkpoint.read_reference(saved[-1]))
        for name, value in state.get("running", {}).items():
            self.objective.running[name] = torch.tensor(value, dtype=torch.float64, device=self.policy.device)
        self.record.go_on_after(state["step"])
        return state["step"]

    def save(self, step: int) -> None:
        """Write a checkpoint; those to be deleted are only after it, and one more is kept where the policy is
        degenerate."""
        keep = self.rounds.config.keep_checkpoints
        if keep is not None and self.stopped_at is not None:
            keep += 1
        running = {name: float(value) for name, value in self.objective.running.items()}
        state = {"step": step, "running": running, **self.fingerprint()}
        model, optimizer, moved = self.policy.model, self.optim.optimizer, self.reference.state_dict()
        try:
            checkpoint.save(self.checkpoints, model, optimizer, moved, state, keep=keep)
        except OSError as error:
            raise OSError(
                f"the checkpoint of step {step} was not written to {self.checkpoints} ({error.strerror or error}); "
                "earlier ones are intact. Free space, then go on with python train.py "
                f"resume={self.work.directory}"
            ) from error

    def train(self, first_step: int = 0) -> int:
        """Train from `first_step` to the end, or until the policy is degenerate; returns the number of steps done.
        Raises Interrupted or NonFinite."""
        total = self.rounds.num_steps
        with stop_requests() as stop, self.policy.precision(), self._bar.shown(total, first_step):
            if first_step == 0:
                self._evaluate(0)
                self._evaluate_samples(0)
            pending: tuple[Step, float] | None = None
            self._bar.advance(0)
            self._started = time.perf_counter()
            for step in train(self.policy, self.reference, self.objective, self.optim, self.rounds, first_step):
                if pending is not None:
                    self._log(*pending)  # one step late: the device never waits for its numbers to be read
                pending = step, self._seconds(step)
                self._bar.advance()
                if stop or self._due(step.step, total):
                    self._log(*pending)
                    pending = None
                    self._pause(step.step, total, bool(stop))
                    if self.stopped_at is not None:
                        return self.stopped_at
                    self._started = time.perf_counter()
            if pending is not None:
                self._log(*pending)
            self._bar.complete()
            self._evaluate(total)
            self._evaluate_samples(total)
        return total

    def finish(self, steps: int) -> None:
        """Save the last checkpoint and the policy's folder."""
        self.save(steps)
        self.policy.save(self.work.directory / "policy")

    def _seconds(self, step: Step) -> float:
        """Since the step before was done; making a round counts as no step's time."""
        started, self._started = self._started, time.perf_counter()
        return self._started - started - step.preparing

    def _due(self, step: int, total: int) -> bool:
        """Whether something is to be done after this step besides going on."""
        sampled = self.evaluation is not None and self.evaluation.due(step)
        cadences = (self.rounds.config.save_every, self.rounds.config.eval_every)
        return step < total and (sampled or any(every and step % every == 0 for every in cadences))

    def _pause(self, step: int, total: int, stop: bool) -> None:
        """Evaluate and save as is due, and stop if that was asked for: by an exception where a signal did, by setting
        `stopped_at` where a degenerate policy ends the run."""
        config = self.rounds.config
        if step < total and self.evaluation is not None and self.evaluation.due(step):
            self._evaluate_samples(step)
            if config.stop_when_degenerate and self.evaluation.degenerate:
                self.stopped_at = step
                self._evaluate(step)
                return
        if config.eval_every and step % config.eval_every == 0 and step < total:
            self._evaluate(step)
        if stop or (config.save_every and step % config.save_every == 0):
            self.save(step)
        if stop:
            raise Interrupted(f"stopped at step {step} of {total}")

    def _evaluate(self, step: int) -> None:
        if not self.held_out:
            return
        values = evaluate(self.policy, self.reference, self.objective, self.held_out, self.rounds.pack)
        self.record.add({f"eval/{name}": float(value) for name, value in mean_of(values).items()}, step)
        self.record.add_distributions("eval", values, step)

    def _evaluate_samples(self, step: int) -> None:
        """Let the policy answer held-out prompts, where that is asked for. Raises ValueError where the initial policy
        is degenerate and that ends the run: then it says nothing about training."""
        if self.evaluation is None:
            return
        metrics, self.evaluation.degenerate = self.evaluation.measure(step)
        self.record.replace_under("evaluation", metrics, step)
        if step == 0 and self.rounds.config.stop_when_degenerate and self.evaluation.degenerate:
            raise ValueError(
                f"trainer.stop_when_degenerate: the policy is degenerate before any training: "
                f"{'; '.join(self.evaluation.degenerate)}. Raise evaluation.max_new_tokens if answers are cut, else "
                "leave trainer.stop_when_degenerate out"
            )

    def _log(self, step: Step, seconds: float) -> None:
        metrics = {name: float(value) for name, value in step.metrics.items()}
        metrics["epoch"] = step.epoch
        metrics["throughput/pairs_per_second"] = len(step.groups) / seconds
        metrics["throughput/tokens_per_second"] = step.num_tokens / seconds
        metrics["throughput/pack_fill"] = step.num_tokens / (step.num_packs * self.rounds.tokens_per_batch)
        if self.policy.compiled:
            metrics["throughput/graphs_compiled"] = graphs_compiled()
        metrics["memory/peak_gib"] = peak_memory_gib(self.policy.device)
        named = {f"train/{name}": value for name, value in metrics.items()}
        self.record.add(named | dict(step.of_round), step.step)
        if step.step % HISTOGRAM_EVERY == 0:
            self.record.add_distributions("train", step.values, step.step)
        self._bar.update(metrics)
        if not all(torch.tensor([metrics["loss"], metrics["grad_norm"]]).isfinite()):
            self._stop_non_finite(step, metrics)

    def _stop_non_finite(self, step: Step, metrics: dict[str, float]) -> None:
        path = self.work.directory / f"non_finite_step_{step.step}.json"
        write_json(path, {"step": step.step, "group_ids": [group.group_id for group in step.groups]})
        self.save(step.step)
        raise NonFinite(
            f"step {step.step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}. The update was left out "
            f"and a checkpoint saved; the batch's pairs are listed in {path}. Look at them, or lower optim.lr"
        )


# --- what ends a run before its last step: a signal, or a loss that is no number


class Interrupted(Exception):
    """The run was asked to stop (SIGTERM, Ctrl-C) and has saved itself."""


class NonFinite(ValueError):
    """A loss or gradient was not finite; the run has saved the weights from before that step and the batch's ids."""


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT instead of dying in the middle of a step; a second one kills as usual."""
    received: list[int] = []
    previous: dict[int, Any] = {}

    def note(signum: int, frame: object) -> None:
        received.append(signum)
        signal.signal(signum, previous[signum])

    for signum in (signal.SIGTERM, signal.SIGINT):
        previous[signum] = signal.signal(signum, note)
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
