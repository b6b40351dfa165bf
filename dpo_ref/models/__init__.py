"""Models as objects: loading, attention over packs, log-probabilities, adapters, checkpoints, servers."""
