"""Data sets on the hub: a process of its own asks a hub on loopback, then finds the file in its cache."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tutelage.data.dataset_files import read_conversations
from tutelage.data.hub import local_file
from tutelage.errors import DataError

ROWS = b'{"question": "1 + 1?", "answer": "2"}\n{"question": "2 + 2?", "answer": "4"}\n'
COMMIT = "0123456789abcdef0123456789abcdef01234567"
READ = """
import json, sys
from pathlib import Path
from tutelage.errors import DataError
from tutelage.data.dataset_files import read_conversations
for name in sys.argv[1:]:
    try:
        print(json.dumps([row for row, _ in read_conversations(Path(name))]))
    except DataError as error:
        print(json.dumps(str(error)))
"""


class Hub(BaseHTTPRequestHandler):
    """Has one file, in one data set, at `main` and at one tag."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer(ROWS)

    def _answer(self, body: bytes = b"") -> None:
        found = self.path in {f"/datasets/ann/sums/resolve/{at}/main/train.jsonl" for at in ("main", "v2", COMMIT)}
        self.send_response(200 if found else 404)
        if found:
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(ROWS).hexdigest()}"')
            self.send_header("Content-Length", str(len(ROWS)))
        else:
            self.send_header("X-Error-Code", "RepoNotFound" if "/nobody/" in self.path else "EntryNotFound")
            self.send_header("Content-Length", "0")
        self.end_headers()
        if found:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def read(names: list[str], cache: Path, hub: str, *, offline: bool = False) -> list[object]:
    environment = os.environ | {"HF_HOME": str(cache), "HF_ENDPOINT": hub, "HF_HUB_OFFLINE": str(int(offline))}
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", READ, *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_data_set_on_the_hub_is_read_and_found_again_without_it(hub, tmp_path):
    rows = [json.loads(line) for line in ROWS.splitlines()]
    names = ["hf://datasets/ann/sums/main/train.jsonl", "hf://datasets/ann/sums@v2/main/train.jsonl"]
    assert read(names, tmp_path, hub) == [rows, rows]
    assert read(names, tmp_path, "http://127.0.0.1:1", offline=True) == [rows, rows]


def test_what_the_hub_does_not_have_is_named(hub, tmp_path):
    names = ["hf://datasets/ann/sums/test.jsonl", "hf://datasets/nobody/sums/main/train.jsonl"]
    for name, message in zip(names, read(names, tmp_path, hub), strict=True):
        assert f"the hub does not give {Path(name)}" in str(message)
        assert "hf://datasets/OWNER/NAME/FILE" in str(message)


@pytest.mark.parametrize(
    "name", ["hf://datasets/ann/sums.jsonl", "hf://models/ann/sums/main/train.jsonl", "hf://x.jsonl"]
)
def test_a_name_of_another_form_is_refused(name):
    with pytest.raises(DataError, match="is not of the form hf://datasets/OWNER/NAME/FILE"):
        read_conversations(Path(name))


def test_a_path_is_itself(tmp_path):
    assert local_file(tmp_path / "hf:" / "rows.jsonl") == tmp_path / "hf:" / "rows.jsonl"
