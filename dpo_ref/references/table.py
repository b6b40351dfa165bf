"""The table of reference log-probabilities: computed once per reference and row, shared by every run.

Rows are keyed by what was scored (the token ids of prompt and responses) and live in a folder named by the reference's
identity, so limits, held-out splits and later runs compute only what is missing. Shards are written atomically as the
pass goes on: a crash loses at most one shard. Of runs that lack the same rows one computes them, and the others wait.
"""

import hashlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors.numpy import load, save
from torch import nn

from dpo_ref.data.groups import Groups
from dpo_ref.data.packing import WINDOW, Pack, Pass, collate, share_of
from dpo_ref.distributed import memory_for, ranks
from dpo_ref.files.cache import in_use, made_by_one
from dpo_ref.files.digests import bytes_digest
from dpo_ref.files.writing import needing_room, replacing
from dpo_ref.models.folders import positions_of
from dpo_ref.models.logps import response_logps, sum_by_response
from dpo_ref.references.interface import Reference, ReferenceContext
from dpo_ref.tracking.terminal import say
from dpo_ref.types import PackedBatch, ProgressIn, ResponseLogps, TokenGroup, digest

SHARD_TOKENS = 2**20
SHARD_SECONDS = 120.0  # a slow pass writes smaller shards
PROBES = 4  # rows scored again whenever a table is reused
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # nats on a token
PROBE_TOLERANCE_HALF = 1.0  # as for a server's: what rounds anew, as a compiled model does, differs by 0.3 and more

Rows = dict[bytes, np.ndarray]


def digest_of_arrays(arrays: Iterable[np.ndarray]) -> str:
    """SHA-256 of the arrays' bytes, one after the other, as 32 hexadecimal digits."""
    hasher = hashlib.sha256()
    for values in arrays:
        hasher.update(np.ascontiguousarray(values).data)
    return hasher.hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Scorer:
    """What fills a table: gives per-token log-probs of the responses of some groups.

    `tolerance`, in nats on a token, is how far they may differ when the same groups are asked for again; `positions`
    is how many tokens its model takes, where that is known.
    """

    score: Callable[[Sequence[TokenGroup]], Rows]
    tolerance: float
    positions: int | None = None

    def __call__(self, groups: Sequence[TokenGroup]) -> Rows:
        return self.score(groups)

    def check(self, groups: Sequence[TokenGroup]) -> None:
        """Raise ValueError for groups that are longer than the model's positions, before any of them is scored."""
        if self.positions is None:
            return
        longest = max((len(group.prompt_ids) + max(map(len, group.response_ids)) for group in groups), default=0)
        if longest > self.positions:
            raise ValueError(
                f"reference.path: its model has {self.positions:,} positions (max_position_embeddings), and the data "
                f"has groups of {longest:,} of its tokens; data.max_length={self.positions} or less leaves those out, "
                "or cuts them as data.over_length says"
            )


def row_key(group: TokenGroup) -> bytes:
    """128 bits that name what is scored: the ids of the prompt and of every response, and which of them count."""
    sizes = [len(group.prompt_ids), *map(len, group.response_ids)]
    ids = [
        *sizes,
        *group.prompt_ids,
        *chain.from_iterable(group.response_ids),
        *chain.from_iterable(group.scored or ()),
    ]
    return hashlib.sha256(np.asarray([len(sizes), *ids], dtype=np.int32).tobytes()).digest()[:16]


def read_shards(folder: Path, wanted: Collection[bytes] | None = None) -> tuple[Rows, list[Path]]:
    """The rows that are stored for one reference, of those that are wanted where that is said: per-token values, one
    response after the other; and the shards that are damaged: whose bytes are not those they are named by."""
    rows: Rows = {}
    damaged = []
    for path in sorted(folder.glob("*.safetensors")):
        content = path.read_bytes()
        if bytes_digest(content) != path.stem:
            damaged.append(path)
            continue
        shard = load(content)
        ends = np.cumsum(shard["sizes"]).tolist()
        keys = map(np.ndarray.tobytes, shard["keys"])
        spans = zip(keys, pairwise([0, *ends]), strict=True)
        rows |= {key: shard["values"][start:end] for key, (start, end) in spans if wanted is None or key in wanted}
    return rows, damaged


def write_shard(folder: Path, rows: Rows) -> None:
    """Store rows, atomically, under the digest of the file."""
    keys = np.stack([np.frombuffer(key, dtype=np.uint8) for key in rows])
    sizes = np.array([len(values) for values in rows.values()], dtype=np.int64)
    content = save({"keys": keys, "sizes": sizes, "values": np.concatenate(list(rows.values()))})
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / f"{bytes_digest(content)}.safetensors") as partial:
        partial.write_bytes(content)


@torch.no_grad()
def score(model: nn.Module, groups: Sequence[TokenGroup], device: torch.device) -> Rows:
    """Per-token log-probs of the groups' responses in one pack."""
    with memory_for("the reference's pass over", sum(group.num_tokens for group in groups)):
        batch = collate(groups).to(device)
        values = response_logps(model, batch).tokens().float().cpu().numpy()
    bounds = np.cumsum([group.num_scored for group in groups])[:-1]
    return dict(zip(map(row_key, groups), np.split(values, bounds), strict=True))


def scorer_of(model: Any) -> Scorer:
    """A model, wherever it is, as what fills a table."""
    device = next(model.parameters()).device
    dtype = next(weight.dtype for weight in model.parameters() if weight.is_floating_point())
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    tolerance = PROBE_TOLERANCE.get(dtype, PROBE_TOLERANCE_HALF)
    return Scorer(partial(score, model, device=device), tolerance, positions_of(model.config))


class _Shards:
    """Stores rows as they come in. An interrupted pass, or one whose server went away, keeps what it has."""

    def __init__(self, folder: Path) -> None:
        self.rows: Rows = {}
        self._folder, self._waiting, self._since = folder, {}, time.monotonic()

    def __enter__(self) -> "_Shards":
        return self

    def __exit__(self, *_: object) -> None:
        if self._waiting:
            self._write()

    def add(self, rows: Rows) -> None:
        """Take rows; write a shard once there are many, or the last one was long ago."""
        self._waiting |= rows
        late = time.monotonic() - self._since >= SHARD_SECONDS
        if late or sum(map(len, self._waiting.values())) >= SHARD_TOKENS:
            self._write()

    def _write(self) -> None:
        write_shard(self._folder, self._waiting)
        self.rows |= self._waiting
        self._waiting, self._since = {}, time.monotonic()


def _passes(groups: Sequence[TokenGroup], missing: Sequence[int], context: ReferenceContext) -> Iterator[Pass]:
    """This rank's over the groups that are missing."""
    scored = ProgressIn(context.work.progress, "reference log-probs", len(missing))
    for start in range(0, len(missing), WINDOW):
        window = [groups[index] for index in missing[start : start + WINDOW]]
        for each in share_of(window, context.pack).passes:
            yield each
            scored.advance(ranks().size * each.counts * len(each.groups))


def _fill(
    scorer: Scorer, groups: Sequence[TokenGroup], missing: Sequence[int], folder: Path, context: ReferenceContext
) -> Rows:
    with _Shards(folder) as shards:
        for pack, counts in _passes(groups, missing, context):
            rows = scorer(pack)
            if counts:
                shards.add(rows)
    return shards.rows


def _probe(scorer: Scorer, groups: Sequence[TokenGroup], rows: Rows, folder: Path) -> None:
    """Score a few stored rows again; a table whose values the model does not give is refused."""
    for key, values in scorer(groups).items():
        gap = float(np.abs(values - rows[key]).max())
        if not gap <= scorer.tolerance:
            raise ValueError(
                f"the cached reference log-probs in {folder} differ from the reference by {gap:.2g} nats on a token: "
                "the table is stale; delete the folder, or run with reference.cache=off"
            )


class PrecomputedReference(Reference):
    """A reference whose log-probabilities were computed beforehand; its model is not needed any more."""

    live = False

    def __init__(
        self, name: str, identity: str, weights: str, groups: Sequence[TokenGroup], rows: Rows, device: torch.device
    ) -> None:
        self.name, self.identity, self.weights, self.table = name, identity, weights, identity
        keys = [(group.group_index, row_key(group)) for group in groups]
        holes = [index for index, key in keys if key not in rows]
        if holes:
            raise ValueError(f"the reference table lacks {len(holes)} groups, such as number {holes[0]}")
        parts = [np.zeros(0, dtype=np.float32), *(rows[key] for _, key in keys)]  # there may be no groups
        self._values = torch.from_numpy(np.concatenate(parts)).to(device)
        ends = np.cumsum([len(part) for part in parts]).tolist()
        indices = (index for index, _ in keys)
        self._span = dict(zip(indices, pairwise(ends), strict=True))
        self.values_digest = digest_of_arrays(parts)

    def digest_of(self, indices: Sequence[int]) -> str:
        """Of their token log-probs, in this order."""
        values, spans = self._values.cpu().numpy(), (self._span[index] for index in indices)
        return digest_of_arrays(values[start:end] for start, end in spans)

    def logps(self, batch: PackedBatch) -> ResponseLogps:
        """Look the pack's groups up."""
        spans = (self._span[index] for index in batch.group_index)
        values = torch.cat([self._values[start:end] for start, end in spans])
        return ResponseLogps(sum_by_response(values, batch), batch.lengths, batch.num_bytes, values)


def rows_of(scorer: Scorer, groups: Sequence[TokenGroup], identity: str, context: ReferenceContext) -> Rows:
    """Rows for all groups: stored ones reused after a probe, the rest computed and stored."""
    scorer.check(groups)
    folder = context.work.cache / "reference" / identity
    with needing_room(folder):
        folder.mkdir(parents=True, exist_ok=True)
    in_use(folder)
    keys = [row_key(group) for group in groups]
    stored = _rows_of_first(folder, keys)
    reused = [index for index, key in enumerate(keys) if key in stored]
    if reused:
        picked = reused[:: max(1, len(reused) // PROBES)][:PROBES]
        _probe(scorer, [groups[index] for index in picked], stored, folder)
    missing = {key: index for index, key in enumerate(keys) if key not in stored}
    if not missing:
        return stored
    name = f"{identity}-{digest(sorted(key.hex() for key in missing))}"
    with made_by_one(folder.with_name(name)) if ranks().is_first else nullcontext():
        stored |= _rows_of_first(folder, list(missing))  # what a run beside this one has made meanwhile
        rest = [index for key, index in missing.items() if key not in stored]
        if not rest:
            return stored
        made = _fill(scorer, groups, rest, folder, context)
        return stored | (made if ranks().size == 1 else _made_by_all(folder, [keys[index] for index in rest]))


def _rows_of_first(folder: Path, wanted: Sequence[bytes]) -> Rows:
    """What is stored of the wanted rows, as the first rank finds it: all ask for the same rows then. Raises ValueError
    where another rank does not find them."""
    rows = _whole_rows(folder, set(wanted)) if ranks().is_first else {}
    found = ranks().first(lambda: [index for index, key in enumerate(wanted) if key in rows])
    return rows if ranks().is_first else _found(folder, [wanted[index] for index in found])


def _made_by_all(folder: Path, wanted: Sequence[bytes]) -> Rows:
    """The rows that all ranks have made together."""
    ranks().wait()
    return _found(folder, wanted)


def _found(folder: Path, wanted: Sequence[bytes]) -> Rows:
    rows, _ = read_shards(folder, set(wanted))
    if len(rows) < len(set(wanted)):
        raise ValueError(
            f"rank {ranks().index} does not find {len(set(wanted)) - len(rows):,} rows of the reference's table in "
            f"{folder} that the others have made: the cache must be one folder for all nodes (DPO_REF_CACHE=<folder>)"
        )
    return rows


def of_all_ranks(rows: Rows) -> Rows:
    """The rows that all ranks have together."""
    named = ranks().columns({"sizes": torch.tensor([len(row) for row in rows.values()], dtype=torch.int64)})
    values = np.concatenate([np.zeros(0, dtype=np.float32), *rows.values()])
    joined = ranks().columns({"values": torch.from_numpy(values)})["values"].numpy()
    keys = [bytes.fromhex(key) for of_rank in ranks().gather([key.hex() for key in rows]) for key in of_rank]
    ends = np.cumsum(named["sizes"].numpy())[:-1]
    return dict(zip(keys, np.split(joined, ends), strict=True)) if keys else {}


def logps_of_groups(
    reference: Reference, groups: Groups, pack: Pack, device: torch.device
) -> Iterator[Float[np.ndarray, " k"]]:
    """A reference's log-probs of the responses of every group, summed over tokens, in the order of the groups."""
    for start in range(0, len(groups), WINDOW):
        window, sums = groups[start : start + WINDOW], {}
        for some in pack(window):
            ends = np.cumsum([len(group.response_ids) for group in some])[:-1]
            values = reference.logps(collate(some).to(device)).sums.cpu().numpy()
            sums |= zip((group.group_index for group in some), np.split(values, ends), strict=True)
        yield from (sums[group.group_index] for group in window)


def _whole_rows(folder: Path, wanted: Collection[bytes]) -> Rows:
    """What is stored of the wanted rows; damaged shards are deleted, and their rows computed again."""
    rows, damaged = read_shards(folder, wanted)
    if damaged:
        say(
            f"{damaged[0]} is damaged, or of an earlier version: the rows of {len(damaged)} of the table's files are "
            "computed again"
        )
    for path in damaged:
        path.unlink(missing_ok=True)  # a run beside this one may have been faster
    return rows


def precompute(
    name: str, model: nn.Module, identity: str, weights: str, context: ReferenceContext
) -> PrecomputedReference:
    """The table of `model` for all of the context's groups."""
    rows = rows_of(scorer_of(model), context.groups, identity, context)
    return PrecomputedReference(name, identity, weights, context.groups, rows, context.work.device)
