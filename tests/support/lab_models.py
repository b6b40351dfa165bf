"""A model of the lab that is built on first use, by a recipe that takes a moment."""

from dataclasses import replace

import pytest

from dpo_ref.lab.recipes import RECIPES


@pytest.fixture
def large_in_a_moment(monkeypatch):
    """lab:large by a recipe of one step; processes that are forked have it too."""
    recipe = RECIPES["tiny"]
    short = replace(recipe, stages=(replace(recipe.stages[0], num_steps=1, batch_size=4),))
    monkeypatch.setitem(RECIPES, "large", short)
