"""Members of dpo_ref's groups in a folder of their own: left of `*` stands what a run hands over, right of it what can
be configured. See README.md for the commands."""

import math
from collections.abc import Sequence
from pathlib import Path

from dpo_ref.generation.records import Generation, Scores
from dpo_ref.objectives.interface import KLStrength, Preference
from dpo_ref.references.interface import Reference, ReferenceContext
from dpo_ref.types import Message, PackedBatch, PairLogps, PreferenceData, Progress, PromptGroup, ResponseLogps


def truncated_quadratic(
    policy: PairLogps, reference: PairLogps, *, beta: KLStrength = 0.1, knee: float = 1.0
) -> Preference:
    """max(0, knee - margin)^2 of the margin of implicit rewards (GPO, arXiv:2402.05749)."""
    chosen_rewards = beta * (policy.chosen - reference.chosen)
    rejected_rewards = beta * (policy.rejected - reference.rejected)
    losses = (knee - chosen_rewards + rejected_rewards).clamp(min=0).square()
    return Preference(losses, chosen_rewards.detach(), rejected_rewards.detach())


class UniformBytes(Reference):
    """Every byte equally likely: log p(y) = -bytes ln `alphabet`, whatever the prompt."""

    name = "uniform_bytes"

    def __init__(self, alphabet: int) -> None:
        self.identity = f"uniform over {alphabet} bytes"
        self._value = -math.log(alphabet)

    def logps(self, batch: PackedBatch) -> ResponseLogps:
        """One value for a response; there are none of its tokens."""
        return ResponseLogps(batch.num_bytes.double() * self._value, batch.lengths, batch.num_bytes, None)


def uniform_bytes(context: ReferenceContext, *, alphabet: int = 256) -> Reference:
    """A reference that rewards nothing but length in bytes."""
    return UniformBytes(alphabet)


def brevity(generations: Sequence[Generation], *, target: int = 20) -> Scores:
    """1 for an answer of `target` characters, less by the relative distance from it for any other."""
    return Scores("brevity", [1 - abs(generation.num_chars - target) / target for generation in generations])


def tab_separated(seed: int, progress: Progress, *, path: str, eval_share: float = 0.25) -> PreferenceData:
    """Lines of prompt, chosen and rejected with tabs between them; the last `eval_share` of them are held out."""
    lines = [line.split("\t") for line in Path(path).read_text().splitlines()]
    groups = [
        PromptGroup(
            prompt=(Message(role="user", content=prompt),),
            responses=(chosen, rejected),
            pairs=((0, 1),),
            origin=f"{path} line {number}",
        )
        for number, (prompt, chosen, rejected) in enumerate(lines, 1)
    ]
    count = len(groups) - round(eval_share * len(groups))
    train, held_out = groups[:count], groups[count:]
    return PreferenceData(train, held_out, [group.asked for group in held_out])
