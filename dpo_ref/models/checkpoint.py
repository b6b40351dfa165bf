"""Checkpoints: everything a run needs to go on bit for bit. Safetensors and JSON only; replaced atomically, read
only if every byte is as it was written. And the digests by which weights are known.
"""

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dpo_ref.distributed import on_cuda, ranks
from dpo_ref.files.digests import DIGESTS, file_digest, seal_folder
from dpo_ref.files.writing import delete_folder, remove_abandoned, remove_deleted, replacing_folder, write_json
from dpo_ref.models.adapters import adapter_tensors, base_weights, effective, merge, save_adapter
from dpo_ref.models.folders import CARD
from dpo_ref.models.frozen import held_in_bfloat16
from dpo_ref.models.sharding import Holding
from dpo_ref.models.shards import Part, empty_beside, fill, gathered, held, like, read, stored, whole, write, written

PREFIX = "step-"
WEIGHTS, MOMENTS = "policy.safetensors", "optimizer.safetensors"
REFERENCE, RANDOM = "reference.safetensors", "random.safetensors"
STATE = "state.json"
FILES = (WEIGHTS, MOMENTS, REFERENCE, RANDOM, STATE)  # of one process
SHARDS = "shards"  # of several ranks: a folder in place of the first three
POLICY, OPTIMIZER, MOVED = "policy/", "optimizer/", "reference/"  # before names of tensors in it


def save_policy(
    folder: Path,
    policy: Any,
    tokenizer: Any,
    adapter: Any = None,
    ends: Collection[int] = (),
    holding: Holding | None = None,
) -> None:
    """A plain Hugging Face folder (weights, config, tokenizer, chat template) that loads without our code. A trained
    adapter is merged into the weights, and saved apart in `adapter/`. `ends` are the tokens that end an answer, which
    generation_config.json then lists. A model card that is there already stays. What is read with our code is checked
    against the digests in it, of all but the card. What ranks hold together the first one gathers, and writes."""
    merged = policy if adapter is None else merge(policy)
    plain = holding.as_saved(merged) if holding is not None and adapter is None else merged
    sharded = holding is not None and holding.sharded
    weights = {"state_dict": _gathered_once(merged, plain)} if sharded else {}
    apart = None if adapter is None else gathered(adapter_tensors(adapter))
    if not ranks().is_first:
        return
    remove_abandoned(folder)
    with replacing_folder(folder) as partial, as_writing_fails():
        plain.save_pretrained(partial, **weights)
        if ends:
            _ending_with(policy.generation_config, ends).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if (folder / CARD).is_file():
            shutil.copy2(folder / CARD, partial)
        if apart is not None:
            save_adapter(adapter, partial / "adapter", apart)
            seal_folder(partial / "adapter")
        seal_folder(partial, besides=[CARD])


def _gathered_once(model: Any, plain: Any) -> dict[str, Tensor]:
    """The weights of a sharded model, of tied ones, as `plain` ties them, one."""
    once = {name for name, _ in (*plain.named_parameters(), *plain.named_buffers())}
    return gathered({name: value for name, value in model.state_dict().items() if name in once})


def _ending_with(settings: Any, ends: Collection[int]) -> Any:
    """A copy of generation settings at which transformers, too, ends answers with these tokens. Where a template ends
    turns with another token than EOS, base models list EOS alone and would go on to the limit."""
    settings = copy.deepcopy(settings)
    listed = settings.eos_token_id
    listed = [] if listed is None else listed if isinstance(listed, list) else [listed]
    if not set(ends) <= set(listed):
        settings.eos_token_id = [*listed, *sorted(set(ends) - set(listed))]
    return settings


def _itself(weight: nn.Parameter) -> nn.Parameter:
    return weight


def _optimizer_tensors(optimizer: torch.optim.Optimizer, policy: nn.Module, part: Part) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": like(value, parameter)
        for name, parameter in policy.named_parameters()
        for key, value in optimizer.state.get(part(parameter), {}).items()
    }


def random_states() -> dict[str, Tensor]:
    """Of the generators that training draws from."""
    states = {"cpu": torch.get_rng_state()}
    if on_cuda():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states: Mapping[str, Tensor]) -> None:
    """What `random_states` gave, from here on."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and on_cuda():
        torch.cuda.set_rng_state(states["cuda"])


def save(
    folder: Path,
    policy: nn.Module,
    optimizer: torch.optim.Optimizer,
    reference: Mapping[str, Tensor],
    state: Mapping[str, Any],
    *,
    keep: int | None = 1,
    spare: Sequence[int] = (),
    part: Part = _itself,
) -> "Future[Path]":
    """Write `folder/step-<n>` from `state["step"]`, then delete all earlier ones but the newest; `keep` stay, or all
    for None, and those after the steps in `spare`.

    `reference` are the weights of a reference that moves, `part` is what the optimiser steps of a weight. `state` is
    JSON: the position in the run and what must be equal on resume. When this returns everything is written as it is
    now, or copied, where several ranks write it together; training goes on while the rest is done and the files'
    digests are taken, and the future gives the checkpoint once it stands in its place. A full disk raises OSError,
    here or from the future, and loses nothing: the previous checkpoint is deleted only when the new one is in place.
    """
    target = folder / name_of(state["step"])
    weights = {name: p.detach() for name, p in policy.named_parameters() if p.requires_grad}
    moments = _optimizer_tensors(optimizer, policy, part)
    if dist.is_initialized():
        tensors = {POLICY: weights, OPTIMIZER: moments, MOVED: reference}
        named = {prefix + name: value for prefix, some in tensors.items() for name, value in some.items()}
        return _save_together(target, named, state, keep, spare)
    with _written_beside(target) as (stack, partial):
        weights = {name: value.contiguous() for name, value in weights.items()}
        for name, content in {WEIGHTS: weights, MOMENTS: moments, REFERENCE: dict(reference)}.items():
            with as_writing_fails():
                save_file(content, partial / name)
        _write_rest(partial, state)
        return _in_background(_put_in_place, stack.pop_all(), partial, target, keep, spare)


@contextmanager
def _written_beside(target: Path) -> Iterator[tuple[ExitStack, Path]]:
    """What closes the folder that is to be filled, and the folder."""
    remove_abandoned(target)
    with ExitStack() as stack:
        yield stack, stack.enter_context(replacing_folder(target))


def _write_rest(partial: Path, state: Mapping[str, Any]) -> None:
    with as_writing_fails():
        save_file(random_states(), partial / RANDOM)
    write_json(partial / STATE, dict(state))


def _save_together(
    target: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any], keep: int | None, spare: Sequence[int]
) -> "Future[Path]":
    """Every rank writes what it holds; the first one puts all of it in its place."""
    with ExitStack() as outer:

        def beside() -> str:
            stack, partial = outer.enter_context(_written_beside(target))
            outer.push(stack.pop_all())
            (partial / SHARDS).mkdir()
            _write_rest(partial, state)
            return str(partial)

        partial = Path(ranks().first(beside))
        saved = write(partial / SHARDS, tensors)
        return _in_background(_end_together, outer.pop_all(), saved, partial, target, keep, spare)


def _end_together(
    moving: ExitStack, saved: "Future[Any]", partial: Path, target: Path, keep: int | None, spare: Sequence[int]
) -> Path:
    with moving:
        written(saved)
        return _put_in_place(moving.pop_all(), partial, target, keep, spare) if ranks().is_first else target


def name_of(step: int) -> str:
    """The name of the checkpoint after so many steps."""
    return f"{PREFIX}{step:08d}"


@contextmanager
def as_writing_fails() -> Iterator[None]:
    """Raises OSError for what safetensors calls any failure to write."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _in_background(call: Callable[..., Path], *arguments: Any) -> "Future[Path]":
    """In a thread of its own, which the end of the process waits for."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(call, *arguments)
    pool.shutdown(wait=False)
    return future


def _put_in_place(moving: ExitStack, partial: Path, target: Path, keep: int | None, spare: Sequence[int]) -> Path:
    with moving:
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        write_json(partial / DIGESTS, {str(path.relative_to(partial)): file_digest(path) for path in files})
    _delete_before(target, keep, {name_of(step) for step in spare})
    return target


def _delete_before(newest: Path, keep: int | None, spared: Set[str]) -> None:
    """Delete the earlier checkpoints, complete or not, that `keep` leaves no place for and `spared` does not name."""
    if keep is None:
        return
    kept = [path for path in complete_in(newest.parent) if path.name <= newest.name][-keep:]
    for path in saved_in(newest.parent):
        if path.name < newest.name and path not in kept and path.name not in spared:
            delete_folder(path)


# --- finding and reading them


class DamagedCheckpoint(ValueError):
    """A checkpoint's file is not as it was written; says which."""


def saved_in(folder: Path) -> list[Path]:
    """Checkpoints, damaged or not, oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if path.is_dir())


def complete_in(folder: Path) -> list[Path]:
    """Checkpoints of which no file is missing, oldest first."""
    return [path for path in saved_in(folder) if _is_complete(path)]


def _is_complete(checkpoint: Path) -> bool:
    with suppress(DamagedCheckpoint):
        return all((checkpoint / name).is_file() for name in _files_of(_read_json(checkpoint / DIGESTS)))
    return False


def _files_of(digests: Mapping[str, Any]) -> list[str]:
    """The files of a checkpoint: those that every one has, and the rest of its own."""
    held = (STATE, RANDOM) if any(name.startswith(SHARDS) for name in digests) else FILES
    return [*held, *(name for name in digests if name not in held)]


def recover(folder: Path) -> None:
    """Put in its place what a killed process had written whole and not moved there yet, or moved aside; delete what
    else it left. For the one process that writes checkpoints here."""
    targets = {path: folder / path.name[1:].rpartition(".")[0] for path in folder.glob(f".{PREFIX}*")}
    for workspace, target in targets.items():
        if not target.exists() and _is_whole(workspace / "new"):
            (workspace / "new").rename(target)
    for target in targets.values():
        remove_abandoned(target)
    remove_deleted(folder)


def _is_whole(checkpoint: Path) -> bool:
    try:
        check_files(checkpoint)
    except DamagedCheckpoint:
        return False
    return True


def check(checkpoint: Path) -> None:
    """Raise DamagedCheckpoint, naming the file, unless every byte is as written and the folder bears its step."""
    check_files(checkpoint)
    read_state(checkpoint)


def check_files(checkpoint: Path, names: Sequence[str] | None = None) -> None:
    """Raise DamagedCheckpoint for the first of these files, or of all, that is missing or has other bytes than were
    written."""
    digests = _read_json(checkpoint / DIGESTS)
    for name in _files_of(digests) if names is None else names:
        path = checkpoint / name
        if not path.is_file():
            raise DamagedCheckpoint(f"{path} is missing")
        if file_digest(path) != digests.get(name):
            raise DamagedCheckpoint(f"{path} is damaged: its bytes are not those that were written")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{path} is missing, or the checkpoint is of an earlier version of dpo_ref") from error
    except ValueError as error:
        raise DamagedCheckpoint(f"{path} is damaged: it is not JSON") from error
    if not isinstance(content, dict):
        raise DamagedCheckpoint(f"{path} is damaged: it is not a JSON object")
    return content


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON state a checkpoint was saved with. Raises DamagedCheckpoint."""
    check_files(checkpoint, [STATE])
    state = _read_json(checkpoint / STATE)
    if not isinstance(state.get("step"), int):
        raise DamagedCheckpoint(f"{checkpoint / STATE} does not say its step")
    if checkpoint.name != name_of(state["step"]):
        raise DamagedCheckpoint(f"{checkpoint / STATE} is of step {state['step']}, which is not what its folder says")
    return state


def newest_state(folder: Path) -> dict[str, Any] | None:
    """The state of the newest checkpoint whose state can be read."""
    for checkpoint in reversed(saved_in(folder)):
        with suppress(DamagedCheckpoint):
            return read_state(checkpoint)
    return None


def _is_sharded(checkpoint: Path) -> bool:
    return (checkpoint / SHARDS).is_dir()


def _read(checkpoint: Path, name: str, prefix: str) -> dict[str, Tensor]:
    """All tensors of a part, whole, in main memory."""
    if not _is_sharded(checkpoint):
        check_files(checkpoint, [name])
        return load_file(checkpoint / name)
    check_files(checkpoint)
    described = stored(checkpoint / SHARDS).items()
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in described if name.startswith(prefix)}
    read(checkpoint / SHARDS, tensors)
    return {name.removeprefix(prefix): value for name, value in tensors.items()}


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The weights that were trained. Raises DamagedCheckpoint."""
    return _read(checkpoint, WEIGHTS, POLICY)


def read_reference(checkpoint: Path) -> dict[str, Tensor]:
    """The weights of the run's reference, if it moves. Raises DamagedCheckpoint."""
    return _read(checkpoint, REFERENCE, MOVED)


def run_of(folder: Path) -> Path | None:
    """The folder of the run that a checkpoint belongs to; None for a folder that is no checkpoint."""
    is_checkpoint = (folder / STATE).is_file() and (folder.parents[1] / "summary.json").is_file()
    return folder.parents[1] if is_checkpoint else None


def load_policy(checkpoint: Path, policy: nn.Module) -> None:
    """Give a model the weights that a checkpoint saved. Raises ValueError for weights of an adapter, which is apart
    from the model while it is trained, and DamagedCheckpoint."""
    weights, parameters = read_weights(checkpoint), dict(policy.named_parameters())
    if not weights.keys() <= parameters.keys():
        raise ValueError(f"{checkpoint} holds the weights of an adapter; only the run's last policy can be evaluated")
    with torch.no_grad():
        for name, value in weights.items():
            fill(parameters[name], value)


@torch.no_grad()
def load(checkpoint: Path, policy: nn.Module, optimizer: torch.optim.Optimizer, part: Part = _itself) -> None:
    """Restore weights, optimiser and random states of a checked checkpoint in place, whatever number of ranks it is
    of. Raises ValueError if they are another model's."""
    parameters = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    restore = _load_shards if _is_sharded(checkpoint) else _load_whole
    moments = restore(checkpoint, parameters)
    for key, value in moments.items():
        name, _, slot = key.rpartition("/")
        optimizer.state[part(parameters[name])][slot] = held(value)
    restore_random_states(load_file(checkpoint / RANDOM))


def _check_names(checkpoint: Path, saved: Collection[str], parameters: Collection[str]) -> None:
    if set(saved) != set(parameters):
        raise ValueError(f"{checkpoint}: its weights are not those of the configured model")


def _load_whole(checkpoint: Path, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    weights = load_file(checkpoint / WEIGHTS)
    _check_names(checkpoint, weights, parameters)
    for name, parameter in parameters.items():
        fill(parameter, weights[name])
    moments = {}
    for key, value in load_file(checkpoint / MOMENTS).items():
        moments[key] = empty_beside(parameters[key.rpartition("/")[0]], value.shape, value.dtype)
        fill(moments[key], value)
    return moments


def _load_shards(checkpoint: Path, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    described = stored(checkpoint / SHARDS)
    _check_names(checkpoint, [n.removeprefix(POLICY) for n in described if n.startswith(POLICY)], parameters)
    weights = {POLICY + name: parameter.detach() for name, parameter in parameters.items()}
    moments = {
        name: empty_beside(parameters[name.removeprefix(OPTIMIZER).rpartition("/")[0]], *kept)
        for name, kept in described.items()
        if name.startswith(OPTIMIZER)
    }
    read(checkpoint / SHARDS, weights | moments)
    return {name.removeprefix(OPTIMIZER): value for name, value in moments.items()}


# --- digests of weights


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over every weight's name, dtype, shape and bytes, as 32 hexadecimal digits; an adapter counts once it
    changes something, with its scaling."""
    return state_digest(effective(model), held_in_bfloat16(model))


def base_digest(model: nn.Module) -> str:
    """The digest of the weights of the model below its adapter."""
    return state_digest(base_weights(model), held_in_bfloat16(model))


def state_digest(state: Mapping[str, torch.Tensor], as_float32: Set[str] = frozenset()) -> str:
    """SHA-256 over every tensor's name, dtype, shape and bytes, as 32 hexadecimal digits; those named in `as_float32`
    count as what they are in float32."""
    hasher = hashlib.sha256()
    for name, value in sorted(state.items()):
        tensor = whole(value.float() if name in as_float32 else value)
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hasher.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return hasher.hexdigest()[:32]
