"""Groups in bulk: tokens as flat arrays, 4 bytes a token, memory-mapped where they come from the cache; texts in an
Arrow file, read once, memory-mapped by every later run, of any size.
"""

import hashlib
import json
import math
from abc import abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np
from jaxtyping import Bool, Int

from dpo_ref.data.pairing import set_id
from dpo_ref.files.digests import seal_folder
from dpo_ref.files.writing import replacing, replacing_folder
from dpo_ref.types import Message, PromptGroup, TokenGroup, digest

# --- tokens


KINDS = {
    "tokens": np.int32,  # of all segments; a group's segments are its prompt and its responses
    "scored": np.bool_,  # beside tokens; empty where all response tokens count
    "ends": np.int64,  # of segments, in tokens
    "segments": np.int64,  # of groups, in segments: where each ends
    "num_bytes": np.int64,  # of responses
    "labels": np.int8,  # of responses: 1 wanted, 0 not, -1 not labelled
    "advantages": np.float64,  # of responses; nan where there are none
    "pairs": np.int32,  # better, worse, better, worse, ...
    "pair_ends": np.int64,  # of groups, in entries of pairs
    "numbers": np.int64,  # of groups: group_index
    "ids": np.uint8,  # of groups: 16 bytes of group_id
}
_CODES = {np.int32: "i", np.int64: "q", np.int8: "b", np.uint8: "B", np.bool_: "B", np.float64: "d"}


@dataclass(frozen=True)
class Arrays:
    """The flat arrays of `KINDS`, by name."""

    by_name: dict[str, np.ndarray]

    def __getattr__(self, name: str) -> np.ndarray:
        return self.by_name[name]


def _memory_map(path: Path) -> np.ndarray:
    empty = np.load(path, allow_pickle=False).size == 0 if path.stat().st_size < 256 else False
    values = np.load(path, mmap_mode=None if empty else "r", allow_pickle=False)  # nothing cannot be mapped
    return np.asarray(values)  # the same bytes; np.memmap's own slices cost twice as much


class Groups(Sequence[TokenGroup]):
    """Token groups that know the texts they are from."""

    @abstractmethod
    def text(self, index: int) -> PromptGroup:
        """The texts of the group at this position."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """Of the tokens of all groups and what is said about them, in their order; not of what a configured function
        makes of them."""

    @property
    def others(self) -> "list[Groups]":
        """Groups that an objective looks at beside these: responses behind prompts that are not theirs."""
        return []


class TokenGroups(Groups):
    """A sequence of token groups; slices and selections share its arrays and `texts`, the rows it was made from."""

    def __init__(
        self,
        arrays: Arrays,
        places: Int[np.ndarray, " G"] | None = None,
        first_number: int = 0,
        texts: Sequence[PromptGroup] = (),
    ) -> None:
        self.arrays, self.first_number, self.texts = arrays, first_number, texts
        self.places = np.arange(len(arrays.segments)) if places is None else places

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> TokenGroup: ...
    @overload
    def __getitem__(self, index: slice) -> "TokenGroups": ...
    def __getitem__(self, index: int | slice) -> "TokenGroup | TokenGroups":
        if isinstance(index, slice):
            return TokenGroups(self.arrays, self.places[index], self.first_number, self.texts)
        return self._group(int(self.places[index]))

    def where(self, mask: Bool[np.ndarray, " G"]) -> "TokenGroups":
        """The groups for which `mask` is true."""
        return TokenGroups(self.arrays, self.places[mask], self.first_number, self.texts)

    def numbered_from(self, first_number: int) -> "TokenGroups":
        """The same groups, `first_number` added to their `group_index`."""
        return TokenGroups(self.arrays, self.places, first_number, self.texts)

    def text(self, index: int) -> PromptGroup:
        """The row that the group at this position was made from."""
        return self.texts[int(self.rows[index])]

    @property
    def digest(self) -> str:
        """Of the arrays, and which of their groups these are."""
        hasher = hashlib.sha256()
        for values in (*self.arrays.by_name.values(), self.places):
            hasher.update(np.ascontiguousarray(values).view(np.uint8).data)
        return hasher.hexdigest()[:32]

    @property
    def rows(self) -> Int[np.ndarray, " G"]:
        """The index of every group among what was tokenised."""
        return self.arrays.numbers[self.places]

    @property
    def have_pairs(self) -> Bool[np.ndarray, " G"]:
        """Which groups say that one response is better than another."""
        return np.diff(self.arrays.pair_ends, prepend=0)[self.places] > 0

    @property
    def wanted(self) -> Bool[np.ndarray, " G"]:
        """Which groups have a first response that is not labelled as unwanted."""
        return (self.arrays.labels[self._first_responses()] != 0)[self.places]

    @property
    def labelled(self) -> Bool[np.ndarray, " G"]:
        """Which groups say whether each response is wanted."""
        return (self.arrays.labels[self._first_responses()] >= 0)[self.places]

    @property
    def have_advantages(self) -> Bool[np.ndarray, " G"]:
        """Which groups have an advantage for each response."""
        return ~np.isnan(self.arrays.advantages[self._first_responses()])[self.places]

    @property
    def undecided(self) -> Bool[np.ndarray, " G"]:
        """Which groups have a response that their pairs call both better and worse, or neither."""
        arrays, firsts = self.arrays, self._first_responses()
        owners = np.repeat(firsts, np.diff(arrays.pair_ends, prepend=0) // 2)
        better, worse = np.zeros((2, len(arrays.num_bytes)), dtype=bool)
        better[arrays.pairs[::2] + owners] = worse[arrays.pairs[1::2] + owners] = True
        return np.logical_or.reduceat(better == worse, firsts)[self.places]

    def _first_responses(self) -> Int[np.ndarray, " G"]:
        """The index of every group's first response among all responses."""
        counts = np.diff(self.arrays.segments, prepend=0) - 1
        return counts.cumsum() - counts

    def lengths(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Tokens of every prompt, of the better and the worse response of every pair, and of responses in no pair."""
        arrays = self.arrays
        sizes, counts = np.diff(arrays.ends, prepend=0), np.diff(arrays.segments, prepend=0)
        firsts = arrays.segments - counts
        owners = np.repeat(firsts, np.diff(arrays.pair_ends, prepend=0) // 2)
        better, worse = arrays.pairs[::2] + owners + 1, arrays.pairs[1::2] + owners + 1
        alone = np.ones(len(sizes), dtype=bool)
        alone[firsts] = alone[better] = alone[worse] = False
        return sizes[firsts], sizes[better], sizes[worse], sizes[alone]

    def _group(self, index: int) -> TokenGroup:
        arrays = self.arrays
        first, last = (int(arrays.segments[index - 1]) if index else 0), int(arrays.segments[index])
        bounds = arrays.ends[max(first - 1, 0) : last].tolist()
        bounds = bounds if first else [0, *bounds]
        prompt, *responses = (arrays.tokens[a:b].tolist() for a, b in pairwise(bounds))
        masks = [arrays.scored[a:b].tolist() for a, b in pairwise(bounds[1:])] if len(arrays.scored) else []
        first_pair = int(arrays.pair_ends[index - 1]) if index else 0
        pairs = arrays.pairs[first_pair : int(arrays.pair_ends[index])].tolist()
        begin = first - index  # responses of the groups before: their segments less one prompt each
        labels = arrays.labels[begin : begin + len(responses)].tolist()
        advantages = arrays.advantages[begin : begin + len(responses)].tolist()
        return TokenGroup(
            group_index=int(arrays.numbers[index]) + self.first_number,
            group_id=arrays.ids[16 * index : 16 * index + 16].tobytes().hex(),
            prompt_ids=prompt,
            response_ids=tuple(responses),
            num_bytes=tuple(arrays.num_bytes[begin : begin + len(responses)].tolist()),
            pairs=tuple(zip(pairs[::2], pairs[1::2], strict=True)),
            scored=tuple(masks) if masks and not all(map(all, masks)) else None,
            labels=tuple(label == 1 for label in labels) if labels and labels[0] >= 0 else None,
            advantages=None if not advantages or math.isnan(advantages[0]) else tuple(advantages),
        )

    def save(self, folder: Path, notes: dict[str, str]) -> None:
        """Write the arrays of all groups, and `notes` by file name, with digests; `folder` appears at once or not at
        all. One that is there already stays: other processes may be reading it."""
        if folder.exists():
            return
        with replacing_folder(folder) as partial:
            for name, text in notes.items():
                (partial / name).write_text(text)
            for name, values in self.arrays.by_name.items():
                np.save(partial / f"{name}.npy", values, allow_pickle=False)
            seal_folder(partial)

    @classmethod
    def load(cls, folder: Path, texts: Sequence[PromptGroup]) -> "TokenGroups":
        """What `save` wrote, memory-mapped; `texts` are the rows it was made from."""
        return cls(Arrays({name: _memory_map(folder / f"{name}.npy") for name in KINDS}), texts=texts)


class ConcatGroups(Groups):
    """Several sequences of groups as one."""

    def __init__(self, *parts: Groups) -> None:
        self.parts = parts
        self._ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    @overload
    def __getitem__(self, index: int) -> TokenGroup: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenGroup]: ...
    def __getitem__(self, index: int | slice) -> TokenGroup | list[TokenGroup]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        part, within = self._within(index)
        return part[within]

    @property
    def digest(self) -> str:
        """Of all parts."""
        return digest([part.digest for part in self.parts])

    def text(self, index: int) -> PromptGroup:
        """The texts of the part's group."""
        part, within = self._within(index)
        return part.text(within)

    @property
    def others(self) -> list[Groups]:
        """Those of all parts."""
        return [groups for part in self.parts for groups in part.others]

    def _within(self, index: int) -> tuple[Groups, int]:
        part = bisect_right(self._ends, index)
        if part == len(self.parts):
            raise IndexError(index)
        return self.parts[part], index - (self._ends[part - 1] if part else 0)


class MappedGroups(Groups):
    """Groups seen through a function, made when they are asked for; their texts are those of the groups, or `texts`
    of a position."""

    def __init__(
        self,
        groups: Groups,
        change: Callable[[TokenGroup], TokenGroup],
        texts: Callable[[int], PromptGroup] | None = None,
    ) -> None:
        self.groups, self.change, self._text = groups, change, texts or groups.text

    def __len__(self) -> int:
        return len(self.groups)

    @overload
    def __getitem__(self, index: int) -> TokenGroup: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenGroup]: ...
    def __getitem__(self, index: int | slice) -> TokenGroup | list[TokenGroup]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.change(self.groups[index])

    @property
    def digest(self) -> str:
        """That of the groups."""
        return self.groups.digest

    def text(self, index: int) -> PromptGroup:
        """The texts at this position."""
        return self._text(index)

    @property
    def others(self) -> list[Groups]:
        """Those of the groups."""
        return self.groups.others


class SelectedGroups(Groups):
    """The groups at some positions of others."""

    def __init__(self, groups: Groups, positions: Sequence[int]) -> None:
        self.groups, self.positions = groups, positions

    def __len__(self) -> int:
        return len(self.positions)

    @overload
    def __getitem__(self, index: int) -> TokenGroup: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenGroup]: ...
    def __getitem__(self, index: int | slice) -> TokenGroup | list[TokenGroup]:
        if isinstance(index, slice):
            return [self.groups[position] for position in self.positions[index]]
        return self.groups[self.positions[index]]

    @property
    def digest(self) -> str:
        """Of the groups, and which of them these are."""
        return digest([self.groups.digest, *self.positions])

    def text(self, index: int) -> PromptGroup:
        """The texts of the group at this position."""
        return self.groups.text(self.positions[index])

    @property
    def others(self) -> list[Groups]:
        """Those at the same positions."""
        return [SelectedGroups(groups, self.positions) for groups in self.groups.others]


def from_groups(groups: Iterable[TokenGroup], texts: Sequence[PromptGroup] = ()) -> TokenGroups:
    """Groups written one after the other into flat arrays; `texts` are the rows that their `group_index` counts."""
    flat = {name: array(_CODES[kind]) for name, kind in KINDS.items()}
    masked = False
    for group in groups:
        segments = [group.prompt_ids, *group.response_ids]
        masks = group.scored or [[True] * len(response) for response in group.response_ids]
        masked = masked or group.scored is not None
        for segment, mask in zip(segments, [[False] * len(group.prompt_ids), *masks], strict=True):
            flat["tokens"].extend(segment)
            flat["scored"].extend(mask)
            flat["ends"].append(len(flat["tokens"]))
        flat["segments"].append(len(flat["ends"]))
        flat["num_bytes"].extend(group.num_bytes)
        flat["labels"].extend(group.labels or [-1] * len(group.response_ids))
        flat["advantages"].extend(group.advantages or [math.nan] * len(group.response_ids))
        flat["pairs"].extend(index for pair in group.pairs for index in pair)
        flat["pair_ends"].append(len(flat["pairs"]))
        flat["numbers"].append(group.group_index)
        flat["ids"].extend(bytes.fromhex(group.group_id))
    if not masked:
        flat["scored"] = array("B")
    arrays = Arrays({name: np.frombuffer(flat[name], dtype=kind) for name, kind in KINDS.items()})
    return TokenGroups(arrays, texts=texts)


# --- texts


BATCH = 1000  # groups written at once


def whole_id(group: PromptGroup) -> str:
    """Digest of all that tokenising depends on: the texts, and what is said about them; not where they came from, nor
    log-probs that came along: data with them and without shares its tokens."""
    return digest([group.group_id, group.pairs, group.labels])


IDS: dict[str, Callable[[PromptGroup], str]] = {
    "group_id": lambda group: group.group_id,
    "prompt_id": lambda group: group.prompt_id,
    "set_id": set_id,
    "whole_id": whole_id,
}


def write(groups: Iterable[PromptGroup], path: Path) -> None:
    """Write groups to an Arrow file, which appears at once or not at all."""
    import pyarrow as pa

    schema = pa.schema([("content", pa.large_string()), *((name, pa.binary(16)) for name in IDS)])
    path.parent.mkdir(parents=True, exist_ok=True)
    rest = iter(groups)
    with replacing(path) as partial, pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        while batch := list(islice(rest, BATCH)):
            columns = [list(map(_to_json, batch))]
            columns += [[bytes.fromhex(id_of(group)) for group in batch] for id_of in IDS.values()]
            writer.write_batch(pa.record_batch(columns, schema=schema))


def _to_json(group: PromptGroup) -> str:
    texts = (group.prompt, group.responses, group.pairs)
    values = [*texts, group.rewards, group.origin, group.labels, group.tools, group.logps]
    values += [group.template_options] if group.template_options else []
    return json.dumps(values, ensure_ascii=False, separators=(",", ":"))


def _from_json(content: str) -> PromptGroup:
    prompt, responses, pairs, rewards, origin, *more = json.loads(content)
    turns: tuple[Message, ...] = tuple(prompt)
    said = tuple(response if isinstance(response, str) else tuple(response) for response in responses)
    optional: list[Any] = [None if value is None else tuple(value) for value in (rewards, *more[:3])]
    return PromptGroup(turns, said, tuple(map(tuple, pairs)), optional[0], origin, *optional[1:], *more[3:])  # pyright: ignore


class StoredGroups(Sequence[PromptGroup]):
    """Groups of one or several Arrow files; selections share them. Groups are made when they are asked for."""

    def __init__(self, table: Any, places: Int[np.ndarray, " G"]) -> None:
        self.table, self.places = table, places

    @classmethod
    def load(cls, paths: Sequence[Path]) -> "StoredGroups":
        """What `write` wrote, one file after the other."""
        import pyarrow as pa

        table = pa.concat_tables([pa.ipc.open_file(pa.memory_map(str(path))).read_all() for path in paths])
        return cls(table, np.arange(len(table)))

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> PromptGroup: ...
    @overload
    def __getitem__(self, index: slice) -> "StoredGroups": ...
    def __getitem__(self, index: int | slice) -> "PromptGroup | StoredGroups":
        if isinstance(index, slice):
            return self.select(self.places[index])
        return _from_json(self.table["content"][int(self.places[index])].as_py())

    def __iter__(self) -> Iterator[PromptGroup]:
        for start in range(0, len(self), BATCH):
            rows = self.table["content"].take(self.places[start : start + BATCH])
            yield from (_from_json(content) for content in rows.to_pylist())

    def select(self, places: Int[np.ndarray, " G"]) -> "StoredGroups":
        """The groups at these rows of the table."""
        return StoredGroups(self.table, places)

    def ids(self, name: str) -> list[bytes]:
        """One of `IDS` for every group, without making the groups."""
        return self.table[name].take(self.places).to_pylist()

    @property
    def content(self) -> str:
        """Digest of all groups in their order."""
        return hashlib.sha256(b"".join(self.ids("whole_id"))).hexdigest()[:32]
