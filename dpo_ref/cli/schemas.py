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

from hydra._internal.config_repository import ConfigRepository
from hydra.core.config_store import ConfigStore
from hydra.core.default_element import ConfigDefault
from hydra.errors import ConfigCompositionException
from omegaconf import MISSING, OmegaConf

from dpo_ref.cli import launchers, side_by_side
from dpo_ref.component import (
    annotations,
    choices_of,
    configuration,
    hooks_of,
    mapped_to,
    may_be_left_open,
    member_group,
    one_or_several,
)
from dpo_ref.data.packing import pack
from dpo_ref.data.tokenise import tokenise
from dpo_ref.evaluation.compatibility import CompatibilityOptions
from dpo_ref.evaluation.results import Thresholds
from dpo_ref.lab.bandits.study import StudyOptions
from dpo_ref.models.lora import AdapterOptions
from dpo_ref.objectives.interface import shared_terms
from dpo_ref.references.interface import tempered
from dpo_ref.training.optim import optimisation
from dpo_ref.training.reference_margins import by_reference
from dpo_ref.training.rounds import TrainerConfig
from dpo_ref.types import digest

# --- folders


SWEPT_KEYS = "DPO_REF_SWEPT_KEYS"  # environment variable


VARIED = re.compile("[(,]")  # in a value, outside of quotes
QUOTED = re.compile(r"""'(\\.|[^'\\])*'|"(\\.|[^"\\])*\"""")
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
    words = (argument.partition("=") for argument in arguments)
    keys = [key.lstrip("+") for key, _, value in words if VARIED.search(QUOTED.sub("", value))]
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
    folder: str | None = None  # instead of a repository: a new folder here, with the same files
    private: bool = True


# --- schemas


CONF = Path(__file__).parents[2] / "conf"
SHARED = {  # options every member takes besides its own
    "bandit": (StudyOptions,),
    "data": (tokenise, pack, by_reference),
    "model": (AdapterOptions,),
    "objective": (shared_terms,),
    "optim": (optimisation,),
    "reference": (tempered,),
}


@dataclass
class TrainSchema:
    """Top level of `conf/train.yaml`."""

    model: Any = MISSING
    data: Any = MISSING
    objective: Any = MISSING
    reference: Any = MISSING
    optim: Any = MISSING
    parallel: Any = MISSING
    tracking: Any = MISSING
    evaluation: Any = None  # while training
    generation: Any = None  # where rounds are sampled, unless here
    bandit: Any = None  # instead of a language model
    search: Any = None  # which jobs of a sweep train to their end
    recipe: Any = None  # a chain of runs instead of one
    beta: float | None = None
    seed: int = 0
    device: str = "auto"
    output_dir: str | None = None
    resume: str | None = None
    resume_sweep: str | None = None  # written out before Hydra reads it (`resume_sweep.py`)
    trust: Annotated[Any, "an address, a variable's name, or a list of these"] = None  # no group
    stage: str = "train"
    export_to: str | None = None  # of stage=cache_reference
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    degeneration: Thresholds = field(default_factory=Thresholds)


STAGES = {
    "train": ("train", "cache_reference", "data", "check"),
    "evaluate": (
        "all",
        "generate",
        "diagnose",
        "score",
        "judge",
        "report",
        "compatibility",
        "winrate",
        "merge",
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
    device: str = "auto"
    output_dir: str | None = None
    n_jobs: int | None = 1
    stage: str = "all"
    references: list[Any] | None = None
    annotations: Any = None  # a path or a list of paths
    df_gamed: str | None = None
    policies: Annotated[Any, "a run, a model, a pattern or a list of these"] = None
    weights: list[float] | None = None
    shares: list[float] | None = None
    compatibility: CompatibilityOptions = field(default_factory=CompatibilityOptions)
    hub: HubOptions = field(default_factory=HubOptions)
    degeneration: Thresholds = field(default_factory=Thresholds)


SCHEMAS = {"train": TrainSchema, "evaluate": EvaluateSchema}


def locate(target: str) -> Callable[..., Any]:
    """The function or class a dotted path names; ValueError if there is none, or it says too little of its options."""
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever a user's module raises
        reason = f"{type(error).__name__}: {error}" if not isinstance(error, ImportError | AttributeError) else error
        hint = "; PYTHONPATH names the folder of a module" if isinstance(error, ModuleNotFoundError) else ""
        raise ValueError(f"_target_: {target} cannot be imported: {reason}{hint}") from error
    if untyped := [name for name in configuration(found) if name not in annotations(found)]:
        raise ValueError(
            f"_target_: {target} does not say the type of its option {untyped[0]}: write {untyped[0]}: float"
        )
    return found


def parts_of(group: str, component: Callable[..., Any]) -> tuple[Callable[..., Any], ...]:
    """Whose options a member of a group takes: its own, those of how its groups come about (`rounds.py`), how what it
    looks at is made (`quantiles.py`) or how a policy in training answers (`generation/served.py`), and those its group
    shares, unless a member inside it brings them."""
    hooks = hooks_of(component)
    own = (component, *(part for part in (hooks.rounds, hooks.prepare, hooks.sampled) if part is not None))
    inside = {member_group(hint) for part in own for hint in annotations(part).values()}
    return own if group in inside else (*own, *SHARED.get(group, ()))


def option_types(group: str, target: str, outer: tuple[str, ...] = ()) -> dict[str, Any]:
    """The options of a group's member and their types, those of members inside it with a dot; a group inside itself
    has no further members. `outer` are the groups around this one."""
    types: dict[str, Any] = {}
    for part in parts_of(group, locate(target)):
        hints = annotations(part)
        for name in configuration(part):
            inner = member_group(hints[name])
            if inner is None:
                types[name] = hints[name]
            elif group not in outer:
                types |= {f"{name}.{option}": hint for option, hint in _all_types(inner, (*outer, group)).items()}
    return types


def _all_types(group: str, outer: tuple[str, ...]) -> dict[str, Any]:
    members = sorted(set(groups()[group].values()))
    return {name: hint for target in members for name, hint in option_types(group, target, outer).items()}


def option_names(group: str) -> set[str]:
    """The options of all members of a group, those of members inside them with a dot."""
    return set(_all_types(group, ()))


def _stored_type(hint: Any) -> Any:
    """The type OmegaConf checks: a Literal is a string there (`resolve` checks the choice), Annotated is bare."""
    if get_origin(hint) is Annotated:
        stored = _stored_type(get_args(hint)[0])
        return stored | None if may_be_left_open(hint) else stored
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
            default = None if may_be_left_open(hints[name]) else default
            default = list(default) if isinstance(default, tuple) else default
            initial = field(default_factory=lambda d=default: list(d)) if isinstance(default, list) else default
            members.setdefault(name, (name, _stored_type(hints[name]), initial))
    return make_dataclass(component.__name__, [("_target_", str, MISSING), *members.values()])


def target_of(path: Path) -> str | None:
    """What a YAML file targets, read without parsing the file: --help looks at all of them. A file that takes over
    another of its group has the target of that."""
    text = path.read_text()
    if match := re.search(r"^_target_: *(\S+)", text, re.MULTILINE):
        return match[1]
    taken = re.findall(r"^ *- *(?:/\w+/)?(\w+)(?:@_here_)? *$", text, re.MULTILINE)
    files = (folder / path.parent.name / f"{name}.yaml" for name in taken for folder in (path.parents[1], CONF))
    return next((target for file in files if file.is_file() and file != path and (target := target_of(file))), None)


@cache
def groups() -> dict[str, dict[Path, str]]:
    """The config groups whose members target components: their YAML files and the targets."""
    targets: dict[str, dict[Path, str]] = {}
    for path in (path for folder in FOLDERS for path in sorted(folder.glob("*/*.yaml"))):
        if path not in UNUSABLE and (target := target_of(path)):
            targets.setdefault(path.parent.name, {})[path] = target
    return targets


def choices_text() -> str:
    """The config groups and their members, for --help."""
    listed: dict[str, list[str]] = {}
    for path in (path for folder in FOLDERS for path in sorted(folder.glob("*/*.yaml"))):
        listed.setdefault(path.parent.name, []).append(path.stem)
    return "\n".join(f"  {group}: {', '.join(names)}" for group, names in listed.items())


# --- members of the user's own, in a folder that the command line names


FOLDERS = [CONF]  # in which members are looked for
UNUSABLE: dict[Path, str] = {}  # files of the user's whose component cannot be had, and why


def look_in(folders: Sequence[Path]) -> None:
    """Look for members in these folders too. Raises ValueError for a file with the name of one of ours, which Hydra
    would never read. What is wrong with a component is told where it is chosen."""
    FOLDERS[1:] = folders
    UNUSABLE.clear()
    groups.cache_clear()
    ours = {(path.parent.name, path.stem) for path in CONF.glob("*/*.yaml")}
    for path in (path for folder in folders for path in sorted(folder.glob("*/*.yaml"))):
        group, name = path.parent.name, path.stem
        if (group, name) in ours:
            raise ValueError(f"{path} has the name of our own {group}={name}, which is taken; rename the file")
        try:
            if target := target_of(path):
                schema(*parts_of(group, locate(target)))
        except (ValueError, OSError) as error:
            UNUSABLE[path] = str(error)
    groups.cache_clear()


def _with_schema(load: Callable[..., Any]) -> Callable[..., Any]:
    """Hydra's reading of a file of a group, which composes onto the schema of what it targets, stored when it is first
    asked for: a user's file need not name it, nor can two functions of one name be mistaken for each other."""

    def load_config(repository: ConfigRepository, config_path: str) -> Any:
        result: Any = load(repository, config_path)
        if result is None:
            return None
        target: Any = result.config.get("_target_")
        group = config_path.partition("/")[0]
        if target is None or result.provider in OURS or group not in groups():
            return result
        try:
            ConfigStore.instance().store(
                group=f"schema/{group}", name=target, node=schema(*parts_of(group, locate(target)))
            )
        except ValueError as error:
            raise ConfigCompositionException(f"{group}={config_path.rpartition('/')[2]}: {error}") from error
        others = [default for default in result.defaults_list if not _names_schema(default)]
        result.defaults_list = [ConfigDefault(path=f"/schema/{group}/{target}", package="_here_"), *others]
        return result

    return load_config


OURS = ("main", "schema")  # who provides what is read: conf/, and the store of schemas


def _names_schema(default: Any) -> bool:
    return isinstance(default, ConfigDefault) and str(default.path).startswith("/schema/")


_READS_SCHEMAS: list[bool] = []  # whether Hydra does, in this process


def register() -> None:
    """Store the schemas of the top level and of everything that `conf/` targets, our resolvers and our launchers."""
    side_by_side.register()
    launchers.register()
    OmegaConf.register_new_resolver("dpo_ref.swept", swept, replace=True)
    OmegaConf.register_new_resolver("dpo_ref.choices", choices_text, replace=True)
    OmegaConf.register_new_resolver("dpo_ref.sweep_dir", sweep_directory, use_cache=True, replace=True)
    store = ConfigStore.instance().store
    # Hydra copies its sources, the store of all schemas among them, for every group that it lists, and copies again
    # what it reads. Shared, `--help` takes a fraction of the time.
    ConfigStore.__deepcopy__ = lambda shared, memo: shared  # pyright: ignore[reportAttributeAccessIssue]
    if not _READS_SCHEMAS:  # it is registered once a process
        _READS_SCHEMAS.append(True)
        ConfigRepository.load_config = _with_schema(ConfigRepository.load_config)
    store(group="schema", name="train", node=TrainSchema)
    store(group="schema", name="evaluate", node=EvaluateSchema)
    for group, members in groups().items():
        for target in sorted(set(members.values())):
            component = locate(target)
            node = schema(*parts_of(group, component))
            store(group=f"schema/{group}", name=component.__name__, node=node)
