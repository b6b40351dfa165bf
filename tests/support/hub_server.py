"""As much of the Hugging Face hub as a push needs, on a port of its own: what was asked and what was uploaded."""

import base64
import json
import threading
from contextlib import contextmanager
from http.server import ThreadingHTTPServer

from tests.support.loopback import Answering


class Hub(Answering):
    """Answers `create_repo`, `repo_info`, `preupload`, `validate-yaml` and `commit`; keeps the commit's files."""

    def do_GET(self):
        about = {"id": self.server.repo, "private": self.server.private, "siblings": [], "sha": "0" * 40}
        self.say(self.server.status, about)

    def do_POST(self):
        size = self.headers.get("Content-Length")
        body = self.chunks() if size is None else self.rfile.read(int(size))
        self.server.requests.append((self.path, self.headers.get("Authorization"), body))
        if self.server.status != 200:
            self.say(self.server.status, {"error": "no"})
        elif self.path.endswith("/repos/create"):
            if self.server.new:
                self.server.private = json.loads(body)["visibility"] == "private"
            self.say(200, {"url": f"{self.server.address}/{self.server.repo}", "name": self.server.repo})
        elif "/preupload/" in self.path:
            files = [file | {"uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            self.say(200, {"files": files})
        elif self.path.endswith("/validate-yaml"):
            self.say(200, {"errors": [], "warnings": []})
        else:
            self.commit(body)

    def chunks(self):
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        return b"".join(parts)

    def commit(self, body):
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self.say(
            200, {"commitUrl": f"{self.server.address}/{self.server.repo}/commit/{'1' * 40}", "commitOid": "1" * 40}
        )


@contextmanager
def hub(repo: str, *, existing: str | None = None, status: int = 200):
    """A hub that holds one repository, new unless it is `existing` as "public" or "private"."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.repo, server.status, server.requests, server.files = repo, status, [], {}
        server.new, server.private, server.daemon_threads = existing is None, existing == "private", True
        server.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
