"""From a composed tree to plain dataclasses: its groups as components, every option checked against the signature it
configures.

`resolve` walks the tree before anything is loaded and refuses what would have no effect: an unknown key (Hydra
composes those added with `+`), a wrong value, a combination in which an option would be ignored.
"""

import difflib
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

import dpo_ref.lab.models  # noqa: F401  (it makes paths such as lab:initial known)
from dpo_ref.cli.command_line import compose_command, refuse_unknown, typed_words
from dpo_ref.cli.schemas import FOLDERS, SCHEMAS, SHARED, STAGES, groups, locate, parts_of
from dpo_ref.component import (
    Component,
    RunPlan,
    annotations,
    choices_of,
    configuration,
    hooks_of,
    mapped_to,
    may_be_left_open,
    member_group,
    members_group,
    one_or_several,
)
from dpo_ref.evaluation.results import BEST_BY, Thresholds, direction
from dpo_ref.models.reward_model import check_reward_run
from dpo_ref.objectives.interface import STRENGTH, Objective, bind, shared_terms
from dpo_ref.references.columns import beside_rows
from dpo_ref.references.interface import check_strength
from dpo_ref.training.model_selection import Criterion, near
from dpo_ref.training.reference_margins import by_reference, check_by_reference
from dpo_ref.training.rounds import TrainerConfig


def _defaults(parts: Sequence[Callable[..., Any]]) -> dict[str, Any]:
    options = {name: option.default for part in parts for name, option in configuration(part).items()}
    return {name: value for name, value in options.items() if value is not inspect.Parameter.empty}


def component(group: str, node: DictConfig, choice: str, key: str | None = None) -> Component:
    """Check one group's node, which stands at `key` of the tree, against the signatures it configures."""
    key = key or group
    function = locate(node["_target_"])
    parts = parts_of(group, function)
    hints = {name: hint for part in parts for name, hint in annotations(part).items() if name in configuration(part)}
    values = {str(name): node[name] for name in node if name != "_target_" and not OmegaConf.is_missing(node, name)}
    refuse_unknown(f"{key}.", values, list(hints))
    values = {name: value for name, value in values.items() if value is not None or not may_be_left_open(hints[name])}
    values = _defaults(parts) | values  # the saved configuration of a run may be older than an option
    missing = [name for name in hints if name not in values]
    if missing:
        raise ValueError(f"{key}={choice} needs {key}.{missing[0]}=...")
    values |= {name: _value(f"{key}.{name}", values[name], hint) for name, hint in hints.items()}
    hooks_of(function).check(**values)
    return Component(choice, function, _shared_by_members(group, hints, values) | values)


def _value(key: str, value: Any, hint: Any) -> Any:
    """An option as components take it; a member of a group becomes a Component, as each of a list of them does."""
    choices, inner = choices_of(hint), member_group(hint)
    if inner is not None:
        return component(inner, value, value["_target_"].rpartition(".")[2], key)
    if choices and value not in (*choices, *([None] if type(None) in get_args(hint) else [])):
        raise ValueError(f"{key}={value} is none of {', '.join(choices)}")
    plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    listed = members_group(hint)
    if listed is not None and isinstance(plain, list):
        return [_listed_member(listed, f"{key}[{index}]", entry) for index, entry in enumerate(plain)]
    single = one_or_several(hint)
    if single is not None:
        return _one_or_several(key, plain, single)
    return plain if plain is None or mapped_to(hint) is None else _mapping(key, plain, mapped_to(hint))


READ = {float: (int, float), int: (int,), str: (str,)}  # what may be written for an option that takes one or several

NAMED = {float: "number", int: "whole number", str: "text"}


def _single(key: str, value: Any, kind: Any) -> Any:
    if not isinstance(value, READ[kind]) or isinstance(value, bool):
        raise ValueError(f"{key}={value} is no {NAMED[kind]}")
    return kind(value)


def _one_or_several(key: str, value: Any, kind: Any) -> Any:
    return [_single(key, single, kind) for single in value] if isinstance(value, list) else _single(key, value, kind)


def _mapping(key: str, value: Any, kind: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{key}={value} must be a dictionary: {key}={{name: value}}")
    return {name: inner if kind is Any else _single(f"{key}.{name}", inner, kind) for name, inner in value.items()}


def _shared_by_members(group: str, hints: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a group shares, where a member inside this one brings them."""
    shared = {name for part in SHARED.get(group, ()) for name in configuration(part)}
    inside = [values[name] for name, hint in hints.items() if member_group(hint) == group]
    return {name: value for member in inside for name, value in member.options.items() if name in shared}


def _sections(cfg: DictConfig, schema_type: type) -> None:
    """Refuse unknown keys at the top level and in its plain sections."""
    names = [f.name for f in fields(schema_type)]
    refuse_unknown("", map(str, cfg), names)
    for f in fields(schema_type):
        if is_dataclass(f.type):
            given = map(str, cfg.get(f.name) or {})  # a run's configuration may be older than the section
            refuse_unknown(f"{f.name}.", given, [inner.name for inner in fields(f.type)])


def _refuse_infinite(key: str, node: Any) -> None:
    """Raise ValueError for a number, at any depth, that is nan or infinite."""
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, value in inner:
        _refuse_infinite(f"{key}.{name}" if key else str(name), value)
    if isinstance(node, float) and not math.isfinite(node):
        raise ValueError(f"{key}={node} must be a finite number")


def components(cfg: DictConfig, choices: Mapping[str, str], kind: str) -> dict[str, Component]:
    """Every group of a composed tree, checked; `kind` is train or evaluate. Raises ValueError."""
    schema_type = SCHEMAS[kind]
    _sections(cfg, schema_type)
    _refuse_infinite("", OmegaConf.to_container(cfg))
    if cfg.stage not in STAGES[kind]:
        raise ValueError(f"stage={cfg.stage} is none of {', '.join(STAGES[kind])}")
    chosen = [f.name for f in fields(schema_type) if f.name in groups() and cfg.get(f.name) is not None]
    parts = {group: component(group, cfg[group], choices.get(group, group)) for group in chosen}
    if "scorer" in parts:
        refuse_relative(parts["scorer"])
    return parts


def refuse_relative(scorer: Component) -> None:
    """Raise ValueError for a scorer that ranks answers to one prompt, where policies are to be compared."""
    if scorer.hooks.relative:
        raise ValueError(
            f"scorer={scorer.name} ranks a policy's answers among themselves, and their mean says nothing about the "
            "policy; evaluate.py has judge=..., which compares with the baseline's answers"
        )


# --- a training run


@dataclass(frozen=True, slots=True)
class RunConfig:
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
    evaluation: Component | None = None  # while training
    selection: Criterion | None = None  # of the policy that is kept
    degeneration: Thresholds = field(default_factory=Thresholds)
    generation: Component | None = None  # where rounds are sampled, unless here
    parallel: Component | None = None  # None: a run from before there was the group
    bandit: Component | None = None  # trained instead of the model
    search: Component | None = None  # which ends it at a rung to compare it with others
    export_to: str | None = None  # the folder for the reference's log-probs (stage=cache_reference)


def strength(function: Callable[..., Any]) -> str | None:
    """The option of an objective that top-level `beta` sets, if it has one."""
    marked = (name for name, hint in annotations(function).items() if STRENGTH in getattr(hint, "__metadata__", ()))
    return next(marked, None)


def strength_of(cfg: DictConfig) -> float | None:
    """How strong the KL constraint of a composed run is."""
    key = strength(locate(cfg.objective["_target_"]))
    return cfg.beta if cfg.beta is not None or key is None else cfg.objective[key]


def _objective(component: Component, beta: float | None, overrides: Sequence[str]) -> Objective:
    """Bind the objective; a top-level beta goes to the parameter it marks as its strength."""
    options, name = dict(component.options), strength(component.function)
    if component.hooks.bind is not None:
        return _mixture(component, beta)
    if beta is not None and name is None:
        raise ValueError(f"beta={beta} has no effect: objective={component.name} has no KL strength; leave beta out")
    if beta is not None:
        key = f"objective.{name}"
        if any(override.split("=")[0].lstrip("+~") == key for override in overrides):
            raise ValueError(f"beta and {key} say the same thing; give one of them")
        options[str(name)] = beta
    prepare = component.hooks.prepare
    ours = {*configuration(component.function), *configuration(shared_terms)} if prepare else options.keys()
    try:
        objective = bind(component.function, **{key: options[key] for key in options if key in ours})
    except TypeError as error:  # of a function of the user's
        raise ValueError(f"objective={component.name}: {error}") from error
    objective.check()
    return replace(objective, name=component.name, prepare=prepare and component.bound(prepare))


def _mixture(mixture: Component, beta: float | None) -> Objective:
    """Bind an objective made of others; a top-level beta goes to those that have a strength and do not say it."""
    parts, taken = [], False
    for index, entry in enumerate(mixture.options["parts"]):
        name, options = _part("objective", f"objective.parts[{index}]", entry)
        part = _composed_part("objective", f"objective.parts[{index}]", name, options)
        key = strength(part.function)
        own = None if key is None or key in options else beta
        taken |= own is not None
        parts.append(_objective(part, own, ()))
    if beta is not None and not taken:
        raise ValueError(f"beta={beta} has no effect: the objective.parts say their own strengths, or have none")
    options: dict[str, Any] = mixture.options | {"parts": parts}
    objective = replace(bind(mixture.function, **options), name=mixture.name)
    objective.check()
    return objective


# --- members of a group that stand in a list: parts of what is made of several


def _listed_member(group: str, key: str, entry: Any) -> Component:
    return _composed_part(group, key, *_part(group, key, entry))


def _composed_part(group: str, key: str, name: str, options: Mapping[str, Any]) -> Component:
    """A part, which stands at `key`, as its own command line would have it. Raises ValueError."""
    target = next(target for path, target in groups()[group].items() if path.stem == name)
    refuse_unknown(f"{key}.", options, {n for part in parts_of(group, locate(target)) for n in configuration(part)})
    words = [f"{group}={name}", *typed_words({f"{group}.{option}": value for option, value in options.items()})]
    try:
        return component(group, _composed(tuple(words), tuple(FOLDERS))[group], name, group)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    except HydraException as error:  # which leaves the reason to its cause
        raise ValueError(f"{key}: {error}: {str(error.__cause__).partition(chr(10))[0]}") from error


@cache
def _composed(words: tuple[str, ...], folders: tuple[Path, ...]) -> DictConfig:
    """The tree of a command line; what the same folders give for it is composed once."""
    return compose_command(words)[0]


def _part(group: str, key: str, entry: Any) -> tuple[str, dict[str, Any]]:
    """The name of a member that is a part of another, and its options. Raises ValueError for what names none."""
    options = {group: entry} if isinstance(entry, str) else dict(entry) if isinstance(entry, Mapping) else {}
    name, known = options.pop(group, None), sorted(path.stem for path in groups()[group])
    if name not in known:
        close = difflib.get_close_matches(str(name), known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"docs/{group}s.md has all"
        kinds = f"a name, or {{{group}: <name>, and its options}}"
        raise ValueError(f"{key}={entry} is no {group}: {kinds}; {hint}")
    return name, {str(option): value for option, value in options.items()}


def _keys(overrides: Sequence[str]) -> set[str]:
    """What the command line says something about."""
    return {override.lstrip("+~").partition("=")[0] for override in overrides}


def _changed_keys(trainer: Mapping[str, Any]) -> set[str]:
    """The keys of `trainer.*` that are not at their defaults: a resumed run's changes are in the tree alone."""
    return {f"trainer.{f.name}" for f in fields(TrainerConfig) if trainer.get(f.name, f.default) != f.default}


def _asked_live(reference: Component) -> Component:
    """The reference where responses come while the run goes on, so that no table can hold them beforehand."""
    if reference.parts:
        return reference.with_parts(_asked_live)
    if reference.options.get("cache", "off") == "off" and not reference.hooks.given:
        return reference
    live = reference.live
    if live is None:
        raise ValueError(
            f"reference={reference.name} scores what is known before training, and the data samples while the run "
            "goes on: use reference=initial, other, interpolate, trajectory, moving, bema, uniform_token or none"
        )
    return live


def _in_memory(objective: Objective, reference: Component) -> Component:
    """The reference as a model that is asked at every step, where the objective looks at next-token distributions."""
    if not objective.divergences:
        return reference
    strength, looks = reference.options["strength"], f"{objective.asking} looks at the reference's next-token"
    if strength != 1:
        raise ValueError(
            f"{looks} distributions, and probabilities to the power of reference.strength={strength} are none; leave "
            "reference.strength out"
        )
    live = reference if reference.options.get("cache") == "off" else reference.live
    if live is None:
        raise ValueError(
            f"{looks} distributions, and reference={reference.name} has none that could be asked for; use "
            "reference=initial, adapter_base, other, interpolate, trajectory, moving or bema"
        )
    return live


def _check_sampled(generation: Component) -> None:
    """Raise ValueError for an engine that a policy in training does not answer through."""
    if generation.hooks.sampled is None:
        raise ValueError(
            f"generation={generation.name} belongs to evaluate.py: rounds of data=on_policy are sampled here, as "
            "data.temperature and data.max_new_tokens say, unless a server does it (generation=served); leave it out"
        )


def refuse_of_rounds(generation: Component, overrides: Sequence[str]) -> None:
    """Raise ValueError for options of an engine that have an effect in training alone."""
    sampled = generation.hooks.sampled
    of_rounds = configuration(sampled).keys() - configuration(generation.function).keys() if sampled else ()
    for name in sorted(of_rounds):
        if f"generation.{name}" in _keys(overrides):
            raise ValueError(
                f"generation.{name} has no effect on an evaluation: it belongs to rounds of training (train.py "
                f"data=on_policy generation={generation.name}); leave it out"
            )


def _while_training(
    evaluation: Component | None, trainer: TrainerConfig, overrides: Sequence[str]
) -> Component | None:
    """The evaluation in training where one is asked for, with `evaluation.every`. Raises ValueError for what has no
    effect without it."""
    if evaluation is not None and evaluation.options["every"] is not None:
        refuse_relative(evaluation.options["scorer"])
        return evaluation
    prefixes = ("evaluation.", "scorer@evaluation.", "degeneration.")
    without = [key for key in _keys(overrides) if key.startswith(prefixes)]
    if changed := sorted(set(without) - {"evaluation.every"}):
        raise ValueError(f"{changed[0]} has no effect without evaluation.every=<optimiser steps>")
    if trainer.stop_when_degenerate:
        raise ValueError(
            "trainer.stop_when_degenerate=true has no effect without evaluations: add evaluation.every=<optimiser "
            "steps>, or leave it out"
        )
    return None


def _selection(trainer: TrainerConfig, evaluation: Component | None) -> Criterion | None:
    """What the best policy is chosen by. Raises ValueError for a metric that cannot be, or is not measured in the
    middle of the run, and for options without effect."""
    key, patience = trainer.keep_best, trainer.patience
    if key is None:
        if patience is not None:
            raise ValueError(
                f"trainer.patience={patience} has no effect without a metric: add trainer.keep_best=eval/loss, or "
                "leave it out"
            )
        return None
    better, prefix = _direction(key), key.partition("/")[0]
    every = {"eval": trainer.eval_every, "evaluation": evaluation and evaluation.options["every"]}[prefix]
    if every is None:
        raise ValueError(
            f"trainer.keep_best={key} has no effect: it is not measured between the first step and the last; add "
            f"{CADENCES[prefix]}=<optimiser steps>"
        )
    return Criterion(key, better, patience)


CADENCES = {"eval": "trainer.eval_every", "evaluation": "evaluation.every"}  # of what is measured under these names


def _direction(key: str) -> Literal["higher", "lower"]:
    """Which way a metric of `metrics.jsonl` is better. Raises ValueError where it is none of held-out data, or has no
    better direction."""
    better = direction(key)
    if better is None or better == "none":
        names = [f"{prefix}/{row.key}" for prefix, rows in BEST_BY.items() for row in rows]
        shown = near(key, [re.sub(r"{(\w+)}", r"<\1>", name) for name in names])
        what = "is none that training measures of held-out data" if better is None else "has no better direction"
        raise ValueError(f"trainer.keep_best={key} {what}; near it are {shown} (docs/training.md has all)")
    return better


def _export_to(cfg: DictConfig) -> str | None:
    """The folder for the reference's log-probs. Raises ValueError where nothing would be written to it."""
    folder = cfg.get("export_to")  # a run's configuration may be older
    if folder is not None and cfg.stage != "cache_reference":
        raise ValueError(f"export={folder} has no effect with stage={cfg.stage}; add stage=cache_reference")
    return folder


def _with_certificate(reference: Component, data: Component) -> Component:
    """The reference with the certificate beside the data's rows, where that is asked for."""
    if reference.parts:
        return reference.with_parts(lambda part: _with_certificate(part, data))
    if reference.options.get("certificate") != "auto":
        return reference
    return replace(reference, options=reference.options | {"certificate": beside_rows(data.options.get("path"))})


def resolve(cfg: DictConfig, choices: Mapping[str, str], overrides: Sequence[str] = ()) -> RunConfig:
    """The composed tree of `train.py` as plain dataclasses.

    `choices` maps group to the member chosen, `overrides` is the command line. Raises ValueError naming the key and
    what to write instead.
    """
    parts = components(cfg, choices, "train")
    beta = cfg.beta
    settings: Any = OmegaConf.to_container(cfg.trainer)
    objective = _objective(parts["objective"], beta, overrides)
    plan = RunPlan(parts, overrides, _keys(overrides) | _changed_keys(settings))
    reference = parts["reference"]
    if "bandit" in parts:
        parts["bandit"].hooks.check_run(objective, plan)
    if "generation" in parts:
        _check_sampled(parts["generation"])
        parts["generation"].hooks.check_run(objective, plan)
    if not objective.uses_reference and reference.name not in ("auto", "none"):
        raise ValueError(
            f"reference={reference.name} has no effect: objective={objective.name} uses no reference; "
            "leave it out or write reference=none"
        )
    reference = _in_memory(objective, reference)
    if parts["data"].hooks.rounds is not None and objective.uses_reference:
        reference = _asked_live(reference)
    parts["reference"] = reference  # as the checks of the plan see it
    check_strength(reference.name if objective.uses_reference else "none", reference.options["strength"])
    if objective.of_scores:
        check_reward_run(objective.name, parts)
    reference.hooks.check_run(objective, plan)
    parts["objective"].hooks.check_run(objective, plan)
    if "parallel" in parts:
        parts["parallel"].hooks.check_run(objective, plan)
    reference = _with_certificate(reference, parts["data"])
    trainer = TrainerConfig(**settings)
    parts["data"].hooks.check_run(objective, plan)
    check_by_reference(parts["data"].bound(by_reference)(), objective, reference, parts["data"])
    evaluation = _while_training(parts.get("evaluation"), trainer, overrides)
    rest = {group: parts[group] for group in ("model", "data", "optim", "tracking")}
    return RunConfig(
        **rest,
        objective=objective,
        reference=reference,
        trainer=trainer,
        beta=beta,
        seed=cfg.seed,
        stage=cfg.stage,
        evaluation=evaluation,
        selection=_selection(trainer, evaluation),
        degeneration=Thresholds(**OmegaConf.to_container(cfg.get("degeneration") or OmegaConf.create())),  # pyright: ignore
        generation=parts.get("generation"),
        parallel=parts.get("parallel"),
        bandit=parts.get("bandit"),
        search=parts.get("search"),
        export_to=_export_to(cfg),
    )
