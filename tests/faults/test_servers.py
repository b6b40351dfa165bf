"""Servers that never end, never stop sending, or send what is none: given up in a stated time, and told."""

import gzip
import json
import socket
import threading
import time
from contextlib import contextmanager
from functools import partial

import pytest

from dpo_ref.evaluation.judging.judge import JudgeLost, judge_pairs
from dpo_ref.models import server as model_server
from dpo_ref.models.server import Server, ServerUnavailable
from dpo_ref.types import silent
from tests.evaluation.test_judge_server import judge, pairs, rows
from tests.references.test_references_served_refused import each
from tests.support.completions_server import CompletionsServer
from tests.support.judge_server import JudgeServer
from tests.support.loopback import surroundings  # noqa: F401
from tests.support.served_references import Served, big, context_of

pytestmark = pytest.mark.slow  # `make faults` runs it

TIMEOUT = 0.3  # seconds without a byte; three times that for all of an answer
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
LENGTH = HEAD + b"Content-Length: 1000000\r\n\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@contextmanager
def sending(answer):
    """A server that does `answer` with each connection once a question has come; yields its address and how often."""
    connections = []

    def serve():
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            connections.append(connection)
            threading.Thread(target=handle, args=(connection,), daemon=True).start()

    def handle(connection):
        with connection:
            try:
                take_question(connection)
                answer(connection)
            except OSError:
                return

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1", connections


def take_question(connection):
    question = b""
    while not question.endswith((b"}", b"}\n")):
        question += connection.recv(2**16)


def drips(connection, text):
    for byte in text:
        connection.sendall(bytes([byte]))
        time.sleep(TIMEOUT / 6)


def endlessly(connection, beginning, part):
    connection.sendall(beginning)
    while True:
        connection.sendall(part)


def once(connection, content):
    connection.sendall(content)


def reset(connection, content):
    connection.sendall(content)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def whole(body, headers=b""):
    return HEAD + headers + b"Content-Length: %d\r\n\r\n" % len(body) + body


BOMB = gzip.compress(b" " * 2**28, 1)
OVER_TIME, OVER_SIZE = "not complete after 0.9 seconds", "has more than 4 MiB"
ANSWERS = {
    "drips its answer byte by byte": (partial(drips, text=LENGTH + b" " * 1000), OVER_TIME),
    "drips its headers": (partial(drips, text=HEAD + b"X: " + b"a" * 1000), OVER_TIME),
    "drips a body without end": (lambda c: (once(c, LENGTH), drips(c, b" " * 1000)), OVER_TIME),
    "drips chunks": (lambda c: (once(c, CHUNKED), drips(c, b"1\r\n \r\n" * 200)), OVER_TIME),
    "sends gigabytes": (partial(endlessly, beginning=HEAD + b"\r\n", part=b" " * 2**16), OVER_SIZE),
    "sends gigabytes in chunks": (
        partial(endlessly, beginning=CHUNKED, part=b"10000\r\n" + b" " * 2**16 + b"\r\n"),
        OVER_SIZE,
    ),
    "sends headers without end": (partial(endlessly, beginning=HEAD, part=b"X: " + b"a" * 1000 + b"\r\n"), "."),
    "sends `100 Continue` without end": (
        partial(endlessly, beginning=b"", part=b"HTTP/1.1 100 Continue\r\n\r\n" * 500),
        "the answer ",
    ),
    "sends a packed answer of 256 MiB": (
        partial(once, content=whole(BOMB, b"Content-Encoding: gzip\r\n")),
        "the answer is packed (gzip), which was not asked for",
    ),
    "sends chunks of no size": (partial(once, content=CHUNKED + b"zzzz\r\nabc"), "illegal chunk header"),
    "speaks HTTP/0.9": (partial(once, content=b"<html>hello</html>"), "."),
    "sends no UTF-8": (partial(once, content=whole(b'{"a": "\xff"}')), "the answer is not JSON; it begins with"),
    "sends 100,000 brackets": (partial(once, content=whole(b"[" * 10**5)), "the answer is not JSON; it begins with"),
    "sends a number of 100,000 digits": (partial(once, content=whole(b"9" * 10**5)), "the answer is not JSON"),
    "resets the connection at once": (partial(reset, content=b""), "."),
    "resets within the headers": (partial(reset, content=HEAD), "."),
    "resets within the body": (partial(reset, content=LENGTH + b"{"), "."),
    "sends no headers' end": (partial(once, content=HEAD), "."),
    "says nothing": (lambda connection: time.sleep(5), "timed out"),
}


@pytest.mark.parametrize("done", ANSWERS)
def test_a_server_is_given_up_in_a_stated_time(done, tell):
    answer, reason = ANSWERS[done]
    begun = time.monotonic()
    with sending(answer) as (url, connections), pytest.raises(ServerUnavailable) as lost:
        Server(url, TIMEOUT, 1).post("/x", {})
    assert time.monotonic() - begun < 2 * (model_server.WHOLE * TIMEOUT + 3)
    assert reason.strip(".") in str(lost.value)
    assert len(connections) == 2  # asked again once
    seen = str(lost.value).partition("; it begins")[0]
    tell(
        "service",
        f"a server that {done}",
        seen=seen,
        survived="asked again, then given up; memory and time are bounded",
    )


def test_a_redirect_is_not_followed(tell):
    moved = b"HTTP/1.1 307 Moved\r\nLocation: %s/elsewhere\r\nContent-Length: 0\r\n\r\n"
    with (
        sending(partial(once, content=whole(b"{}"))) as (target, reached),
        sending(partial(once, content=moved % target.encode())) as (url, connections),
        pytest.raises(model_server.ServerRefused) as refusal,
    ):
        Server(url, TIMEOUT, 3).post("/x", {})
    assert (len(connections), len(reached)) == (1, 0)
    tell("service", "a server that redirects", seen=str(refusal.value), survived="no question and no key go elsewhere")


def test_an_answer_may_be_as_large_as_the_question_makes_it():
    question = {"prompt": "a" * 2**17}
    body = json.dumps({"value": "b" * 8 * 2**20}).encode()
    with sending(partial(once, content=whole(body))) as (url, _):
        assert len(Server(url, 5.0, 0).post("/x", question)["value"]) == 8 * 2**20


# --- judges


def with_logprob(value):
    content = [{"token": "m", "logprob": 0, "top_logprobs": [{"token": "m", "logprob": value}]}]
    return {"choices": [{"message": {"content": "m"}, "logprobs": {"content": content}}]}


USELESS = {
    "an error in a 200": {"error": {"message": "overloaded"}},
    "log-probs that are nan": with_logprob(float("nan")),
    "log-probs that are inf": with_logprob(float("inf")),
    "log-probs that are texts": with_logprob("much"),
    "an infinite number of tokens": with_logprob(-0.1) | {"usage": {"prompt_tokens": float("inf")}},
    "a list": [],
    "choices that are numbers": {"choices": [1, 2]},
}


@pytest.mark.parametrize("done", USELESS)
def test_an_answer_of_a_judge_that_is_none(tmp_path, done, tell):
    body = json.dumps(USELESS[done]).encode()
    with sending(partial(once, content=whole(body))) as (url, connections), pytest.raises(JudgeLost) as lost:
        judge_pairs(judge(tmp_path, url, retries=1, max_workers=1), pairs(2), silent)
    assert len(connections) in (2, 3)  # the next question may have begun
    assert rows(tmp_path) == []
    assert "0 of 2 pairs are judged, then judge=alpaca_eval gave no answer: " in str(lost.value)
    seen = str(lost.value).partition("; the answer begins")[0]
    tell("service", f"a judge that answers with {done}", seen=seen, survived="nothing is counted as a verdict")


def test_a_judge_that_is_lost_and_back_is_asked_only_what_is_missing(tmp_path, tell):
    with JudgeServer(dies_after=9) as server, pytest.raises(JudgeLost) as lost:
        judge_pairs(judge(tmp_path, server.url, retries=1), pairs(10), silent)
    kept = len(rows(tmp_path))
    with JudgeServer() as back:
        judged = judge_pairs(judge(tmp_path, back.url), pairs(10), silent)
    assert back.asked.total() == judged.num_asked == 20 - kept
    assert all(judgment.preference is not None for judgment in judged.judgments)
    tell(
        "service",
        "a judge that is lost and back",
        seen=str(lost.value),
        survived="every answer; only the others are asked",
    )


def test_a_judge_that_is_away_for_a_while_is_waited_for(tmp_path, tell):
    with JudgeServer(faults=["dropped"] * 3 + ["503"] * 3) as server:
        judged = judge_pairs(judge(tmp_path, server.url, max_workers=1, retries=6), pairs(3), silent)
    assert judged.num_asked == 6
    assert all(judgment.preference is not None for judgment in judged.judgments)
    tell("service", "a judge away for six requests", seen="6 questions are answered", survived="all verdicts")


# --- served references


def lists(change):
    return lambda answer: {"choices": [change(choice) for choice in answer["choices"]]}


WRONG = {
    "choices that are numbers": (lists(lambda choice: 1), "gave .* choices for"),
    "log-probs that are a text": (each(lambda e: next(iter(e[-1].values())).update(logprob="x")), "no log-probs"),
    "log-probs that are a number": (lists(lambda choice: choice | {"prompt_logprobs": 7}), "no log-probs"),
    "log-probs in lists": (lists(lambda choice: choice | {"prompt_logprobs": [[]] * 10**3}), "log-probs of"),
    "a log-prob of 10^400": (each(lambda e: next(iter(e[-1].values())).update(logprob=10**400)), "no log-probs"),
    "too many log-probs": (each(lambda entries: entries.append(entries[-1])), "log-probs of"),
    "too few log-probs": (each(list.pop), "log-probs of"),
}


@pytest.mark.parametrize("done", WRONG)
def test_an_answer_of_a_served_reference_that_is_none(tmp_path, done, tell):
    alter, reason = WRONG[done]
    with (
        CompletionsServer(big(), healthy=2, alter=alter) as server,
        pytest.raises(ValueError, match=reason) as error,
    ):
        Served(context_of(tmp_path), url=server.url)
    tell(
        "service",
        f"a reference server that answers with {done}",
        seen=str(error.value),
        survived="no table is written",
    )
