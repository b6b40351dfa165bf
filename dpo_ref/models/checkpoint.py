"""Checkpoints: everything a run needs to go on bit for bit. Safetensors and JSON only; replaced atomically. And the
digests by which weights are known.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dpo_ref.files import remove_abandoned, replacing_folder, write_json
from dpo_ref.models.adapters import effective, merge

PREFIX = "step-"
REFERENCE = "reference.safetensors"


def save_policy(folder: Path, policy: Any, tokenizer: Any, adapter: Any = None) -> None:
    """A plain Hugging Face folder (weights, config, tokenizer, chat template) that loads without our code. A trained
    adapter is merged into the weights, and saved apart in `adapter/`. A model card that is there already stays."""
    remove_abandoned(folder)
    with replacing_folder(folder) as partial:
        (policy if adapter is None else merge(policy)).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if (folder / "README.md").is_file():
            shutil.copy2(folder / "README.md", partial)
        if adapter is not None:
            adapter.save_pretrained(partial / "adapter")


def _optimizer_tensors(optimizer: torch.optim.Optimizer, policy: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value
        for name, parameter in policy.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def save(
    folder: Path,
    policy: nn.Module,
    optimizer: torch.optim.Optimizer,
    reference: Mapping[str, Tensor],
    state: Mapping[str, Any],
    *,
    keep: int | None = 1,
) -> Path:
    """Write `folder/step-<n>` from `state["step"]`, then delete all but the newest `keep`; None keeps them all.

    `reference` are the weights of a reference that moves. `state` is JSON: the position in the run and what must be
    equal on resume (the reference's identity). The previous
    checkpoint is deleted only when the new one is in place: a full disk raises OSError and loses nothing.
    """
    target = folder / f"{PREFIX}{state['step']:08d}"
    remove_abandoned(target)
    with replacing_folder(target) as partial:
        weights = {name: p.detach().contiguous() for name, p in policy.named_parameters() if p.requires_grad}
        save_file(weights, partial / "policy.safetensors")
        save_file(_optimizer_tensors(optimizer, policy), partial / "optimizer.safetensors")
        save_file(dict(reference), partial / REFERENCE)
        save_file(_random_states(), partial / "random.safetensors")
        write_json(partial / "state.json", dict(state))
    for old in complete_in(folder)[:-keep] if keep else ():
        shutil.rmtree(old)
    return target


def complete_in(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if (path / "state.json").is_file())


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON state a checkpoint was saved with."""
    return json.loads((checkpoint / "state.json").read_text())


def read_reference(checkpoint: Path) -> dict[str, Tensor]:
    """The weights of the run's reference, if it moves."""
    return load_file(checkpoint / REFERENCE)


def run_of(folder: Path) -> Path | None:
    """The folder of the run that a checkpoint belongs to; None for a folder that is no checkpoint."""
    is_checkpoint = (folder / "state.json").is_file() and (folder.parents[1] / "summary.json").is_file()
    return folder.parents[1] if is_checkpoint else None


def load_policy(checkpoint: Path, policy: nn.Module) -> None:
    """Give a model the weights that a checkpoint saved. Raises ValueError for weights of an adapter, which is apart
    from the model while it is trained."""
    weights, parameters = load_file(checkpoint / "policy.safetensors"), dict(policy.named_parameters())
    if not weights.keys() <= parameters.keys():
        raise ValueError(f"{checkpoint} holds the weights of an adapter; only the run's last policy can be evaluated")
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)


def load(checkpoint: Path, policy: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restore weights, optimiser and random states in place."""
    weights = load_file(checkpoint / "policy.safetensors")
    parameters = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    if weights.keys() != parameters.keys():
        raise ValueError(f"{checkpoint}: its weights are not those of the configured model")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    for key, value in load_file(checkpoint / "optimizer.safetensors").items():
        name, _, slot = key.rpartition("/")
        optimizer.state[parameters[name]][slot] = value.to(parameters[name].device)
    states = load_file(checkpoint / "random.safetensors")
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


# --- digests of weights


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over every weight's name, dtype, shape and bytes, as 32 hexadecimal digits; an adapter counts once it
    changes something."""
    return state_digest(effective(model))


def state_digest(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over every tensor's name, dtype, shape and bytes, as 32 hexadecimal digits."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hasher.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return hasher.hexdigest()[:32]
