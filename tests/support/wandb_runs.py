"""What W&B wrote to disk, and as much of its service as a run needs; for the tests of tracking."""

import json
import struct
import threading
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path

import wandb
from wandb.proto.wandb_internal_pb2 import Record

from tests.support.loopback import Answering


def records(path: Path):
    """The records of a .wandb file: a 7-byte header, then LevelDB log blocks of 32 KiB, their records framed by
    checksum, length and kind (1 whole, 2 first, 3 middle, 4 last)."""
    data, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32_768 - position % 32_768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def items(entries) -> dict:
    return {".".join(entry.nested_key) or entry.key: json.loads(entry.value_json) for entry in entries}


class Offline:
    """What the wandb folder of a run holds, all its pieces together, once wandb's background process has ended."""

    def __init__(self, directory: Path, pattern: str = "offline-run-*") -> None:
        wandb.teardown()  # a finished run may still be in that process's memory
        self.files = sorted(directory.glob(f"wandb/{pattern}/*.wandb"))
        self.bytes = b"".join(path.read_bytes() for path in self.files)
        all_records = [record for path in self.files for record in records(path)]
        self.run = next(record.run for record in all_records if record.HasField("run"))
        self.config = items(self.run.config.update)
        self.history = [items(record.history.item) for record in all_records if record.HasField("history")]
        self.summary = {}
        for record in all_records:
            self.summary |= items(record.summary.update)
        self.metrics = [record.metric for record in all_records if record.HasField("metric")]
        self.exit_codes = [record.exit.exit_code for record in all_records if record.HasField("exit")]


class Service(Answering):
    """As much of the W&B service as a run needs to believe that it is online."""

    def do_POST(self):
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        query = json.loads(raw).get("query", "") if self.path == "/graphql" else ""
        project = {"id": "p", "name": "dpo_ref", "entity": {"id": "e", "name": "me"}}
        bucket = {"id": "b", "name": "named", "displayName": "n", "historyLineCount": 0, "project": project}
        replies = {
            "upsertBucket(": {"upsertBucket": {"bucket": bucket, "inserted": True}},
            "createRunFiles(": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}},
            "model(": {"model": None},
        }
        data = next((reply for sign, reply in replies.items() if sign in query), {})
        self.server.requests.append(query or raw.decode())
        answer = self.server.answer(data)
        status, content = answer if isinstance(answer, tuple) else (200, answer)
        self.say(status, content)


@contextmanager
def service(answer=lambda data: json.dumps({"data": data}).encode()):
    """A service on a port of its own; yields its address and the list of what it was sent."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        server.answer, server.requests, server.daemon_threads = answer, [], True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", server.requests
        finally:
            server.shutdown()
            thread.join()
