"""Arrays survive the wire bit for bit; a damaged message is refused by name."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tutelage.errors import CorruptFrame
from tutelage.rpc.codec import decode, encode, frame_checksum, sequence_digest
from tutelage.rpc.v1 import teacher_pb2 as pb

DTYPES = ("<f4", "<f2", "<i4", "<u2", ">f4", ">i4")


@given(st.sampled_from(DTYPES).flatmap(lambda d: hnp.arrays(np.dtype(d), hnp.array_shapes(max_dims=3, min_side=0))))
def test_round_trip_is_bit_exact_and_little_endian(array):
    message = pb.Tensor.FromString(encode(array).SerializeToString())
    back = decode(message)
    assert back.shape == array.shape
    assert back.tobytes() == array.astype(array.dtype.newbyteorder("<")).tobytes()


def test_bfloat16_travels_as_bit_patterns():
    bits = np.array([[0x3F80, 0xC000]], np.uint16)
    message = encode(bits, bfloat16=True)
    assert message.dtype == pb.DTYPE_BFLOAT16
    np.testing.assert_array_equal(decode(message), bits)


def test_golden_bytes():
    message = encode(np.array([[1, -1]], np.int32))
    assert message.SerializeToString() == b"\x08\x04\x12\x02\x01\x02\x1a\x08\x01\x00\x00\x00\xff\xff\xff\xff"


def test_other_dtypes_are_refused():
    with pytest.raises(TypeError, match="float64"):
        encode(np.zeros(3))
    with pytest.raises(TypeError, match="bfloat16"):
        encode(np.zeros(3, np.float32), bfloat16=True)


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (pb.Tensor(dtype=pb.DTYPE_INT32, shape=[3], data=b"\0" * 8), "8 bytes do not fill"),
        (pb.Tensor(dtype=pb.DTYPE_UNSPECIFIED, shape=[1], data=b"\0"), "dtype 0"),
        (pb.Tensor(dtype=99, shape=[1], data=b"\0"), "dtype 99"),
        (pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[2**31, 2**31], data=b""), "do not fill"),
    ],
)
def test_damaged_tensors_are_refused_by_name(message, says):
    with pytest.raises(CorruptFrame, match=says) as caught:
        decode(message, "frame.logits")
    assert caught.value.field == "frame.logits"


def a_frame() -> pb.SignalFrame:
    return pb.SignalFrame(
        frame_index=1,
        position_start=2,
        position_count=2,
        last=True,
        sequence_digest=sequence_digest(np.array([5, 6, 7, 8], np.int32)),
        kind=pb.SIGNAL_KIND_HIDDEN,
        hidden=encode(np.arange(6, dtype=np.uint16).reshape(2, 3), bfloat16=True),
    )


def test_checksum_is_what_the_docstring_says():
    frame = a_frame()
    crc = zlib.crc32(struct.pack("<IIIBQI", 1, 2, 2, True, frame.sequence_digest, pb.SIGNAL_KIND_HIDDEN))
    for _ in range(4):
        crc = zlib.crc32(b"\0\0", crc)
    crc = zlib.crc32(struct.pack("<BBII", pb.DTYPE_BFLOAT16, 2, 2, 3) + np.arange(6, dtype="<u2").tobytes(), crc)
    assert frame_checksum(frame) == crc


@pytest.mark.parametrize(
    "change",
    [
        lambda f: setattr(f, "frame_index", 2),
        lambda f: setattr(f, "position_start", 3),
        lambda f: setattr(f, "last", False),
        lambda f: setattr(f, "sequence_digest", 1),
        lambda f: setattr(f, "kind", pb.SIGNAL_KIND_TOPK),
        lambda f: setattr(f.hidden, "dtype", pb.DTYPE_UINT16),
        lambda f: f.hidden.shape.__setitem__(slice(None), [3, 2]),
        lambda f: setattr(f.hidden, "data", b"\1" + f.hidden.data[1:]),
        lambda f: f.logits.CopyFrom(encode(np.zeros((2, 1), np.float32))),
    ],
)
def test_checksum_sees_every_field(change):
    frame = a_frame()
    before = frame_checksum(frame)
    change(frame)
    assert frame_checksum(frame) != before


def test_sequence_digest_tells_sequences_apart():
    digests = {sequence_digest(np.array(ids, np.int32)) for ids in ([1, 2], [2, 1], [1, 2, 0], [1], [])}
    assert len(digests) == 5
    assert all(0 <= digest < 2**64 for digest in digests)
