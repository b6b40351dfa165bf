"""Does the policy, seen as a reward model, rank held-out pairs as their labels do, and better than by length?"""

import numpy as np
from jaxtyping import Float, Num


def pair_accuracy(
    chosen_rewards: Float[np.ndarray, " B"],
    rejected_rewards: Float[np.ndarray, " B"],
    chosen_lengths: Num[np.ndarray, " B"],
    rejected_lengths: Num[np.ndarray, " B"],
) -> dict[str, float]:
    """Implicit-reward accuracy (strict: ties are wrong, and reported) beside the accuracy of preferring the longer
    response (equal lengths are a coin flip: half).

    The rewards are log pi - log pi_ref, or that times beta, which changes nothing here. Standard errors are those of
    a share. Raises ValueError for no pairs.
    """
    if len(chosen_rewards) == 0:
        raise ValueError("there are no held-out pairs; give data.eval_fraction or data.eval_path")
    margins = chosen_rewards - rejected_rewards
    longer = (np.sign(chosen_lengths - rejected_lengths) + 1) / 2
    accuracy = float((margins > 0).mean())
    return {
        "rewards/accuracies": accuracy,
        "rewards/accuracies_se": float(np.sqrt(accuracy * (1 - accuracy) / len(margins))),
        "rewards/ties": float((margins == 0).mean()),
        "rewards/margins": float(margins.mean()),
        "rewards/length_baseline": float(longer.mean()),
        "rewards/num_pairs": float(len(margins)),
    }
