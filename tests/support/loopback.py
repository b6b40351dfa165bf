"""Real HTTP servers on the loopback interface, each on a port of its own."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dpo_ref.models import server as model_server


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """No proxy between us and ourselves, no key of the user's, short pauses."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv(model_server.KEY, raising=False)
    monkeypatch.setattr(model_server, "FIRST_PAUSE", 0.004)


class LoopbackServer(ThreadingHTTPServer):
    """Listens from when it is made; as a context manager, until the end of its block."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, handler, port=0):
        super().__init__(("127.0.0.1", port), handler)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """A client that went away is no news."""


class Answering(BaseHTTPRequestHandler):
    """Answers with JSON, or with bytes as they are."""

    def log_message(self, format, *args):
        """Nothing is printed."""

    def say(self, status, content, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
