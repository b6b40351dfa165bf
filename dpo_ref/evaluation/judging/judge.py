"""Pairs of answers judged by a language model: the questions, what is kept of the answers, what they come to.

Every answer a judge ever gave lies in one SQLite file, stored the moment it arrives, so that it is asked only what it
has not been asked before. Judged pairs are `judgments.jsonl`: one JSON object a line with everything that was said
about a pair. All numbers are shares of a win: 1 won, 0.5 tied, 0 lost.
"""

import json
import math
import os
import re
import sqlite3
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dpo_ref.data.bounded import OverLimit, bounded
from dpo_ref.evaluation import results
from dpo_ref.evaluation.judging.templates import Template, Verdict
from dpo_ref.evaluation.statistics.comparisons import preference_metrics
from dpo_ref.files import Damaged, in_use, release, sealed, unsealed, unused, write_lines
from dpo_ref.generation.records import Generation
from dpo_ref.models.server import ServerUnavailable
from dpo_ref.tracking.terminal import say
from dpo_ref.types import Message, Progress, digest

# --- pairs of answers to one prompt, and the questions about them: which is shown first, and whether twice


@dataclass(frozen=True, slots=True)
class Pair:
    """The policy's and the baseline's answer to one prompt."""

    prompt: tuple[Message, ...]
    prompt_index: int
    sample_index: int
    output: str
    baseline_output: str

    @property
    def identical(self) -> bool:
        """Whether there is nothing to judge: the pair is a tie."""
        return self.output == self.baseline_output

    def orders(self, both: bool) -> tuple[bool, ...]:
        """Whether the policy's answer is shown first, once for each question about the pair: both orders, or one drawn
        by the pair's own digest, so that it depends on nothing else."""
        if both:
            return (False, True)
        return (int(digest([self.prompt, self.output, self.baseline_output]), 16) % 2 == 1,)


def _by_prompt(generations: Sequence[Generation]) -> dict[tuple[str, int], dict[int, Generation]]:
    """Samples by their index, under the prompt's digest and how often the prompt occurred before."""
    samples: dict[tuple[str, int], dict[int, Generation]] = defaultdict(dict)
    occurrences: Counter[str] = Counter()
    keys: dict[int, tuple[str, int]] = {}
    for generation in generations:
        if generation.prompt_index not in keys:
            name = digest(generation.prompt)
            keys[generation.prompt_index] = (name, occurrences[name])
            occurrences[name] += 1
        samples[keys[generation.prompt_index]][generation.sample_index] = generation
    return samples


def answer_pairs(generations: Sequence[Generation], baseline: Sequence[Generation]) -> list[Pair]:
    """Every answer beside the baseline's of the same sample index, as far as both have it.

    Answers that were drawn with the same random numbers (same seed and index) are no independent draws where the
    policies are alike: there the baseline's next sample is taken, if there are several. Raises ValueError where the
    prompts differ, and for conversations of several turns: their later answers have no prompt in common.
    """
    if any(generation.turn > 1 for generation in (*generations, *baseline)):
        raise ValueError(
            "judge= compares two answers to one prompt, and these questions have further turns; stage=export "
            "export=mt_bench hands them to FastChat's judge"
        )
    ours, theirs = _by_prompt(generations), _by_prompt(baseline)
    if ours.keys() != theirs.keys() or not ours:
        raise ValueError(
            f"answers are judged prompt by prompt, but only {len(ours.keys() & theirs.keys())} prompts are shared by "
            f"the policy's {len(ours)} and the baseline's {len(theirs)}; generate both from the same prompts"
        )
    return [pair for prompt, samples in ours.items() for pair in _pairs(samples, theirs[prompt])]


def _pairs(ours: dict[int, Generation], theirs: dict[int, Generation]) -> list[Pair]:
    shared = sorted(ours.keys() & theirs.keys())
    same_draws = bool(shared) and ours[shared[0]].seed == theirs[shared[0]].seed
    partners = shared[1:] + shared[:1] if same_draws else shared
    return [
        Pair(ours[index].prompt, ours[index].prompt_index, index, ours[index].output, theirs[partner].output)
        for index, partner in zip(shared, partners, strict=True)
    ]


# --- one request to a judge, and what is kept of its answer


@dataclass(frozen=True, slots=True)
class JudgeRequest:
    """One question. `parameters` are everything beside the messages that determines the answer, the model's name
    first of all."""

    messages: tuple[Message, ...]
    parameters: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Digest of model, parameters and full prompt."""
        return digest([self.messages, dict(self.parameters)])


@dataclass(frozen=True, slots=True)
class JudgeAnswer:
    """What a judge wrote. `candidates` are the likeliest first tokens with their log-probs in nats, None where none
    were asked for."""

    text: str
    candidates: tuple[tuple[str, float], ...] | None
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str | None


class JudgeRefused(Exception):
    """The judge will not answer this question, however often it is asked; the message is its reason."""


Store = Callable[[JudgeRequest, JudgeAnswer | JudgeRefused], None]
# Asks all requests, hands every outcome to the store the moment it arrives, and yields the request then. Raises
# ServerUnavailable when the judge is lost.
Asker = Callable[[Sequence[JudgeRequest], Store], Iterator[JudgeRequest]]


# --- from a judge's answers to a preference


TIE = 0.5


def label_of(verdict: Verdict, text: str) -> str | None:
    """The label that an answer names, None if it names none."""
    if verdict.pattern is None:
        label = text.strip()
    else:
        label = next((match[1] for match in reversed(list(re.finditer(verdict.pattern, text)))), None)
    return label if label in verdict.labels else None


def first_wins(verdict: Verdict, answer: JudgeAnswer) -> float | None:
    """How far the first answer wins; None where the judge's answer names no label (a parse failure).

    With log-probs it is P(first) + P(tie) / 2 with probabilities normalised over the labels, as AlpacaEval 2 has it
    (Dubois et al. 2024, arXiv:2404.04475); a label that is not among the likeliest tokens counts as impossible, and
    tokens that differ by the space around them count together.
    """
    if answer.candidates is None:
        label = label_of(verdict, answer.text)
        return None if label is None else verdict.labels[label]
    weights = dict.fromkeys(verdict.labels, 0.0)
    # Relative to the likeliest label: all of them may be too small for exp.
    candidates = [(token.strip(), logp) for token, logp in answer.candidates if token.strip() in weights]
    top = max((logp for _, logp in candidates), default=-math.inf)
    if top == -math.inf:
        return None
    for label, logp in candidates:
        weights[label] += math.exp(logp - top)
    return sum(share * weights[label] for label, share in verdict.labels.items()) / sum(weights.values())


def winner(share: float) -> int:
    """1, 0 or -1: won, tied, lost."""
    return (share > TIE) - (share < TIE)


def combine_orders(wins: list[float | None], soft: bool) -> float | None:
    """One preference from the wins that the same answer has in each order; None if an order gave no verdict.

    Probabilities are averaged; verdicts without them must agree, or the pair is a tie (Zheng et al. 2023,
    arXiv:2306.05685).
    """
    verdicts = [win for win in wins if win is not None]
    if len(verdicts) < len(wins):
        return None
    if soft:
        return sum(verdicts) / len(verdicts)
    return verdicts[0] if len(set(verdicts)) == 1 else TIE


# --- every answer a judge ever gave


FILE = "judge_answers.sqlite"
WAIT = 60.0  # seconds for another process's write
AT_ONCE = 500  # keys in one query
TABLE = """CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, model TEXT NOT NULL, stored REAL NOT NULL, answer TEXT NOT NULL) WITHOUT ROWID"""


class AnswerCache:
    """Answers by the digest of what was asked. Threads and processes may use the same file; a power cut loses at most
    the last answers, never the file (write-ahead log). Of a damaged file what is whole is kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._use = path.with_suffix(".lock")  # of the file itself a closed handle would end SQLite's own locks
        self._use.touch()
        try:
            if path.exists() and (damage := _damage(path)) is not None:
                with unused(self._use) as alone:
                    _mend(path, damage, alone)
            in_use(self._use)
            self._connection = _opened(path)
        except sqlite3.OperationalError as error:
            raise ValueError(f"{path} cannot be opened: {error}") from error

    def __enter__(self) -> "AnswerCache":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        release(self._use)

    def store(self, request: JudgeRequest, answer: JudgeAnswer) -> None:
        """Keep an answer; the first one to a question stays."""
        row = (request.key, str(request.parameters.get("model")), time.time(), json.dumps(sealed(asdict(answer))))
        with self._lock:
            self._connection.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?)", row)

    def known(self, requests: Iterable[JudgeRequest]) -> dict[str, JudgeAnswer]:
        """The stored answers to `requests`, by their keys; damaged ones are deleted."""
        keys = list(dict.fromkeys(request.key for request in requests))
        answers: dict[str, JudgeAnswer] = {}
        damages: dict[str, str] = {}
        for start in range(0, len(keys), AT_ONCE):
            batch = keys[start : start + AT_ONCE]
            query = f"SELECT key, answer FROM answers WHERE key IN ({','.join('?' * len(batch))})"
            with self._lock:
                rows = self._connection.execute(query, batch).fetchall()
            for key, text in rows:
                try:
                    answers[key] = _answer(text, f"an answer in {self.path}")
                except Damaged as damage:
                    damages[key] = damage.what
        if damages:
            say(f"{next(iter(damages.values()))}: {len(damages)} questions are asked again")
            self._forget(damages)
        return answers

    def _forget(self, keys: Iterable[str]) -> None:
        with self._lock:
            self._connection.executemany("DELETE FROM answers WHERE key = ?", [(key,) for key in keys])


def _answer(text: str, what: str) -> JudgeAnswer:
    remedy = "ask the question again"
    row = unsealed(text, what, remedy)
    try:
        candidates = row.pop("candidates")
        tokens = None if candidates is None else tuple((token, logp) for token, logp in candidates)
        return JudgeAnswer(**row, candidates=tokens)
    except (KeyError, TypeError, ValueError) as error:
        raise Damaged(f"{what} is damaged: {error}", remedy) from error


def _opened(path: Path) -> sqlite3.Connection:
    # No transactions of Python's own: every statement is one, and is on the disk when it returns.
    connection = sqlite3.connect(path, timeout=WAIT, isolation_level=None, check_same_thread=False)
    connection.text_factory = _text
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute(TABLE)
    return connection


def _text(content: bytes) -> str:
    """A flipped byte need not be UTF-8."""
    return content.decode(errors="replace")


def _damage(path: Path) -> str | None:
    """What is wrong with the file's structure; None where nothing is."""
    with closing(sqlite3.connect(path, timeout=WAIT)) as connection:
        try:
            finding = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            return None if finding == "ok" else " ".join(finding.split())
        except sqlite3.OperationalError:  # locked, not ours to read: for who opens it
            return None
        except sqlite3.DatabaseError as error:
            return str(error)


def _mend(path: Path, damage: str, alone: bool) -> None:
    """Set a damaged file aside and begin another with the answers that can still be read."""
    if not alone:
        raise Damaged(
            f"{path} is damaged ({damage}) and in use by another process", "type this again when it has ended"
        )
    aside = path.with_name(f"{path.stem}.damaged-{time.time_ns()}{path.suffix}")
    rows = _readable_rows(path)
    for ending in ("-wal", "-shm"):
        path.with_name(path.name + ending).unlink(missing_ok=True)
    path.rename(aside)
    with closing(_opened(path)) as connection:
        connection.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?)", rows)
    say(
        f"{path} was damaged ({damage}): {len(rows)} answers are kept, the others asked again; the old file is {aside}"
    )


def _lengthen(path: Path) -> None:
    """Fill a file that was cut short up to the length that its head states: SQLite reads nothing of a shorter one."""
    with path.open("rb") as stream:
        head = stream.read(100)
    if head.startswith(b"SQLite format 3"):
        page_size, num_pages = int.from_bytes(head[16:18]), int.from_bytes(head[28:32])
        os.truncate(path, max(path.stat().st_size, page_size * num_pages))


def _readable_rows(path: Path) -> list[tuple[Any, ...]]:
    """Rows of a damaged file: read in small parts by the first digits of their keys, as far as each goes."""
    rows = []
    _lengthen(path)
    with closing(sqlite3.connect(path)) as connection:
        connection.text_factory = _text
        for start in range(256):
            with suppress(sqlite3.DatabaseError):
                query = "SELECT * FROM answers WHERE key >= ? AND key < ?"
                rows += connection.execute(query, (f"{start:02x}", f"{start:02x}g")).fetchall()
    return rows


# --- asking what has not been asked before


@dataclass(slots=True)
class JudgeOutcome:
    """Answers and refusals by the keys of their requests; `num_asked` questions went to the judge this time. `lost`
    says why it was given up, if it was."""

    answers: dict[str, JudgeAnswer]
    refusals: dict[str, str] = field(default_factory=dict)
    num_asked: int = 0
    lost: str | None = None


def collect(requests: Sequence[JudgeRequest], cache: AnswerCache, ask: Asker, progress: Progress) -> JudgeOutcome:
    """The outcome of every request: from the cache, or asked once however often it occurs, and stored."""
    outcome = JudgeOutcome(cache.known(requests))
    missing = list({request.key: request for request in requests if request.key not in outcome.answers}.values())

    def keep(request: JudgeRequest, answer: JudgeAnswer | JudgeRefused) -> None:
        if isinstance(answer, JudgeRefused):
            outcome.refusals[request.key] = str(answer)
            return
        cache.store(request, answer)
        outcome.answers[request.key] = answer

    try:
        for _ in progress(ask(missing, keep), "judging", len(missing)) if missing else ():
            outcome.num_asked += 1
    except ServerUnavailable as error:
        outcome.lost = str(error)
    return outcome


# --- judged pairs


class JudgeLost(ValueError):
    """The judge stopped answering; what it said before is kept."""


@dataclass(frozen=True, slots=True)
class Judge:
    """Whom to ask and how. `parameters` determine an answer beside the question itself; `soft` says that answers come
    with log-probs; `prices` are per million tokens of prompt and answer, None where they are not known."""

    name: str
    model: str
    template: Template
    parameters: Mapping[str, Any]
    both_orders: bool
    soft: bool
    ask: Asker
    cache: Path
    prices: tuple[float, float] | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What the verdicts depend on, under names for a reader."""
        return {
            "name": self.name,
            "model": self.model,
            "template": self.template.name,
            "template_digest": self.template.identity,
            "orders": "both" if self.both_orders else "one, drawn by the pair's digest",
            "preferences": "log-probs of the labels" if self.soft else "written verdicts",
            "parameters": dict(self.parameters),
        }

    def request(self, pair: Pair, policy_first: bool) -> JudgeRequest:
        """The question about a pair, with the policy's answer first or second."""
        answers = (pair.output, pair.baseline_output) if policy_first else (pair.baseline_output, pair.output)
        return JudgeRequest(self.template.fill(pair.prompt, *answers), self.parameters)


@dataclass(frozen=True, slots=True)
class Opinion:
    """The answer to one question. `win` is the policy's share, None where the answer names no label or was refused."""

    policy_first: bool
    win: float | None
    answer: str
    refusal: str | None
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Judgment:
    """A pair and what was said about it. `preference` is the policy's share of the win, None where an opinion has
    none. A pair of identical answers is a tie about which nobody was asked."""

    pair: Pair
    opinions: tuple[Opinion, ...]
    preference: float | None


@dataclass(frozen=True, slots=True)
class Judged:
    """All judgments, and how many questions they took this time."""

    judgments: list[Judgment]
    num_asked: int


def judge_pairs(judge: Judge, pairs: Sequence[Pair], progress: Progress) -> Judged:
    """What the judge says of every pair; what it was asked before comes from the cache.

    Raises JudgeLost, once all that was answered is stored, when the judge stops answering, and ValueError where it
    refuses everything.
    """
    requests = [[] if pair.identical else _requests(judge, pair) for pair in pairs]
    path = judge.cache / FILE
    with AnswerCache(path) as cache:
        outcome = collect([request for members in requests for request in members], cache, judge.ask, progress)
    if outcome.lost is not None:
        num_judged = sum(all(_is_settled(outcome, request) for request in members) for members in requests)
        raise JudgeLost(
            f"{num_judged} of {len(pairs)} pairs are judged, then judge={judge.name} gave no answer: {outcome.lost}. "
            f"Every answer so far is kept in {path}: type the same command again when the judge is back (stage=judge "
            "judges alone), and only the others are asked"
        )
    if outcome.refusals and not outcome.answers:
        raise ValueError(f"judge={judge.name} refuses every question: {next(iter(outcome.refusals.values()))}")
    verdict, keys = judge.template.verdict, list(outcome.answers)
    try:  # apart: verdict.pattern may be a stranger's, and takes hours for some texts
        shares = list(bounded(lambda key: first_wins(verdict, outcome.answers[key]), keys))
    except OverLimit as error:
        raise ValueError(
            f"judge={judge.name}: verdict.pattern of template {judge.template.name} cannot be searched for "
            f"in an answer ({error}); write one that does not try so many ways"
        ) from None
    wins = dict(zip(keys, shares, strict=True))
    return Judged([_judgment(judge, pair, outcome, wins) for pair in pairs], outcome.num_asked)


def _requests(judge: Judge, pair: Pair) -> list[JudgeRequest]:
    return [judge.request(pair, policy_first) for policy_first in pair.orders(judge.both_orders)]


def _is_settled(outcome: JudgeOutcome, request: JudgeRequest) -> bool:
    return request.key in outcome.answers or request.key in outcome.refusals


def _judgment(judge: Judge, pair: Pair, outcome: JudgeOutcome, wins: Mapping[str, float | None]) -> Judgment:
    if pair.identical:
        return Judgment(pair, (), TIE)
    opinions = tuple(_opinion(judge, pair, first, outcome, wins) for first in pair.orders(judge.both_orders))
    return Judgment(pair, opinions, combine_orders([opinion.win for opinion in opinions], judge.soft))


def _opinion(
    judge: Judge, pair: Pair, policy_first: bool, outcome: JudgeOutcome, wins: Mapping[str, float | None]
) -> Opinion:
    key = judge.request(pair, policy_first).key
    if key in outcome.refusals:
        return Opinion(policy_first, None, "", outcome.refusals[key], 0, 0)
    answer = outcome.answers[key]
    share = wins[key]
    win = share if share is None or policy_first else 1 - share
    return Opinion(policy_first, win, answer.text, None, answer.prompt_tokens, answer.completion_tokens)


def write_judgments(path: Path, judgments: Iterable[Judgment]) -> None:
    """Replace a `.jsonl` file atomically."""
    write_lines(path, (json.dumps(_row(judgment), ensure_ascii=False) + "\n" for judgment in judgments))


def _row(judgment: Judgment) -> dict[str, Any]:
    opinions = [asdict(opinion) for opinion in judgment.opinions]
    return sealed(asdict(judgment.pair) | {"preference": judgment.preference, "opinions": opinions})


def read_judgments(path: Path) -> list[Judgment]:
    """The judgments in a file, in its order. Raises ValueError, naming the row, for what is none."""
    with path.open("rb") as file:
        return [_read(line, f"{path} row {index}") for index, line in enumerate(file, start=1)]


def _read(line: bytes, origin: str) -> Judgment:
    row = unsealed(line, origin, "judge again with stage=judge")
    try:
        opinions = tuple(Opinion(**opinion) for opinion in row.pop("opinions"))
        preference = row.pop("preference")
        pair: dict[str, Any] = row | {"prompt": tuple(row["prompt"])}
        return Judgment(Pair(**pair), opinions, preference)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{origin} is no judgment ({error}); judge again with stage=judge") from error


# --- what judgments come to
# How often the policy wins, how sure that is, and how far the judge can be trusted.


WIN_RATE = {  # of `preference_metrics`: what follows the win rate's key
    "win_rate": "",
    "win_rate_se": "_se",
    "win_rate_low": "_low",
    "win_rate_high": "_high",
    "discrete_win_rate": "_discrete",
    "length_adjusted": "_length_adjusted",
    "length_adjusted_low": "_length_adjusted_low",
    "length_adjusted_high": "_length_adjusted_high",
}
BESIDE_IT = {
    "ties": results.JUDGE_TIES,
    "win_rate_longer": results.WINRATE_LONGER,
    "win_rate_shorter": results.WINRATE_SHORTER,
    "longer_share": results.LONGER_SHARE,
    "num_compared": results.NUM_JUDGED,
    "num_missing": results.NUM_MISSING,
}


def judge_metrics(judge: Judge, judgments: Sequence[Judgment], baseline: str, seed: int) -> dict[str, float]:
    """The numbers of `judge_winrate/<baseline>` and `judge/...`, as far as there is something to count; lengths are
    those in characters. `seed` drives the bootstraps over prompts."""
    preferences = np.array([np.nan if j.preference is None else j.preference for j in judgments])
    ours = np.array([len(judgment.pair.output) for judgment in judgments])
    theirs = np.array([len(judgment.pair.baseline_output) for judgment in judgments])
    prompts = [digest(judgment.pair.prompt) for judgment in judgments]
    statistics = preference_metrics(preferences, ours, theirs, prompts, seed)
    key = results.JUDGE_WIN_RATE.of(baseline=baseline)
    metrics = {f"{key}{part}": statistics[name] for name, part in WIN_RATE.items()}
    metrics |= {metric.key: statistics[name] for name, metric in BESIDE_IT.items()}
    metrics |= _bias(judgments) | _bill(judge, judgments)
    return {key: value for key, value in metrics.items() if value == value}


def consistent(judgment: Judgment) -> bool:
    """Whether both orders have the same winner."""
    return len({winner(opinion.win) for opinion in judgment.opinions if opinion.win is not None}) == 1


def _bias(judgments: Sequence[Judgment]) -> dict[str, float]:
    """How often both orders have the same winner, and how often the answer shown first wins (ties half)."""
    judged = [judgment for judgment in judgments if judgment.opinions and judgment.preference is not None]
    first = [
        (1 + (winner(opinion.win) if opinion.policy_first else -winner(opinion.win))) / 2
        for judgment in judged
        for opinion in judgment.opinions
        if opinion.win is not None
    ]
    agree = [float(consistent(judgment)) for judgment in judged if len(judgment.opinions) == 2]
    shares = {results.CONSISTENCY.key: agree, results.FIRST_POSITION.key: first}
    return {key: float(np.mean(values)) for key, values in shares.items() if values}


def _bill(judge: Judge, judgments: Sequence[Judgment]) -> dict[str, float]:
    """What was asked, what failed, and what it costs (also what was known before, so that the numbers repeat)."""
    opinions = [opinion for judgment in judgments for opinion in judgment.opinions]
    tokens = [sum(o.prompt_tokens for o in opinions), sum(o.completion_tokens for o in opinions)]
    counts = {
        results.NUM_JUDGE_PAIRS.key: len(judgments),
        results.IDENTICAL.key: sum(judgment.pair.identical for judgment in judgments),
        results.PARSE_FAILURES.key: sum(o.win is None and o.refusal is None for o in opinions),
        results.REFUSALS.key: sum(o.refusal is not None for o in opinions),
        results.PROMPT_TOKENS.key: tokens[0],
        results.COMPLETION_TOKENS.key: tokens[1],
    }
    metrics = {key: float(count) for key, count in counts.items()}
    if judge.prices is not None:
        metrics[results.COST.key] = sum(price * count for price, count in zip(judge.prices, tokens, strict=True)) / 1e6
    return metrics
