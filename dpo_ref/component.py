"""What can be configured: components, and how their options are read off their signatures.

The star rule: what stands left of `*` in a component's signature is handed over at run time, what stands right of it
is configuration. An option may itself be a member of a config group (`MemberOf`), such as the scorer of on-policy
rounds. What no signature says stands in the decorator `@component(...)`, as `Hooks`.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cache, partial
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints


@dataclass(frozen=True, slots=True)
class MemberOf:
    """Marks a parameter, as in Annotated[Any, MemberOf("scorer")]: what is handed over is the configured member,
    called with what stands left of its star."""

    group: str


@dataclass(frozen=True, slots=True)
class MembersOf:
    """Marks a parameter, as in Annotated[list[Any], MembersOf("reference")]: what is handed over are configured
    members of the group, which a configuration gives by their names, or as {reference: <name>, and its options}."""

    group: str


@dataclass(frozen=True, slots=True)
class LeftOpen:
    """Marks a parameter, as in Annotated[float, LEFT_OPEN], that a configuration leaves open (null) unless it is
    given: what that means depends on the model and is written there before a run (`cli/starting_point.py`). Where
    nothing is run, and for who calls the component from Python, it is the parameter's default."""


LEFT_OPEN = LeftOpen()


@cache
def configuration(component: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a component: its configuration."""
    parameters = inspect.signature(component).parameters
    return {name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}


@cache
def annotations(component: Callable[..., Any]) -> dict[str, Any]:
    """Type hints of a function, or of a class's constructor, with Annotated kept."""
    function = component.__init__ if inspect.isclass(component) else component
    return get_type_hints(function, include_extras=True)


def member_group(hint: Any) -> str | None:
    """The config group that an option is itself a member of, if it is one."""
    marks = (mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, MemberOf))
    return next((mark.group for mark in marks), None)


def members_group(hint: Any) -> str | None:
    """The config group that an option lists members of, if it does."""
    marks = (mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, MembersOf))
    return next((mark.group for mark in marks), None)


def may_be_left_open(hint: Any) -> bool:
    """Whether an option may be null until the model is known."""
    return LEFT_OPEN in getattr(hint, "__metadata__", ())


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
    values = [get_args(part)[1] for part in get_args(hint) if get_origin(part) is dict]
    return values[0] if values and type(None) in get_args(hint) else None


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
        return {name: _plain(value) for name, value in self.options.items()}

    @property
    def model_path(self) -> str | None:
        """The one model that its option `path` names; None where it has no such option, or one for several."""
        several = one_or_several(annotations(self.function).get("path")) is not None
        return None if several else self.options.get("path")

    @property
    def parts(self) -> "list[Component]":
        """The components that it is made of (`MembersOf`)."""
        lists = (value for value in self.options.values() if isinstance(value, list))
        return [part for values in lists for part in values if isinstance(part, Component)]

    def with_parts(self, change: "Callable[[Component], Component]") -> "Component":
        """The same with each of its parts changed."""
        changed = {
            name: [change(part) if isinstance(part, Component) else part for part in value]
            for name, value in self.options.items()
            if isinstance(value, list)
        }
        return replace(self, options=self.options | changed)

    def bound(self, function: Callable[..., Any]) -> "partial[Any]":
        """`function`, the component's own or one its group shares, with its part of the options."""
        return partial(function, **{name: self.options[name] for name in configuration(function)})

    @property
    def hooks(self) -> "Hooks":
        """What it declares beside its options."""
        return hooks_of(self.function)

    @property
    def live(self) -> "Component | None":
        """The component with nothing cached, asked as it goes; None where its option `cache` cannot be off."""
        if "off" not in choices_of(annotations(self.function).get("cache")):
            return None
        return replace(self, options=self.options | {"cache": "off"})


def _plain(value: Any) -> Any:
    if isinstance(value, Component):
        return {"name": value.name, **value.plain()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


# --- what a component declares beside its options


@dataclass(frozen=True, slots=True)
class RunPlan:
    """A training run as it was asked for, before anything is loaded: its components by group, the command line, and
    the keys about which that, or the tree of a resumed run, says something."""

    components: Mapping[str, Component]
    overrides: Sequence[str]
    given: Set[str]


def _accept(*_: Any, **options: Any) -> None:
    """Refuses nothing."""


@dataclass(frozen=True, slots=True)
class Hooks:
    """What a component may declare; most declare nothing. `check` and `check_run` raise ValueError naming the key."""

    check: Callable[..., None] = _accept  # handed all options by name, before anything is loaded
    check_run: Callable[[Any, RunPlan], None] = _accept  # whether it goes with the run's objective and the rest
    rounds: Callable[..., Any] | None = None  # data: makes groups while the run goes on (`training/rounds.py`)
    held_out: Callable[..., Any] | None = None  # data, with `rounds`: the held-out groups it can be evaluated on
    sampled: Callable[..., Any] | None = None  # generation: gives rounds of training a `SampledPolicy`
    of_whole: str | None = None  # optim: what it does with weights that cannot be done with parts of them
    follows: bool = False  # reference: it changes while the policy is trained
    given: bool = False  # reference: the data brings its log-probs, those of rows too that the run does not come to
    identity: Callable[..., str] | None = None  # scorer: digest of what its numbers mean, from some of its options
    relative: bool = False  # scorer: it ranks answers to one prompt among themselves
    advance: Callable[..., Any] | None = None  # objective: its running statistic, a step on, before the step's losses
    settle: Callable[..., Any] | None = None  # objective: the same after them, by their values
    between: Callable[..., Any] | None = None  # objective: what its `divergences` are, by its options
    bind: Callable[..., Any] | None = None  # objective: makes it of the objectives that are its option `parts`
    prepare: Callable[..., Any] | None = None  # objective: makes what it looks at beside log-probs, before training
    fits_chosen: bool = False  # objective: it has a likelihood term of the chosen response of its own
    advantage: str | None = None  # objective: the advantage it was published with


_HOOKS: dict[tuple[str, str], Hooks] = {}  # by module and name: a function may stand behind other decorators
Declaring = TypeVar("Declaring", bound=Callable[..., Any])


def component(**hooks: Any) -> Callable[[Declaring], Declaring]:
    """Declares the `Hooks` of a function or class, which stays as it is."""
    declared = Hooks(**hooks)

    def declare(function: Declaring) -> Declaring:
        _HOOKS[function.__module__, function.__qualname__] = declared
        return function

    return declare


def hooks_of(function: Callable[..., Any]) -> Hooks:
    """What a component's function or class declares."""
    return _HOOKS.get((function.__module__, function.__qualname__), Hooks())
