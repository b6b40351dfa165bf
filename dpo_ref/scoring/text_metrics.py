"""What can be said about answers without a judge: how long they are, whether they end, whether they repeat."""

from collections.abc import Sequence

import numpy as np

from dpo_ref.generation.records import Generation
from dpo_ref.scoring.estimates import clustered_mean

ORDER = 4


def seq_rep_4(token_ids: Sequence[int]) -> float:
    """1 - distinct 4-grams / 4-grams of one answer (Welleck et al. 2020, arXiv:1908.04319); 0 for answers of
    fewer than four tokens."""
    grams = [tuple(token_ids[start : start + ORDER]) for start in range(len(token_ids) - ORDER + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def text_metrics(generations: Sequence[Generation]) -> dict[str, float]:
    """Length in tokens (the end token counted) and characters, share that ended by itself, seq-rep-4.

    Standard errors (`_se`) are clustered by prompt. Raises ValueError for no generations.
    """
    if not generations:
        raise ValueError("there are no generations to describe; sample some with stage=generate")
    clusters = [g.prompt_index for g in generations]
    lengths = np.array([g.num_tokens for g in generations], dtype=np.float64)
    found = {
        "lengths/response": clustered_mean(lengths, clusters),
        "lengths/response_chars": clustered_mean([float(g.num_chars) for g in generations], clusters),
        "ended/share": clustered_mean([float(g.finished) for g in generations], clusters),
        "repetition/seq_rep_4": clustered_mean([seq_rep_4(g.content_ids) for g in generations], clusters),
    }
    metrics = {name: estimate.mean for name, estimate in found.items()}
    metrics |= {f"{name}_se": estimate.se for name, estimate in found.items()}
    median, p95 = np.quantile(lengths, [0.5, 0.95])
    return metrics | {"lengths/response_median": float(median), "lengths/response_p95": float(p95)}
