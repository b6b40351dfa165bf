"""From a trained policy to evidence: generate, score, measure against the initial policy."""
