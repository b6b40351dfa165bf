"""What a table of log-probs says of itself where it leaves the cache: whose they are, of which text, which rows, and a
few of them with their tokens, to be scored again. `references/export.py` writes it, `reference=columns` checks it.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dpo_ref.data.chat_templates import ChatText, written_date
from dpo_ref.data.scoring import Scoring
from dpo_ref.files.digests import Damaged, unsealed
from dpo_ref.models.asked import DTYPES, ModelSource
from dpo_ref.models.checkpoint import weights_digest
from dpo_ref.models.loading import LOCATORS
from dpo_ref.references.interface import ReferenceContext
from dpo_ref.references.table import row_key, scorer_of
from dpo_ref.types import PromptGroup, TokenGroup, digest

CERTIFICATE, DIGESTS = "certificate.json", "rows.digests"  # the latter has a line for each row
LARGEST = 2**26  # bytes of a certificate; one of eight long rows has some hundred thousand
VERSION = 1  # of its layout
TOLERANCE = {"float32": 1e-3}  # nats a token, in the mean over a response; as on a single one in references/table.py
TOLERANCE_HALF = 0.05  # as in the mean of a pack before the first step, where the model computes in half precision
AGAIN = "write the table again (stage=cache_reference export=...), or say whose log-probs they are with provenance"


def pair_alone(text: PromptGroup, pair: tuple[int, int]) -> PromptGroup:
    """A pair of a group of k responses as a group of two, the better one first."""

    def of_pair(values: tuple[Any, ...] | None) -> Any:
        return None if values is None else tuple(values[index] for index in pair)

    return replace(
        text, responses=of_pair(text.responses), pairs=((0, 1),), rewards=of_pair(text.rewards),
        logps=of_pair(text.logps), labels=None,
    )  # fmt: skip


def row_digest(row: PromptGroup) -> str:
    """Digest of a pair's texts and log-probs: what must be equal for a row to be the one that was written."""
    return digest([row.group_id, row.logps])


# --- which text log-probs are of


@dataclass(frozen=True, slots=True)
class ScoredText:
    """Digests of the tokenizer and template with which the rows were made tokens, the policy's; whether the reference
    read the same words in others, its `own`; which turns are scored, and which part of each (`data.score`,
    `data.score_thinking`); the token that ends a turn, whether it counts, and what the template writes behind it,
    which never does."""

    tokenizer: str
    template: str
    own: bool
    turns: str
    part: str
    end_of_turn: str
    end_is_counted: bool
    behind_the_end: str

    @classmethod
    def of(cls, tokenizer: Any, scoring: Scoring, *, own: bool = False, end_is_counted: bool = True) -> "ScoredText":
        """What a policy with this tokenizer is scored on."""
        chat = ChatText(tokenizer)
        vocabulary = digest([tokenizer.backend_tokenizer.to_str(), tokenizer.all_special_tokens])
        template = digest([tokenizer.chat_template, written_date(tokenizer)])
        end = tokenizer.convert_ids_to_tokens(chat.end_id)
        return cls(vocabulary, template, own, scoring.turns, scoring.part, end, end_is_counted, chat.tail)

    def refusal(self, now: "ScoredText") -> str | None:
        """Why log-probs of this text are none of the text that a policy reads now. Of another tokenizer they are sums
        over the same words, as those of any reference with a tokenizer of its own."""
        if (self.turns, self.part) != (now.turns, now.part):
            return (
                f"its log-probs are of data.score={self.turns} data.score_thinking={self.part}, and this run has "
                f"data.score={now.turns} data.score_thinking={now.part}"
            )
        if self.tokenizer == now.tokenizer and self.template != now.template and not self.own:
            return (
                "its log-probs are of the policy's tokens under another chat template (or the date that one writes); "
                "see model.template and model.template_options"
            )
        return None

    def notes(self, now: "ScoredText") -> list[str]:
        """What is other than for the policy, and may be."""
        of_text = "reference: its log-probs are of the same words "
        other = self.own or self.tokenizer != now.tokenizer
        notes = [f"{of_text}in another tokenizer, template or system prompt than the policy's"] if other else []
        return notes if self.end_is_counted else [*notes, f"{of_text}without the token that ends the turn"]


# --- the certificate


@dataclass(frozen=True, slots=True)
class ProbeRow:
    """A row to score again: its texts, its tokens as the reference read them, and the log-prob of each response."""

    row: str  # such as train.jsonl row 7
    prompt: Sequence[Any]
    responses: Sequence[Any]
    prompt_ids: list[int]
    response_ids: list[list[int]]
    scored: list[list[bool]] | None  # which response tokens count; None: all
    logps: list[float]

    def __post_init__(self) -> None:
        masks = self.scored or [[True] * len(ids) for ids in self.response_ids]
        alike = [list(map(len, self.response_ids)), list(map(len, masks))]
        ids = [*self.prompt_ids, *chain.from_iterable(self.response_ids)]
        whole = alike[0] == alike[1] and len(masks) == len(self.logps) and all(map(any, masks))
        if not (self.prompt_ids and whole and all(isinstance(each, int) and each >= 0 for each in ids)):
            raise ValueError(f"{self.row} has no tokens that could be scored")

    @property
    def group(self) -> TokenGroup:
        """As it is scored."""
        masks = None if self.scored is None else tuple(self.scored)
        sizes = (0,) * len(self.response_ids)
        return TokenGroup(0, "0" * 32, self.prompt_ids, tuple(self.response_ids), sizes, (), masks)


@dataclass(frozen=True, slots=True)
class Certificate:
    """A certificate as it was read. `source` is the model whose log-probs they are, where it is a single one that is
    asked for nothing but these tokens; `weights` is the digest of its weights."""

    path: Path
    identity: str
    kind: str
    strength: float
    dtype: str | None  # it computed in; None where that is not known here
    weights: str
    source: ModelSource | None
    text: ScoredText
    rows: frozenset[str]  # their digests
    probes: tuple[ProbeRow, ...]

    @property
    def title(self) -> str:
        """Whose log-probs they are, in a few words."""
        whose = f" of {self.source.path}" if self.source is not None else ""
        return f"certificate {self.identity[:12]}: {self.kind}{whose}"

    @property
    def key(self) -> str:
        """How messages call it."""
        return f"reference.certificate={self.path}"


def certificate_json(
    about: Mapping[str, Any], source: ModelSource | None, text: ScoredText, probes: Sequence[ProbeRow]
) -> dict[str, Any]:
    """What `read_certificate` reads; `about` has the rest: reference, dtype, weights, rows, and what readers only look
    at."""
    model = None if source is None else {k: v for k, v in asdict(source).items() if k != "device"}
    return {
        "certificate": VERSION,
        **about,
        "model": model,
        "text": asdict(text),
        "probes": [asdict(probe) for probe in probes],
    }


def read_certificate(path: Path) -> Certificate:
    """The certificate at `path`, and the digests of rows beside it. Raises ValueError, naming the file, for anything
    but these two as they were written."""
    key = f"reference.certificate={path}"
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it is larger than {LARGEST:,} bytes")
        content = unsealed(path.read_bytes(), key, AGAIN)
        if content["certificate"] != VERSION:
            raise ValueError(f"its layout is of version {content['certificate']}, and {VERSION} is read")
        lines = (path.parent / DIGESTS).read_bytes()
        if lines_digest(lines) != content["rows"]["digest"]:
            raise ValueError(f"{DIGESTS} beside it is not the list of rows that it names")
        return _parsed(path, content, frozenset(lines.decode().split()))
    except Damaged:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        said = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{key} is no certificate of log-probs: {said}; {AGAIN}") from error


def _parsed(path: Path, content: Mapping[str, Any], rows: frozenset[str]) -> Certificate:
    reference, model = content["reference"], content["model"]
    return Certificate(
        path=path,
        identity=digest(dict(content)),
        kind=str(reference["kind"]),
        strength=float(reference["strength"]),
        dtype=content["dtype"],
        weights=str(content["weights"]),
        source=None if model is None else _source(model),
        text=ScoredText(**content["text"]),
        rows=rows,
        probes=tuple(ProbeRow(**probe) for probe in content["probes"]),
    )


def _source(model: Mapping[str, Any]) -> ModelSource:
    texts = {name: value for name, value in model.items() if value is not None}
    if not all(isinstance(value, str) for value in texts.values()) or model["dtype"] not in DTYPES:
        raise ValueError("its model is none")
    return ModelSource(**model)


def lines_digest(content: bytes) -> str:
    """SHA-256 of the digests of all rows, as 32 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()[:32]


# --- checked where it is read


def check_text(certificate: Certificate, context: ReferenceContext) -> list[str]:
    """Raise ValueError where its log-probs are of another text than the policy is scored on; else what is to be said
    of the text."""
    now = ScoredText.of(context.policy.tokenizer, context.scoring)
    if refusal := certificate.text.refusal(now):
        raise ValueError(f"{certificate.key}: {refusal}; {AGAIN}")
    return certificate.text.notes(now)


def check_model(certificate: Certificate, context: ReferenceContext) -> list[str]:
    """Let the certificate's model, where it is at hand, score the certificate's rows again: the policy, a folder here
    or a model of the lab; nothing is fetched. What was done, to be said. Raises ValueError where weights or log-probs
    differ."""
    source = certificate.source
    if source is None or not certificate.probes:
        return ["reference: its certificate names no model that could score its rows again"]
    if certificate.weights == context.policy.weights:
        return [_scored_again(certificate, context.policy.model, "the policy", context)]
    if not _is_at_hand(source.path):
        return [f"reference: {source.path} is not on this machine, so no row of its certificate was scored again"]
    model = context.work.loader.reference(source)
    if (found := weights_digest(model)) != certificate.weights:
        raise ValueError(
            f"{certificate.key}: {source.path} has other weights ({found[:12]}) than those whose log-probs the "
            f"certificate has ({certificate.weights[:12]}); reference.probe=off leaves that model alone"
        )
    return [_scored_again(certificate, model, source.path, context)]


def _is_at_hand(path: str) -> bool:
    return path[: path.find(":") + 1] in LOCATORS or Path(path).expanduser().is_dir()


def _scored_again(certificate: Certificate, model: nn.Module, name: str, context: ReferenceContext) -> str:
    tolerance = _tolerance(certificate.dtype, context.policy.compute_dtype)
    gaps = [gap for probe in certificate.probes for gap in _gaps(probe, model, certificate)]
    if not max(gaps) <= tolerance:
        raise ValueError(
            f"{certificate.key}: {name} gives the certificate's rows other log-probs, by {max(gaps):.2g} nats a token "
            f"(bound {tolerance:g}), such as {certificate.probes[int(np.argmax(gaps)) // 2].row}: they are not its "
            f"own, or not sums over these tokens; {AGAIN}"
        )
    return f"reference: {name} gives {len(gaps)} responses of the certificate the same log-probs ({max(gaps):.1g})"


def _tolerance(dtype: str | None, here: torch.dtype) -> float:
    same = {dtype, str(here).removeprefix("torch.")}
    return TOLERANCE.get(same.pop(), TOLERANCE_HALF) if len(same) == 1 else TOLERANCE_HALF


def _gaps(probe: ProbeRow, model: Any, certificate: Certificate) -> list[float]:
    """By how many nats a token the model's log-probs differ from the certificate's, for each response."""
    group, scorer = probe.group, scorer_of(model)
    if max(chain(group.prompt_ids, *group.response_ids)) >= model.get_input_embeddings().num_embeddings:
        raise ValueError(f"{certificate.key}: {probe.row} has tokens that its model does not know; {AGAIN}")
    scorer.check([group])
    values = scorer([group])[row_key(group)].astype(np.float64)
    sizes = list(map(sum, group.scored) if group.scored else map(len, group.response_ids))
    sums = np.add.reduceat(values, [0, *accumulate(sizes[:-1])]) * certificate.strength
    return [float(abs(s - logp) / n) for s, logp, n in zip(sums, probe.logps, sizes, strict=True)]
