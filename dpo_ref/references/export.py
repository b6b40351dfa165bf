"""A reference's log-probs as a folder for other trainers and machines: rows in TRL's format with the columns that TRL
and RefDPO read, and a certificate of what they are (`certificate.py`).
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from dpo_ref.data.chat_templates import ChatText
from dpo_ref.data.encoding import Encoder, Ids
from dpo_ref.data.groups import ConcatGroups, Groups, SelectedGroups
from dpo_ref.files.digests import sealed
from dpo_ref.files.writing import replacing_folder, write_json, write_lines
from dpo_ref.models.asked import ModelSource
from dpo_ref.references.certificate import (
    CERTIFICATE,
    DIGESTS,
    ProbeRow,
    ScoredText,
    certificate_json,
    lines_digest,
    pair_alone,
    row_digest,
)
from dpo_ref.references.interface import Reference, ReferenceContext
from dpo_ref.references.other_tokenizer import ReferenceEncoder, ReferenceText
from dpo_ref.references.policies import without_prompts
from dpo_ref.references.table import logps_of_groups
from dpo_ref.types import PromptGroup, TokenGroup, conversation, turns_of

TRAIN, HELD_OUT = "train.jsonl", "validation.jsonl"  # names by which `datasets` knows the splits
COLUMNS = (("ref_chosen_logps", "ref_rejected_logps"), ("chosen_logprob", "rejected_logprob"))  # TRL's, RefDPO's
PROBES = 4  # groups in the certificate
CHUNK = 1024  # groups written at once


@dataclass(frozen=True, slots=True)
class Described:
    """What the certificate says of a reference besides what the reference itself knows.

    `source` is the model that gives the log-probs, `weights` the digest of its weights, `own` how it reads where it
    has text of its own; `about` is copied.
    """

    kind: str
    strength: float
    weights: str
    source: ModelSource | None
    own: ReferenceText | None
    about: Mapping[str, Any]


# --- the tokens that TRL makes of a row


def _conversations(chat: ChatText, text: PromptGroup) -> list[str]:
    whole = [conversation(text.prompt, response) for response in text.responses]
    return chat.write(whole, start=False, tools=text.tools, options=text.template_options)


class TrlTokens:
    """What TRL makes tokens of (1.16, `DPOTrainer._prepare_dataset`): the whole conversation as the template writes
    it, scored behind the prompt. Ours are the same, or end earlier, at the token that ends the turn, or are other
    ones: where one token straddles the beginning of a response, where a text has a special token's string in it, and
    where a part of the response or all of the conversation is scored."""

    def __init__(self, context: ReferenceContext) -> None:
        self._encoder, self._scoring = Encoder(context.policy.tokenizer), context.scoring
        tail = self._encoder.chat.tail
        self._behind = self._encoder.ids([tail])[0] if tail else []

    def kinds(self, groups: Sequence[TokenGroup], texts: Sequence[PromptGroup]) -> list[str]:
        """For every group: same, behind (TRL scores what the template writes behind the end as well) or other; or cut,
        where limits left out a part of its text."""
        chat = self._encoder.chat
        written = list(chat.apart(partial(_conversations, chat), texts))
        rest = iter(self._encoder.ids([text for texts in written for text in texts]))
        wholes = [[next(rest) for _ in texts] for texts in written]
        kinds = [self._kind(group, whole) for group, whole in zip(groups, wholes, strict=True)]
        unlike = [index for index, kind in enumerate(kinds) if kind == "other"]
        found = self._encoder.outcomes([texts[index] for index in unlike], self._scoring)
        for index, ids in zip(unlike, found, strict=True):
            if not isinstance(ids, Ids) or (ids.prompt, tuple(ids.responses)) != _ids(groups[index]):
                kinds[index] = "cut"
        return kinds

    def _kind(self, group: TokenGroup, wholes: Sequence[list[int]]) -> str:
        pairs = list(zip(group.response_ids, wholes, strict=True))
        if group.scored is None and all(group.prompt_ids + ids == whole for ids, whole in pairs):
            return "same"
        longer = all(group.prompt_ids + ids + self._behind == whole for ids, whole in pairs)
        return "behind" if group.scored is None and longer else "other"


def _ids(group: TokenGroup) -> tuple[list[int], tuple[list[int], ...]]:
    return group.prompt_ids, group.response_ids


# --- rows


def as_row(pair: PromptGroup) -> dict[str, Any]:
    """A pair with log-probs as a row: TRL's conversational preference format, its columns and RefDPO's. A text that
    is not text alone (tools, calls) stands in it as it stood in the data; tools as JSON text, as TRL takes them."""
    assert pair.logps is not None
    row: dict[str, Any] = {"prompt": list(pair.prompt)}
    row |= {side: list(turns_of(said)) for side, said in zip(("chosen", "rejected"), pair.responses, strict=True)}
    if pair.tools:
        row["tools"] = json.dumps(pair.tools, ensure_ascii=False)
    if pair.template_options:
        row["chat_template_kwargs"] = pair.template_options
    if pair.rewards is not None:
        row |= dict(zip(("score_chosen", "score_rejected"), pair.rewards, strict=True))
    return row | {name: value for names in COLUMNS for name, value in zip(names, pair.logps, strict=True)}


def _refuse_what_is_no_row(pair: PromptGroup) -> None:
    assert pair.logps is not None
    if not pair.prompt:
        raise ValueError(f"export: {pair.origin} is a pair without a prompt, which TRL has no place for")
    if not all(map(math.isfinite, pair.logps)):
        raise ValueError(f"export: the reference gives {pair.origin} log-probs that are not finite, {pair.logps}")


@dataclass
class Written:
    """What became of the groups: rows by file, a line with the digest of each row, groups by what TRL reads in them,
    where the groups of rows stand among all, and the tokens of the longest."""

    rows: Counter[str] = field(default_factory=Counter)
    digests: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    places: list[tuple[str, int]] = field(default_factory=list)  # the name of a group's first row, its index
    longest: int = 0

    @property
    def cut(self) -> int:
        """Groups left out: their log-probs are of a part of their text alone."""
        return self.kinds["cut"]


class _Writer:
    """Makes the rows of one file after the other."""

    def __init__(self, reference: Reference, context: ReferenceContext) -> None:
        self.reference, self.context, self.trl = reference, context, TrlTokens(context)
        self.written = Written()

    def lines(self, name: str, part: Groups, first: int) -> Iterator[str]:
        """The rows of a part of the groups, which begins at `first`, as JSON lines."""
        context = self.context
        logps = logps_of_groups(self.reference, part, context.pack, context.work.device)
        starts = range(0, len(part), CHUNK)
        for start in context.work.progress(starts, f"writing {name}", len(starts)):
            indices = range(start, min(start + CHUNK, len(part)))
            groups, texts = [part[index] for index in indices], [part.text(index) for index in indices]
            kinds, sums = self.trl.kinds(groups, texts), islice(logps, len(groups))
            self.written.kinds.update(kinds)
            for index, group, text, kind, values in zip(indices, groups, texts, kinds, sums, strict=True):
                if kind != "cut" and group.pairs:
                    self.written.places.append((f"{name} row {self.written.rows[name] + 1}", first + index))
                    self.written.longest = max(self.written.longest, _longest(group))
                    yield from self._of_group(name, replace(text, logps=tuple(map(float, values))), group.pairs)

    def _of_group(self, name: str, text: PromptGroup, pairs: Sequence[tuple[int, int]]) -> Iterator[str]:
        for pair in (pair_alone(text, pair) for pair in pairs):
            _refuse_what_is_no_row(pair)
            self.written.rows[name] += 1
            self.written.digests.append(f"{row_digest(pair)}\n")
            yield json.dumps(as_row(pair), ensure_ascii=False) + "\n"


def _longest(group: TokenGroup) -> int:
    return len(group.prompt_ids) + max(map(len, group.response_ids))


# --- the folder


def export(
    folder: Path, reference: Reference, context: ReferenceContext, parts: Mapping[str, Groups], described: Described
) -> Written:
    """Write the rows of all parts, named by their files, and the certificate; `folder` appears at once or not at all.

    A ranked group becomes a row for each of its pairs. Groups of which limits have cut a part are left out, as nobody
    else would cut them so. Raises ValueError where no row is left, and for log-probs that are not finite.
    """
    writer = _Writer(reference, context)
    with replacing_folder(folder) as partial:
        first = 0
        for name, part in parts.items():
            if len(part):
                write_lines(partial / name, writer.lines(name, part, first))
            first += len(part)
        written = writer.written
        if not written.digests:
            raise ValueError(
                f"export: none of {first:,} groups is a whole pair ({written.cut:,} were cut); a larger "
                "data.max_length, or data.over_length=drop, keeps whole ones"
            )
        write_lines(partial / DIGESTS, written.digests)
        certificate = _certificate(
            reference, replace(context, groups=ConcatGroups(*parts.values())), described, written
        )
        write_json(partial / CERTIFICATE, sealed(certificate))
    return written


def _certificate(
    reference: Reference, context: ReferenceContext, described: Described, written: Written
) -> dict[str, Any]:
    counted = described.own is None or described.own.terminator == "count"
    text = ScoredText.of(
        context.policy.tokenizer,
        context.scoring,
        own=reference.own_text,
        end_is_counted=counted or not reference.own_text,
    )
    about = {
        "reference": {"kind": described.kind, "strength": described.strength, "identity": reference.identity},
        "weights": described.weights,
        "units": "nats (natural logarithm), summed over the scored tokens of a response",
        "rows": {
            "files": dict(written.rows),
            "digest": lines_digest("".join(written.digests).encode()),
            "longest_in_tokens": written.longest,
            "groups_left_out_as_cut": written.cut,
            "groups_by_what_trl_reads": {kind: count for kind, count in written.kinds.items() if kind != "cut"},
        },
        **described.about,
    }
    return certificate_json(about, described.source, text, _probes(reference, context, described, written))


def _probes(reference: Reference, context: ReferenceContext, described: Described, written: Written) -> list[ProbeRow]:
    """A few rows' groups, from the first on, evenly."""
    places = written.places[:: max(1, len(written.places) // PROBES)][:PROBES]
    some = SelectedGroups(context.groups, [place for _, place in places])
    logps = logps_of_groups(reference, some, context.pack, context.work.device)
    read = _as_read(reference, replace(context, groups=some), described.own)
    return [
        ProbeRow(
            row=name,
            prompt=list(some.text(index).prompt),
            responses=list(some.text(index).responses),
            prompt_ids=group.prompt_ids,
            response_ids=list(group.response_ids),
            scored=None if group.scored is None else list(group.scored),
            logps=list(map(float, values)),
        )
        for index, ((name, _), group, values) in enumerate(zip(places, read, logps, strict=True))
    ]


READ: dict[str, Callable[[ReferenceContext], Sequence[TokenGroup]]] = {"prior": without_prompts}


def _as_read(reference: Reference, context: ReferenceContext, own: ReferenceText | None) -> Sequence[TokenGroup]:
    """The context's groups in the tokens that the reference scores; the policy's, unless it has its own."""
    if own is not None and reference.own_text:
        return list(ReferenceEncoder(context, own).groups())
    return READ[reference.name](context) if reference.name in READ else context.groups
