"""Two numeric keys that are swept together, such as the learning rate beside beta: which job stands where."""

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dpo_ref.evaluation.sweep import STRENGTHS, SweptRun, key_of

Place = tuple[float, float]  # values of the horizontal and of the vertical key


@dataclass(frozen=True, slots=True)
class GridAxis:
    """A swept key and its values, ascending, each with the text that was typed for it."""

    key: str
    texts: dict[float, str]

    @property
    def values(self) -> list[float]:
        """The values, ascending."""
        return list(self.texts)


@dataclass(frozen=True, slots=True)
class Grid:
    """Jobs by their values of two keys; those at one place differ in their seed. `rest` is what tells this grid from
    others of the sweep, where more than two keys vary."""

    x: GridAxis
    y: GridAxis
    rest: str
    jobs: dict[Place, list[SweptRun]]

    def name(self, place: Place) -> str:
        """The combination at a place, as it is typed."""
        x, y = place
        return f"{self.x.key}={self.x.texts[x]} {self.y.key}={self.y.texts[y]}"

    def at_edge(self, place: Place) -> list[str]:
        """The keys of three values or more of which a place has the smallest or the largest."""
        pairs = zip((self.x, self.y), place, strict=True)
        return [
            axis.key for axis, value in pairs if len(axis.texts) > 2 and value in (axis.values[0], axis.values[-1])
        ]


def grids(jobs: Sequence[SweptRun]) -> list[Grid]:
    """The grids of a sweep over two numeric keys or more, one for each combination of what varies besides; none for a
    sweep over one. Jobs without a record of what was asked for have no place."""
    placed = [job for job in jobs if job.words and job.step is None and job.share is None]
    numbers = [_numbers(job) for job in placed]
    keys = _axes(numbers) if placed else []
    if len(keys) < 2:
        return []
    folders = {job.folder.parent for job in placed}
    x, y = (_axis(key, {each[key] for each in numbers}, folders) for key in keys)
    found: dict[str, dict[Place, list[SweptRun]]] = defaultdict(lambda: defaultdict(list))
    for job, rest, each in zip(placed, _rests(placed, keys), numbers, strict=True):
        found[rest][each[x.key], each[y.key]].append(job)
    return [Grid(x, y, rest, dict(places)) for rest, places in found.items()]


def _numbers(job: SweptRun) -> dict[str, float]:
    """What a job's words say that is a number."""
    numbers = {}
    for key, _, text in (word.lstrip("+").partition("=") for word in job.words):
        with suppress(ValueError):
            numbers[key] = float(text)
    return {key: value for key, value in numbers.items() if math.isfinite(value)}


def _axes(numbers: Sequence[dict[str, float]]) -> list[str]:
    """The numeric keys that vary among jobs all of which say them: the two that make a grid, the horizontal one first.
    A KL strength is the vertical one; of others those with most values are taken."""
    values = {key: {each[key] for each in numbers} for key in numbers[0] if all(key in each for each in numbers)}
    varied = [key for key, several in values.items() if len(several) > 1]
    strengths = [key for key in varied if key in STRENGTHS]
    others = sorted((key for key in varied if key not in strengths), key=lambda key: -len(values[key]))
    return [*others[:1], *strengths[:1]] if strengths else others[:2]


def _rests(jobs: Sequence[SweptRun], keys: Collection[str]) -> list[str]:
    """What else varies in each job, as it is typed; with its folder where two sweeps hold the same runs."""
    shared = set.intersection(*(set(job.words) for job in jobs))
    names = [", ".join(w for w in job.words if w not in shared and key_of(w) not in keys) for job in jobs]
    folders: dict[object, set[Path]] = defaultdict(set)
    for job in jobs:
        folders[job.words, job.seed].add(job.folder.parent)
    if all(len(several) == 1 for several in folders.values()):
        return names
    return [
        ", ".join(filter(None, [name, f"in {job.folder.parent.name}"])) for job, name in zip(jobs, names, strict=True)
    ]


LARGEST_COMMAND = 2**20  # bytes of a file that has a few thousand


def _axis(key: str, values: Set[float], folders: Collection[Path]) -> GridAxis:
    """A swept key with the texts of its values: Hydra hands 0.0001 to a job where 1e-4 was typed, and keeps what was
    typed in the multirun's folder."""
    typed: dict[float, str] = {}
    line = re.compile(rf"""^[ -]*['"]?\+*{re.escape(key)}(?:=|: *)['"]?([^'"\n]*)""", re.MULTILINE)
    for path in (folder / "multirun.yaml" for folder in sorted(folders)):
        if path.is_file() and path.stat().st_size < LARGEST_COMMAND:
            typed |= dict(_read_numbers(line.findall(path.read_text(encoding="utf-8", errors="replace"))))
    return GridAxis(key, {value: typed.get(value, f"{value:g}") for value in sorted(values)})


def _read_numbers(lists: Iterable[str]) -> Iterator[tuple[float, str]]:
    for text in ",".join(lists).split(","):
        with suppress(ValueError):
            yield float(text), text.strip()
