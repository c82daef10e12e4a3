"""The store of hidden states: what it gives back, what it forgets, what it refuses to believe."""

from __future__ import annotations

import os
import random

import pytest
import torch

from tutelage.errors import ConfigurationError
from tutelage.teacher_server.signals.store import SignalStore

SIZE = 16


def states(tokens: list[int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(tokens))
    return torch.randn(len(tokens), SIZE, generator=generator).bfloat16()


@pytest.fixture
def store(tmp_path):
    store = SignalStore(tmp_path, "teacher", 10**6)
    yield store
    store.close()


def test_what_is_put_is_given_back_bit_for_bit_also_after_a_restart(store, tmp_path):
    sequences = [[1], [1, 2], [2, 1], list(range(500))]
    for tokens in sequences:
        assert store.get(tokens) is None
        store.put(tokens, states(tokens))
    store.close()
    again = SignalStore(tmp_path, "teacher", 10**6)
    assert (len(again), again.bytes) == (4, store.bytes)
    for tokens in sequences:
        assert torch.equal(again.get(tokens), states(tokens))


def test_what_was_used_longest_ago_goes_first(tmp_path):
    sequences = [[number] * 100 for number in range(10)]
    probe = SignalStore(tmp_path / "probe", "teacher", 10**6)
    probe.put(sequences[0], states(sequences[0]))
    room = 3 * probe.bytes
    store = SignalStore(tmp_path, "teacher", room)
    for tokens in sequences[:3]:
        store.put(tokens, states(tokens))
    assert store.get(sequences[0]) is not None
    store.put(sequences[3], states(sequences[3]))
    assert [store.get(tokens) is not None for tokens in sequences[:4]] == [True, False, True, True]
    for tokens in sequences:
        store.put(tokens, states(tokens))
        assert store.bytes <= room
    assert sum(path.stat().st_size for path in tmp_path.glob("teacher/*.safetensors")) == store.bytes


def test_the_order_of_use_outlives_a_restart(tmp_path):
    store = SignalStore(tmp_path, "teacher", 10**6)
    for number in range(3):
        store.put([number] * 100, states([number] * 100))
        os.utime(store._path(next(reversed(store._sizes))), (number, number))
    assert store.get([0] * 100) is not None
    store.close()
    smaller = SignalStore(tmp_path, "teacher", store.bytes - 1, shrink=True)
    assert [smaller.get([number] * 100) is not None for number in range(3)] == [True, False, True]


def test_a_store_of_another_process_is_refused(store, tmp_path):
    with pytest.raises(ConfigurationError, match="in use by another teacher"):
        SignalStore(tmp_path, "teacher", 10**6)


def test_a_damaged_file_is_never_served(store, tmp_path, caplog):
    rng, tokens = random.Random(0), [7, 8, 9]
    store.put(tokens, states(tokens))
    (path,) = tmp_path.glob("teacher/*.safetensors")
    good = path.read_bytes()
    for attempt in range(300):
        position = rng.randrange(len(good))
        damaged = bytearray(good)
        damaged[position] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged if attempt % 3 else good[:position])
        found = store.get(tokens)
        # A flip in the header's padding changes nothing that matters.
        assert found is None or torch.equal(found, states(tokens))
        if found is None:
            assert not path.exists()
            store.put(tokens, states(tokens))
    assert "will be computed again" in caplog.text
    assert store.bytes == len(good)


def test_a_file_under_another_name_is_not_believed(store, tmp_path):
    store.put([1, 2], states([1, 2]))
    (one,) = tmp_path.glob("teacher/*.safetensors")
    store.put([3, 4], states([3, 4]))
    (other,) = set(tmp_path.glob("teacher/*.safetensors")) - {one}
    other.write_bytes(one.read_bytes())
    assert store.get([3, 4]) is None
    assert torch.equal(store.get([1, 2]), states([1, 2]))


def test_a_smaller_limit_is_refused_and_deletes_nothing(store, tmp_path):
    for number in range(20):
        store.put([number] * 100, states([number] * 100))
    store.close()
    with pytest.raises(ConfigurationError, match=rf"store\.bytes: .*1,000 bytes.*{store.bytes:,}"):
        SignalStore(tmp_path, "teacher", 1000)
    again = SignalStore(tmp_path, "teacher", store.bytes)
    assert len(again) == len(list(tmp_path.glob("teacher/*.safetensors"))) == 20


def test_a_refused_store_is_free_for_who_asks_rightly(store, tmp_path):
    store.put([1] * 100, states([1] * 100))
    store.close()
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=r"store\.shrink"):
            SignalStore(tmp_path, "teacher", 1000)


def test_a_sequence_larger_than_the_store_costs_the_others_nothing(tmp_path, caplog):
    store = SignalStore(tmp_path, "teacher", 5000)
    store.put([1, 2], states([1, 2]))
    store.put([3] * 500, states([3] * 500))
    assert [tokens in store for tokens in ([1, 2], [3] * 500)] == [True, False]
    assert len(list(tmp_path.glob("teacher/*.safetensors"))) == 1
    assert "store.bytes" in caplog.text


def test_a_file_that_cannot_be_read_just_now_is_kept(store, monkeypatch, caplog):
    store.put([7, 8], states([7, 8]))
    with monkeypatch.context() as patched:

        def too_many_files(*_):
            raise OSError(24, "Too many open files")

        patched.setattr("tutelage.teacher_server.signals.store.read_states", too_many_files)
        assert store.get([7, 8]) is None
    assert "Too many open files" in caplog.text
    assert torch.equal(store.get([7, 8]), states([7, 8]))
