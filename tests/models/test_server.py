"""The one client for servers: what it asks again, what it hides, and that nothing else in the package asks."""

import ast
import logging
import threading
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context

import pytest

import dpo_ref
from dpo_ref.models import server as model_server
from dpo_ref.models.server import Server, ServerRefused, ServerUnavailable, check_url
from tests.support.command import ROOT
from tests.support.loopback import Answering, LoopbackServer, surroundings  # noqa: F401

KEY = "sk-not-a-real-key-0123456789"


class Scripted(LoopbackServer):
    """Gives its answers, status and content, one after the other; `headers` are those of the requests."""

    def __init__(self, *answers):
        self.answers, self.headers = deque(answers), []
        super().__init__(Handler)


class Handler(Answering):
    server: Scripted

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.headers.append(self.headers)
        status, content = self.server.answers.popleft()
        self.say(status, content, Location="/elsewhere")


GOOD = (200, {"value": 7})


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504, 520, 529])
def test_a_status_that_passes_is_asked_again(status):
    with Scripted((status, {}), GOOD) as server:
        assert Server(server.url, 5.0, 1).post("/x", {}) == GOOD[1]
        assert not server.answers


@pytest.mark.parametrize("status", [302, 307, 400, 404, 422, 501])
def test_a_refusal_is_not_asked_again(status):
    with Scripted((status, {"error": {"message": "not so"}}), GOOD) as server:
        with pytest.raises(ServerRefused, match=f"^{status}: not so$") as refusal:
            Server(server.url, 5.0, 1).post("/x", {})
        assert refusal.value.status == status
        assert len(server.answers) == 1


def test_a_quota_that_is_used_up_does_not_pass():
    with Scripted((429, {"error": {"message": "pay first", "code": "insufficient_quota"}}), GOOD) as server:
        with pytest.raises(ServerUnavailable, match=r"^429: pay first$"):
            Server(server.url, 5.0, 1).post("/x", {})
        assert len(server.answers) == 1


def test_an_answer_that_cannot_be_read_is_asked_for_again():
    with Scripted((200, b"{"), (200, {"other": 1}), (200, [1]), GOOD) as server:
        assert Server(server.url, 5.0, 3).post("/x", {}, lambda answer: answer["value"]) == 7
    with Scripted((200, {"other": 1})) as server, pytest.raises(ServerUnavailable) as lost:
        Server(server.url, 5.0, 0).post("/x", {}, lambda answer: answer["value"])
    assert str(lost.value) == "'value'; the answer begins with '{\"other\": 1}'"


def test_nothing_is_asked_again_once_it_is_stopped(monkeypatch):
    monkeypatch.setattr(model_server, "FIRST_PAUSE", 30.0)
    stop = threading.Event()
    with Scripted((500, {}), GOOD) as server:
        threading.Timer(0.2, stop.set).start()
        with pytest.raises(ServerUnavailable):
            Server(server.url, 5.0, 6, stop=stop).post("/x", {})
        assert len(server.answers) == 1


def test_the_key_is_sent_and_cut_out_of_all_that_comes_back(monkeypatch):
    monkeypatch.setenv("OWN_KEY", KEY)
    answers = [(200, {"value": f"you are {KEY}"}), (400, f"bad {KEY}".encode()), (200, f"<{KEY}>".encode())]
    with Scripted(*answers) as server:
        asked = Server(server.url, 5.0, 0, "OWN_KEY")
        assert asked.post("/x", {}) == {"value": "you are ***"}
        with pytest.raises(ServerRefused, match=r"^400: bad \*\*\*$"):
            asked.post("/x", {})
        with pytest.raises(ServerUnavailable, match=r"begins with '<\*\*\*>'"):
            asked.post("/x", {})
        assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}


def test_a_key_that_cannot_be_sent_is_not_shown(monkeypatch):
    monkeypatch.setenv(model_server.KEY, f"{KEY}\n{KEY}")
    with Scripted() as server, pytest.raises(ValueError, match="holds characters that cannot be sent") as error:
        Server(server.url, 5.0, 1).post("/x", {})
    assert KEY not in str(error.value)


def test_neither_questions_nor_what_comes_back_are_lines_of_the_log(caplog):
    caplog.set_level(logging.DEBUG)
    with Scripted(GOOD) as server:
        Server(server.url, 5.0, 0).post("/x", {})
    assert caplog.records == []


class Keeping(LoopbackServer):
    """Keeps connections; `questions` counts the requests of each, `cookies` are what came with them."""

    def __init__(self):
        self.questions, self.cookies = Counter(), set()
        super().__init__(KeepingHandler)


class KeepingHandler(Answering):
    server: Keeping
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.questions[self.client_address] += 1
        self.server.cookies.add(self.headers["Cookie"])
        self.say(200, {"value": 7}, Set_Cookie="machine=1; Path=/")


def ask(server):
    return Server(server.url, 5.0, 0).post("/x", {})


def test_connections_are_shared_by_questions_and_cookies_are_not_kept(monkeypatch):
    monkeypatch.setattr(model_server, "KEPT", 60.0)  # however slow this machine is
    with Keeping() as server, ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, [server] * 40)) == [GOOD[1]] * 40
        assert len(server.questions) <= 4
        assert server.questions.total() == 40
        assert server.cookies == {None}


def test_an_idle_connection_is_left_before_the_server_closes_it(monkeypatch):
    monkeypatch.setattr(model_server, "KEPT", 0.05)
    with Keeping() as server:
        ask(server)
        time.sleep(0.2)
        ask(server)
        assert list(server.questions.values()) == [1, 1]


def test_proxies_of_the_environment_are_asked(monkeypatch):
    with Scripted(GOOD) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        assert Server("http://elsewhere.invalid/v1", 5.0, 0).post("/x", {}) == GOOD[1]


def test_a_process_that_forks_shares_no_connection(monkeypatch):
    monkeypatch.setattr(model_server, "KEPT", 60.0)  # however slow this machine is
    with Keeping() as server:
        ask(server)
        child = get_context("fork").Process(target=ask, args=(server,))
        child.start()
        child.join()
        ask(server)
        assert sorted(server.questions.values()) == [1, 2]


@pytest.mark.parametrize("path", ["/completions", "/chat/completions/"])
def test_an_address_is_the_base(path):
    assert check_url("http://host:8000/v1/", "judge.base_url") == "http://host:8000/v1"
    with pytest.raises(ValueError, match=f"must be the base, without {path.rstrip('/')}$"):
        check_url(f"http://host:8000/v1{path}", "judge.base_url")


CLIENTS = {"urllib.request", "urllib3", "http.client", "socket", "requests", "aiohttp", "openai"}
CLIENTS |= {"httpx", "httpx2", "httpcore", "httpcore2"}


def test_no_other_module_asks_a_server():
    """Faults are put in at this one seam. (The clients of the hub and of Weights & Biases are their own.)"""
    package = ROOT / dpo_ref.__name__
    asking = [path for path in package.rglob("*.py") if CLIENTS & imported(path)]
    assert asking == [package / "models" / "server.py"]


def imported(path):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    direct = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return direct | {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
