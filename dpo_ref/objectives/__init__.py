"""Objectives: pure functions from log-probabilities to per-item losses and implicit rewards.

What stands left of `*` says what kind an objective is: `(policy: PairLogps, reference: PairLogps)` is pairwise,
`(policy: PairLogps)` pairwise without a reference, `(policy: ResponseLogps)` a likelihood over single responses. What
stands right of `*` is configuration; the parameter annotated `Strength` is the one that top-level `beta` sets. Adding
an objective is one function here and one file in `conf/objective/`.
"""
