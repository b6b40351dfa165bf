"""What became of held-out pairs as wholes: likelihood displacement, and the ranking by implicit reward against length.

Likelihood displacement (Razin et al. 2024, arXiv:2410.08847): preference optimisation may lower the probability of the
chosen response while it raises the margin. Implicit rewards are log pi - log pi_ref over a response; a judge by length
alone prefers the longer one.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from dpo_ref.data.formats.checks import BadRow
from dpo_ref.data.rows import Named, Source, files, open_source
from dpo_ref.data.sources import Reader, Rules
from dpo_ref.evaluation.diagnostics.token_statistics import PairPlaces, ScoredTokens
from dpo_ref.evaluation.statistics.estimates import Estimate, clustered_mean
from dpo_ref.tracking.terminal import say
from dpo_ref.types import PromptGroup, digest

GAPS = (3, 10, 30, 100)  # tokens; upper ends of the bins of |length difference|, the same for every run
Z = 1.959963984540054  # of a 95 % interval


@dataclass(frozen=True, slots=True)
class Displacement:
    """log pi - log initial of one side of the pairs, per response in nats, and per token."""

    mean: Estimate
    median: float
    share_down: Estimate  # pairs in which it fell
    per_token: Estimate


@dataclass(frozen=True, slots=True)
class Displacements:
    """Both sides, and the share of pairs in each quadrant; what did not move counts as up."""

    chosen: Displacement
    rejected: Displacement
    both_up: float
    chosen_up_rejected_down: float
    chosen_down_rejected_up: float
    both_down: float


@dataclass(frozen=True, slots=True)
class LengthBin:
    """Pairs with similar length difference (chosen - rejected, tokens): accuracy with its 95 % Wilson interval, and
    the mean margin in nats."""

    name: str
    num_pairs: int
    accuracy: float
    low: float
    high: float
    margin: float


@dataclass(frozen=True, slots=True)
class Ranking:
    """How B pairs are ranked. `accuracy` has, by name of a score, the share of pairs whose chosen response scores
    higher (ties are wrong); `length` prefers the longer response (equal lengths are a coin flip: half)."""

    num_pairs: int
    accuracy: Mapping[str, Estimate]
    ties: Mapping[str, float]
    above_length: Estimate | None  # implicit - length, pair by pair
    by_length: tuple[LengthBin, ...]  # of the implicit reward


def _displacement(
    moved: Float[np.ndarray, " B"], lengths: Int[np.ndarray, " B"], prompts: Sequence[int]
) -> Displacement:
    ratio = float(moved.sum() / lengths.sum())
    error = clustered_mean(moved - ratio * lengths, prompts).se / float(lengths.mean())
    down = clustered_mean((moved < 0).astype(np.float64), prompts)
    return Displacement(clustered_mean(moved, prompts), float(np.median(moved)), down, Estimate(ratio, error))


def displacements(tokens: ScoredTokens, pairs: PairPlaces) -> Displacements:
    """Likelihood displacement of both sides of the pairs, which are at least one."""
    moved, lengths = tokens.sums(tokens.logratios), tokens.lengths
    prompts = tokens.prompts[pairs.chosen].tolist()
    chosen, rejected = moved[pairs.chosen], moved[pairs.rejected]
    up, other_up = chosen >= 0, rejected >= 0
    return Displacements(
        _displacement(chosen, lengths[pairs.chosen], prompts),
        _displacement(rejected, lengths[pairs.rejected], prompts),
        *(float(share.mean()) for share in (up & other_up, up & ~other_up, ~up & other_up, ~up & ~other_up)),
    )


def wilson(right: int, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927), which stays inside [0, 1] for few pairs."""
    share, spread = right / count, Z**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def length_bins(gaps: Int[np.ndarray, " B"]) -> tuple[Int[np.ndarray, " B"], dict[int, str]]:
    """The bin of each length difference, 0 for none and else with the difference's sign; and the bins' names."""
    codes = np.sign(gaps) * np.where(gaps == 0, 0, 1 + np.searchsorted(GAPS, np.abs(gaps)))
    names = {0: "0"}
    for code, (least, most) in enumerate(zip((1, *(gap + 1 for gap in GAPS)), (*GAPS, None), strict=True), start=1):
        names[code] = f"+{least} or more" if most is None else f"+{least} to +{most}"
        names[-code] = f"−{least} or less" if most is None else f"−{most} to −{least}"
    return codes, names


def by_length(margins: Float[np.ndarray, " B"], gaps: Int[np.ndarray, " B"]) -> tuple[LengthBin, ...]:
    """Accuracy in each bin that has pairs, from chosen much shorter to chosen much longer."""
    codes, names = length_bins(gaps)
    bins = []
    for code in np.unique(codes):
        inside = margins[codes == code]
        right = int((inside > 0).sum())
        low, high = wilson(right, len(inside))
        bins.append(LengthBin(names[int(code)], len(inside), right / len(inside), low, high, float(inside.mean())))
    return tuple(bins)


def ranking(
    margins: Mapping[str, Float[np.ndarray, " B"]], gaps: Int[np.ndarray, " B"], prompts: Sequence[int]
) -> Ranking:
    """How scores with these margins (chosen - rejected) rank the pairs; `implicit` is compared with length."""
    right = {name: (values > 0).astype(np.float64) for name, values in margins.items()}
    longer = (np.sign(gaps) + 1) / 2
    accuracy = {name: clustered_mean(values, prompts) for name, values in right.items()}
    has_implicit = "implicit" in margins
    return Ranking(
        num_pairs=len(gaps),
        accuracy=accuracy | {"length": clustered_mean(longer, prompts)},
        ties={name: float((values == 0).mean()) for name, values in margins.items()},
        above_length=clustered_mean(right["implicit"] - longer, prompts) if has_implicit else None,
        by_length=by_length(margins["implicit"], gaps) if has_implicit else (),
    )


# --- files of labelled pairs to rank beside the held-out ones
# RewardBench's layout, LLMBar's, or any that `data` reads. Rows are {prompt, chosen, rejected} with a `subset` if they
# like (RewardBench, Lambert et al. 2024, arXiv:2403.13787), or {input, output_1, output_2, label} (LLMBar, Zeng et al.
# 2024, arXiv:2310.07641); a row without `subset` belongs to one named after its file.


KEY = "diagnostic.pairs"


class LabelledPairs(NamedTuple):
    """Pairs and the subset each belongs to."""

    groups: list[PromptGroup]
    subsets: list[str]


def check_pairs(paths: Sequence[str] | None) -> None:
    """Raise ValueError for files that are not there, or that are given twice."""
    all_files = [file.resolve() for path in paths or () for file in _files(path)]
    if len(set(all_files)) < len(all_files):
        twice = next(file for file in all_files if all_files.count(file) > 1)
        raise ValueError(f"{KEY} names {twice.name} twice")


def _files(path: str) -> list[Path]:
    if not Path(path).expanduser().exists():
        raise ValueError(f"{KEY}={path} does not exist; give files of pairs, or folders of them")
    return files(path, KEY)


def content_of(paths: Sequence[str]) -> str:
    """Digest of the files' names and bytes."""
    all_files = [file for path in paths for file in _files(path)]
    return digest([[file.name, hashlib.sha256(file.read_bytes()).hexdigest()] for file in all_files])


def read_pairs(paths: Sequence[str]) -> LabelledPairs:
    """The pairs of all files, in their order. Raises ValueError naming file and row for what is no pair."""
    groups: list[PromptGroup] = []
    subsets: list[str] = []
    for file in (file for path in paths for file in _files(path)):
        pairs, names = _read(file)
        groups += pairs
        subsets += names
    return LabelledPairs(groups, subsets)


def _read(path: Path) -> tuple[list[PromptGroup], list[str]]:
    subsets: dict[str, str] = {}

    def rows() -> Iterator[Named]:
        for origin, row in open_source(Source(str(path)), KEY).rows:
            if not isinstance(row, BadRow):
                subsets[origin] = str(row.get("subset") or path.name.partition(".")[0])
            yield origin, row

    reader = Reader(Rules(), f"{KEY}={path.name}")
    groups = list(reader.groups(rows()))
    say(*(f"{KEY}={path.name}: {note}" for note in reader.reading.notes))
    for group in groups:
        if not group.pairs:
            raise ValueError(f"{KEY}: {group.origin} is no pair; a row is {{prompt, chosen, rejected}}")
    return groups, [subsets[group.origin] for group in groups]
