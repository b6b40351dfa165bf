"""Sampling answers from a policy, and the records they are kept in."""
