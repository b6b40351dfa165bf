"""Rows that a reader should see before anything is trained on them: what was dropped because both sides are the same,
sides that differ in form alone or in script, held-out prompts that are nearly trained on, lengths out of proportion.

Each is counted over all rows, with the first few of them to look at. The time is linear in the rows: about a
ten-thousandth of a second each.
"""

import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt64

from dpo_ref.data.groups import TokenGroups
from dpo_ref.data.inspection import LONG, TIMES, are_lopsided, ids_of
from dpo_ref.data.tokenise import Tokenised
from dpo_ref.data.turns import common_start
from dpo_ref.types import PreferenceData, Progress, PromptGroup, words_of

SHOWN = 5  # rows of each kind that are kept to be looked at


class Case(NamedTuple):
    """A row to look at: where it is from, what was asked if that is not what is looked at, and texts by name."""

    origin: str
    prompt: str
    texts: tuple[tuple[str, str], ...]


class Finding:
    """How many there are of a kind, and the first few."""

    def __init__(self, name: str, count: int = 0) -> None:
        self.name, self.count = name, count
        self.cases: list[Case] = []

    def meet(self, make: Callable[[], Case]) -> None:
        """Count one, and keep it if there is room."""
        self.count += 1
        if len(self.cases) < SHOWN:
            self.cases.append(make())


def anomalies(
    data: PreferenceData, train: Tokenised, held_out: Tokenised, tokenise: Callable[..., Tokenised], progress: Progress
) -> list[Finding]:
    """All kinds, those that do not occur as well. `tokenise` is what made the tokens of groups."""
    texts, near = OddTexts(), NearlyLeaked(data)
    for group in progress(data.train, "looking at texts", len(data.train)):
        texts.look(group)
        near.look(group)
    for group in data.eval:
        texts.look(group)
    dropped = _dropped_alike(data, train, held_out, tokenise)
    return [dropped, *texts.findings, near.finding, *_odd_lengths(train.groups)]


def _pair(group: PromptGroup, pair: tuple[int, int]) -> Case:
    chosen, rejected = (words_of(group.responses[index]) for index in pair)
    return Case(group.origin, asked(group), (("chosen", chosen), ("rejected", rejected)))


def asked(group: PromptGroup) -> str:
    """The words of the prompt's turns, without those of a system turn, which many rows share."""
    return "\n\n".join(turn["content"] for turn in group.prompt if turn["role"] != "system")


# --- pairs whose sides are the same tokens, which were dropped


ALIKE = "pairs dropped: both sides are the same tokens"  # begins the names of their counts
_SEARCHED, _TRIED = 10_000, 20  # rows without tokens that are looked at, and that are tokenised once more


def _dropped_alike(
    data: PreferenceData, train: Tokenised, held_out: Tokenised, tokenise: Callable[..., Tokenised]
) -> Finding:
    """Which rows they are nobody noted: those of the dropped whose sides begin alike the longest, tokenised again."""
    parts = ((data.train, train), (data.eval, held_out))
    finding = Finding(ALIKE, sum(_count(tokenised) for _, tokenised in parts))
    for groups, tokenised in parts:
        for group in _likely_alike(groups, tokenised) if _count(tokenised) else ():
            if len(finding.cases) < SHOWN and _is_dropped(tokenise, group):
                finding.cases.append(_pair(group, group.pairs[0]))
    return finding


def _count(tokenised: Tokenised) -> int:
    return sum(count for name, count in tokenised.counts.items() if name.startswith(ALIKE))


def _likely_alike(groups: Sequence[PromptGroup], tokenised: Tokenised) -> list[PromptGroup]:
    dropped = np.setdiff1d(np.arange(len(groups)), tokenised.groups.rows)[:_SEARCHED].tolist()
    paired = [group for group in (groups[index] for index in dropped) if group.pairs]
    return sorted(paired, key=_opening, reverse=True)[:_TRIED]


def _opening(group: PromptGroup) -> float:
    """Which share of the shorter side the sides of the first pair have in common, from the beginning."""
    first, second = (_folded(words_of(group.responses[index])) for index in group.pairs[0])
    return common_start(first, second) / max(min(len(first), len(second)), 1)


def _is_dropped(tokenise: Callable[..., Tokenised], group: PromptGroup) -> bool:
    try:
        return _count(tokenise([group])) > 0
    except ValueError:  # a bad row, where such are skipped
        return False


# --- what the texts of a row show


# A word; in scripts that put no blanks between words a character.
_ALONE = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+")
_ONE_WORD = 64  # characters: what is longer is not looked at


class OddTexts:
    """What is odd about the responses of groups."""

    def __init__(self) -> None:
        self._form = Finding("pairs whose sides differ in blanks, case or Unicode form alone")
        self._script = Finding("pairs whose sides are in different scripts")
        self._short = Finding("responses of one word or none")
        self.findings = [self._form, self._script, self._short]

    def look(self, group: PromptGroup) -> None:
        """Count what is odd about one more group."""
        said = [words_of(response) for response in group.responses]
        for words in filter(has_one_word, said):
            self._short.meet(partial(_response, group, words))
        for pair in group.pairs:
            sides = said[pair[0]], said[pair[1]]
            if differ_in_form(*sides):
                self._form.meet(partial(_pair, group, pair))
            if differ_in_script(*sides):
                self._script.meet(partial(_pair, group, pair))


def _response(group: PromptGroup, words: str) -> Case:
    return Case(group.origin, asked(group), (("response", words),))


def has_one_word(text: str) -> bool:
    """Whether a text has a word or none."""
    return len(text) < _ONE_WORD and len(_WORD.findall(text)) < 2


def differ_in_form(first: str, second: str) -> bool:
    """Whether texts are the same but for blanks, case, and how Unicode writes a character."""
    if first == second:
        return False
    starts = _folded(first[:_ONE_WORD]), _folded(second[:_ONE_WORD])
    size = min(map(len, starts)) // 2  # what stands before the cut, whatever the cut has split
    return starts[0][:size] == starts[1][:size] and _folded(first) == _folded(second)


def _folded(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


_LETTERS, _LOOKED_AT = 10, 4000  # letters that tell a script; characters of a text
_TOGETHER = {"CJK": "HAN OR KANA", "HIRAGANA": "HAN OR KANA", "KATAKANA": "HAN OR KANA"}


def script_of(text: str) -> str:
    """The script of more than half of a text's letters, as Unicode calls it; nothing where no script has that many."""
    counts: Counter[str] = Counter()
    for character, count in Counter(text[:_LOOKED_AT]).items():
        counts[_script(character)] += count
    del counts[""]
    script, most = max(counts.items(), key=lambda item: item[1], default=("", 0))
    return script if 2 * most > counts.total() >= _LETTERS else ""


@cache
def _script(character: str) -> str:
    name = unicodedata.name(character, "").split(" ")[0].split("-")[0] if character.isalpha() else ""
    return _TOGETHER.get(name, name)


def differ_in_script(first: str, second: str) -> bool:
    """Whether both texts have a script, and not the same."""
    if _is_nearly_ascii(first) and _is_nearly_ascii(second):
        return False
    scripts = script_of(first), script_of(second)
    return all(scripts) and scripts[0] != scripts[1]


def _is_nearly_ascii(text: str) -> bool:
    """Whether no more than a tenth is something else, such as typographic quotes."""
    return text.isascii() or len(text.encode("utf-8", "surrogatepass")) <= 1.1 * len(text)


# --- held-out prompts that are nearly those of rows that are trained on


RUN = 5  # words
_LEAST = 0.5  # of the runs of words that either has
_SKETCH = 8  # hashes of a prompt by which similar ones are found: the smallest, so that they have the same
_COMMON = 8  # held-out prompts with a hash in common, above which it says nothing: a template's words
_COMPARED = 4  # held-out prompts that a prompt is compared with
_MOST_WORDS = 2000


class NearlyLeaked:
    """Held-out prompts that share half of their runs of words with one that is trained on, and equal none."""

    def __init__(self, data: PreferenceData) -> None:
        self.finding = Finding("held-out prompts are nearly the same as one that is trained on")
        trained = set(ids_of(data.train, "prompt_id")) if len(data.eval) else set()
        apart = [prompt not in trained for prompt in ids_of(data.eval, "prompt_id")]
        self._groups = [group for group, is_apart in zip(data.eval, apart, strict=True) if is_apart]
        self._runs = [runs_of(asked(group)) for group in self._groups]
        self._by_hash: dict[int, list[int]] = {}
        for index, runs in enumerate(self._runs):
            for value in runs[:_SKETCH].tolist():
                self._by_hash.setdefault(value, []).append(index)
        self._found: set[int] = set()

    def look(self, group: PromptGroup) -> None:
        """Count what is nearly the prompt of one more group that is trained on."""
        if not self._groups:
            return
        runs = runs_of(asked(group))
        for index in self._likely(runs):
            if index not in self._found and likeness(runs, self._runs[index]) >= _LEAST:
                self._found.add(index)
                self.finding.meet(partial(_prompts, self._groups[index], group))

    def _likely(self, runs: UInt64[np.ndarray, " N"]) -> list[int]:
        """The held-out prompts with the most of its smallest hashes."""
        shared: Counter[int] = Counter()
        for value in runs[:_SKETCH].tolist():
            indices = self._by_hash.get(value, ())
            shared.update(indices if len(indices) <= _COMMON else ())
        return [index for index, _ in shared.most_common(_COMPARED)]


def _prompts(held_out: PromptGroup, trained: PromptGroup) -> Case:
    return Case(
        held_out.origin, "", (("held out", asked(held_out)), (f"trained on: {trained.origin}", asked(trained)))
    )


def runs_of(text: str) -> UInt64[np.ndarray, " N"]:
    """Hashes of every RUN words that follow each other, of fewer words all of them; ascending, each once."""
    words = " ".join(_WORD.findall(text.casefold())[:_MOST_WORDS]).encode().split()
    hashes = np.fromiter(map(zlib.crc32, words), np.uint64, len(words))
    size = max(len(words) - RUN + 1, 0) or min(len(words), 1)
    runs = np.zeros(size, np.uint64)
    for index in range(min(RUN, len(words))):
        runs = (runs ^ hashes[index : index + size]) * _PRIME
    return np.unique(runs ^ (runs >> _HALF))


_PRIME, _HALF = np.uint64(0x9E3779B97F4A7C15), np.uint64(32)


def likeness(first: UInt64[np.ndarray, " N"], second: UInt64[np.ndarray, " M"]) -> float:
    """The share of the runs of either text that both have."""
    both = len(np.intersect1d(first, second, assume_unique=True))
    return both / max(len(first) + len(second) - both, 1)


# --- lengths out of proportion, in tokens


def _odd_lengths(groups: TokenGroups) -> list[Finding]:
    prompts, chosen, rejected, _ = groups.lengths()
    owners = np.repeat(np.arange(len(groups)), np.diff(groups.arrays.pair_ends, prepend=0) // 2)
    longest = TIMES * float(np.median(prompts)) if len(prompts) else 0
    lopsided = _at(
        groups,
        f"pairs have a side more than {TIMES} times as long as the other",
        owners[are_lopsided(chosen, rejected)],
    )
    long = _at(
        groups,
        f"prompts are more than {TIMES} times as long as half of them",
        np.flatnonzero((prompts > longest) & (prompts > LONG)),
    )
    return [lopsided, long]


def _at(groups: TokenGroups, name: str, indices: Int[np.ndarray, " N"]) -> Finding:
    finding = Finding(name, len(indices))
    finding.cases += [_whole(groups.text(index)) for index in indices[:SHOWN].tolist()]
    return finding


def _whole(group: PromptGroup) -> Case:
    if group.pairs:
        return _pair(group, group.pairs[0])
    return Case(group.origin, asked(group), tuple(("response", words_of(response)) for response in group.responses))
