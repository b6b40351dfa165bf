"""What the name of a column says about what it holds, and its value where the name leaves that open."""

import re
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from dpo_ref.data.formats.checks import says_nothing, written_out
from dpo_ref.data.formats.conversations import messages_written_out

# --- cells that are missing


_MISSING = ("nan", "null", "none", "<na>")  # as pandas and others write cells that are missing into a text


def is_missing(value: Any) -> bool:
    """Whether a value says nothing, or is what became of a cell that was missing: NaN, or a text such as "nan"."""
    if isinstance(value, str):
        return value.strip().lower() in _MISSING or says_nothing(value)
    return value != value if isinstance(value, float) else says_nothing(value)


# --- what a name says


Kind = Literal["harmless", "about", "unknown", "media", "label", "setting", "words"]


def _singular(word: str) -> str:
    if len(word) > 4 and word.endswith("ies"):
        return f"{word[:-3]}y"
    return word[:-1] if len(word) > 2 and word.endswith("s") and not word.endswith("ss") else word


def _words(names: str) -> frozenset[str]:
    return frozenset(map(_singular, names.split()))


_ASPECTS = _words(
    "helpfulness correctness coherence complexity verbosity honesty truthfulness harmlessness following relevance"
)
# A name that ends so is about the row or about a part of it, whatever it begins with: prompt_id, chosen_model.
_IDS = _words("id qid uid uuid guid hash md5 sha")
_POINTERS = _IDS | _words("key index idx name model generator policy engine checkpoint")
_HARMLESS = _POINTERS | _ASPECTS | _words(
    "source dataset origin domain subset category type kind topic lang language locale country version revision "
    "url uri link license licence timestamp time date datetime created updated at utc year length len size count "
    "token char byte meta metadata embedding vector fingerprint"
)  # fmt: skip
# Or, in translation, summaries and data of many tasks, what was asked: any words, or a question alone.
_PROVENANCE = _words("source origin topic category task task_name")
_NEVER_ASKED = _IDS | _words("url uri link license licence")
_COUNTS = _words("num n nb number total len count")  # at the beginning
# About how the row was judged: numbers where a name ends so, words of judges wherever they stand in it.
_MEASURES = _words(
    "score rating reward logprob logp margin probability prob confidence agreement vote upvote downvote elo "
    "perplexity ppl cost price temperature seed status ratio difference weight"
)
_JUDGING = _words(
    "annotator annotation annotated judge judgement judgment critique rationale feedback explanation labelling "
    "labeling labeller labeler labelled labeled"
)
_MEDIA = _words(
    "image img picture pic photo photograph video audio speech voice sound waveform pixel attachment screenshot media "
    "multimodal figure"
)
_LABELS = _words(
    "label preference prefer winner winning loser choice better worse best worst verdict rank ranking wanted "
    "desirable selected correct tie"
)
_SETTINGS = _words("kwargs mask thinking thought reasoning think cot scratchpad")
TURNED = _words("swapped flipped inverted reversed")  # the better response is the other one
ONCE = _words("original orig before previous old")  # what a column was before somebody changed the row
# What says how good a response is, and numbers that never do.
_GRADING = _ASPECTS | _words(
    "score rating reward margin vote upvote downvote like elo karma grade quality metric evaluation eval assessment "
    "annotation annotated judge judgement judgment critique feedback review thumb confidence agreement probability "
    "prob"
)
_UNGRADED = _words("logprob logp perplexity ppl cost price temperature seed weight")
# Of a demonstration: whether it is good, where the value is true or false; and the same in words.
_APPROVING = _words("approved passed pass success successful succeeded valid validated verified acceptable liked good")
_DISAPPROVING = _words(
    "failed fail failure invalid flagged unsafe harmful toxic disapproved disliked bad wrong incorrect"
)
_VERDICTS = _words("status feedback outcome result review decision state quality grade rating vote thumb")
_BAD_WORDS = _DISAPPROVING | {"rejected", "reject", "declined", "negative", "poor", "down", "thumbs", "thumbsdown"}
_BAD_WORDS |= {"thumb", "\N{THUMBS DOWN SIGN}"}
TRUTH = {"true": True, "1": True, "1.0": True, "yes": True, "false": False, "0": False, "0.0": False, "no": False}
# Whose words a column holds, by the name under which they are read here.
_SPOKEN = {
    "tools": _words("tool function plugin api"),
    "system": _words("system sys persona"),
    "rejected": _words("rejected reject dispreferred lose losing negative"),
    "chosen": _words("chosen preferred accepted win positive"),
    "responses": _words("response reply answer completion output generation candidate trajectory assistant gpt bot"),
    "prompt": _words(
        "prompt question query instruction input context history message conversation dialogue dialog document doc "
        "passage article post text paragraph snippet evidence knowledge background premise request turn chat story "
        "problem option user human"
    ),
}
# The same, where what they hold is several words: one alone is a name.
_SPOKEN_AT_LENGTH = {
    "system": _words("developer role guideline"),
    "prompt": _words("schema table fact example hint prefix preamble"),
}
CONVERSATIONS = _words("message conversation dialogue dialog chat turn")  # of which the answer is a part
_LONG = sorted(
    (word for words in (_MEDIA, _LABELS, *_SPOKEN.values()) for word in words if len(word) > 4), key=len, reverse=True
)


def words_of_name(name: str) -> list[str]:
    """The words of a column's name, without letters and digits that number it at the end."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+", name)
    while len(words) > 1 and (words[-1].isdigit() or len(words[-1]) == 1):
        words.pop()
    return [_joined(_singular(word.lower())) for word in words]


def _joined(word: str) -> str:
    """A word, or the known one that it begins or ends with where two are written together: systemprompt."""
    known = word in _HARMLESS or word in _JUDGING or word in _MEASURES
    return word if known else next((long for long in _LONG if word.startswith(long) or word.endswith(long)), word)


def _has_label(words: list[str]) -> bool:
    """Whether a name is that of a label, or of a label's position; its source and its type are none."""
    last = words[-1]
    if last in _HARMLESS - _POINTERS:
        return False
    points = last in ("index", "idx", "number") and not _SPOKEN["chosen"].isdisjoint(words)
    return words[0] == "is" or points or not _LABELS.isdisjoint(words)


@lru_cache(4096)
def kind_of(name: str) -> Kind:
    """What a column's name says about what it holds; of column.key the key."""
    name = name.rpartition(".")[2]
    words = words_of_name(name)
    if not words:
        return "unknown"
    first, last = words[0], words[-1]
    if not _MEDIA.isdisjoint(words) or (last == "file" and "source" not in words):
        return "media"
    if _has_label(words) or last in TURNED:
        return "label"
    names_tools = last == "name" and not _SPOKEN["tools"].isdisjoint(words)
    counts = first in _COUNTS and len(words) > 1
    if (last in _HARMLESS and not names_tools) or counts or name == "parallel_tool_calls":
        return "harmless"
    if last in _MEASURES or not _JUDGING.isdisjoint(words):
        return "about"
    if not _SETTINGS.isdisjoint(words):
        return "setting"
    return "unknown" if spoken_as(name) is None else "words"


@lru_cache(4096)
def spoken_as(name: str) -> str | None:
    """Under which of our names the words of a column are read."""
    words = words_of_name(name.rpartition(".")[2])
    spoken = (*_SPOKEN.items(), *_SPOKEN_AT_LENGTH.items())
    return next((ours for ours, known in spoken if not known.isdisjoint(words)), None)


def is_spoken_at_length(name: str) -> bool:
    """Whether a column holds words only where there are several."""
    words = words_of_name(name.rpartition(".")[2])
    return all(known.isdisjoint(words) for known in _SPOKEN.values())


def could_be_prompt(name: str, value: Any) -> bool:
    """Whether a column that nobody reads may be what was asked."""
    if is_missing(value):
        return False
    if name.lower() in _PROVENANCE and isinstance(value, str) and " " in value.strip():
        return True
    kind = kind_of(name)
    if kind == "harmless":
        asks = isinstance(value, str) and value.rstrip().endswith(("?", "？"))
        return asks and words_of_name(name)[-1] not in _NEVER_ASKED
    return kind in ("words", "unknown") and not is_number(value) and bool(content_of(value, name).texts)


def prompt_inside(name: str, value: Any) -> str | None:
    """The key of an object in a column, or of one in that, which may be what was asked; as column.key."""
    content = written_out(value) if isinstance(value, str) else value
    if isinstance(content, list | tuple):
        return next((found for inner in content if (found := prompt_inside(name, inner))), None)
    if not isinstance(content, dict) or "role" in content or "from" in content:
        return None
    for key, inner in content.items():
        words = kind_of(key) == "words" and spoken_as(key) == "prompt" and bool(content_of(inner, key).texts)
        found = f"{name}.{key}" if words and not is_missing(inner) else prompt_inside(f"{name}.{key}", inner)
        if found:
            return found
    return None


# --- what could say which of several responses is better


def could_rank(name: str, value: Any, size: int) -> bool:
    """Whether a column that nobody reads may say which of `size` responses is better: by a name that chooses, or by
    numbers or grades for each."""
    content = (written_out(value) or value) if isinstance(value, str) else value
    if is_missing(content):
        return False
    if isinstance(content, list | tuple):
        return _list_could_rank(name, content, size)
    if isinstance(content, dict):
        numbers = len(content) == size and all(map(is_number, content.values())) and not _never_grades(name)
        return numbers or _grades(name) or any(could_rank(key, inner, size) for key, inner in content.items())
    numbered = re.search(r"(?<![a-zA-Z])([a-zA-Z]|[0-9]+)(?![a-zA-Z])", name)  # score_b, response_1_score
    return _chooses(name) or (numbered is not None and is_number(content) and _grades(name))


def _list_could_rank(name: str, values: Sequence[Any], size: int) -> bool:
    if _grades(name) or _chooses(name):
        return True
    if any(could_grade(key, inner) for entry in values if isinstance(entry, dict) for key, inner in entry.items()):
        return True
    if any(_list_could_rank(name, inner, size) for inner in values if isinstance(inner, list | tuple)):
        return True
    numbers = all(value is None or is_number(value) for value in values)
    return numbers and len(values) == size and not _never_grades(name)


def could_grade(key: str, value: Any) -> bool:
    """Whether a key of one response may say how good it is: by its name, or as a number of no known meaning."""
    if is_missing(value):
        return False
    if _grades(key) or _chooses(key):
        return True
    if isinstance(value, dict):
        return any(could_grade(inner_key, inner) for inner_key, inner in value.items())
    if isinstance(value, list | tuple):
        return any(could_grade(key, inner) for inner in value)
    return is_number(value) and not _never_grades(key)


def could_grade_turn(key: str, value: Any) -> bool:
    """Whether a key of a turn may say how good it is; objects and lists in turns are calls and the like."""
    named = (_grades(key) or _chooses(key)) and not is_missing(value)
    return named or (not isinstance(value, dict | list | tuple) and could_grade(key, value))


def _chooses(name: str) -> bool:
    """Whether a name is that of a label, or of the better or the worse response, or of something of theirs."""
    words = words_of_name(name)
    sides = _SPOKEN["chosen"] | _SPOKEN["rejected"]
    return bool(words) and (_has_label(words) or words[-1] in TURNED or not sides.isdisjoint(words))


def _grades(name: str) -> bool:
    words = words_of_name(name)
    about_itself = _HARMLESS - _ASPECTS - {"index", "idx"}  # score_source
    return bool(words) and words[-1] not in about_itself and not _GRADING.isdisjoint(words)


def _never_grades(name: str) -> bool:
    """Whether numbers are none of how good something is."""
    words = words_of_name(name) or [""]
    if not _GRADING.isdisjoint(words) and words[-1] in _POINTERS - _IDS:
        return False  # scores_by_model
    counts = words[0] in _COUNTS and len(words) > 1
    return "logp" in name.lower() or counts or words[-1] in _HARMLESS | _UNGRADED


def is_rank(name: str) -> bool:
    """Whether a column or key counts from the best: 1 is better than 2."""
    return words_of_name(name)[-1:] in (["rank"], ["ranking"])


def texts_in(value: Any, name: str) -> list[str]:
    """All texts in a value, without the blanks around them."""
    return content_of(value, name).texts


def is_number(value: Any) -> bool:
    """Whether a value is a number or a text that spells one, as CSV has them."""
    if not isinstance(value, str):
        return isinstance(value, int | float)
    with suppress(ValueError):
        float(value)
        return True
    return False


def disapproves(name: str) -> bool:
    """Whether true in a column means that a demonstration is bad."""
    return words_of_name(name)[-1:] == ["down"] or not _DISAPPROVING.isdisjoint(words_of_name(name)[-1:])


def verdict_of(name: str, value: Any) -> bool | None:
    """Whether a column says that a demonstration is good; None where it says nothing of it."""
    words = words_of_name(name) or [""]
    true = TRUTH.get(str(value).strip().lower())
    if true is not None and (words[0] == "thumb" or words[-1] in _APPROVING | _DISAPPROVING):
        if disapproves(name):
            return False if true else None  # what is not toxic need not be good
        return true
    if isinstance(value, str) and (words[-1] in _VERDICTS or not _JUDGING.isdisjoint(words)):
        said = re.findall(r"[^\W_]+|\N{THUMBS DOWN SIGN}", value[:40].lower())
        if said and _BAD_WORDS.issuperset(said):
            return False
    negative = is_number(value) and float(value) < 0
    return False if negative and words[-1] in ("reward", "rating", "score", "vote", "grade") else None


_NOT_SAID = ("role", "from", "type")  # keys whose texts are names of parts


class Content(NamedTuple):
    texts: list[str]  # without the blanks around them
    has_bytes: bool


def content_of(value: Any, name: str) -> Content:
    """All that is in a value, at any depth; messages may be written out in a text."""
    texts: list[str] = []
    left, has_bytes = [value], False
    while left:
        inner = left.pop()
        if isinstance(inner, str):
            messages = messages_written_out(inner, name)
            left += messages or ()
            texts += [inner.strip()] if messages is None and not says_nothing(inner) else ()
        elif isinstance(inner, dict):
            left += [said for key, said in inner.items() if key not in _NOT_SAID]
        elif isinstance(inner, list | tuple):
            left += inner
        else:
            has_bytes = has_bytes or isinstance(inner, bytes | bytearray | memoryview)
    return Content(texts, has_bytes)
