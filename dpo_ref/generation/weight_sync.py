"""How a server gets the weights that training has reached: an adapter by vLLM's adapter-loading call, whole weights by
a folder and a command of the user's that restarts the server with it.

Either way the server serves them under a name that no other weights have: it says which run they are of, before which
round, and a digest of what is trained. vLLM keeps what it computed of a prompt by the adapter's name, so that a name
with other weights would answer from the old ones too.
"""

import atexit
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from torch import nn

from dpo_ref.distributed import ranks
from dpo_ref.files.writing import delete_folder, remove_abandoned, replacing_folder
from dpo_ref.models.adapters import TRAINED, adapter_tensors, save_adapter
from dpo_ref.models.checkpoint import as_writing_fails, state_digest
from dpo_ref.models.folders import ADAPTER_SETTINGS, read_settings
from dpo_ref.models.loading import Policy
from dpo_ref.models.server import Server, ServerRefused, ServerUnavailable
from dpo_ref.models.shards import gathered
from dpo_ref.types import digest

ASKING = 10.0  # seconds that a server has to say what it serves
FIRST_RETRIES = 2  # vLLM says with a 500, which is tried again elsewhere, that it cannot take an adapter
NAME_LENGTH = 60  # characters of a run's name in that of its policies


def trained_digest(model: nn.Module) -> str:
    """32 hexadecimal digits that name the weights that are trained; the others are the run's all along."""
    return state_digest({name: weight for name, weight in model.named_parameters() if weight.requires_grad})


class WeightSync(ABC):
    """Hands `policy` over to `server`, round by round. Its weights lie in `folder`, which the server sees under the
    same path; those of the round before are deleted."""

    def __init__(self, policy: Policy, server: Server, folder: Path, run: Path) -> None:
        self.policy, self.server, self.folder = policy, server, folder.expanduser().resolve()
        run = run.resolve()
        self.run = f"{re.sub(r'[^A-Za-z0-9.-]+', '_', run.name)[-NAME_LENGTH:]}-{digest([str(run)])[:6]}-round-"
        self.handed_over = False
        # A list and an unloading take no time: a server that hangs shall not hold up the end of a run.
        self.asking = replace(server, retries=FIRST_RETRIES, timeout=min(server.timeout, ASKING))

    def hand_over(self, index: int) -> str:
        """Have the server serve the policy as it is before the round with this 0-based index; returns its name there.
        Raises ValueError, with the remedy, for a server that does not."""
        name = f"{self.run}{index + 1:05d}-{trained_digest(self.policy.model)[:12]}"
        folder = self.folder / name
        if ranks().first(lambda: self._is_lacking(folder)):
            self.write(folder)
        ranks().first(lambda: self.serve(name, folder))
        self.handed_over = ranks().is_first
        return name

    def _is_lacking(self, folder: Path) -> bool:
        """Whether the policy is still to be written to its folder; others of this run are deleted."""
        for former in self.folder.glob(f"{self.run}*"):
            if former.name != folder.name:
                delete_folder(former)
        if folder.is_dir():
            return False
        remove_abandoned(folder)
        return True

    def names(self, retries: int = FIRST_RETRIES) -> list[str]:
        """What the server says it serves. Raises `ServerUnavailable`."""
        return replace(self.asking, retries=retries).models() or []

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Write what the server reads, whole or not at all; all ranks come here, and the first writes."""

    @abstractmethod
    def serve(self, name: str, folder: Path) -> None:
        """Have the server read it, and serve it as `name`."""

    @abstractmethod
    def close(self) -> None:
        """No further round is sampled."""


# --- an adapter, which a running server loads


NOT_LOADED = (  # settings of an adapter that vLLM refuses, or passes over
    "use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "target_parameters", "trainable_token_indices",
)  # fmt: skip
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM takes as --max-lora-rank


class AdapterLoading(WeightSync):
    """By `/v1/load_lora_adapter`, where the adapter of the round before is unloaded. Raises ValueError for an adapter
    that vLLM does not load, or computes another way."""

    def __init__(self, policy: Policy, server: Server, folder: Path, run: Path) -> None:
        super().__init__(policy, server, folder, run)
        settings = policy.adapter.peft_config[TRAINED].to_dict()
        if unknown := [name for name in NOT_LOADED if settings.get(name)]:
            raise ValueError(
                f"generation=served: vLLM does not load an adapter with {unknown[0]}={settings[unknown[0]]}; "
                "generation.restart='<command that serves {folder} as {name}>' serves the whole policy instead"
            )

    def write(self, folder: Path) -> None:
        tensors = gathered(adapter_tensors(self.policy.adapter))
        if ranks().is_first:
            with replacing_folder(folder) as partial, as_writing_fails():
                save_adapter(self.policy.adapter, partial, tensors)

    def serve(self, name: str, folder: Path) -> None:
        try:
            served = self._unload_others(name)
            if name not in served:
                self._load(name, folder)
        except ServerUnavailable as error:
            raise ValueError(
                f"the server at generation.url={self.server.url} did not load the adapter {folder} ({error}); "
                f"{self._start(folder)}"
            ) from error

    def close(self) -> None:
        if self.handed_over:
            with suppress(ServerUnavailable, ValueError):  # it may be gone, and the run has ended in any case
                self._unload_others("")

    def _unload_others(self, name: str) -> list[str]:
        """Unload this run's adapters but the one of this name, also those that a killed process left; returns what the
        server serves."""
        served = self.names()
        for other in (each for each in served if each.startswith(self.run) and each != name):
            with suppress(ServerRefused, ServerUnavailable):  # it is gone, or stays; nobody asks for it any more
                self.asking.order("/unload_lora_adapter", {"lora_name": other})
        return served

    def _load(self, name: str, folder: Path) -> None:
        hasty = replace(self.server, retries=FIRST_RETRIES)
        try:
            hasty.order("/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        except ServerRefused as refusal:
            if name not in self.names():  # else it had, and the answer to a first attempt was lost
                raise ValueError(self._refused(refusal, name, folder)) from None

    def _refused(self, refusal: ServerRefused, name: str, folder: Path) -> str:
        url, message = self.server.url, str(refusal)
        if refusal.status == 404 and not any(word in message for word in (name, str(folder))):
            return f"the server at {url} loads no adapters while it runs ({message}); {self._start(folder)}"
        if refusal.status == 404:
            return (
                f"the server at {url} does not find the adapter ({message}): it must see {folder} under this path; "
                "generation.folder=<a folder that both see> is where adapters are written"
            )
        return f"the server at {url} refused the adapter {folder} ({message}); {self._start(folder)}"

    def _start(self, folder: Path) -> str:
        rank = read_settings(folder / ADAPTER_SETTINGS)["r"]
        room = next((each for each in RANKS if each >= rank), rank)
        return (
            "start it with `VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve "
            f"{self.policy.folder} --enable-lora --max-lora-rank {room} --generation-config vllm`, and check that it "
            "is of this model"
        )


# --- whole weights, with which a command restarts the server


POLL = 0.5  # seconds between two looks at whether the server is up
ENDING = 30.0  # seconds that a server has to end after SIGTERM
LAST_LINES = 12  # of the command's output, in messages
PLACEHOLDERS = ("{folder}", "{name}")
LOG = "restart.log"


def restart_words(command: str) -> list[str]:
    """The command's words as a shell reads them. Raises ValueError for one that lacks a placeholder."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"generation.restart={command}: {error}") from error
    if missing := [place for place in PLACEHOLDERS if not any(place in word for word in words)]:
        raise ValueError(
            f"generation.restart={command} does not say {missing[0]}: {{folder}} is the model folder to serve, "
            "{name} what to serve it as, such as in vllm serve {folder} --served-model-name {name}"
        )
    return words


class RestartCommand(WeightSync):
    """By a command that ends the server that runs and starts another, or that is the server itself: then it is ended
    here before the next one. No shell reads it. The server has `seconds` to come up."""

    def __init__(self, policy: Policy, server: Server, folder: Path, run: Path, command: str, seconds: float) -> None:
        super().__init__(policy, server, folder, run)
        self.words, self.seconds, self.log = restart_words(command), seconds, self.folder / LOG
        if shutil.which(self.words[0]) is None:
            raise ValueError(f"generation.restart: there is no command {self.words[0]}")
        self._process: subprocess.Popen[bytes] | None = None

    def write(self, folder: Path) -> None:
        self.policy.save(folder)

    def serve(self, name: str, folder: Path) -> None:
        with suppress(ServerUnavailable):
            if name in self.names(retries=0):  # a run that goes on, whose server has stayed
                return
        self.close()
        places: dict[str, str] = {"{folder}": str(folder), "{name}": name}
        words = [re.sub(r"\{folder\}|\{name\}", lambda place: places[place[0]], word) for word in self.words]
        atexit.register(self.close)
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._wait_for(name, self._process)

    def _wait_for(self, name: str, process: "subprocess.Popen[bytes]") -> None:
        """Return once the server has the policy. Raises ValueError where the command fails, or it takes too long."""
        end, served = time.monotonic() + self.seconds, "nothing"
        while time.monotonic() < end:
            try:
                names = self.names(retries=0)
                if name in names:
                    return
                served = ", ".join(names) or served
            except ServerUnavailable as error:
                served = f"nothing: {error}"
            if process.poll():
                raise ValueError(f"generation.restart ended with status {process.returncode}{self._last_lines()}")
            time.sleep(POLL)
        raise ValueError(
            f"generation.restart: after {self.seconds:g} seconds (generation.restart_timeout) {self.server.url} does "
            f"not serve {name} but {served}; the command must make it serve {{folder}} as {{name}}{self._last_lines()}"
        )

    def _last_lines(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-LAST_LINES:]
        return f"; {self.log} ends with: {' | '.join(lines)}" if lines else f"; it wrote nothing to {self.log}"

    def close(self) -> None:
        """End the server, where the command is the server itself."""
        atexit.unregister(self.close)
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(ENDING)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
