"""The schemas of `conf/`, generated from signatures, and how Hydra gets to know them; and where runs and the jobs of a
multirun go, named by what the command line says.

Schemas are generated from the signatures of what `conf/<group>/*.yaml` targets (`component.py` has the star rule), so
there is no second list of options and no list of components.
"""

import importlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, make_dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from dpo_ref.cli import side_by_side
from dpo_ref.component import annotations, choices_of, configuration, hooks_of, mapped_to, member_group, one_or_several
from dpo_ref.data.packing import pack
from dpo_ref.data.tokenise import tokenise
from dpo_ref.evaluation.compatibility import CompatibilityOptions
from dpo_ref.evaluation.results import Thresholds
from dpo_ref.lab.bandits.study import StudyOptions
from dpo_ref.objectives.interface import likelihood_term
from dpo_ref.training.optim import optimisation
from dpo_ref.training.rounds import TrainerConfig
from dpo_ref.types import digest

# --- folders


SWEPT_KEYS = "DPO_REF_SWEPT_KEYS"  # environment variable


SLUG_BYTES = 120  # of the 255 that a name may have


def slug(overrides: str) -> str:
    """Command-line overrides as part of a folder's name: nothing in it needs quoting on a command line. Of long ones
    the middle is a digest of the whole: what tells one run from the next often stands last."""
    name = re.sub(r"[^\w.-]+", "_", overrides.replace("=", "-")).strip("_").encode()
    if len(name) <= SLUG_BYTES:
        return name.decode() or "defaults"
    middle = f"_{digest([overrides])[:8]}_"
    half = (SLUG_BYTES - len(middle)) // 2
    return name[:half].decode(errors="ignore") + middle + name[-half:].decode(errors="ignore")


def note_swept_keys(arguments: Sequence[str]) -> None:
    """Remember which keys a multirun varies, for the names of its jobs' folders; workers inherit it."""
    varied = ("(", ",")
    keys = [
        key.lstrip("+") for key, _, value in (a.partition("=") for a in arguments) if any(v in value for v in varied)
    ]
    os.environ[SWEPT_KEYS] = " ".join(keys)


def swept(overrides: str) -> str:
    """The varied part of a job's overrides (all of it where nothing is known of the sweep)."""
    keys = os.environ.get(SWEPT_KEYS, "").split()
    parts = [part for part in overrides.split(",") if part.partition("=")[0].lstrip("+") in keys]
    return slug(",".join(parts) or overrides)


def sweep_directory(output_dir: str | None, experiment: str) -> str:
    """Where a multirun's jobs go."""
    return output_dir or f"outputs/{experiment}/{datetime.now():%Y-%m-%d_%H-%M-%S}_sweep"


def run_directory(output_dir: str | None, experiment: str, overrides: Sequence[str]) -> Path:
    """Where a single run goes: outputs/<experiment>/<timestamp>_<overrides> unless given exactly."""
    words = [o for o in overrides if o.partition("=")[0] not in ("output_dir", "resume", "stage", "+experiment")]
    default = f"outputs/{experiment}/{datetime.now():%Y-%m-%d_%H-%M-%S}_{slug(','.join(words))}"
    return Path(output_dir or default).expanduser()


@dataclass
class HubOptions:
    """Where a policy is published. An existing repository is not made private or public by it."""

    repo: str | None = None  # organisation or user/name
    private: bool = True


# --- schemas


CONF = Path(__file__).parents[2] / "conf"
SHARED = {  # options every member takes besides its own
    "bandit": (StudyOptions,),
    "data": (tokenise, pack),
    "objective": (likelihood_term,),
    "optim": (optimisation,),
}


@dataclass
class TrainSchema:
    """Top level of `conf/train.yaml`."""

    model: Any = MISSING
    data: Any = MISSING
    objective: Any = MISSING
    reference: Any = MISSING
    optim: Any = MISSING
    tracking: Any = MISSING
    evaluation: Any = None  # while training
    bandit: Any = None  # instead of a language model
    beta: float | None = None
    seed: int = 0
    output_dir: str | None = None
    resume: str | None = None
    trust: Annotated[Any, "an address, a variable's name, or a list of these"] = None  # no group
    stage: str = "train"
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    degeneration: Thresholds = field(default_factory=Thresholds)


STAGES = {
    "train": ("train", "cache_reference", "data"),
    "evaluate": (
        "all",
        "generate",
        "diagnose",
        "score",
        "judge",
        "report",
        "compatibility",
        "winrate",
        "push",
        "export",
    ),
}


@dataclass
class EvaluateSchema:
    """Top level of `conf/evaluate.yaml`."""

    policy: str | None = None
    baseline: str | None = None
    reference: Any = None
    sweep: Annotated[Any, "a folder, a pattern or a list of these"] = None  # no group: its type is not bare Any
    trust: Annotated[Any, "an address, a variable's name, or a list of these"] = None
    data: Any = MISSING
    prompts: Any = None
    generation: Any = MISSING
    scorer: Any = MISSING
    diagnostic: Any = MISSING
    judge: Any = None
    export: Any = None
    tracking: Any = MISSING
    seed: int = 0
    output_dir: str | None = None
    n_jobs: int | None = 1
    stage: str = "all"
    references: list[Any] | None = None
    annotations: Any = None  # a path or a list of paths
    df_gamed: str | None = None
    compatibility: CompatibilityOptions = field(default_factory=CompatibilityOptions)
    hub: HubOptions = field(default_factory=HubOptions)
    degeneration: Thresholds = field(default_factory=Thresholds)


SCHEMAS = {"train": TrainSchema, "evaluate": EvaluateSchema}


def locate(target: str) -> Callable[..., Any]:
    """The function or class a dotted path names; ValueError if there is none."""
    module, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"_target_: {target} cannot be imported: {error}") from error


def parts_of(group: str, component: Callable[..., Any]) -> tuple[Callable[..., Any], ...]:
    """Whose options a member of a group takes: its own, those of how its groups come about (`rounds.py`), and those
    its group shares, unless they are those of a member inside it."""
    rounds = hooks_of(component).rounds
    own = (component,) if rounds is None else (component, rounds)
    inside = {member_group(hint) for part in own for hint in annotations(part).values()}
    return own if group in inside else (*own, *SHARED.get(group, ()))


def option_names(group: str, outer: tuple[str, ...] = ()) -> set[str]:
    """The options of all members of a group, those of members inside them with a dot; a group inside itself has no
    further members. `outer` are the groups around this one."""
    names: set[str] = set()
    for part in {part for target in groups()[group].values() for part in parts_of(group, locate(target))}:
        hints = annotations(part)
        for name in configuration(part):
            inner = member_group(hints[name])
            if inner is None:
                names.add(name)
            elif group not in outer:
                names |= {f"{name}.{option}" for option in option_names(inner, (*outer, group))}
    return names


def _stored_type(hint: Any) -> Any:
    """The type OmegaConf checks: a Literal is a string there (`resolve` checks the choice), Annotated is bare."""
    if get_origin(hint) is Annotated:
        return _stored_type(get_args(hint)[0])
    if choices_of(hint):
        return str | None if type(None) in get_args(hint) else str
    if get_origin(hint) is tuple:
        return list[get_args(hint)[0]]
    # OmegaConf cannot put a dictionary where a typed one was null
    return Any if one_or_several(hint) or mapped_to(hint) else hint


def schema(component: Callable[..., Any], *shared: Callable[..., Any]) -> type:
    """A dataclass whose fields are the configuration of a component and of the functions its group shares; an option
    that several take is one."""
    members: dict[str, tuple[str, Any, Any]] = {}
    for part in (component, *shared):
        hints = annotations(part)
        for name, parameter in configuration(part).items():
            default = MISSING if parameter.default is parameter.empty else parameter.default
            default = list(default) if isinstance(default, tuple) else default
            initial = field(default_factory=lambda d=default: list(d)) if isinstance(default, list) else default
            members.setdefault(name, (name, _stored_type(hints[name]), initial))
    return make_dataclass(component.__name__, [("_target_", str, MISSING), *members.values()])


def target_of(path: Path) -> str | None:
    """What a YAML file targets, read without parsing the file: --help looks at all of them."""
    match = re.search(r"^_target_: *(\S+)", path.read_text(), re.MULTILINE)
    return match and match[1]


@cache
def groups() -> dict[str, dict[Path, str]]:
    """The config groups whose members target components: their YAML files and the targets."""
    targets: dict[str, dict[Path, str]] = {}
    for path in sorted(CONF.glob("*/*.yaml")):
        if target := target_of(path):
            targets.setdefault(path.parent.name, {})[path] = target
    return targets


def choices_text() -> str:
    """The config groups and their members, for --help."""
    listed = {path.parent.name: [] for path in sorted(CONF.glob("*/*.yaml"))}
    for path in sorted(CONF.glob("*/*.yaml")):
        listed[path.parent.name].append(path.stem)
    return "\n".join(f"  {group}: {', '.join(names)}" for group, names in listed.items())


def register() -> None:
    """Store the schemas of the top level and of everything that `conf/` targets, our resolvers and our launcher."""
    side_by_side.register()
    OmegaConf.register_new_resolver("dpo_ref.swept", swept, replace=True)
    OmegaConf.register_new_resolver("dpo_ref.choices", choices_text, replace=True)
    OmegaConf.register_new_resolver("dpo_ref.sweep_dir", sweep_directory, use_cache=True, replace=True)
    store = ConfigStore.instance().store
    # Hydra copies its sources, the store of all schemas among them, for every group that it lists, and copies again
    # what it reads. Shared, `--help` takes a fraction of the time.
    ConfigStore.__deepcopy__ = lambda shared, memo: shared  # pyright: ignore[reportAttributeAccessIssue]
    store(group="schema", name="train", node=TrainSchema)
    store(group="schema", name="evaluate", node=EvaluateSchema)
    for group, members in groups().items():
        for target in sorted(set(members.values())):
            component = locate(target)
            node = schema(*parts_of(group, component))
            store(group=f"schema/{group}", name=component.__name__, node=node)
