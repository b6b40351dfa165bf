"""A reference that is not asked but read: log-probs of the responses that came with the data."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from dpo_ref.component import RunPlan, component
from dpo_ref.data.formats.recognise import LISTS, PAIRS
from dpo_ref.data.tokenise import end_of_turn_ids
from dpo_ref.objectives.interface import Objective
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
    """Sums over responses as they were given. `provenance` says whose they are, which nothing here can check, nor
    whether they are of a distribution."""

    normalised = False

    def __init__(self, provenance: str, sums: dict[int, np.ndarray], device: torch.device) -> None:
        super().__init__("columns", digest(["columns", provenance]), "", sums, device)
        self.provenance = provenance

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


@component(check_run=_check_run, given=True)
def columns(context: ReferenceContext, *, provenance: str) -> Columns:
    """Log-probs of whole responses in nats, from columns of the data (as in yale-nlp/RefDPO, arXiv:2407.13709).

    `provenance` declares whose they are and what was scored: model, template, whether the end of the turn counts. It
    is the identity; a run goes on only with the values it had. Raises ValueError if it is empty, and for rows without
    log-probs, with values that are none, or with a response that the policy's limits cut.
    """
    if not provenance.strip():
        raise ValueError("reference.provenance is empty: say whose log-probs the data brings, and what was scored")
    ends = end_of_turn_ids(context.policy.tokenizer)
    sums: dict[int, np.ndarray] = {}
    refused: dict[str, list[str]] = {}
    for index in context.work.progress(range(len(context.groups)), "log-probs of the data", len(context.groups)):
        group, text = context.groups[index], context.groups.text(index)
        problem = _problem(text, any(ids[-1] not in ends for ids in group.response_ids))
        if problem is not None:
            why, remedy = problem
            refused.setdefault(remedy, []).append(f"{text.origin} {why}")
        sums[group.group_index] = np.array(text.logps, dtype=np.float64)
    for remedy, rows in refused.items():
        raise ValueError(f"reference=columns: {rows[0]} ({len(rows)} of {len(context.groups)} groups); {remedy}")
    return Columns(provenance, sums, context.work.device)


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
