"""The signal store on disk, as the teacher server writes it and a trainer without a teacher reads it.

    <root>/<teacher>/<sequence>.safetensors      the states of one sequence
    <root>/<teacher>/teacher/info.pb             who the teacher is: a GetTeacherInfoResponse
    <root>/<teacher>/teacher/unembedding.safetensors

<teacher> is named by weights, dtype and engine; <sequence> by the token ids. A sequence's file holds `states`
(bfloat16 [T, D], after each token), `token_ids` (int32 [T]) and, in its header, the SHA-256 of both: it is
believed only if all of it fits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
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


def sequence_key(token_ids: Sequence[int] | npt.NDArray[np.int32]) -> str:
    """Names a sequence: SHA-256 of its int32 bytes, hex."""
    return hashlib.sha256(np.asarray(token_ids, dtype="<i4").tobytes()).hexdigest()


def digest(states_TD: npt.NDArray[np.uint16], token_ids: npt.NDArray[np.int32]) -> str:
    """SHA-256, hex, of bfloat16 bit patterns and token ids, as a sequence's file carries it."""
    total = hashlib.sha256(str(list(states_TD.shape)).encode())
    total.update(np.ascontiguousarray(states_TD, dtype="<u2").data)
    total.update(np.ascontiguousarray(token_ids, dtype="<i4").data)
    return total.hexdigest()


def read_states(path: Path, token_ids: Sequence[int] | npt.NDArray[np.int32]) -> npt.NDArray[np.uint16]:
    """The states after each of these tokens: bfloat16 bit patterns [T, D].

    Raises:
        CorruptFrame: the file is damaged, or holds another sequence.
        FileNotFoundError: there is none.

    """
    arrays, metadata = _read(path)
    states_TD, ids = arrays.get("states"), arrays.get("token_ids")
    if states_TD is None or ids is None or digest(states_TD, ids) != metadata.get("sha256"):
        raise CorruptFrame(f"{path} is damaged: its checksum does not fit", "sha256")
    if not np.array_equal(ids, token_ids) or len(states_TD) != len(ids):
        raise CorruptFrame(f"{path} holds another sequence", "token_ids")
    return states_TD


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
