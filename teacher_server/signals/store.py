"""Hidden states on disk, named by what they are the states of: one engine pass for all students, kinds and times.

`tutelage.data.signal_store` says what the files are. One is written durably (`tutelage.files`), so that a kill leaves
either all of it or nothing with that name; and it is believed only if all of it fits. What was used
longest ago goes first when the bytes run out.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from threading import RLock

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save

from tutelage.data.signal_store import SUFFIX, digest, paths_of_teacher, read_states, sequence_key, teacher_folder
from tutelage.errors import ConfigurationError, CorruptFrame
from tutelage.files import PARTIAL_SUFFIX, requiring_locks, write_durably
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.teacher_server.signals.unembedding import Unembedding

logger = logging.getLogger(__name__)

_HEADER_BYTES = 256


class SignalStore:
    """The stored hidden states of one teacher. Safe to use from several threads, by one process at a time.

    Args:
        root: folder of the stores of all teachers; made if it is missing.
        teacher: `teacher_key` of this one.
        max_bytes: size of this teacher's files together.
        shrink: delete at once what was used longest ago of a store that holds more; without it, that is refused.

    Raises:
        ConfigurationError: another process uses the folder, its file system has no locks, or it holds more than
            `max_bytes`.

    """

    def __init__(self, root: Path, teacher: str, max_bytes: int, *, shrink: bool = False) -> None:
        self._folder, self.max_bytes = teacher_folder(root, teacher), max_bytes
        self._folder.mkdir(parents=True, exist_ok=True)
        # Of the process and not of the thread: a teacher is loaded in one thread and closed in another. No fallback:
        # where a file system has no flock, filelock would take the file's being there for the lock, and that outlives
        # a kill.
        self._process_lock = FileLock(
            self._folder / "lock", thread_local=False, fallback_to_soft=False, preserve_lock_file=True
        )
        try:
            with requiring_locks(self._folder, "store.path"):
                self._process_lock.acquire(timeout=0)
        except Timeout as error:
            message = f"{self._folder} is in use by another teacher server; give each its own folder"
            raise ConfigurationError(message, "store.path") from error
        self._lock = RLock()
        for partial in self._folder.glob(f"*{PARTIAL_SUFFIX}"):  # what a kill left; nobody else writes here
            partial.unlink()
        files = [(path, path.stat()) for path in self._folder.glob(f"*{SUFFIX}")]
        files.sort(key=lambda file: file[1].st_mtime)
        self._sizes = OrderedDict((path.stem, status.st_size) for path, status in files)  # in the order of use
        self.bytes = sum(self._sizes.values())
        if self.bytes > max_bytes and not shrink:
            self.close()
            raise ConfigurationError(
                f"the store may have {max_bytes:,} bytes, and {self._folder} holds {self.bytes:,} already; allow as "
                "many, or say store.shrink to delete what was used longest ago",
                "store.bytes",
            )
        self._evict()

    def close(self) -> None:
        """Lets another process use the folder."""
        self._process_lock.release()

    def get(self, token_ids: Sequence[int]) -> torch.Tensor | None:
        """bfloat16 [tokens, hidden_size]: the states after each token, or None if they are not (or no longer) here."""
        key = sequence_key(token_ids)
        with self._lock:
            if key not in self._sizes:
                return None
            self._sizes.move_to_end(key)
        path = self._path(key)
        try:
            states = torch.from_numpy(read_states(path, token_ids)).view(torch.bfloat16)
            os.utime(path)  # the order of use outlives this process
        except FileNotFoundError:  # evicted just now
            return None
        except CorruptFrame as error:
            logger.warning("%s is damaged and will be computed again: %s", path, error)
            self._remove(key)
            return None
        except OSError as error:  # too many open files, a disk that answers late: says nothing about the file
            logger.warning("%s cannot be read now and will be computed again: %s", path, error)
            return None
        return states

    def put(self, token_ids: Sequence[int], states_TD: torch.Tensor) -> None:
        """Stores the states of a sequence; when it returns, they survive a kill.

        A sequence that is larger than the whole store is not stored: it would cost all others, and then itself.

        Raises:
            OSError: the disk is full or broken.

        """
        states, ids = states_TD.to(torch.bfloat16).contiguous(), torch.tensor(token_ids, dtype=torch.int32)
        metadata = {"sha256": digest(states.view(torch.uint16).numpy(), ids.numpy())}
        key, content = sequence_key(token_ids), save({"states": states, "token_ids": ids}, metadata=metadata)
        if len(content) > self.max_bytes:
            given = (len(token_ids), len(content), self.max_bytes)
            logger.warning("%d tokens take %d bytes and are not stored: store.bytes is %d", *given)
            return
        write_durably(self._path(key), content)
        with self._lock:
            self.bytes += len(content) - self._sizes.pop(key, 0)
            self._sizes[key] = len(content)
        self._evict()

    def describe(self, info: pb.GetTeacherInfoResponse, unembedding: Unembedding) -> None:
        """Writes who the teacher is, and what turns its states into logits, for those who read without a server.

        Raises:
            OSError: the disk is full or broken.

        """
        info_path, unembedding_path = paths_of_teacher(self._folder)
        info_path.parent.mkdir(exist_ok=True)
        if not info_path.exists():  # it is written last, and a folder has one teacher only
            tensors = {"weight": unembedding.weight_VD}
            if unembedding.bias_V is not None:
                tensors["bias"] = unembedding.bias_V
            write_durably(unembedding_path, save(tensors))
        write_durably(info_path, info.SerializeToString())

    def __contains__(self, token_ids: Sequence[int]) -> bool:
        return sequence_key(token_ids) in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def _evict(self) -> None:
        with self._lock:
            while self.bytes > self.max_bytes and self._sizes:
                self._remove(next(iter(self._sizes)))

    def _remove(self, key: str) -> None:
        with self._lock:
            self.bytes -= self._sizes.pop(key, 0)
            self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}{SUFFIX}"


def file_bytes(tokens: int, hidden_size: int) -> int:
    """Size of a sequence's file, at most: states, token ids and header."""
    return tokens * (2 * hidden_size + 4) + _HEADER_BYTES
