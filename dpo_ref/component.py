"""What can be configured: components, and how their options are read off their signatures.

The star rule: what stands left of `*` in a component's signature is handed over at run time, what stands right of it
is configuration. An option may itself be a member of a config group (`MemberOf`), such as the scorer of on-policy
rounds.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints


@dataclass(frozen=True, slots=True)
class MemberOf:
    """Marks a parameter, as in Annotated[Any, MemberOf("scorer")]: what is handed over is the configured member,
    called with what stands left of its star."""

    group: str


def configuration(component: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a component: its configuration."""
    parameters = inspect.signature(component).parameters
    return {name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}


def annotations(component: Callable[..., Any]) -> dict[str, Any]:
    """Type hints of a function, or of a class's constructor, with Annotated kept."""
    function = component.__init__ if inspect.isclass(component) else component
    return get_type_hints(function, include_extras=True)


def member_group(hint: Any) -> str | None:
    """The config group that an option is itself a member of, if it is one."""
    marks = (mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, MemberOf))
    return next((mark.group for mark in marks), None)


def choices_of(hint: Any) -> tuple[str, ...]:
    """What a Literal, or one that may be left out, allows; empty for any other type."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    inner = [part for part in get_args(hint) if get_origin(part) is Literal]
    return get_args(inner[0]) if inner else ()


def one_or_several(hint: Any) -> Any:
    """The T of `T | list[T]`, which OmegaConf cannot check; None for any other type."""
    single, *rest = get_args(hint) or (None,)
    return single if rest == [list[single]] and get_origin(hint) is UnionType else None


def mapped_to(hint: Any) -> Any:
    """The V of `dict[str, V] | None`, whose None OmegaConf cannot override; None for any other type."""
    found = [get_args(part)[1] for part in get_args(hint) if get_origin(part) is dict]
    return found[0] if found and type(None) in get_args(hint) else None


@dataclass(frozen=True, slots=True)
class Component:
    """A configured component; call it with what stands left of its star."""

    name: str
    function: Callable[..., Any]
    options: dict[str, Any]

    def __call__(self, *handed_over: Any) -> Any:
        return self.bound(self.function)(*handed_over)

    def plain(self) -> dict[str, Any]:
        """The options as JSON values, those of members inside it with the target's name."""
        return {
            name: {"name": value.name, **value.plain()} if isinstance(value, Component) else value
            for name, value in self.options.items()
        }

    def bound(self, function: Callable[..., Any]) -> "partial[Any]":
        """`function`, the component's own or one its group shares, with its part of the options."""
        return partial(function, **{name: self.options[name] for name in configuration(function)})
