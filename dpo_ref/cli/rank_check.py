"""The ranks of a run, as `train.py stage=check` sees them: what each has and needs, how fast each computes while all
do, and how long what they send each other takes.
"""

import platform
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from dpo_ref.distributed import ranks
from dpo_ref.evaluation.check import Fit, RankFacts, RanksFacts
from dpo_ref.models.loading import TrainedModel
from dpo_ref.models.rank_costs import sent_by_rank
from dpo_ref.models.sharding import Holding, Parallel, skeleton
from dpo_ref.training.cost import now

if TYPE_CHECKING:
    from dpo_ref.cli.check import Trial

PROBE_SECONDS = 0.5  # of products of matrices
ROWS = 1024  # of a matrix, which is as wide as the model
MOST_SENT = 64 * 2**20  # bytes that are sent to see how long it takes
TIMES = 3  # of which the fastest counts


def ranks_facts(trial: "Trial", step_seconds: float | None) -> RanksFacts | None:
    """Of a run whose steps take so long; None for one of a single process. All ranks ask together."""
    size, device = ranks().size, trial.work.device
    if size == 1:
        return None
    shares = trial.shares
    tokens = sum(group.num_tokens for share in shares for some, counts in share.passes if counts for group in some)
    width = trial.policy.model.config.get_text_config().hidden_size
    flops = products_per_second(device, trial.policy.compute_dtype, width)
    own = RankFacts(place_of(device), trial.memory.peak, trial.available, flops, tokens)
    passes = max(len(share.passes) for share in shares)
    sent = sent_by_rank(trial.parallel, trial.sizes, size, passes)
    return RanksFacts(
        [RankFacts(*of_rank) for of_rank in ranks().gather(own)],
        sum(share.imbalance for share in shares) / len(shares),
        sent,
        exchange_seconds(device, sent),
        step_seconds,
    )


def fit_of(trial: "Trial", together: RanksFacts | None) -> Fit | None:
    """Whether the run fits, on the rank that has least room; None where no system says how much there is."""
    if together is None:
        where = "this machine" if trial.on_cpu else torch.cuda.get_device_name(trial.work.device)
        needed, available = trial.memory.peak, trial.available
    else:
        at = together.tightest
        where, needed, available, *_ = together.ranks[at]
        where = f"rank {at}, {where}"
    return None if available is None else Fit(needed, available, trial.tokens_that_fit, where)


def as_asked(policy: TrainedModel, parallel: Parallel) -> TrainedModel:
    """The policy as a rank asks it: weights that are gathered of all ranks have the dtype of the computation then."""
    if not parallel.in_parts:
        return policy
    bare = skeleton(policy.holding.as_saved(policy.model)).to(policy.compute_dtype)
    return replace(policy, load=lambda: bare, holding=Holding())


@contextmanager
def scratch(shared: Path) -> Iterator[Path]:
    """A folder that all ranks see and that is gone afterwards: where there are several, in what they share."""
    here = TemporaryDirectory(dir=shared if ranks().size > 1 else None) if ranks().is_first else nullcontext()
    with here as own:
        yield Path(ranks().first(lambda: own))
        ranks().wait()


def place_of(device: torch.device) -> str:
    """The machine and what of it computes."""
    card = "" if device.type == "cpu" else f", {device} {torch.cuda.get_device_name(device)}"
    return f"{platform.node()}{card or ', CPU'}"


@torch.no_grad()
def products_per_second(device: torch.device, dtype: torch.dtype, width: int) -> float:
    """Floating-point operations a second of products of matrices so wide, which all ranks make at the same time: what
    a card that is throttled, or a machine that others use, shows by itself."""
    rows, square = torch.randn(ROWS, width, device=device, dtype=dtype), torch.eye(width, device=device, dtype=dtype)
    rows = rows @ square  # the first one warms up
    ranks().wait()
    started, made = now(device), 0
    while now(device) - started < PROBE_SECONDS:
        rows = rows @ square
        made += 1
    return made * 2 * ROWS * width**2 / (now(device) - started)


def exchange_seconds(device: torch.device, sent: float) -> float:
    """Seconds in which a rank sends so many bytes, by sums over all ranks, of which each sends 2 (n - 1) / n of what
    it has."""
    size = ranks().size
    most = max(4, min(MOST_SENT, sent * size / (2 * (size - 1))))
    buffer, times = torch.zeros(int(most // 4), device=device), []
    for _ in range(1 + TIMES):
        ranks().wait()
        started = now(device)
        dist.all_reduce(buffer)
        times.append(now(device) - started)
    return min(times[1:]) * sent / (buffer.nbytes * 2 * (size - 1) / size)
