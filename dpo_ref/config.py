"""From composed YAML to plain dataclasses. Hydra is known here and in the entry points only.

Every component follows the star rule: what stands left of `*` in its signature is handed over at run time, what stands
right of it is configuration. Schemas are generated from the signatures of what `conf/<group>/*.yaml` targets, so there
is no second list of options and no list of components. `resolve` walks the composed tree before anything is loaded and
refuses what would have no effect: an unknown key (Hydra composes those added with `+`), a wrong value, a combination
in which an option would be ignored.
"""

import difflib
import importlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from dpo_ref.data.packing import pack
from dpo_ref.data.tokenise import tokenise
from dpo_ref.objectives.interface import STRENGTH, Objective, bind
from dpo_ref.trainer import TrainerConfig

CONF = Path(__file__).parents[1] / "conf"
SHARED = {"data": (tokenise, pack)}  # options every member of a group takes besides its own


@dataclass(frozen=True, slots=True)
class Component:
    """A configured component; call it with what stands left of its star."""

    name: str
    function: Callable[..., Any]
    options: dict[str, Any]

    def __call__(self, *handed_over: Any) -> Any:
        return self.bound(self.function)(*handed_over)

    def bound(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, the component's own or one its group shares, with its part of the options."""
        return partial(function, **{name: self.options[name] for name in configuration(function)})


@dataclass
class TrainSchema:
    """Top level of `conf/train.yaml`."""

    model: Any = MISSING
    data: Any = MISSING
    objective: Any = MISSING
    reference: Any = MISSING
    optim: Any = MISSING
    tracking: Any = MISSING
    beta: float | None = None
    seed: int = 0
    output_dir: str | None = None
    resume: str | None = None
    stage: str = "train"
    trainer: TrainerConfig = field(default_factory=TrainerConfig)


STAGES = {"train": ("train", "cache_reference"), "evaluate": ("all", "generate", "score", "report")}


@dataclass
class EvaluateSchema:
    """Top level of `conf/evaluate.yaml`."""

    policy: str | None = None
    baseline: str | None = None
    reference: str | None = None
    sweep: str | None = None
    data: Any = MISSING
    generation: Any = MISSING
    scorer: Any = MISSING
    tracking: Any = MISSING
    seed: int = 0
    output_dir: str | None = None
    stage: str = "all"


@dataclass(frozen=True, slots=True)
class TrainRun:
    """A training run, resolved: every option checked, nothing loaded yet."""

    model: Component
    data: Component
    objective: Objective
    reference: Component
    optim: Component
    tracking: Component
    trainer: TrainerConfig
    beta: float | None
    seed: int
    stage: str


def locate(target: str) -> Callable[..., Any]:
    """The function or class a dotted path names; ValueError if there is none."""
    module, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"_target_: {target} cannot be imported: {error}") from error


def configuration(component: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a component: its configuration."""
    parameters = inspect.signature(component).parameters
    return {name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}


def annotations(component: Callable[..., Any]) -> dict[str, Any]:
    """Type hints of a function, or of a class's constructor, with Annotated kept."""
    function = component.__init__ if inspect.isclass(component) else component
    return get_type_hints(function, include_extras=True)


def _stored_type(hint: Any) -> Any:
    """The type OmegaConf checks: Literal strings are strings there (`resolve` checks the choice), Annotated is bare."""
    if get_origin(hint) is Annotated:
        return _stored_type(get_args(hint)[0])
    if get_origin(hint) is Literal:
        return str
    if get_origin(hint) is tuple:
        return list[get_args(hint)[0]]
    return hint


def schema(component: Callable[..., Any], *shared: Callable[..., Any]) -> type:
    """A dataclass whose fields are the configuration of a component and of the functions its group shares."""
    members = []
    for part in (component, *shared):
        hints = annotations(part)
        for name, parameter in configuration(part).items():
            default = MISSING if parameter.default is parameter.empty else parameter.default
            default = list(default) if isinstance(default, tuple) else default
            kept = field(default_factory=lambda d=default: list(d)) if isinstance(default, list) else default
            members.append((name, _stored_type(hints[name]), kept))
    return make_dataclass(component.__name__, [("_target_", str, MISSING), *members])


def groups() -> dict[str, list[Path]]:
    """The config groups whose members target components, with their YAML files."""
    found: dict[str, list[Path]] = {}
    for path in sorted(CONF.glob("*/*.yaml")):
        if "_target_" in path.read_text():
            found.setdefault(path.parent.name, []).append(path)
    return found


def slug(overrides: str) -> str:
    """Command-line overrides as part of a folder's name."""
    return re.sub(r"[^\w.,=+-]+", "-", overrides)[:120] or "defaults"


def sweep_directory(output_dir: str | None, experiment: str) -> str:
    """Where a multirun's jobs go."""
    return output_dir or f"outputs/{experiment}/{datetime.now():%Y-%m-%d_%H-%M-%S}_sweep"


def run_directory(output_dir: str | None, experiment: str, overrides: Sequence[str]) -> Path:
    """Where a single run goes: outputs/<experiment>/<timestamp>_<overrides> unless given exactly."""
    named = [o for o in overrides if o.partition("=")[0] not in ("output_dir", "resume", "stage", "+experiment")]
    default = f"outputs/{experiment}/{datetime.now():%Y-%m-%d_%H-%M-%S}_{slug(','.join(named))}"
    return Path(output_dir or default).expanduser()


def register() -> None:
    """Store the schemas of the top level and of everything that `conf/` targets, and our resolvers."""
    OmegaConf.register_new_resolver("dpo_ref.slug", slug, replace=True)
    OmegaConf.register_new_resolver("dpo_ref.sweep_dir", sweep_directory, use_cache=True, replace=True)
    store = ConfigStore.instance().store
    store(group="schema", name="train", node=TrainSchema)
    store(group="schema", name="evaluate", node=EvaluateSchema)
    for group, paths in groups().items():
        for path in paths:
            component = locate(OmegaConf.load(path)["_target_"])  # pyright: ignore
            node = schema(component, *SHARED.get(group, ()))
            store(group=f"schema/{group}", name=component.__name__, node=node)


def _suggest(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(sorted(known))}"


def _refuse_unknown(prefix: str, given: Mapping[Any, Any], known: Sequence[str]) -> None:
    for key in given:
        if key not in known:
            raise ValueError(f"{prefix}{key} is not an option; {_suggest(str(key), known)}")


def _component(group: str, node: DictConfig, choice: str) -> Component:
    """Check one group's node against the signatures it configures."""
    function = locate(node["_target_"])
    parts = (function, *SHARED.get(group, ()))
    hints = {name: hint for part in parts for name, hint in annotations(part).items() if name in configuration(part)}
    values = {str(key): node[key] for key in node if key != "_target_" and not OmegaConf.is_missing(node, key)}
    _refuse_unknown(f"{group}.", values, list(hints))
    missing = [key for key in hints if OmegaConf.is_missing(node, key) or key not in node]
    if missing:
        raise ValueError(f"{group}={choice} needs {group}.{missing[0]}=...")
    for name, hint in hints.items():
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        if choices and values[name] not in choices:
            raise ValueError(f"{group}.{name}={values[name]} is none of {', '.join(choices)}")
        if OmegaConf.is_config(values[name]):
            values[name] = OmegaConf.to_container(values[name], resolve=True)
    return Component(choice, function, values)


def _objective(component: Component, beta: float | None, overrides: Sequence[str]) -> Objective:
    """Bind the objective; a top-level beta goes to the parameter it marks as its strength."""
    hints = annotations(component.function)
    strength = [name for name in component.options if STRENGTH in getattr(hints[name], "__metadata__", ())]
    options = dict(component.options)
    if beta is not None and not strength:
        raise ValueError(f"beta={beta} has no effect: objective={component.name} has no KL strength; leave beta out")
    if beta is not None:
        key = f"objective.{strength[0]}"
        if any(override.split("=")[0].lstrip("+~") == key for override in overrides):
            raise ValueError(f"beta and {key} say the same thing; give one of them")
        options[strength[0]] = beta
    objective = bind(component.function, **options)
    objective.check()
    return objective


def _sections(cfg: DictConfig, schema_type: type) -> None:
    """Refuse unknown keys at the top level and in its plain sections."""
    known = [f.name for f in fields(schema_type)]
    _refuse_unknown("", cfg, known)
    for f in fields(schema_type):
        if is_dataclass(f.type):
            _refuse_unknown(f"{f.name}.", cfg[f.name], [inner.name for inner in fields(f.type)])


def components(cfg: DictConfig, choices: Mapping[str, str], kind: str) -> dict[str, Component]:
    """Every group of a composed tree, checked; `kind` is train or evaluate. Raises ValueError naming key and remedy."""
    schema_type = {"train": TrainSchema, "evaluate": EvaluateSchema}[kind]
    _sections(cfg, schema_type)
    if cfg.stage not in STAGES[kind]:
        raise ValueError(f"stage={cfg.stage} is none of {', '.join(STAGES[kind])}")
    chosen = [f.name for f in fields(schema_type) if f.type is Any]
    return {group: _component(group, cfg[group], choices.get(group, group)) for group in chosen}


def resolve(cfg: DictConfig, choices: Mapping[str, str], overrides: Sequence[str] = ()) -> TrainRun:
    """The composed tree of `train.py` as plain dataclasses.

    `choices` maps group to the member chosen, `overrides` is the command line. Raises ValueError naming the key and
    what to write instead.
    """
    parts = components(cfg, choices, "train")
    beta = cfg.beta
    objective = _objective(parts["objective"], beta, overrides)
    reference = parts["reference"]
    if not objective.uses_reference and reference.name not in ("auto", "none"):
        raise ValueError(
            f"reference={reference.name} has no effect: objective={objective.name} uses no reference; "
            "leave it out or write reference=none"
        )
    trainer: TrainerConfig = OmegaConf.to_object(cfg.trainer)  # pyright: ignore[reportAssignmentType]
    rest = {group: parts[group] for group in ("model", "data", "optim", "tracking")}
    return TrainRun(
        **rest, objective=objective, reference=reference, trainer=trainer, beta=beta, seed=cfg.seed, stage=cfg.stage
    )
