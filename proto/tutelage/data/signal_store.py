"""The signal store on disk, as the teacher server writes it and a trainer without a teacher reads it.

    <root>/<teacher>/<prefix>-<start>.safetensors   a block: the states after tokens start … end-1 of a sequence
    <root>/<teacher>/teacher/info.pb                who the teacher is: a GetTeacherInfoResponse
    <root>/<teacher>/teacher/unembedding.safetensors

<teacher> is named by weights, dtype and engine; <prefix> by all tokens up to the block's end, so that a block hangs on
the one that ends where it starts: sequences that begin alike share their blocks, and one that grew has a further one.
Without -<start> a block starts at 0; stores in which every sequence was one file have such blocks only. A file holds
`states` (bfloat16 [R, D], after each token), `token_ids` (int32 [R], those of the block) and, in its header, the
SHA-256 of both: it is believed only if all of it fits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tutelage.errors import CorruptFrame, DataError
from tutelage.rpc.v1 import teacher_pb2 as pb

SUFFIX = ".safetensors"
_INFO, _UNEMBEDDING = Path("teacher") / "info.pb", Path("teacher") / f"unembedding{SUFFIX}"
_HEADER_LENGTH_BYTES = 8
_NUMPY_OF_DTYPE: dict[str, np.dtype[Any]] = {"BF16": np.dtype("<u2"), "F32": np.dtype("<f4"), "I32": np.dtype("<i4")}


def teacher_key(weights_digest: str, dtype: str, engine: str) -> str:
    """Names what hidden states depend on besides the tokens; hex."""
    return hashlib.sha256(json.dumps([weights_digest, dtype, engine]).encode()).hexdigest()


def teacher_folder(root: Path, key: str) -> Path:
    """Where the states of the teacher with that `teacher_key` are."""
    return root / key[:32]


class Prefixes:
    """A sequence, and the names of its prefixes.

    Args:
        token_ids: its tokens.

    """

    def __init__(self, token_ids: Sequence[int] | npt.NDArray[np.int32]) -> None:
        self.ids = np.asarray(token_ids, dtype="<i4")

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def keys(self) -> list[str]:
        """For n = 0 … all of them: SHA-256, hex, of the first n tokens' int32 bytes."""
        content, total = self.ids.tobytes(), hashlib.sha256()
        keys = [total.hexdigest()]
        for start in range(0, len(content), 4):
            total.update(content[start : start + 4])
            keys.append(total.hexdigest())
        return keys


def sequence_key(token_ids: Sequence[int] | npt.NDArray[np.int32]) -> str:
    """Names a sequence as `Prefixes.keys` does: SHA-256 of its int32 bytes, hex."""
    return hashlib.sha256(np.asarray(token_ids, dtype="<i4").tobytes()).hexdigest()


def path_of_block(folder: Path, key: str, start: int) -> Path:
    """Where a block is that starts after so many tokens and ends with the prefix of that name."""
    return folder / (f"{key}-{start}{SUFFIX}" if start else f"{key}{SUFFIX}")


def key_and_start(path: Path) -> tuple[str, int]:
    """What `path_of_block` made a path of."""
    key, _, start = path.stem.partition("-")
    return key, int(start or 0)


def starts_of_blocks(folder: Path) -> dict[str, int]:
    """Where each block in a teacher's folder starts, by the key of its end."""
    return dict(key_and_start(path) for path in folder.glob(f"*{SUFFIX}"))


def chain(starts: Mapping[str, int], sequence: Prefixes, start: int, end: int) -> list[tuple[int, int]]:
    """The stored blocks that have the states after tokens `start` … as near to `end` as there are, without a gap.

    Args:
        starts: where each block starts, by the key of its end.
        sequence: whose blocks.
        start: first token that is wanted, 0 … end.
        end: one past the last one that is wanted, at most all.

    Returns:
        [start, end) of each block, in order; the first may start before `start`, the last end behind `end`.

    """
    for last in [*range(end, len(sequence) + 1), *range(end - 1, start, -1)]:
        blocks: list[tuple[int, int]] = []
        block_end = last
        while block_end > start and (block_start := starts.get(sequence.keys[block_end])) is not None:
            blocks.insert(0, (block_start, block_end))
            block_end = block_start
        if blocks and block_end <= start:
            return blocks
    return []


def digest(states_RD: npt.NDArray[np.uint16], token_ids: npt.NDArray[np.int32]) -> str:
    """SHA-256, hex, of bfloat16 bit patterns and token ids, as a block's file carries it."""
    total = hashlib.sha256(str(list(states_RD.shape)).encode())
    total.update(np.ascontiguousarray(states_RD, dtype="<u2").data)
    total.update(np.ascontiguousarray(token_ids, dtype="<i4").data)
    return total.hexdigest()


def read_block(folder: Path, sequence: Prefixes, start: int, end: int) -> npt.NDArray[np.uint16]:
    """The states after tokens `start` … end-1: bfloat16 bit patterns [R, D].

    Raises:
        CorruptFrame: the file is damaged, or holds other tokens.
        FileNotFoundError: there is none.

    """
    path = path_of_block(folder, sequence.keys[end], start)
    arrays, metadata = _read(path)
    states_RD, ids = arrays.get("states"), arrays.get("token_ids")
    if states_RD is None or ids is None or digest(states_RD, ids) != metadata.get("sha256"):
        raise CorruptFrame(f"{path} is damaged: its checksum does not fit", "sha256")
    if not np.array_equal(ids, sequence.ids[start:end]) or len(states_RD) != len(ids):
        raise CorruptFrame(f"{path} holds another sequence", "token_ids")
    return states_RD


def _read(path: Path) -> tuple[dict[str, npt.NDArray[Any]], dict[str, str]]:
    """Arrays by name, and the header's metadata, of a safetensors file."""
    from safetensors import SafetensorError, deserialize

    content = path.read_bytes()
    try:
        tensors: dict[str, Any] = dict(deserialize(content))
        length = int.from_bytes(content[:_HEADER_LENGTH_BYTES], "little")
        header = json.loads(content[_HEADER_LENGTH_BYTES : _HEADER_LENGTH_BYTES + length])
        arrays = {
            name: np.frombuffer(tensor["data"], _NUMPY_OF_DTYPE[tensor["dtype"]]).reshape(tensor["shape"])
            for name, tensor in tensors.items()
        }
    except (SafetensorError, ValueError, KeyError) as error:
        raise CorruptFrame(f"{path} is damaged: {error}") from error
    return arrays, header.get("__metadata__", {})


@dataclass(frozen=True)
class StoredTeacher:
    """Who made the states in a folder, and what turns them into logits."""

    info: pb.GetTeacherInfoResponse
    rows_VD: npt.NDArray[Any]
    """The unembedding: float32, or bfloat16 as uint16 bit patterns."""
    bias_V: npt.NDArray[np.float32] | None


def find_teacher(folder: Path) -> Path:
    """The teacher's folder: `folder` itself, or the only one in it.

    Raises:
        DataError: there is none, or there are several.

    """
    if (folder / _INFO).is_file():
        return folder
    found = sorted(path.parent.parent for path in folder.glob(str(Path("*") / _INFO)))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise DataError(
            f"{folder} holds the stored signals of {len(found)} teachers ({names}), expected one; name the folder of "
            "the one to learn from, or fill it with `tutelage teacher precompute`",
            "signals_from",
        )
    return found[0]


def read_teacher(folder: Path) -> StoredTeacher:
    """Who made the states in a teacher's folder.

    Raises:
        CorruptFrame: its files are damaged.

    """
    info = pb.GetTeacherInfoResponse.FromString((folder / _INFO).read_bytes())
    arrays, _ = _read(folder / _UNEMBEDDING)
    rows_VD, bias_V = arrays["weight"], arrays.get("bias")
    total = hashlib.sha256(rows_VD.data)
    if bias_V is not None:
        total.update(bias_V.data)
    if total.hexdigest() != info.unembedding.digest:
        raise CorruptFrame(f"{folder / _UNEMBEDDING} is not the unembedding that info.pb names", "unembedding")
    return StoredTeacher(info, rows_VD, bias_V)


def paths_of_teacher(folder: Path) -> tuple[Path, Path]:
    """Where `info.pb` and the unembedding of a teacher's folder are; the former is written last."""
    return folder / _INFO, folder / _UNEMBEDDING
