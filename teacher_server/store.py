"""Hidden states on disk, named by what they are the states of: one engine pass for all students, kinds and times.

A file is named by the SHA-256 of the token ids, in a folder named by the teacher (weights, dtype, engine). It
is a safetensors file: the states, the token ids, and in its header the SHA-256 of both. It is written beside
its place, fsynced and renamed, so that a kill leaves either all of it or nothing with that name; and it is
believed only if all of it fits. What was used longest ago goes first when the bytes run out.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from threading import RLock
from typing import IO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tutelage.errors import ConfigurationError

from teacher_server.unembedding import rows_bytes

logger = logging.getLogger(__name__)

_SUFFIX, _PART_SUFFIX = ".safetensors", ".part"


def teacher_key(weights_digest: str, dtype: str, engine: str) -> str:
    """Names what hidden states depend on besides the tokens; hex."""
    return hashlib.sha256(json.dumps([weights_digest, dtype, engine]).encode()).hexdigest()


def sequence_key(token_ids: Sequence[int]) -> str:
    """Names a sequence: SHA-256 of its int32 bytes, hex."""
    return hashlib.sha256(np.asarray(token_ids, dtype="<i4").tobytes()).hexdigest()


class SignalStore:
    """The stored hidden states of one teacher. Safe to use from several threads, by one process at a time.

    Args:
        root: folder of the stores of all teachers; made if it is missing.
        teacher: `teacher_key` of this one.
        max_bytes: size of this teacher's files together.

    Raises:
        ConfigurationError: another process uses the folder.

    """

    def __init__(self, root: Path, teacher: str, max_bytes: int) -> None:
        self._folder, self._max_bytes = root / teacher[:32], max_bytes
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock_file = _locked(self._folder / "lock")
        self._lock = RLock()
        self._part_numbers = itertools.count()
        self._sizes = self._found()
        self.bytes = sum(self._sizes.values())
        self._evict()

    def close(self) -> None:
        """Lets another process use the folder."""
        self._lock_file.close()

    def get(self, token_ids: Sequence[int]) -> torch.Tensor | None:
        """bfloat16 [tokens, hidden_size]: the states after each token, or None if they are not (or no longer) here."""
        key = sequence_key(token_ids)
        with self._lock:
            if key not in self._sizes:
                return None
            self._sizes.move_to_end(key)
        path = self._path(key)
        try:
            states = _read(path, token_ids)
            os.utime(path)  # the order of use outlives this process
        except FileNotFoundError:  # evicted just now
            return None
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            logger.warning("%s is damaged and will be computed again: %s", path, error)
            self._remove(key)
            return None
        return states

    def put(self, token_ids: Sequence[int], states_TD: torch.Tensor) -> None:
        """Stores the states of a sequence; when it returns, they survive a kill.

        Raises:
            OSError: the disk is full or broken.

        """
        key, content = sequence_key(token_ids), _content(token_ids, states_TD)
        part = self._folder / f"{key}.{next(self._part_numbers)}{_PART_SUFFIX}"
        _write(part, self._path(key), content)
        with self._lock:
            self.bytes += len(content) - self._sizes.pop(key, 0)
            self._sizes[key] = len(content)
        self._evict()

    def __len__(self) -> int:
        return len(self._sizes)

    def _found(self) -> OrderedDict[str, int]:
        """Sizes by key, in the order of use; clears away what a kill left half-written."""
        for part in self._folder.glob(f"*{_PART_SUFFIX}"):
            part.unlink()
        files = [(path, path.stat()) for path in self._folder.glob(f"*{_SUFFIX}")]
        files.sort(key=lambda file: file[1].st_mtime)
        return OrderedDict((path.stem, status.st_size) for path, status in files)

    def _evict(self) -> None:
        with self._lock:
            while self.bytes > self._max_bytes and self._sizes:
                self._remove(next(iter(self._sizes)))

    def _remove(self, key: str) -> None:
        with self._lock:
            self.bytes -= self._sizes.pop(key, 0)
            self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}{_SUFFIX}"


def _locked(path: Path) -> IO[bytes]:
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        message = f"{path.parent} is in use by another teacher server; give each its own folder"
        raise ConfigurationError(message, "store.path") from error
    return file


def _content(token_ids: Sequence[int], states_TD: torch.Tensor) -> bytes:
    states, ids = states_TD.to(torch.bfloat16).contiguous(), torch.tensor(token_ids, dtype=torch.int32)
    content: bytes = save({"states": states, "token_ids": ids}, metadata={"sha256": _digest(states, ids)})
    return content


def _digest(states_TD: torch.Tensor, token_ids: torch.Tensor) -> str:
    total = hashlib.sha256(str(list(states_TD.shape)).encode())
    for tensor in (states_TD, token_ids):
        total.update(rows_bytes(tensor))
    return total.hexdigest()


def _read(path: Path, token_ids: Sequence[int]) -> torch.Tensor:
    """The states in a file that is whole and of these tokens."""
    with safe_open(path, framework="pt") as file:
        states, ids = file.get_tensor("states"), file.get_tensor("token_ids")
        expected = (file.metadata() or {}).get("sha256")
    if states.dtype != torch.bfloat16 or _digest(states, ids) != expected:
        raise ValueError("its checksum does not fit")
    if ids.tolist() != list(token_ids) or len(states) != len(token_ids):
        raise ValueError("it holds another sequence")
    result: torch.Tensor = states
    return result


def _write(part: Path, path: Path, content: bytes) -> None:
    """Writes a file, first as `part`, so that a kill leaves all of it or nothing under its name."""
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
