"""A reference that is not asked but read: log-probs of the responses that came with the data."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from dpo_ref.component import RunPlan, component
from dpo_ref.data.formats.recognise import LISTS, PAIRS
from dpo_ref.data.tokenise import end_of_turn_ids
from dpo_ref.objectives.interface import Objective
from dpo_ref.references.certificate import (
    AGAIN,
    CERTIFICATE,
    Certificate,
    check_model,
    check_text,
    pair_alone,
    read_certificate,
    row_digest,
)
from dpo_ref.references.interface import ReferenceContext
from dpo_ref.references.other_tokenizer import PrecomputedSums
from dpo_ref.types import PromptGroup, digest

_KNOWN = "; ".join(", ".join(names) for names in (*PAIRS, *LISTS))
LOOKED_FOR = f"looked for are the columns {_KNOWN} (one of these sets in a row), or those of data.logps_columns"
ABOVE_0 = (
    "the log-prob of a response cannot exceed 0: its column holds something else, such as a negative log-likelihood "
    "or a mean of it; data.logps_columns names another"
)
CUT = "data.over_length=drop leaves such rows out, a larger data.max_length keeps them whole"


class Columns(PrecomputedSums):
    """Sums over responses as they were given. `provenance` says whose they are: what the user declared, or which
    certificate was checked. Whether they are of a distribution nothing here can say."""

    normalised = False

    def __init__(
        self, provenance: str, whose: str, sums: dict[int, np.ndarray], device: torch.device, *notes: str
    ) -> None:
        """`whose` is what tells them from others: what was declared, or the certificate's identity."""
        super().__init__("columns", digest(["columns", whose]), "", sums, device)
        self.provenance, self.notes = provenance, notes

    def digest_of(self, indices: Sequence[int]) -> str:
        """Of all log-probs of the data: one that was changed is another reference, whether or not it was used yet."""
        return super().digest_of(list(self._sums))


def _check_run(objective: Objective, plan: RunPlan) -> None:
    """Refuse objectives that look at single tokens, or at responses behind prompts that are not theirs."""
    if "mismatched" in objective.inputs:
        raise ValueError(
            f"reference=columns has log-probs of the data's own responses, and objective={objective.name} estimates "
            "its KL from responses behind other prompts; use objective=bco, or another reference"
        )
    if objective.needs_tokens:
        raise ValueError(
            f"reference=columns has log-probs of whole responses, and objective={objective.name} looks at single "
            "tokens of the reference; use an objective on sums, such as dpo, or another reference"
        )


def _check(provenance: str | None, certificate: str | None, **_: Any) -> None:
    if (provenance is None) == (certificate is None):
        raise ValueError(
            "reference=columns needs reference.provenance=... (whose log-probs the data brings, and what was scored) "
            "or reference.certificate=auto (the certificate.json beside data.path), and not both"
        )


def beside_rows(path: str | None) -> str:
    """Where the certificate beside the rows at `data.path`, a file or a folder, is: what `reference.certificate=auto`
    stands for. Raises ValueError for data without a path."""
    if path is None:
        raise ValueError(
            f"reference.certificate=auto is the {CERTIFICATE} beside data.path, and the data has none; write where it "
            f"is: reference.certificate=<folder>/{CERTIFICATE}"
        )
    rows = Path(path).expanduser()
    return str((rows if rows.is_dir() else rows.parent) / CERTIFICATE)


def check_certificate(path: str) -> None:
    """Raise ValueError, before any data is read, where there is no certificate."""
    if not Path(path).expanduser().is_file():
        raise ValueError(
            f"reference.certificate: there is no {path}; stage=cache_reference export=<folder> writes one with its "
            "rows, reference.provenance=... does without"
        )


@component(check=_check, check_run=_check_run, given=True)
def columns(
    context: ReferenceContext,
    *,
    provenance: str | None = None,
    certificate: str | None = None,
    probe: Literal["auto", "off"] = "auto",
) -> Columns:
    """Log-probs of whole responses in nats, from columns of the data (as in yale-nlp/RefDPO, arXiv:2407.13709).

    `provenance` declares whose they are and what was scored: model, template, whether the end of the turn counts. It
    is the identity; a run goes on only with the values it had. Or `certificate` is the file that stage=cache_reference
    wrote with the rows (`auto`: beside data.path): every row must be one of its rows, of the text that the policy
    reads, and with `probe=auto` its model, where it is on this machine, scores some of them again. Raises ValueError
    for an empty provenance, for what the certificate does not hold for, and for rows without log-probs, with values
    that are none, or with a response that the policy's limits cut.
    """
    _check(provenance, certificate)
    if provenance is not None:
        if not provenance.strip():
            raise ValueError("reference.provenance is empty: say whose log-probs the data brings, and what was scored")
        return Columns(provenance, provenance, _sums(context, None), context.work.device)
    found = read_certificate(Path(str(certificate)).expanduser())
    sums, notes = _sums(context, found), check_text(found, context)
    notes += CHECKS[probe](found, context)
    return Columns(found.title, found.identity, sums, context.work.device, *notes)


def _trusted(certificate: Certificate, context: ReferenceContext) -> list[str]:
    """No row is scored again."""
    return []


CHECKS = {"auto": check_model, "off": _trusted}


def _sums(context: ReferenceContext, certificate: Certificate | None) -> dict[int, np.ndarray]:
    """The log-probs of every group's responses, by its `group_index`."""
    ends = end_of_turn_ids(context.policy.tokenizer)
    sums: dict[int, np.ndarray] = {}
    refused: dict[str, list[str]] = {}
    for index in context.work.progress(range(len(context.groups)), "log-probs of the data", len(context.groups)):
        group, text = context.groups[index], context.groups.text(index)
        problem = _problem(text, any(ids[-1] not in ends for ids in group.response_ids))
        if problem is None and certificate is not None:
            problem = _unknown_to(certificate, text)
        if problem is not None:
            why, remedy = problem
            refused.setdefault(remedy, []).append(f"{text.origin} {why}")
        sums[group.group_index] = np.array(text.logps, dtype=np.float64)
    for remedy, rows in refused.items():
        raise ValueError(f"reference=columns: {rows[0]} ({len(rows)} of {len(context.groups)} groups); {remedy}")
    return sums


def _unknown_to(certificate: Certificate, text: PromptGroup) -> tuple[str, str] | None:
    """Why a row is none of a certificate's, and the remedy."""
    rows = [row_digest(pair_alone(text, pair)) for pair in text.pairs]
    if rows and certificate.rows.issuperset(rows):
        return None
    return f"is none of the rows of {certificate.path}: a text or a log-prob of it is another", AGAIN


def _problem(text: PromptGroup, cut: bool) -> tuple[str, str] | None:
    """Why a group cannot be used, and the remedy."""
    if text.logps is None:
        return "has no log-probs", LOOKED_FOR
    values = ", ".join(f"{value:g}" for value in text.logps)
    if not all(map(math.isfinite, text.logps)):
        return f"has log-probs that are missing or no finite numbers ({values})", LOOKED_FOR
    if max(text.logps) > 0:
        return f"has log-probs above 0 ({values})", ABOVE_0
    return ("has a response that was cut, while its log-prob is of the whole of it", CUT) if cut else None
