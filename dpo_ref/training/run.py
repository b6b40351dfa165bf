"""A training run around its loop: logging, held-out evaluation, checkpoints, interruption, the final policy."""

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dpo_ref.data.groups import Groups
from dpo_ref.distributed import memory_explained, memory_for, peak_memory_gib, ranks
from dpo_ref.files.writing import remove_half_written, write_json
from dpo_ref.models import checkpoint
from dpo_ref.models.asked import Workspace
from dpo_ref.models.layers import graphs_compiled
from dpo_ref.models.loading import TrainedModel
from dpo_ref.objectives.interface import Objective
from dpo_ref.references.interface import Reference
from dpo_ref.tracking.run_record import RunRecord, Seal
from dpo_ref.tracking.terminal import TrainingProgress, say
from dpo_ref.training.metrics import mean_of
from dpo_ref.training.model_selection import ModelSelection, near
from dpo_ref.training.optim import Optimisation
from dpo_ref.training.rounds import Rounds
from dpo_ref.training.trainer import Step, evaluate, train
from dpo_ref.types import PackedBatch, ResponseLogps

HISTOGRAM_EVERY = 50  # optimiser steps
DEGENERATE, PATIENCE = "trainer.stop_when_degenerate", "trainer.patience"  # what ends a run before its last step


@dataclass
class SampleEvaluation:
    """What is measured on answers of the policy, every `every` optimiser steps: metrics, and why it is degenerate."""

    measure: Callable[[int], tuple[Mapping[str, float], list[str]]]  # after an optimiser step
    every: int
    in_brief: Callable[[Mapping[str, float]], str]  # the metrics, for a line of the terminal
    degenerate: list[str] = field(default_factory=list)  # at the last of them; empty if it was not

    def due(self, step: int) -> bool:
        """Whether the policy is evaluated after this step, were it not the last."""
        return step % self.every == 0


@dataclass(frozen=True, slots=True)
class Rung:
    """Where a search ends a run for now: after which optimiser step, one after which `metric` is measured, and the
    option that says so. The schedule stays that of the whole run."""

    step: int
    metric: str
    option: str


@dataclass(frozen=True, slots=True)
class RunFolder:
    """What a run's folder holds besides what training writes."""

    configuration: str  # YAML
    make: Callable[[], None]  # write it, in a folder that is made if need be


@dataclass
class TrainingRun:
    """Everything a run needs, built; `train` goes to the end or to an interruption."""

    work: Workspace
    policy: TrainedModel
    reference: Reference
    objective: Objective
    optim: Optimisation
    rounds: Rounds
    held_out: Groups
    record: RunRecord
    evaluation: SampleEvaluation | None = None  # while training
    selection: ModelSelection | None = None  # of the policy that is kept, where that need not be the last
    stopped_at: int | None = field(default=None, init=False)  # where the run ended before its last step
    stopped_by: str | None = field(default=None, init=False)  # the option that says so
    initial_weights: str = field(init=False)  # digest of the policy before training
    folder: RunFolder = field(init=False)
    rung: Rung | None = field(default=None, init=False)  # of a search
    _saved_at: float = field(default=0.0, init=False)  # time.monotonic() of the last checkpoint, or of the beginning
    _placing: "tuple[int, Future[Path]] | None" = field(default=None, init=False)  # the checkpoint of this step
    _started: float = field(default=0.0, init=False)  # when the step under way began
    _bar: TrainingProgress = field(default_factory=TrainingProgress, init=False)

    def __post_init__(self) -> None:
        self.initial_weights = self.policy.weights

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.work.directory / "checkpoints"

    def fingerprint(self, step: int) -> dict[str, Any]:
        """What must be equal for a run resumed after `step` steps to be the same run. Of a table of reference values
        these are the ones used so far: a run that goes on longer than planned comes to others."""
        return self._unchanging | {"reference_values": self.reference.digest_of(self._seen_by(step))}

    def _seen_by(self, step: int) -> list[int]:
        return [group.group_index for groups in (self.rounds.known_by(step), self.held_out) for group in groups]

    @cached_property
    def _unchanging(self) -> dict[str, Any]:
        return {
            "policy": self.initial_weights,
            "kl_reference": self.initial_weights,  # what evaluation measures KL to
            "objective": self.objective.name,
            "reference": self.reference.identity,
            "seed": self.work.seed,
            "data": self.rounds.data.digest,
            "held_out": self.held_out.digest,
        }

    def resume(self) -> int:
        """Restore the newest whole checkpoint, and say which; returns the number of steps done. ValueError if it is
        another run's, or if there are checkpoints and none is whole."""
        remove_half_written(self.work.directory)
        ranks().first(lambda: checkpoint.recover(self.checkpoints))
        saved = self._newest_whole()
        if saved is None:
            say(f"{self.checkpoints} holds no checkpoint: the run starts at step 0")
            self.record.start_over()
            return 0
        state = checkpoint.read_state(saved)
        for name, value in self.fingerprint(state["step"]).items():
            if state.get(name) != value:
                raise ValueError(
                    f"resume={self.work.directory}: {name} was {state.get(name)} and is {value} now; a run goes on "
                    "only as it was. Start a new run (model.path may be this run's policy folder) instead"
                )
        step: int = state["step"]
        self.record.go_on_from(Seal(**state["record"]))
        if self.evaluation is not None:
            self.evaluation.degenerate = state.get("degenerate", [])  # runs from before it was saved
        if self.selection is not None:
            self.selection.load_state(state.get("selection"))
        checkpoint.load(saved, self.policy.model, self.optim.optimizer, self.optim.parts.of)
        self.reference.load_state_dict(checkpoint.read_reference(saved))
        for name, value in state["running"].items():
            self.objective.running[name] = torch.tensor(value, dtype=torch.float64, device=self.policy.device)
        say(f"going on after step {step:,}", *self._stretched(state))
        return step

    def _stretched(self, state: Mapping[str, Any]) -> list[str]:
        """What is said where the run has become longer or shorter than it was planned, and with it its schedule."""
        step, planned, total = state["step"], state.get("num_steps"), self.rounds.num_steps
        if planned in (None, total) or not 0 < step < total:  # a checkpoint may be older than what it says of the plan
            return []
        before, after = state["lr"], self.optim.lr_at(step)
        if before == after:  # a constant one
            return []
        how = "stretched" if total > planned else "shortened"
        return [
            f"the schedule is {how} from {planned:,} to {total:,} steps: the learning rate was {before:.1e} at step "
            f"{step:,} and is {after:.1e} at step {step + 1:,}"
        ]

    def _newest_whole(self) -> Path | None:
        damages = []
        for saved in reversed(checkpoint.saved_in(self.checkpoints)):
            try:
                checkpoint.check(saved)
            except checkpoint.DamagedCheckpoint as damage:
                damages.append(str(damage))
                continue
            say(*(f"{damage}; an earlier checkpoint is taken, {saved.name}" for damage in damages))
            return saved
        if damages:
            raise ValueError(
                f"resume={self.work.directory}: {'; '.join(damages)}. There is no other checkpoint: start again with "
                f"another output_dir, or go back to step 0 with rm -r {self.checkpoints}"
            )
        return None

    def save(self, step: int) -> None:
        """Write a checkpoint; those to be deleted are only after it, and one more is kept where the policy is
        degenerate. Training goes on while it is put in its place."""
        self._save(step, keep_more=int(self.stopped_by == DEGENERATE))

    def _save(self, step: int, keep_more: int) -> None:
        self.settle()
        self._mind_folder()
        with self._or_say_what_is_left(step):
            try:
                placing = self._write(step, keep_more)
            except OSError:
                if self._folder_stands:
                    raise
                self._mind_folder()  # removed in this very moment
                placing = self._write(step, keep_more)
        self._placing, self._saved_at = (step, placing), time.monotonic()

    def _write(self, step: int, keep_more: int) -> "Future[Path]":
        keep = self.rounds.config.keep_checkpoints
        keep = None if keep is None else keep + keep_more
        running = {name: float(value) for name, value in self.objective.running.items()}
        state = {"step": step, "running": running, "record": self.record.seal._asdict()}
        state["degenerate"] = self._degenerate
        state["selection"] = self.selection.state if self.selection else None
        state |= {"num_steps": self.rounds.num_steps, "lr": self.optim.lr_at(max(0, step - 1))}  # as planned, and last
        state |= {"configuration": self.folder.configuration, **self.fingerprint(step)}
        model, optimizer, moved = self.policy.model, self.optim.optimizer, self.reference.state_dict()
        spare = [self.selection.best.step] if self.selection and self.selection.best else []
        part = self.optim.parts.of
        return checkpoint.save(self.checkpoints, model, optimizer, moved, state, keep=keep, spare=spare, part=part)

    def settle(self) -> None:
        """Wait until the last checkpoint is in its place. Raises OSError if it could not be put there, unless the
        run's folder was removed meanwhile."""
        if self._placing is None:
            return
        (step, placing), self._placing = self._placing, None
        with self._or_say_what_is_left(step):
            try:
                placing.result()
            except OSError:
                if self._folder_stands:
                    raise

    @contextmanager
    def _or_say_what_is_left(self, step: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                f"the checkpoint of step {step} was not written to {self.checkpoints} ({error.strerror or error}); "
                "earlier ones are intact. Free space, then go on with python train.py "
                f"resume={self.work.directory}"
            ) from error

    @property
    def _folder_stands(self) -> bool:
        return (self.work.directory / "config.yaml").is_file()

    def _mind_folder(self) -> None:
        """Make the run's folder again if somebody removed it."""
        if self._folder_stands:
            return
        self.folder.make()
        say(f"{self.work.directory} was removed while training, and is made again; what it held until now is lost")

    def train(self, first_step: int = 0) -> int:
        """Train from `first_step` to the end, or until the policy is degenerate or has long been no better; returns
        the number of steps done. Raises Interrupted, NonFinite or OutOfMemory."""
        total, self._saved_at = self.rounds.num_steps, time.monotonic()
        explained = memory_explained(self.policy.model, self.optim.optimizer, self._remedy)
        bar = self._bar.shown(total, first_step)
        with explained, self._settled(), stop_requests() as stop, self.policy.precision(), bar:
            if first_step == 0:
                self._evaluate(0)
                self._evaluate_samples(0)
            self._check_measured()
            # killed between its last checkpoint and its end
            if first_step < total and (self._exhausted(first_step) or self._at_rung(first_step)):
                return first_step
            pending: tuple[Step, float] | None = None
            self._bar.advance(0)
            self._started = time.perf_counter()
            for step in train(self.policy, self.reference, self.objective, self.optim, self.rounds, first_step):
                if pending is not None:
                    self._log(*pending)  # one step late: the device never waits for its numbers to be read
                pending = step, self._seconds(step)
                self._bar.advance()
                asked = any(ranks().gather(bool(stop)))
                if asked or self._due(step.step, total):
                    self._log(*pending)
                    pending = None
                    self._pause(step.step, total, asked)
                    if self.stopped_at is not None:
                        return self.stopped_at
                    self._started = time.perf_counter()
            if pending is not None:
                self._log(*pending)
            self._bar.complete()
            self._evaluate(total)
            self._evaluate_samples(total)
        return total

    @property
    def _remedy(self) -> str:
        return (
            f"The last checkpoint is whole: go on with python train.py resume={self.work.directory} and a smaller "
            "data.tokens_per_batch, or model.gradient_checkpointing=full; where there is none yet, start a new run"
        )

    @contextmanager
    def _settled(self) -> Iterator[None]:
        """However training ends, the last checkpoint is in its place."""
        try:
            yield
        finally:
            self.settle()

    def finish(self, steps: int) -> None:
        """Save the last checkpoint and the folder of the policy, which from here on is the best one where the run
        keeps it. Raises OSError saying what is left."""
        self.save(steps)
        self.settle()
        self._take_best(steps)
        folder = self.work.directory / "policy"
        try:
            self.policy.save(folder)
        except OSError as error:
            raise OSError(
                f"the policy was not written to {folder} ({error.strerror or error}), but the checkpoint of step "
                f"{steps} was. Free space, then python train.py resume={self.work.directory}"
            ) from error

    def _take_best(self, steps: int) -> None:
        best = self.selection and self.selection.best
        if best is None or best.step == steps:
            return
        try:
            checkpoint.load_policy(self.checkpoints / checkpoint.name_of(best.step), self.policy.model)
        except checkpoint.DamagedCheckpoint as damage:
            raise ValueError(
                f"trainer.keep_best: the policy of step {best.step}, which is the best, cannot be read: {damage}. The "
                f"last one can: python train.py resume={self.work.directory} trainer.keep_best=null "
                "trainer.patience=null saves it"
            ) from damage
        if self.evaluation is not None:
            self.evaluation.degenerate = best.degenerate

    @property
    def _degenerate(self) -> list[str]:
        return self.evaluation.degenerate if self.evaluation else []

    def _seconds(self, step: Step) -> float:
        """Since the step before was done; making a round counts as no step's time."""
        started, self._started = self._started, time.perf_counter()
        return self._started - started - step.preparing

    def _due(self, step: int, total: int) -> bool:
        """Whether something is to be done after this step besides going on."""
        sampled = self.evaluation is not None and self.evaluation.due(step)
        every = self.rounds.config.eval_every
        return step < total and (sampled or bool(every and step % every == 0) or self._save_due(step))

    def _save_due(self, step: int) -> bool:
        every, minutes = self.rounds.config.save_every, self.rounds.config.save_minutes
        late = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        return bool(every and step % every == 0) or any(ranks().gather(late))

    def _pause(self, step: int, total: int, stop: bool) -> None:
        """Evaluate and save as is due, and stop if that was asked for: by an exception where a signal did, by setting
        `stopped_at` where the policy ends the run."""
        config = self.rounds.config
        if step < total and self.evaluation is not None and self.evaluation.due(step):
            self._evaluate_samples(step)
            if config.stop_when_degenerate and self.evaluation.degenerate:
                self._end(step, DEGENERATE)
                return
        if config.eval_every and step % config.eval_every == 0 and step < total:
            self._evaluate(step)
        if self._exhausted(step):
            return
        if not stop and self._at_rung(step):
            return
        if stop or self._save_due(step) or self._is_best(step):
            self.save(step)
        if stop:
            raise Interrupted(f"stopped at step {step} of {total}")

    def _end(self, step: int, option: str) -> None:
        """Measure the policy as at the run's end, which is here."""
        self.stopped_at, self.stopped_by = step, option
        self._evaluate(step)
        self._evaluate_samples(step)

    def _exhausted(self, step: int) -> bool:
        """Whether the policy has been no better for so long that the run ends."""
        if self.selection is None or not self.selection.exhausted:
            return False
        self._end(step, PATIENCE)
        return True

    def _at_rung(self, step: int) -> bool:
        """Whether a search ends the run here; it has measured the policy. One stopped beyond it has been there."""
        if self.rung is None or step < self.rung.step:
            return False
        self.stopped_at, self.stopped_by = step, self.rung.option
        return True

    def _is_best(self, step: int) -> bool:
        return self.selection is not None and self.selection.best is not None and self.selection.best.step == step

    def _check_measured(self) -> None:
        """Raise ValueError where a metric that policies or runs are chosen by is none of this run's."""
        measured = [name for name in self.record.last if name.startswith(("eval/", "evaluation/"))]
        chosen_by = {"trainer.keep_best": self.selection and self.selection.criterion.key}
        chosen_by |= {"search.metric": self.rung and self.rung.metric}
        for option, key in chosen_by.items():
            if key is not None and measured and key not in measured:
                raise ValueError(
                    f"{option}={key} is not measured in this run, whose objective is {self.objective.name}; near it "
                    f"are {near(key, measured)}"
                )

    def _consider(self, step: int, metrics: Mapping[str, float]) -> None:
        if self.selection is not None:
            self.selection.consider(step, metrics, self._degenerate)

    def _evaluate(self, step: int) -> None:
        if not len(self.held_out) or self.record.holds("eval", step):
            return
        values = evaluate(
            self.policy, self.reference, self.objective, self.held_out, self.rounds.pack,
            self._known_outputs(step), self.work.progress,
        )  # fmt: skip
        metrics = {f"eval/{name}": float(value) for name, value in mean_of(values).items()}
        self.record.add(metrics, step)
        self.record.add_distributions("eval", values, step)
        self._consider(step, metrics)

    def _known_outputs(self, step: int) -> Callable[[PackedBatch], ResponseLogps] | None:
        """What the policy says before its first step, where the table of its own log-probs has it."""
        is_known = step == 0 and not self.reference.live and self.reference.equals(self.policy)
        return self.reference.logps if is_known else None

    def _evaluate_samples(self, step: int) -> None:
        """Let the policy answer held-out prompts, where that is asked for. Raises ValueError where the initial policy
        is degenerate and that ends the run: then it says nothing about training."""
        if self.evaluation is None:
            return
        if not self.record.holds("evaluation", step):
            with memory_for("an evaluation of answers (evaluation.batch_size of them at once)"):
                metrics, self.evaluation.degenerate = self.evaluation.measure(step)
            named = {f"evaluation/{name}": value for name, value in metrics.items()}
            self.record.add(named, step)
            self._consider(step, named)
            self._bar.tell(self.evaluation.in_brief(metrics))
        if step == 0 and self.rounds.config.stop_when_degenerate and self.evaluation.degenerate:
            raise ValueError(
                f"trainer.stop_when_degenerate: the policy is degenerate before any training: "
                f"{'; '.join(self.evaluation.degenerate)}. Raise evaluation.max_new_tokens if answers are cut, else "
                "leave trainer.stop_when_degenerate out"
            )

    def _log(self, step: Step, seconds: float) -> None:
        self._mind_folder()
        metrics = {name: float(value) for name, value in step.metrics.items()}
        metrics["epoch"] = step.epoch
        metrics["throughput/pairs_per_second"] = len(step.groups) / seconds
        metrics["throughput/tokens_per_second"] = step.num_tokens / seconds
        metrics["throughput/pack_fill"] = step.num_tokens / (step.share.num_packs * self.rounds.tokens_per_batch)
        if ranks().size > 1:
            metrics["throughput/rank_imbalance"] = step.share.imbalance
        if self.policy.compiled:
            metrics["throughput/graphs_compiled"] = graphs_compiled()
        metrics["memory/peak_gib"] = max(ranks().gather(peak_memory_gib(self.policy.device)))
        named = {f"train/{name}": value for name, value in metrics.items()}
        if not step.made:
            self._save_before(step)
        self.record.add(named | dict(step.of_round), step.step)
        if step.step % HISTOGRAM_EVERY == 0:
            self.record.add_distributions("train", step.values, step.step)
        self._bar.update(metrics)
        if not step.made:
            raise NonFinite(
                f"step {step.step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}. The update was left "
                f"out, and a checkpoint of the {step.step - 1} updates before it saved; the batch's pairs are listed "
                f"in {self._pairs_of(step)}. Look at them, or lower optim.lr in a new run"
            )

    def _pairs_of(self, step: Step) -> Path:
        return self.work.directory / f"non_finite_step_{step.step}.json"

    def _save_before(self, step: Step) -> None:
        """Save the run as it was before a step that was not made; no checkpoint is lost by it."""
        pairs = {"step": step.step, "group_ids": [group.group_id for group in step.groups]}
        write_json(self._pairs_of(step), pairs)
        checkpoint.restore_random_states(step.before.random_states)
        self.objective.running.clear()
        self.objective.running.update(step.before.running)
        self._save(step.step - 1, keep_more=1)


# --- what ends a run before its last step: a signal, or a loss that is no number


class Interrupted(Exception):
    """The run was asked to stop (by one of `STOPPING`) and has saved itself."""


class NonFinite(ValueError):
    """A loss or gradient was not finite; the run has saved itself as it was before that step, and the batch's ids."""


# Ctrl-C; batch systems; a terminal or connection that is gone; Slurm's --signal=USR1@120 before the time is up
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
TWICE_KILLS = (signal.SIGINT, signal.SIGTERM)
RELAYED = 3.0  # seconds in which torchrun hands on what the terminal has sent to its processes already


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collect the signals of `STOPPING` instead of dying in the middle of a step. A second SIGINT or SIGTERM kills as
    usual. SIGHUP comes twice, from the shell and the kernel, and SIGUSR1 may: once received they are ignored to the
    end of the process, which is about to save itself. What is ignored, as by nohup, stays so."""
    received: list[int] = []
    previous: dict[int, Any] = {}
    relayed_until = time.monotonic()

    def note(signum: int, frame: object) -> None:
        nonlocal relayed_until
        if not received:
            relayed_until = time.monotonic() + (RELAYED if ranks().size > 1 else 0.0)
        elif signum in TWICE_KILLS and time.monotonic() > relayed_until:
            signal.signal(signum, previous[signum])
            signal.raise_signal(signum)
            return
        received.append(signum)
        if signum in TWICE_KILLS and ranks().size == 1:
            signal.signal(signum, previous[signum])

    for signum in STOPPING:
        if signal.getsignal(signum) != signal.SIG_IGN:
            previous[signum] = signal.signal(signum, note)
    try:
        yield received
    except Exception:
        if ranks().size > 1:  # where another rank is gone torchrun ends this one, which has yet to say so
            previous[signal.SIGTERM] = signal.SIG_IGN
        raise
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, signal.SIG_IGN if signum in received and signum not in TWICE_KILLS else handler)
