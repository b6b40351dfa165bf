"""vLLM on the loopback interface, as rounds of training ask it: it loads adapters while it runs, and answers with the
tiny model that has them, by transformers and peft alone."""

import copy
import json
import warnings
from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.completions_server import Handler
from tests.support.generation_server import GenerationServer

REFUSED = {"type": "BadRequestError", "param": None}


class RoundServer(GenerationServer):
    """Serves the model in the folder `base` under that name, and adapters under theirs.

    `updating` is VLLM_ALLOW_RUNTIME_LORA_UPDATING, `rank` --max-lora-rank; a server that is `blind` sees no folder of
    ours, and one that `forgets` drops its connection once it has loaded. `orders` are all calls but those for answers.
    """

    def __init__(self, base, updating=True, rank=16, blind=False, forgets=False, name=None, **options):
        self.updating, self.rank, self.blind, self.forgets = updating, rank, blind, forgets
        self.orders, self.policies = [], {}
        model = self.read(base)
        super().__init__(model, AutoTokenizer.from_pretrained(base), name or str(base), **options)

    @staticmethod
    def read(folder):
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.set_attn_implementation("eager")
        return model.double().eval()

    def handler(self):
        return RoundHandler

    def names(self):
        return [self.name, *self.policies]

    def answering(self, asked):
        return self.policies.get(asked["model"], self.model)

    def restart(self, folder, name):
        """What a restart command brings about: another model, under another name."""
        self.model, self.name, self.policies = self.read(folder), name, {}

    def load_lora_adapter(self, name, path):
        """Status and answer of /v1/load_lora_adapter: text where it succeeds."""
        if name in self.policies:
            return 400, error(400, f"The lora adapter '{name}' has already been loaded. If you want to load ...")
        if self.blind or not (Path(path) / "adapter_config.json").is_file():
            return 404, error(404, f"Loading lora {name} failed: No adapter found for {path}")
        settings = json.loads((Path(path) / "adapter_config.json").read_text())
        if settings["r"] > self.rank:
            return 500, error(500, f"LoRA rank {settings['r']} is greater than max_lora_rank {self.rank}.")
        with warnings.catch_warnings(action="ignore"):
            adapted = PeftModel.from_pretrained(copy.deepcopy(self.model), path)
            self.policies[name] = adapted.merge_and_unload().double().eval()
        return 200, f"Success: LoRA adapter '{name}' added successfully.".encode()

    def unload_lora_adapter(self, name):
        """Status and answer of /v1/unload_lora_adapter."""
        if self.policies.pop(name, None) is None:
            return 404, error(404, f"The lora adapter '{name}' cannot be found.")
        return 200, f"Success: LoRA adapter '{name}' removed successfully.".encode()


def error(status, message):
    return {"error": REFUSED | {"message": message, "code": status}}


class RoundHandler(Handler):
    """Also takes orders."""

    server: RoundServer

    def do_POST(self):
        order = self.path.removeprefix("/v1/")
        if order == "completions":
            return super().do_POST()
        given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.orders.append((order, given))
        if order == "restart":
            self.server.restart(given["folder"], given["name"])
            return self.say(200, {})
        if not self.server.updating:
            return self.say(404, {"detail": "Not Found"})
        if order == "load_lora_adapter":
            status, answer = self.server.load_lora_adapter(given["lora_name"], given["lora_path"])
            if self.server.forgets:
                self.server.forgets = False
                return self.connection.close()
        else:
            status, answer = self.server.unload_lora_adapter(given["lora_name"])
        return self.say(status, answer)
