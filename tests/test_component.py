"""What components declare beside their options: as written, of functions and classes, and nothing where nothing is."""

from dataclasses import dataclass

import pytest

from dpo_ref.component import Component, Hooks, RunPlan, component, hooks_of
from dpo_ref.references import policies
from dpo_ref.references.moving import moving


def refuse(*, size, **rest):
    raise ValueError(f"size={size}")


def plain(policy, *, size: int = 1):
    return size


def test_a_plain_function_declares_nothing_and_refuses_nothing():
    hooks = Component("plain", plain, {"size": -1}).hooks
    assert hooks == Hooks()
    hooks.check(size=-1)
    hooks.check_run(None, RunPlan({}, [], set()))


def test_the_decorated_stays_as_it_is():
    def sized(policy, *, size: int = 1):
        return size

    before = dict(vars(sized))
    assert component(check=refuse, relative=True)(sized) is sized
    assert vars(sized) == before
    assert hooks_of(sized).relative
    with pytest.raises(ValueError, match="size=3"):
        Component("sized", sized, {"size": 3}).hooks.check(size=3)
    assert hooks_of(plain) == Hooks()


def test_classes_declare_as_functions_do():
    @component(advantage="none")
    @dataclass(frozen=True)
    class Sized:
        size: int

    assert hooks_of(Sized).advantage == "none"


def test_an_unknown_hook_is_no_hook():
    with pytest.raises(TypeError, match="chek"):
        component(chek=refuse)


def own(context, *, path: str, cache: policies.Cache = "auto"):
    """A reference as a user writes it."""


@pytest.mark.parametrize("function", [policies.initial, policies.adapter_base, own])
def test_what_can_do_without_a_cache_is_live_without_it(function):
    asked = Component("asked", function, {"path": "here", "cache": "auto"})
    assert asked.live == Component("asked", function, {"path": "here", "cache": "off"})
    assert asked.options["cache"] == "auto"


@pytest.mark.parametrize("function", [policies.prior, policies.none, moving])
def test_what_has_no_such_choice_is_not(function):
    assert Component("asked", function, {"cache": "auto"}).live is None
