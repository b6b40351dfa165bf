"""Invented judgments: preferred, tied, contradicted, unparsed and refused."""

from dpo_ref.evaluation.judging.judge import Judgment, Opinion, Pair
from dpo_ref.types import Message


def judgment(prompt, output, baseline, wins, preference):
    """Opinions from the policy's shares of the win: shown second, shown first."""
    opinions = tuple(
        Opinion(bool(policy_first), win, "", "refused" if win == "refused" else None, 10, 2)
        if win != "refused"
        else Opinion(bool(policy_first), None, "", "400", 0, 0)
        for policy_first, win in enumerate(wins)
    )
    return Judgment(Pair((Message(role="user", content=prompt),), 0, 0, output, baseline), opinions, preference)


JUDGMENTS = [  # prompt, answers, shares of the win when shown second and first, preference
    judgment("a", "long", "xx", (0.9, 0.7), 0.8),
    judgment("a", "lo", "xxx", (0.4, 0.8), 0.6),
    judgment("b", "long", "xx", (0.1, 0.3), 0.2),
    judgment("b", "same", "same", (), 0.5),
    judgment("c", "loooong", "x", (None, 0.9), None),
    judgment("c", "l", "xx", ("refused", 0.1), None),
]
