"""Between numpy arrays and the contract's `Tensor`, and the checksum of a `SignalFrame`.

bfloat16, which numpy does not have, is held as its bit pattern in uint16; `torch.Tensor.view` turns
the one into the other without a copy.
"""

from __future__ import annotations

import hashlib
import math
import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

from tutelage.errors import CorruptFrame
from tutelage.rpc.v1 import teacher_pb2 as pb

_NUMPY_OF_DTYPE: dict[int, np.dtype[Any]] = {
    pb.DTYPE_FLOAT32: np.dtype("<f4"),
    pb.DTYPE_FLOAT16: np.dtype("<f2"),
    pb.DTYPE_BFLOAT16: np.dtype("<u2"),
    pb.DTYPE_INT32: np.dtype("<i4"),
    pb.DTYPE_UINT16: np.dtype("<u2"),
}
_DTYPE_OF_NUMPY: dict[np.dtype[Any], pb.Dtype.ValueType] = {
    np.dtype("<f4"): pb.DTYPE_FLOAT32,
    np.dtype("<f2"): pb.DTYPE_FLOAT16,
    np.dtype("<i4"): pb.DTYPE_INT32,
    np.dtype("<u2"): pb.DTYPE_UINT16,
}
_TENSORS_OF_FRAME = ("ids", "logits", "target_logits", "logsumexp", "hidden")


def encode(array: npt.NDArray[Any], *, bfloat16: bool = False) -> pb.Tensor:
    """An array as a message.

    Args:
        array: float32, float16, int32 or uint16, of any shape.
        bfloat16: the uint16 elements are bfloat16 bit patterns.

    Raises:
        TypeError: another dtype.

    """
    dtype = _DTYPE_OF_NUMPY.get(array.dtype.newbyteorder("<"))
    if dtype is None or (bfloat16 and dtype != pb.DTYPE_UINT16):
        raise TypeError(f"cannot encode {array.dtype}, bfloat16={bfloat16}")
    data = np.ascontiguousarray(array, dtype=_NUMPY_OF_DTYPE[dtype]).tobytes()
    return pb.Tensor(dtype=pb.DTYPE_BFLOAT16 if bfloat16 else dtype, shape=array.shape, data=data)


def decode(tensor: pb.Tensor, field: str = "") -> npt.NDArray[Any]:
    """A message as a read-only array that shares its bytes; bfloat16 comes as uint16 bit patterns.

    Raises:
        CorruptFrame: the dtype is unknown, or the bytes do not fill the shape.

    """
    dtype = _NUMPY_OF_DTYPE.get(tensor.dtype)
    if dtype is None:
        raise CorruptFrame(f"dtype {tensor.dtype} is not one of the contract's", field)
    if len(tensor.data) != math.prod(tensor.shape) * dtype.itemsize:
        raise CorruptFrame(f"{len(tensor.data)} bytes do not fill {list(tensor.shape)} of {dtype}", field)
    return np.frombuffer(tensor.data, dtype=dtype).reshape(tuple(tensor.shape))


def sequence_digest(token_ids: npt.NDArray[np.int32]) -> int:
    """First 8 bytes, little-endian, of the SHA-256 of the int32 token bytes."""
    data = np.ascontiguousarray(token_ids, dtype="<i4").tobytes()
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little")


def frame_checksum(frame: pb.SignalFrame) -> int:
    """CRC-32 over the frame's header fields and the bytes of its tensors, in order of field number.

    The header is packed as `<IIIBQI`: frame_index, position_start, position_count, last,
    sequence_digest, kind. Of each tensor: one byte of dtype, one of rank, each extent as uint32, then
    its data; an absent tensor counts as two zero bytes, except `row_lengths`, which then does not count.
    """
    crc = zlib.crc32(
        struct.pack(
            "<IIIBQI",
            frame.frame_index,
            frame.position_start,
            frame.position_count,
            frame.last,
            frame.sequence_digest,
            frame.kind,
        )
    )
    for name in _TENSORS_OF_FRAME + (("row_lengths",) if frame.HasField("row_lengths") else ()):
        tensor: pb.Tensor = getattr(frame, name)
        shape = tuple(tensor.shape)
        crc = zlib.crc32(struct.pack(f"<BB{len(shape)}I", tensor.dtype, len(shape), *shape), crc)
        crc = zlib.crc32(tensor.data, crc)
    return crc
