"""Data sets and models on the hub: a process of its own asks a hub on loopback, then finds the file in its cache."""

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
from tutelage.data.hub import local_file, local_model
from tutelage.errors import CheckpointError, DataError

ROWS = b'{"question": "1 + 1?", "answer": "2"}\n{"question": "2 + 2?", "answer": "4"}\n'
MODEL_FILES = ["config.json", "model.safetensors", "pytorch_model.bin"]  # the last one is asked for by nobody
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
        if "/ann/tiny/" in self.path:
            self._answer_of_model(with_body=bool(body))
            return
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

    def _answer_of_model(self, *, with_body: bool) -> None:
        """The lists of a model's files, or one of them."""
        name = self.path.rpartition("/")[2]
        lists = {
            "revision": {"id": "ann/tiny", "sha": COMMIT, "siblings": [{"rfilename": name} for name in MODEL_FILES]},
            "tree": [{"type": "file", "path": name, "size": len(name), "oid": COMMIT} for name in MODEL_FILES],
        }
        asked = self.path.split("/")[5] if self.path.startswith("/api/models/ann/tiny/") else ""
        found = asked in lists or name in MODEL_FILES[:2]
        content = json.dumps(lists[asked]).encode() if asked in lists else name.encode()
        self.send_response(200 if found else 404)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def read(names: list[str], cache: Path, hub: str, *, offline: bool = False, program: str = READ) -> list[object]:
    environment = os.environ | {"HF_HOME": str(cache), "HF_ENDPOINT": hub, "HF_HUB_OFFLINE": str(int(offline))}
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program, *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    lines = done.stdout.splitlines()
    return lines if program is FETCH else [json.loads(line) for line in lines]


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


FETCH = """
import sys
from pathlib import Path
from tutelage.data.hub import local_model
folder = local_model(Path(sys.argv[1]), "checkpoint")
print(*sorted(path.name for path in folder.iterdir()))
"""


def test_a_model_on_the_hub_is_fetched_and_found_again_without_it(hub, tmp_path):
    for at, offline in ((hub, False), ("http://127.0.0.1:1", True)):
        assert read(["ann/tiny"], tmp_path, at, offline=offline, program=FETCH) == ["config.json model.safetensors"]
    assert read([f"ann/tiny@{COMMIT}"], tmp_path, hub, program=FETCH) == ["config.json model.safetensors"]


@pytest.mark.parametrize("name", ["nobody/tiny", "runs/a/b", "./tiny", "/nowhere", "a b"])
def test_what_is_neither_a_folder_nor_a_model_of_the_hub_is_named(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="no folder") as refused:
        local_model(Path(name), "checkpoint")
    assert "\n" not in str(refused.value)


def test_a_folder_is_itself(tmp_path):
    assert local_model(tmp_path, "init") == tmp_path
