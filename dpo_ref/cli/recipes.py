"""Recipes: chains of ordinary runs in one command, `python train.py +recipe=pre_dpo`.

A recipe is a function that says which commands one would type, each in a folder of its own inside the recipe's. They
run one after the other in processes of their own; what is finished is kept, so `resume=<folder>`, or the same command
with the folder as output_dir, goes on wherever the chain was stopped. `recipe.json` records every command and which
weights it began with and was measured against; `recipe.html` shows the chain and what it came to.
"""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig

from dpo_ref.cli import stopping
from dpo_ref.cli.command_line import compose_command, directory_words, python, tracking_words, typed_words
from dpo_ref.cli.resolve import RunConfig, component, resolve
from dpo_ref.cli.run_folder import CONFIG, TRAINED
from dpo_ref.cli.saved_run import addresses_in, read_summary, trust_words
from dpo_ref.cli.schemas import groups
from dpo_ref.component import Component
from dpo_ref.evaluation.policy import FINISHED, SUMMARY
from dpo_ref.evaluation.sweep import collect, key_of
from dpo_ref.files.digests import sealed, unsealed
from dpo_ref.files.holding import held
from dpo_ref.files.writing import write_json, write_text
from dpo_ref.generation.records import Generation, read_generations
from dpo_ref.models.averages import AVERAGE
from dpo_ref.reports.recipe import Link, recipe_page
from dpo_ref.tracking.terminal import progress, run_summary, say
from dpo_ref.types import Message

RECORD, PAGE, COMPARISON = "recipe.json", "recipe.html", "comparison"
ROOT = Path(__file__).parents[2]
NOT_OF_A_STEP = ("recipe", "output_dir", "resume")  # words of the whole


def replaced(words: Sequence[str], by: Sequence[str]) -> list[str]:
    """The words with others in place of those about the same; a member of a group takes that group's options along."""
    keys = {key_of(word) for word in by}
    gone = keys | {key for key in keys if key.partition("@")[0] in groups()}

    def stays(word: str) -> bool:
        key = key_of(word)
        group = key.partition(".")[0].partition("@")[0]
        return key not in gone and not (group in keys and group in groups())

    return [*filter(stays, words), *by]


# --- the commands of a chain


@dataclass(frozen=True, slots=True)
class Command:
    """A command of a recipe, which leaves its results in `folder`.

    `before` makes what it reads. Of a run: `starts_like` is the step with whose initial policy it must begin, and
    `measured_against_start` says that its reference is what it begins with.
    """

    folder: Path
    script: Literal["train.py", "evaluate.py"]
    words: tuple[str, ...]
    made: Callable[[Path], bool]  # whether the folder holds what the command makes
    before: Callable[[], None] | None = None
    starts_like: str | None = None
    measured_against_start: bool = False

    @property
    def name(self) -> str:
        """That of its folder."""
        return self.folder.name

    @property
    def policy(self) -> str:
        """The folder of the policy that it trains."""
        return str(self.folder / "policy")

    @property
    def is_run(self) -> bool:
        """Whether it trains."""
        return self.script == "train.py"

    def command(self) -> list[str]:
        """What is typed now, after the interpreter: a run that was stopped goes on."""
        words = list(self.words)
        if self.is_run and (self.folder / CONFIG).is_file() and any((self.folder / n).exists() for n in TRAINED):
            words = [f"resume={self.folder}"]
        return [self.script, *directory_words(sys.argv[1:]), *words]


@dataclass(frozen=True, slots=True)
class Chain:
    """What a recipe makes its steps of: its folder, what was typed beside it, and the resolved seed."""

    folder: Path
    words: tuple[str, ...]
    seed: int

    def run(self, name: str, *words: str, **expected: Any) -> Command:
        """A training run: what was typed, and these words in place of those about the same."""
        folder = self.folder / name
        typed = (*replaced(self.words, words), f"output_dir={folder}")
        return Command(folder, "train.py", typed, _is_finished, **expected)

    def evaluation(self, name: str, *words: str, made: Callable[[Path], bool], **more: Any) -> Command:
        """A command of `evaluate.py`."""
        folder = self.folder / name
        return Command(folder, "evaluate.py", (*words, f"output_dir={folder}"), made, **more)

    def says(self, key: str) -> bool:
        """Whether a word that was typed is about this."""
        return any(key_of(word) == key for word in self.words)


def _is_finished(folder: Path) -> bool:
    return (folder / SUMMARY).is_file() and read_summary(folder, str(folder))["status"] in FINISHED


def _is_average(folder: Path) -> bool:
    return (folder / AVERAGE).is_file()


# --- the recipes


def pre_dpo(chain: Chain, *, guide: str = "", policy: str = "") -> list[Command]:
    """Pre-DPO (arXiv:2504.15843): train a guide, then start again from the initial policy, on the same pairs, with the
    guide as the reference.

    `guide` and `policy` are words for either run alone, such as "objective=simpo beta=2.0". The paper's second run is
    always DPO.
    """
    first = chain.run("1_guide", *shlex.split(guide))
    against = ("reference=other", *typed_words({"reference.path": first.policy}))
    return [first, chain.run("2_policy", *against, *shlex.split(policy), starts_like=first.name)]


def iterative(
    chain: Chain, *, rounds: int = 3, prompts_per_round: int = 256, judge: Literal["scorer", "self"] = "scorer"
) -> list[Command]:
    """Rounds that begin with the last round's policy and have it as their reference: samples of that policy, scored,
    and an epoch on their pairs (iterative DPO; SPPO, arXiv:2405.00675, with objective=sppo).

    `judge=self` lets the round's first policy compare its own answers with the template that
    `judge@data.scorer.judge` names (self-rewarding, arXiv:2401.10020); `scorer` is what data.scorer says. With other
    data than on_policy every round trains on that data again.
    """
    if rounds < 2:
        raise ValueError(f"recipe.rounds={rounds} must be at least 2: one round is a run without a recipe")
    steps: list[Command] = []
    for index in range(rounds):
        words = [f"seed={chain.seed + index}"]
        words += _sampled_once(chain, prompts_per_round)
        if steps:
            words += typed_words({"model.path": steps[-1].policy})
        if judge == "self":
            words += _judged_by_itself(chain, steps)
        if not chain.says("reference"):
            words += ["reference=initial"]
        steps.append(chain.run(f"{index + 1}_round", *words, measured_against_start=not chain.says("reference")))
    return steps


def _sampled_once(chain: Chain, prompts_per_round: int) -> list[str]:
    """One round of samples, unless the data is other than on_policy."""
    if any(key_of(word) == "data" and word != "data=on_policy" for word in chain.words):
        return []
    words = ["data=on_policy", "data.rounds=1", f"data.prompts_per_round={prompts_per_round}"]
    return [word for word in words if not chain.says(key_of(word))]


def _judged_by_itself(chain: Chain, steps: Sequence[Command]) -> list[str]:
    path = steps[-1].policy if steps else compose_command(chain.words)[0].model.path
    words = {"scorer@data.scorer": "judge", "judge@data.scorer.judge": "local", "data.scorer.judge.model": path}
    return [word for word in typed_words(words) if not chain.says(key_of(word))]


def delta(
    chain: Chain,
    *,
    stronger: str,
    weaker: str,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    samples_per_prompt: int = 1,
) -> list[Command]:
    """Delta learning (arXiv:2507.06187): pairs of a stronger model's answer, chosen, and a weaker one's, rejected, to
    the data's training prompts, without any judge; then dpo_norm on them.

    Both models answer in their own templates. Pairs of equal answers, and with one that has not ended, are left out.
    """
    prompts, pairs = chain.folder / "prompts.jsonl", chain.folder / "pairs.jsonl"
    asked = ["stage=generate", "prompts=jsonl", *typed_words({"prompts.path": str(prompts)}), f"seed={chain.seed}"]
    asked += [f"generation.temperature={temperature:g}", f"generation.max_new_tokens={max_new_tokens}"]
    asked += [f"generation.samples_per_prompt={samples_per_prompt}", "tracking=none"]
    cfg, choices = compose_command(chain.words)
    answers = [
        chain.evaluation(
            name,
            *typed_words({"policy": path}),
            *asked,
            made=lambda folder: (folder / "generations.jsonl").is_file(),
            before=lambda: write_prompts(prompts, resolve(cfg, choices, chain.words)),
        )
        for name, path in (("1_stronger", stronger), ("2_weaker", weaker))
    ]
    words = ["data=jsonl", *typed_words({"data.path": str(pairs)})]
    words += [word for word in ("objective=dpo_norm", "data.eval_fraction=0.1") if not chain.says(key_of(word))]
    run = chain.run("3_policy", *words)
    join = replace(run, before=lambda: write_pairs(pairs, answers[0].folder, answers[1].folder))
    return [*answers, join]


def soup(chain: Chain, *, seeds: int = 3, initial_share: float = 0.0) -> list[Command]:
    """The same run with several seeds, and the average of their weights (model soups, arXiv:2203.05482);
    `initial_share` of it is the initial policy's, as in the averages of SmolLM3 with what it was before DPO."""
    if seeds < 2:
        raise ValueError(f"recipe.seeds={seeds} must be at least 2")
    if not 0 <= initial_share < 1:
        raise ValueError(f"recipe.initial_share={initial_share} must lie in [0, 1)")
    runs = [chain.run(f"{index + 1}_seed", f"seed={chain.seed + index}") for index in range(seeds)]
    policies, weights = [str(run.folder) for run in runs], [(1 - initial_share) / seeds] * seeds
    if initial_share:
        policies, weights = ["initial", *policies], [initial_share, *weights]
    words = typed_words({"policies": policies, "weights": weights})
    return [*runs, chain.evaluation(f"{seeds + 1}_soup", "stage=merge", *words, made=_is_average)]


# --- pairs of two models' answers, without a judge


SAMPLE_AGAIN = "delete the folder, and type the command again"


def write_prompts(path: Path, config: RunConfig) -> None:
    """The training prompts of a run's data, each once, as questions (`prompts=jsonl`). Raises ValueError for rows with
    tools or template options, which a question has no place for, and for data without prompts."""
    if path.is_file():
        return
    rows = {group.asked_id: group for group in config.data(config.seed, progress).train}
    special = next((row for row in rows.values() if row.tools or row.template_options), None)
    if special is not None:
        raise ValueError(
            f"recipe=delta: {special.origin or 'a row'} offers tools or sets template options; two models are asked "
            "plain conversations here"
        )
    prompts = [row.prompt for row in rows.values() if row.prompt]
    if not prompts:
        raise ValueError("recipe=delta: the data has no prompts to be answered")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, _json_lines([{"prompt": list(prompt)} for prompt in prompts]))


def write_pairs(path: Path, stronger: Path, weaker: Path) -> None:
    """Pairs of the answers in two folders, the stronger model's chosen. Raises ValueError where none is left."""
    chosen, rejected = (_answers_in(folder) for folder in (stronger, weaker))
    pairs, left_out = [], 0
    for key, better in chosen.items():
        worse = rejected.get(key)
        if worse is None or not (better.finished and worse.finished) or better.output == worse.output:
            left_out += 1
            continue
        pairs.append({"prompt": list(better.prompt), "chosen": better.output, "rejected": worse.output})
    if not pairs:
        raise ValueError(
            f"recipe=delta: none of {len(chosen):,} pairs of answers is left: they are equal, or have not ended "
            "within recipe.max_new_tokens"
        )
    write_text(path, _json_lines(pairs))
    say(f"{len(pairs):,} pairs in {path}; {left_out:,} left out, whose answers are equal or have not ended")


def _answers_in(folder: Path) -> dict[tuple[tuple[str, ...], int], Generation]:
    """The answers in a folder, by what was asked and the sample's number."""
    generations = read_generations(folder / "generations.jsonl", SAMPLE_AGAIN)
    return {(_question(generation.prompt), generation.sample_index): generation for generation in generations}


def _question(prompt: Sequence[Message]) -> tuple[str, ...]:
    return tuple(json.dumps(turn, sort_keys=True) for turn in prompt)


def _json_lines(rows: Sequence[dict[str, object]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# --- a chain from its start to its end


@dataclass(frozen=True, slots=True)
class PlannedRecipe:
    """A recipe as it was asked for."""

    name: str
    options: Mapping[str, Any]
    words: tuple[str, ...]
    steps: list[Command]
    folder: Path


def planned(recipe: Component, folder: Path, overrides: Sequence[str]) -> PlannedRecipe:
    """The steps of a recipe. Raises ValueError, before anything runs, for what a run of it would be refused for."""
    words = tuple(word for word in overrides if key_of(word).partition(".")[0] not in NOT_OF_A_STEP)
    chain = Chain(folder, words, compose_command(words)[0].seed)
    steps = recipe(chain)
    for step in steps:
        if step.is_run:
            with _naming(step):
                resolve(*compose_command(step.words), step.words)
    return PlannedRecipe(recipe.name, recipe.plain(), words, steps, folder)


@contextmanager
def _naming(step: Command) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{step.name}: {error}") from error


def recipe_of(cfg: DictConfig, choice: str, folder: Path, overrides: Sequence[str]) -> PlannedRecipe:
    """The recipe that a composed tree asks for."""
    return planned(component("recipe", cfg.recipe, choice), folder, overrides)


def recipe_in(folder: Path, overrides: Sequence[str]) -> PlannedRecipe:
    """The recipe of a folder, to be gone on with. Raises ValueError for words beside `resume`."""
    words = asked_in(folder, overrides)
    cfg, choices = compose_command(words)
    return recipe_of(cfg, choices["recipe"], folder, words)


def run_recipe(recipe: PlannedRecipe) -> int:
    """Run what is not finished of a chain; the exit status. Raises ValueError for a folder that holds another one, and
    where a run did not begin with, or was not measured against, the weights that the recipe says."""
    folder = recipe.folder
    with held(folder, say):
        _check_same(recipe)
        again = f"{python()} train.py resume={shlex.quote(str(folder))}"
        stopping.advise(f"finished steps are kept, go on with\n  {again}")
        seconds = dict(_seconds_in(folder))
        for number, step in enumerate(recipe.steps, 1):
            if not step.made(step.folder):
                print(f"\n{recipe.name}, step {number} of {len(recipe.steps)}: {step.name}", flush=True)
                started = time.perf_counter()
                code = _typed(step)
                seconds[step.name] = seconds.get(step.name, 0.0) + time.perf_counter() - started
                _write_record(recipe, seconds)
                if code:
                    print(f"\n{step.name} did not come to its end; go on with\n  {again}", file=sys.stderr)
                    return code
            _check_weights(step, recipe)
        _write_record(recipe, seconds)
        return _concluded(recipe)


def _typed(step: Command) -> int:
    """Run a step's command; a stop reaches it once, and is waited for, as a run saves itself."""
    if step.before is not None:
        step.before()
    return _waited_for(step.command())


def _waited_for(words: Sequence[str]) -> int:
    script, *rest = words
    child = subprocess.Popen([sys.executable, str(ROOT / script), *rest])
    stop: KeyboardInterrupt | None = None
    while True:
        try:
            code = child.wait()
        except KeyboardInterrupt as signal:
            stop = signal
            if signal.args and signal.args[0] != stopping.SIGNALS[0]:  # Ctrl-C reaches it by itself
                child.send_signal(signal.args[0])
            continue
        if stop is not None:
            raise stop
        return code


def _check_weights(step: Command, recipe: PlannedRecipe) -> None:
    if not step.is_run:
        return
    ours = _identities(step)
    if step.starts_like is not None:
        like = next(other for other in recipe.steps if other.name == step.starts_like)
        if ours["initial_policy"] != _identities(like)["initial_policy"]:
            raise ValueError(f"{step.name} began with other weights than {like.name}: the model's files have changed")
    if step.measured_against_start and ours["loss_reference_weights"] not in ("", ours["initial_policy"]):
        raise ValueError(f"{step.name} was measured against other weights than it began with")


def _identities(step: Command) -> dict[str, str]:
    return read_summary(step.folder, str(step.folder))["identities"]


# --- its record


def _write_record(recipe: PlannedRecipe, seconds: Mapping[str, float]) -> None:
    steps = [
        {
            "name": step.name,
            "command": shlex.join([step.script, *step.words]),
            "made": step.made(step.folder),
            "seconds": seconds.get(step.name, 0.0),
            "identities": _identities(step) if step.is_run and step.made(step.folder) else {},
        }
        for step in recipe.steps
    ]
    write_json(recipe.folder / RECORD, sealed(_request(recipe) | {"steps": steps}))


def _request(recipe: PlannedRecipe) -> dict[str, Any]:
    return {"recipe": recipe.name, "options": dict(recipe.options), "words": list(recipe.words)}


def read_record(folder: Path) -> dict[str, Any]:
    """What `recipe.json` says. Raises ValueError for a damaged one."""
    path = folder / RECORD
    return unsealed(path.read_bytes(), str(path), "start the recipe again in another folder")


def _seconds_in(folder: Path) -> Iterator[tuple[str, float]]:
    if (folder / RECORD).is_file():
        yield from ((step["name"], step["seconds"]) for step in read_record(folder)["steps"])


def _check_same(recipe: PlannedRecipe) -> None:
    """Raise ValueError naming what is asked for otherwise than in the folder's record; begin one where there is
    none."""
    folder = recipe.folder
    if not (folder / RECORD).is_file():
        _write_record(recipe, {})
        return
    was, now = _asked(read_record(folder)), _asked(_request(recipe))
    differing = [word for word in (*was, *now) if word not in was or word not in now]
    if differing:
        raise ValueError(
            f"{folder} holds another recipe, which differs in {differing[0]}; it goes on only as it was: "
            f"python train.py resume={folder}. Another one needs another output_dir"
        )


def _asked(record: Mapping[str, Any]) -> list[str]:
    """The words of a recipe's command."""
    options = {f"recipe.{key}": value for key, value in record["options"].items()}
    return [f"+recipe={record['recipe']}", *typed_words(options), *record["words"]]


def asked_in(folder: Path, overrides: Sequence[str]) -> list[str]:
    """The words that a recipe to be gone on with was typed with. Raises ValueError for others beside `resume`."""
    if others := [word for word in overrides if key_of(word) not in ("resume", "output_dir")]:
        raise ValueError(
            f"{others[0]}: a recipe goes on only as it was; leave it out, or start a new one in another folder"
        )
    return _asked(read_record(folder))


# --- what it came to


def _concluded(recipe: PlannedRecipe) -> int:
    """Compare the policies, and write the page; the exit status of the comparison."""
    folder = recipe.folder
    policies = [step for step in recipe.steps if step.is_run or _is_average(step.folder)]
    held_out = [read_summary(step.folder, step.name).get("held_out_prompts") for step in policies if step.is_run]
    code = _compared(recipe, policies) if any(held_out) else 0
    jobs = {job.folder: job for job in collect(*(step.folder for step in policies))}
    links = [
        Link(made["name"], made["command"], made["seconds"], made["identities"], jobs.get(folder / made["name"]))
        for made in read_record(folder)["steps"]
    ]
    report = f"{COMPARISON}/report.html" if (folder / COMPARISON / "report.html").is_file() else None
    write_text(folder / PAGE, recipe_page(recipe.name, links, report))
    last = policies[-1]
    rows = {"policy": last.policy if last.is_run else str(last.folder), "page": str(folder / PAGE)}
    next_command = f"{python()} -m webbrowser file://{(folder / PAGE).resolve()}"
    run_summary(f"recipe {recipe.name}", {"folder": str(folder)} | rows, [next_command])
    return code


def _compared(recipe: PlannedRecipe, policies: Sequence[Command]) -> int:
    words = typed_words({"sweep": [str(step.folder) for step in policies]})
    words += [f"output_dir={recipe.folder / COMPARISON}", *_one_baseline(recipe)]
    words += tracking_words(compose_command(recipe.words)[1]["tracking"], recipe.words)
    words += trust_words(addresses_in(recipe.words))
    return _waited_for(["evaluate.py", *directory_words(sys.argv[1:]), *words])


def _one_baseline(recipe: PlannedRecipe) -> list[str]:
    """What all policies are compared with where they did not begin with one: what the first began with."""
    runs = [step for step in recipe.steps if step.is_run]
    if len({_identities(step)["initial_policy"] for step in runs}) == 1:
        return []
    return typed_words({"baseline": compose_command(runs[0].words)[0].model.path})
