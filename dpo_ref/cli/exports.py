"""What leaves an evaluation or a run: with `stage=export` answers in the files that other tools read, with
`stage=push` a run's policy folder and its card to the Hugging Face hub, when asked for by name.
"""

import logging
import shlex
import shutil
from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from dpo_ref.cli.schemas import HubOptions
from dpo_ref.component import Component, annotations
from dpo_ref.data.tokenise import end_of_turn_ids, tokenise, within
from dpo_ref.evaluation.evaluate import loss_reference
from dpo_ref.evaluation.heldout import PairEvaluation, reference_pairs, score_pairs
from dpo_ref.evaluation.policy import EvaluationSettings, PolicyToEvaluate
from dpo_ref.evaluation.stages import ANSWERS, stored_generations
from dpo_ref.files.digests import DIGESTS
from dpo_ref.files.writing import replacing_folder, write_text
from dpo_ref.models.folders import CARD, check_digests
from dpo_ref.reports.exports import Answers, Export, RewardedPair, RewardedPairs
from dpo_ref.tracking.terminal import progress, run_summary, say
from dpo_ref.types import PromptGroup, TokenGroup, turns_of

STAGE, FOLDER = "export", "exports"
WORDS = {"policy", "stage", "export", "output_dir", "tracking", "trust"}
WORDS_OF_PAIRS = {"data"}  # of what is measured for the export


def asks_pairs(export: Component) -> bool:
    """Whether a format is one of pairs, and not of answers."""
    return RewardedPairs in annotations(export.function).values()


def check_export(export: Component, words: Collection[str], policy: str | None) -> None:
    """Raise ValueError for words that have no effect on an export, and for no policy."""
    if policy is None:
        raise ValueError("stage=export needs policy=<run or model folder>, whose evaluation is exported")
    allowed = WORDS | (WORDS_OF_PAIRS if asks_pairs(export) else set())
    if others := set(words) - allowed:
        raise ValueError(f"{min(others)} has no effect on stage=export export={export.name}; leave it out")


def _answers(subject: PolicyToEvaluate) -> Answers:
    generations = stored_generations(subject.folder)
    return Answers(subject.name, generations, (subject.folder / ANSWERS).stat().st_mtime)


def _pairs(subject: PolicyToEvaluate, settings: EvaluationSettings) -> RewardedPairs:
    """The held-out pairs with their rewards against the run's loss reference; those too long are left out."""
    if subject.run is None:
        raise ValueError(
            f"export=rewardbench wants implicit rewards, which are measured against a run's reference; "
            f"policy={subject.model.path} is no run"
        )
    ours, held_out, source = settings.policy(subject), settings.data.eval, settings.parts["data"]
    groups = within(source.bound(tokenise), ours.tokenizer, ours.positions)(held_out, ours.tokenizer).groups
    members = groups.where(groups.have_pairs)
    if not len(members):
        return RewardedPairs(subject.name, source.name, [])
    reference = loss_reference(subject, settings, members)
    policy = score_pairs(ours.model, members, end_of_turn_ids(ours.tokenizer), progress)
    against = reference_pairs(reference, members, policy, settings.work.device)
    pairs = rewarded_pairs(held_out, members, policy, against)
    if left_out := sum(len(group.pairs) for group in held_out) - len(pairs):
        say(f"{left_out} of {left_out + len(pairs)} pairs left out: they are longer than data.max_length")
    return RewardedPairs(subject.name, source.name, pairs)


def rewarded_pairs(
    held_out: Sequence[PromptGroup], groups: Sequence[TokenGroup], policy: PairEvaluation, reference: PairEvaluation
) -> list[RewardedPair]:
    """The texts of the pairs in `groups`, which are in their source's order, with log policy - log reference."""
    sources = [(held_out[group.group_index], pair) for group in groups for pair in group.pairs]
    chosen, rejected = policy.chosen - reference.chosen, policy.rejected - reference.rejected
    return [
        RewardedPair(
            source.prompt,
            turns_of(source.responses[better]),
            turns_of(source.responses[worse]),
            up,
            down,
            source.origin,
        )
        for (source, (better, worse)), up, down in zip(sources, chosen.tolist(), rejected.tolist(), strict=True)
    ]


def run_export(subject: PolicyToEvaluate, export: Component, settings: Callable[[], EvaluationSettings]) -> Path:
    """Write the file of `export`, replaced atomically, and say where it is. Raises ValueError for answers that do not
    fit the format."""
    source = _pairs(subject, settings()) if asks_pairs(export) else _answers(subject)
    file: Export = export(source)
    path = subject.folder / FOLDER / file.path
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, file.text)
    run_summary(f"{file.num_rows} rows for {export.name}", {"file": str(path)})
    return path


# --- `stage=push`
# The token is the hub client's own: HF_TOKEN, or what `hf auth login` has stored. Only files of the policy folder that
# belong to a model are uploaded.


ALLOWED = (
    CARD, "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*.json",
    "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template.jinja",
    "adapter/adapter_config.json", "adapter/*.safetensors", DIGESTS, f"adapter/{DIGESTS}",
)  # fmt: skip


def chosen(folder: Path) -> tuple[list[str], list[str]]:
    """The folder's files that are uploaded, and those left out, as paths inside it."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    uploads = [name for name in names if any(fnmatch(name, pattern) and _level(name, pattern) for pattern in ALLOWED)]
    return uploads, [name for name in names if name not in uploads]


def _level(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/")  # fnmatch's star takes slashes too


def _check_folder(folder: Path) -> None:
    """Raise ValueError for a policy's folder that has no card or is not as it was written."""
    if not (folder / CARD).is_file():
        raise ValueError(f"{folder / CARD} is missing; evaluating the run again writes it")
    try:
        check_digests(folder)
        check_digests(folder / "adapter")
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _check(options: HubOptions, folder: Path) -> str:
    """The repository's name. Raises ValueError, with what to type, for all that can be known before asking the hub."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if options.repo is None or options.repo.count("/") != 1:
        raise ValueError(
            f"stage=push needs hub.repo=<organisation or user>/<name>; it is {options.repo}. hub.folder=<new folder> "
            "puts the same files there"
        )
    try:
        validate_repo_id(options.repo)
    except HFValidationError as error:
        raise ValueError(f"hub.repo={options.repo}: {error}") from error
    _check_folder(folder)
    if constants.is_offline_mode():
        raise ValueError("the hub is not asked while HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set; unset it")
    if get_token() is None:
        raise ValueError("no Hugging Face token here: type `hf auth login`, or set HF_TOKEN, and push again")
    return options.repo


def push(run: Path, options: HubOptions) -> tuple[str, list[str]]:
    """Upload a run's policy folder; the address of the commit, and the files left out.

    Raises ValueError, naming what to type, without a repository's name, a card or a token, for a repository that is
    public where hub.private=true was asked for, and where the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # the latter: of its transport, whichever it is

    logging.getLogger("httpx2").setLevel(logging.WARNING)  # else a line for every request
    folder = run / "policy"
    repo, (files, left_out) = _check(options, folder), chosen(folder)
    again = shlex.join(["python", "evaluate.py", f"policy={run}", "stage=push", f"hub.repo={repo}"])
    try:
        return _upload(HfApi(), repo, options.private, folder, files), left_out
    except HfHubHTTPError as error:
        code = error.response.status_code
        raise ValueError(f"the hub refuses {repo} ({code}): may the token write there? Then: {again}") from error
    except (HTTPError, OSError) as error:
        raise ValueError(f"the hub cannot be reached ({error}); nothing is lost, later: {again}") from error


def _upload(api: Any, repo: str, private: bool, folder: Path, files: list[str]) -> str:
    api.create_repo(repo, private=private, exist_ok=True)
    if private and not api.repo_info(repo).private:
        raise ValueError(f"{repo} exists and is public; hub.private=false publishes the policy there")
    commit = api.upload_folder(
        repo_id=repo, folder_path=folder, allow_patterns=files, commit_message="Policy trained with dpo_ref"
    )
    return str(commit.commit_url)


def copy_out(run: Path, target: str) -> tuple[Path, list[str]]:
    """Copy the files of a run's policy folder that would be uploaded into a new folder, which appears at once; the
    folder, and the files left out. Raises ValueError where something is there already."""
    folder, copy = run / "policy", Path(target).expanduser()
    _check_folder(folder)
    if copy.exists():
        raise ValueError(f"hub.folder={target} is there already; name a new one, or move it away")
    files, left_out = chosen(folder)
    with replacing_folder(copy) as partial:
        for name in files:
            (partial / name).parent.mkdir(exist_ok=True)
            shutil.copy2(folder / name, partial / name)
    return copy, left_out


def publish(policy: str | None, options: HubOptions) -> None:
    """`stage=push`: publish the policy of a run, on the hub or in a folder, and say where it is. Raises ValueError for
    anything that is no run, and for both places at once."""
    run = Path(policy or "").expanduser()
    if policy is None or not (run / "summary.json").is_file():
        raise ValueError(f"stage=push needs policy=<run folder>, as train.py made it; {policy} is none")
    if options.folder is not None and options.repo is not None:
        raise ValueError("hub.folder and hub.repo are two places: give one of them")
    if options.folder is None:
        address, left_out = push(run, options)
        rows, title = {"commit": address}, f"pushed to {options.repo}"
    else:
        copy, left_out = copy_out(run, options.folder)
        rows, title = {"folder": str(copy)}, "copied as it would be pushed"
    run_summary(title, rows | ({"left out": ", ".join(left_out)} if left_out else {}))
