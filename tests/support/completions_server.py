"""A completions server on the loopback interface that serves a tiny model's true log-probs, and fails when told to."""

import json
import socket
import threading
import time
from collections import Counter, deque

import torch

from tests.support.loopback import Answering, LoopbackServer

SLOW = 0.6  # seconds that a slow answer takes


@torch.no_grad()
def true_logps(model, ids) -> list[float]:
    """log p of every token from the second on, from full logits in float64, with transformers' own attention."""
    logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [logps[index, token].item() for index, token in enumerate(ids[1:])]


class CompletionsServer(LoopbackServer):
    """Serves `model` (float64, eager attention) as `name` on a port of its own.

    `faults` are spent one a request, in order; `asked` counts every sequence in a request, `answered` those that got
    an answer. `key`, `limit` (tokens, the generated one included) and `noise` (nats) are as a real server's. Faults,
    and `alter`, which changes answers, begin after `healthy` requests; after `dies_after` nothing listens any more.
    """

    def __init__(
        self, model, name="big", *, key=None, limit=10**6, noise=0.0, faults=(), healthy=0, alter=None, lists=True,
        port=0,
    ):  # fmt: skip
        model.set_attn_implementation("eager")
        self.model, self.name, self.key, self.limit, self.noise = model.double(), name, key, limit, noise
        self.faults, self.healthy, self.alter, self.lists = deque(faults), healthy, alter, lists
        self.asked, self.answered, self.times, self.dies_after = Counter(), Counter(), [], None
        self.lock, self.barrier, self.known = threading.Lock(), threading.Barrier(3, timeout=5), {}
        super().__init__(self.handler(), port)

    def handler(self):
        """What answers a request."""
        return Handler

    def names(self):
        """What it serves."""
        return [self.name]

    def process_request(self, request, client_address):
        if self.dies_after is not None and len(self.times) >= self.dies_after:
            threading.Thread(target=self.__exit__, daemon=True).start()
            return self.shutdown_request(request)
        return super().process_request(request, client_address)

    def logps(self, ids):
        with self.lock:
            if tuple(ids) not in self.known:
                self.known[tuple(ids)] = true_logps(self.model, ids)
            logps = torch.tensor(self.known[tuple(ids)], dtype=torch.float64)
            return (logps + self.noise * torch.randn(len(logps), dtype=torch.float64)).tolist()

    def choice(self, asked, ids):
        """What the server says about one sequence."""
        assert (asked["max_tokens"], asked["temperature"]) == (1, 0)
        choice = {"text": "x", "logprobs": None, "prompt_logprobs": None}
        if asked.get("echo"):
            assert asked["logprobs"] == 1
            return choice | {"logprobs": {"token_logprobs": [None, *self.logps(ids), -0.5]}}
        if asked.get("prompt_logprobs") == 0:
            pairs = zip(ids[1:], self.logps(ids), strict=True)
            entries = [{str(token): {"logprob": value, "rank": 1, "decoded_token": "x"}} for token, value in pairs]
            return choice | {"prompt_logprobs": [None, *entries]}
        return choice


class Handler(Answering):
    """Answers as vLLM does."""

    server: CompletionsServer

    def refuse(self, status, message, **headers):
        self.say(status, {"error": {"message": message, "type": "BadRequestError", "code": status}}, **headers)

    def do_GET(self):
        if self.path == "/v1/models" and self.server.lists:
            data = [{"id": name, "object": "model"} for name in self.server.names()]
            return self.say(200, {"object": "list", "data": data})
        return self.refuse(404, "Not Found")

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server, sent = self.server, self.headers.get("Authorization")
        if self.path != "/v1/completions":
            return self.refuse(404, "Not Found")
        if server.key is not None and sent != f"Bearer {server.key}":
            return self.refuse(401, f"Incorrect API key provided: {sent}")
        if asked["model"] not in server.names():
            return self.refuse(404, f"The model `{asked['model']}` does not exist.")
        prompts = asked["prompt"] if isinstance(asked["prompt"][0], list) else [asked["prompt"]]
        with server.lock:
            server.asked.update(map(tuple, prompts))
            server.times.append(time.monotonic())
            unwell = len(server.times) > server.healthy
            fault = server.faults.popleft() if server.faults and unwell else None
        if fault is not None and FAULTS[fault](self):
            return None
        longest = max(map(len, prompts)) + asked["max_tokens"]
        if longest > server.limit:
            return self.refuse(400, f"This model's maximum context length is {server.limit} tokens, not {longest}.")
        choices = [{"index": index} | server.choice(asked, ids) for index, ids in enumerate(prompts)]
        with server.lock:
            server.answered.update(map(tuple, prompts))
        answer = {"object": "text_completion", "model": asked["model"], "choices": choices[::-1]}
        return self.say(200, server.alter(answer) if server.alter and unwell else answer)

    def cut(self):
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b'{"choices"')
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)
        return True

    def slow(self):
        time.sleep(SLOW)
        return True

    def fails(self, status, says="try again", **headers):
        self.refuse(status, says, **headers)
        return True

    def malformed(self):
        self.say(200, b'{"choices": [')
        return True


FAULTS = {
    "429": lambda handler: handler.fails(429, Retry_After="0.3"),
    "500": lambda handler: handler.fails(500),
    "503": lambda handler: handler.fails(503),
    "moved": lambda handler: handler.fails(302, Location=f"{handler.server.url}/elsewhere"),
    "tells": lambda handler: handler.fails(500, says=f"bad {handler.headers['Authorization']}"),
    "together": lambda handler: handler.server.barrier.wait() < 0,  # an answer only once three requests are here
    "cut": Handler.cut,
    "slow": Handler.slow,
    "malformed": Handler.malformed,
    "dropped": lambda handler: handler.connection.close() or True,
}
