"""A judge on the loopback interface: a real HTTP server that speaks chat completions, and fails when told to.

`PYTHONPATH=. python tests/support/judge_server.py` serves one on port 8765 that knows the lab's gold reward
(docs/judge.md).
"""

import json
import math
import re
import socket
import threading
import time
from collections import Counter, deque

from dpo_ref.lab.gold import gold_rewards
from tests.support.loopback import Answering, LoopbackServer

SLOW = 0.8  # seconds that a slow answer takes
ANSWERS = re.compile(r'<answer of="m">\n(.*)\n</answer>\n\n<answer of="M">\n(.*)\n</answer>', re.DOTALL)


def longer_wins(first, second):
    """P(first is better) of a judge who likes length, and the first position a little."""
    return 1 / (1 + math.exp(-(len(first) - len(second)) / 10 - 0.2))


QUESTION = re.compile(r"<instruction>\n(.*)\n</instruction>\n\n" + ANSWERS.pattern, re.DOTALL)


def gold_wins(prompt, first, second):
    """P(first is better) of a judge who sees the lab's gold rewards dimly, and likes the first position a little."""
    turns = re.split(r"(?:^|\n\n)(System|User|Assistant): ", prompt)[1:] or ["User", prompt]
    messages = zip(turns[::2], turns[1::2], strict=True)
    asked = [tuple({"role": role.lower(), "content": content} for role, content in messages)] * 2
    of_first, of_second = gold_rewards(asked, [first, second], [True, True])
    return 1 / (1 + math.exp(-6 * (of_first - of_second) - 0.7))


class JudgeServer(LoopbackServer):
    """Judges by `taste(first, second)`, the probability that the first answer wins; `verdict(p)` writes it for
    templates other than alpaca_eval's, whose answers are found by `shown`.

    `faults` are spent one a request, in order. `asked` counts questions by their messages, `answered` those to which a
    whole answer was sent. After `dies_after` answers nothing listens any more.
    """

    def __init__(
        self, taste=longer_wins, *, key=None, faults=(), dies_after=None, shown=ANSWERS, verdict=None, port=0, wait=0.0
    ):
        self.taste, self.key, self.faults, self.dies_after = taste, key, deque(faults), dies_after
        self.shown, self.verdict, self.wait = shown, verdict, wait
        self.asked, self.answered, self.bodies = Counter(), Counter(), []
        self.lock = threading.Lock()
        super().__init__(Handler, port)

    def dead(self):
        return self.dies_after is not None and self.answered.total() >= self.dies_after


class Handler(Answering):
    """Answers as OpenAI's server does."""

    server: JudgeServer

    def refuse(self, status, message, code=None, **headers):
        self.say(status, {"error": {"message": message, "type": "error", "code": code}}, **headers)
        return True

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server, sent = self.server, self.headers.get("Authorization")
        if self.path != "/v1/chat/completions":
            return self.refuse(404, "Not Found")
        if server.key is not None and sent != f"Bearer {server.key}":
            return self.refuse(401, f"Incorrect API key provided: {sent}")
        with server.lock:
            question = json.dumps(body["messages"])
            server.asked[question] += 1
            server.bodies.append(body)
            fault = server.faults.popleft() if server.faults else None
        if fault is not None and FAULTS[fault](self):
            return None
        time.sleep(server.wait)
        with server.lock:
            if server.dead():
                return self.connection.shutdown(socket.SHUT_RDWR)
            server.answered[question] += 1
        return self.say(200, self.completion(body, logprobs=fault != "no logprobs"))

    def completion(self, body, logprobs=True):
        share = self.server.taste(*self.server.shown.search(body["messages"][-1]["content"]).groups())
        text = ("m" if share > 0.5 else "M") if self.server.verdict is None else self.server.verdict(share)
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        if logprobs and body.get("logprobs"):
            tokens = (("m", share), ("M", 1 - share))
            top = [{"token": token, "logprob": math.log(p * 0.9), "bytes": None} for token, p in tokens if p > 0]
            choice["logprobs"] = {"content": [{"token": text, "logprob": -0.1, "bytes": None, "top_logprobs": top}]}
        usage = {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101}
        return {"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage, "model": body["model"]}

    def cut(self):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b'{"choices"')
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)
        return True

    def slow(self):
        time.sleep(SLOW)
        return True

    def malformed(self, body):
        self.say(200, body)
        return True


FAULTS = {
    "429": lambda handler: handler.refuse(429, "slow down", Retry_After="0.05"),
    "500": lambda handler: handler.refuse(500, "try again"),
    "503": lambda handler: handler.refuse(503, "try again"),
    "slow": Handler.slow,
    "cut": Handler.cut,
    "dropped": lambda handler: handler.connection.shutdown(socket.SHUT_RDWR) or True,
    "half json": lambda handler: handler.malformed(b'{"choices": ['),
    "no choices": lambda handler: handler.malformed(b'{"choices": []}'),
    "html": lambda handler: handler.malformed(b"<html>gateway</html>"),
    "no logprobs": lambda handler: False,  # answered, but without them
    "quota": lambda handler: handler.refuse(429, "You exceeded your current quota", code="insufficient_quota"),
    "too long": lambda handler: handler.refuse(400, "maximum context length is 8 tokens"),
    "moved": lambda handler: handler.refuse(307, "elsewhere", Location=f"{handler.server.url}/elsewhere"),
    "tells": lambda handler: handler.refuse(500, f"bad {handler.headers['Authorization']}"),
    "tells nobody": lambda handler: handler.refuse(400, f"bad {handler.headers['Authorization']}"),
}


if __name__ == "__main__":
    with JudgeServer(gold_wins, shown=QUESTION, port=8765) as server:
        print(f"judging by the lab's gold reward at {server.url}; Ctrl-C ends it", flush=True)
        threading.Event().wait()
