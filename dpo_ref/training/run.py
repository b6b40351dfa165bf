"""A training run around its loop: logging, held-out evaluation, checkpoints, interruption, the final policy."""

import resource
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dpo_ref.evaluation.in_training import TrainingEvaluation
from dpo_ref.files import write_json
from dpo_ref.generation.sampling import generate
from dpo_ref.models import checkpoint
from dpo_ref.models.loading import LoadedModel, graphs_compiled
from dpo_ref.models.reward_model import save_reward_model
from dpo_ref.objectives.interface import Objective, Running
from dpo_ref.references.interface import Reference
from dpo_ref.reports import training_curve
from dpo_ref.tracking.run_record import RunRecord
from dpo_ref.training.metrics import mean_of
from dpo_ref.training.optim import Optimisation
from dpo_ref.training.rounds import Supply
from dpo_ref.training.trainer import Pack, Step, TrainerConfig, check_step_zero, evaluate, train
from dpo_ref.types import Message, ResponseLogps, ResponseScores, TokenGroup

SAMPLE_TOKENS = 96
HISTOGRAM_EVERY = 50  # optimiser steps
SAVED = {ResponseLogps: checkpoint.save_policy, ResponseScores: save_reward_model}


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far: the device's if it is CUDA, else the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@dataclass
class Session:
    """Everything a run needs, built; `run` trains to the end or to an interruption."""

    directory: Path
    loaded: LoadedModel
    policy_weights: str  # digest before training
    reference: Reference
    objective: Objective
    optim: Optimisation
    supply: Supply  # training groups, round by round
    eval_groups: Sequence[TokenGroup]
    counts: dict[str, int]  # what became of the data's rows
    sample_prompts: Sequence[Sequence[Message]]
    pack: Pack
    tokens_per_batch: int
    config: TrainerConfig
    seed: int
    record: RunRecord
    show: Any  # progress display: show(steps, total) yields the steps; show.update(metrics) refreshes its numbers
    evaluation: TrainingEvaluation | None = None  # of samples, while training
    running: Running = field(default_factory=dict)  # what the objective carries from step to step
    stopped_at: int | None = None  # the step at which a degenerate policy ended the run
    _started: float = 0.0  # when the step under way began
    _of_round: dict[int, Mapping[str, float]] = field(default_factory=dict)  # a round's metrics, by its first step

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.directory / "checkpoints"

    def fingerprint(self) -> dict[str, Any]:
        """What must be equal for a resumed run to be the same run."""
        return {
            "policy": self.policy_weights,
            "kl_reference": self.policy_weights,  # what evaluation measures KL to
            "objective": self.objective.name,
            "reference": self.reference.identity,
            "reference_values": getattr(self.reference, "values_digest", None),
            "seed": self.seed,
            "num_groups": self.supply.num_groups,
        }

    def resume(self) -> int:
        """Restore the newest checkpoint; returns the number of steps done. ValueError if it is another run's."""
        found = checkpoint.found(self.checkpoints)
        if not found:
            self.record.go_on_after(-1)
            return 0
        state = checkpoint.read_state(found[-1])
        for name, value in self.fingerprint().items():
            if state[name] != value:
                raise ValueError(
                    f"resume={self.directory}: {name} was {state[name]} and is {value} now; a run goes on only as it "
                    "was. Start a new run (model.path may be this run's policy folder) instead"
                )
        checkpoint.load(found[-1], self.loaded.model, self.optim.optimizer)
        self.reference.load_state_dict(checkpoint.read_reference(found[-1]))
        device = next(self.loaded.model.parameters()).device
        self.running.update(
            {
                name: torch.tensor(value, dtype=torch.float64, device=device)
                for name, value in state.get("running", {}).items()
            }
        )
        self.record.go_on_after(state["step"])
        return state["step"]

    def save(self, step: int) -> None:
        """Write a checkpoint; those to be deleted are only after it, and one more is kept where the policy is
        degenerate."""
        keep = self.config.keep_checkpoints
        if keep is not None and self.stopped_at is not None:
            keep += 1
        running = {name: float(value) for name, value in self.running.items()}
        state = {"step": step, "running": running, **self.fingerprint()}
        try:
            checkpoint.save(
                self.checkpoints,
                self.loaded.model,
                self.optim.optimizer,
                self.reference.state_dict(),
                state,
                keep=keep,
            )
        except OSError as error:
            raise OSError(
                f"the checkpoint of step {step} was not written to {self.checkpoints} ({error.strerror or error}); "
                f"earlier ones are intact. Free space, then go on with python train.py resume={self.directory}"
            ) from error

    def run(self, first_step: int) -> int:
        """Train from `first_step` to the end, or until the policy is degenerate; returns the number of steps done.
        Raises Interrupted or NonFinite."""
        total = self.supply.num_steps
        with stop_requests() as stop, self.loaded.precision():
            if first_step == 0:
                self._evaluate(0)
                self._evaluate_samples(0)
            pending: tuple[Step, float] | None = None
            self._started = time.perf_counter()
            for step in self.show(self._steps(first_step), total, first_step):
                if pending is not None:
                    self._log(*pending)  # one step late: the device never waits for its numbers to be read
                pending, self._started = (step, time.perf_counter() - self._started), time.perf_counter()
                if stop or self._due(step.step, total):
                    self._log(*pending)
                    pending = None
                    self._pause(step.step, total, bool(stop))
                    if self.stopped_at is not None:
                        return self.stopped_at
                    self._started = time.perf_counter()
            if pending is not None:
                self._log(*pending)
            self._evaluate(total)
            self._evaluate_samples(total)
        return total

    def _steps(self, first_step: int) -> Iterator[Step]:
        """The steps of all rounds that are not over after `first_step`. Making a round counts as no step's time."""
        for made in self.supply.rounds(first_step):
            if (
                first_step == made.begin == 0
                and self.reference.weights == self.policy_weights
                and not self.reference.own_text
            ):
                check_step_zero(self.loaded.model, self.reference, self.pack(made.groups[:8])[0])
            self._of_round[made.begin + 1] = made.metrics
            self._started = time.perf_counter()
            yield from train(
                self.loaded.model, self.reference, self.objective, self.optim, made.groups, self.pack, made.config,
                seed=made.seed, begin=made.begin, first_step=first_step, old=made.old, running=self.running,
            )  # fmt: skip

    def finish(self, steps: int) -> None:
        """Save the last checkpoint and the policy's folder, and show a few of its generations in the tracker."""
        self.save(steps)
        if self.evaluation is not None:
            self.record.tracker.image("evaluation/curves", training_curve.write_picture(self.directory))
        SAVED[self.objective.asks](
            self.directory / "policy", self.loaded.model, self.loaded.tokenizer, self.loaded.adapter
        )
        if self.sample_prompts:
            with self.loaded.precision():
                made = generate(
                    self.loaded.model,
                    self.loaded.tokenizer,
                    self.sample_prompts,
                    self.seed,
                    max_new_tokens=SAMPLE_TOKENS,
                )
            rows = [[sample.prompt[-1]["content"], sample.output, sample.finish_reason] for sample in made]
            self.record.tracker.table("samples", ["prompt", "output", "finish_reason"], rows, step=steps)

    def _due(self, step: int, total: int) -> bool:
        """Whether something is to be done after this step besides going on."""
        sampled = self.evaluation is not None and self.evaluation.due(step)
        cadences = (self.config.save_every, self.config.eval_every)
        return step < total and (sampled or any(every and step % every == 0 for every in cadences))

    def _pause(self, step: int, total: int, stop: bool) -> None:
        """Evaluate and save as is due, and stop if that was asked for: by an exception where a signal did, by setting
        `stopped_at` where a degenerate policy ends the run."""
        if step < total and self.evaluation is not None and self.evaluation.due(step):
            self._evaluate_samples(step)
            if self.config.stop_when_degenerate and self.evaluation.degenerate:
                self.stopped_at = step
                self._evaluate(step)
                return
        if self.config.eval_every and step % self.config.eval_every == 0 and step < total:
            self._evaluate(step)
        if stop or (self.config.save_every and step % self.config.save_every == 0):
            self.save(step)
        if stop:
            raise Interrupted(f"stopped at step {step} of {total}")

    def _evaluate(self, step: int) -> None:
        if not self.eval_groups:
            return
        found = evaluate(
            self.loaded.model, self.reference, self.objective, self.eval_groups, self.pack, running=self.running
        )
        self.record.add({f"eval/{name}": float(value) for name, value in mean_of(found).items()}, step)
        self.record.add_distributions("eval", found, step)

    def _evaluate_samples(self, step: int) -> None:
        """Let the policy answer held-out prompts, where that is asked for. Raises ValueError where the initial policy
        is degenerate and that ends the run: then it says nothing about training."""
        if self.evaluation is None:
            return
        self.record.replace_under("evaluation", self.evaluation.measure(step), step)
        if step == 0 and self.config.stop_when_degenerate and self.evaluation.degenerate:
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
        metrics["throughput/pack_fill"] = step.num_tokens / (step.num_packs * self.tokens_per_batch)
        if self.loaded.compiled:
            metrics["throughput/graphs_compiled"] = graphs_compiled()
        metrics["memory/peak_gib"] = peak_memory_gib(next(self.loaded.model.parameters()).device)
        of_round = self._of_round.pop(step.step, {})
        self.record.add({f"train/{name}": value for name, value in metrics.items()} | dict(of_round), step.step)
        if step.step % HISTOGRAM_EVERY == 0:
            self.record.add_distributions("train", step.values, step.step)
        self.show.update(metrics)
        if not all(torch.tensor([metrics["loss"], metrics["grad_norm"]]).isfinite()):
            self._stop_non_finite(step, metrics)

    def _stop_non_finite(self, step: Step, metrics: dict[str, float]) -> None:
        path = self.directory / f"non_finite_step_{step.step}.json"
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

    def note(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    for number in (signal.SIGTERM, signal.SIGINT):
        previous[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
