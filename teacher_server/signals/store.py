"""Hidden states on disk, named by what they are the states of: one engine pass for all students, kinds and times.

`tutelage.data.signal_store` says what the files are. One is written durably (`tutelage.files`), so that a kill leaves
either all of it or nothing with that name; and it is believed only if all of it fits. What was used
longest ago goes first when the bytes run out, and of one sequence its end before its beginning, on which others hang.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from threading import RLock

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save

from tutelage.data.signal_store import (
    SUFFIX,
    Prefixes,
    chain,
    digest,
    key_and_start,
    path_of_block,
    paths_of_teacher,
    read_block,
    teacher_folder,
)
from tutelage.errors import ConfigurationError, CorruptFrame
from tutelage.files import PARTIAL_SUFFIX, requiring_locks, write_durably
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.teacher_server.signals.unembedding import Unembedding

logger = logging.getLogger(__name__)

BLOCK_TOKENS = 64
"""Blocks end at multiples of so many tokens, and where a sequence ends: what sequences share, they share in those."""
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
        self._starts: dict[str, int] = {}
        self._sizes: OrderedDict[str, int] = OrderedDict()  # in the order of use
        self.bytes = 0
        for path, status in files:
            self._add(*key_and_start(path), status.st_size)
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

    def get(self, sequence: Prefixes, start: int = 0, end: int | None = None) -> torch.Tensor | None:
        """The states after tokens `start` … as near to `end` as they are stored, without a gap.

        Args:
            sequence: whose states.
            start: first token that is wanted.
            end: one past the last one; all by default.

        Returns:
            bfloat16 [tokens, hidden_size]; None if not even the first is here (or no longer).

        """
        end = len(sequence) if end is None else end
        with self._lock:
            blocks = chain(self._starts, sequence, start, end)
            for _, block_end in reversed(blocks):  # the beginning last, so that it is the last to go
                self._sizes.move_to_end(sequence.keys[block_end])
        parts: list[torch.Tensor] = []
        for block_start, block_end in blocks:
            states = self._read(sequence, block_start, block_end)
            if states is None:
                break
            parts.append(states[max(0, start - block_start) : end - block_start])
        for block_start, block_end in reversed(blocks[: len(parts)]):  # the order of use outlives this process
            with suppress(OSError):  # evicted just now
                os.utime(path_of_block(self._folder, sequence.keys[block_end], block_start))
        return torch.cat(parts) if parts else None

    def _read(self, sequence: Prefixes, start: int, end: int) -> torch.Tensor | None:
        """The states of one block, or None if it cannot be read."""
        path = path_of_block(self._folder, sequence.keys[end], start)
        try:
            return torch.from_numpy(read_block(self._folder, sequence, start, end)).view(torch.bfloat16)
        except FileNotFoundError:  # evicted just now
            pass
        except CorruptFrame as error:
            logger.warning("%s is damaged and will be computed again: %s", path, error)
            self._remove(sequence.keys[end])
        except OSError as error:  # too many open files, a disk that answers late: says nothing about the file
            logger.warning("%s cannot be read now and will be computed again: %s", path, error)
        return None

    def put(self, sequence: Prefixes, states_RD: torch.Tensor, start: int = 0) -> None:
        """Stores what is not stored yet of the states after tokens `start` …; when it returns, they survive a kill.

        What is larger than the whole store is not stored: it would cost all others, and then itself.

        Raises:
            OSError: the disk is full or broken.

        """
        end = start + len(states_RD)
        with self._lock:
            stored = chain(self._starts, sequence, start, end)
        blocks = block_ranges(min(end, stored[-1][1]) if stored else start, end)
        size = sum(file_bytes(block_end - block_start, states_RD.shape[1]) for block_start, block_end in blocks)
        if size > self.max_bytes:
            given = (end - start, size, self.max_bytes)
            logger.warning("%d tokens take %d bytes and are not stored: store.bytes is %d", *given)
            return
        for block_start, block_end in reversed(blocks):  # as in `get`
            states = states_RD[block_start - start : block_end - start].to(torch.bfloat16).contiguous()
            ids = torch.from_numpy(sequence.ids[block_start:block_end].astype("int32"))
            metadata = {"sha256": digest(states.view(torch.uint16).numpy(), ids.numpy())}
            content = save({"states": states, "token_ids": ids}, metadata=metadata)
            write_durably(path_of_block(self._folder, sequence.keys[block_end], block_start), content)
            with self._lock:
                self._add(sequence.keys[block_end], block_start, len(content))
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

    def __contains__(self, sequence: Prefixes) -> bool:
        blocks = chain(self._starts, sequence, 0, len(sequence))
        return bool(blocks) and blocks[-1][1] == len(sequence)

    def __len__(self) -> int:
        return len(self._sizes)

    def _add(self, key: str, start: int, size: int) -> None:
        if self._starts.get(key, start) != start:  # the same states from another beginning: what is newer stays
            self._remove(key)
        self.bytes += size - self._sizes.pop(key, 0)
        self._starts[key], self._sizes[key] = start, size

    def _evict(self) -> None:
        with self._lock:
            while self.bytes > self.max_bytes and self._sizes:
                self._remove(next(iter(self._sizes)))

    def _remove(self, key: str) -> None:
        with self._lock:
            if key in self._sizes:
                self.bytes -= self._sizes.pop(key)
                path_of_block(self._folder, key, self._starts.pop(key)).unlink(missing_ok=True)


def block_ranges(start: int, end: int) -> list[tuple[int, int]]:
    """[start, end) of the blocks that states after tokens `start` … `end`-1 are stored in."""
    inner = range((start // BLOCK_TOKENS + 1) * BLOCK_TOKENS, end, BLOCK_TOKENS)
    return list(itertools.pairwise([start, *inner, end])) if start < end else []


def file_bytes(tokens: int, hidden_size: int) -> int:
    """Size of a block's file, at most: states, token ids and header."""
    return tokens * (2 * hidden_size + 4) + _HEADER_BYTES


def stored_bytes(sequences: Iterable[Prefixes], hidden_size: int) -> int:
    """Size of the files of these sequences, at most, in a store that is empty."""
    blocks = {(s.keys[end], end - start) for s in sequences for start, end in block_ranges(0, len(s))}
    return sum(file_bytes(tokens, hidden_size) for _, tokens in blocks)
