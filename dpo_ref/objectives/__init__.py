"""Objectives: pure functions from log-probabilities to per-item losses and implicit rewards.

What stands left of `*` says what kind an objective is: `(policy: PairLogps, reference: PairLogps)` is pairwise,
`(policy: PairLogps)` pairwise without a reference, `(policy: ResponseLogps)` a likelihood over single responses; with
`labels` it is unpaired, with `advantages` on samples; `(policy: PairScores)` is a reward model's. `TokenPairLogps` and
`TokenLogps` bring values of tokens, `whole` all items of the optimiser batch; `interface.py` has all there is. What
stands right of `*` is configuration; the parameter annotated `KLStrength` is the one that top-level `beta` sets.
Adding an objective is one function here and one file in `conf/objective/`.
"""
