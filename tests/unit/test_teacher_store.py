"""The store of hidden states: what it gives back, what it forgets, what it refuses to believe."""

from __future__ import annotations

import os
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import booleans, data, integers, lists
from safetensors.torch import save

from tutelage.data.signal_store import Prefixes, digest, sequence_key
from tutelage.errors import ConfigurationError
from tutelage.teacher_server.signals.store import SignalStore

SIZE = 16
EMBEDDINGS = torch.randn(1000, SIZE, generator=torch.Generator().manual_seed(0))


def states(tokens: list[int]) -> torch.Tensor:
    """As a causal model's: what comes after a token does not change its row."""
    return EMBEDDINGS[tokens].cumsum(0).bfloat16()


@pytest.fixture
def store(tmp_path):
    store = SignalStore(tmp_path, "teacher", 10**6)
    yield store
    store.close()


def test_what_is_put_is_given_back_bit_for_bit_also_after_a_restart(store, tmp_path):
    sequences = [[1], [1, 2], [2, 1], list(range(500))]
    for tokens in sequences:
        store.put(Prefixes(tokens), states(tokens))
    store.close()
    again = SignalStore(tmp_path, "teacher", 10**6)
    assert (len(again), again.bytes) == (3 + 500 // 64 + 1, store.bytes)
    for tokens in sequences:
        assert torch.equal(again.get(Prefixes(tokens)), states(tokens))


def test_sequences_that_begin_alike_keep_the_beginning_once(store):
    prompt = list(range(600))
    for completion in range(8):
        store.put(Prefixes([*prompt, *[completion] * 40]), states([*prompt, *[completion] * 40]))
    assert len(store) == 600 // 64 + 8
    for completion in range(8):
        sequence = [*prompt, *[completion] * 40]
        assert torch.equal(store.get(Prefixes(sequence)), states(sequence))
        assert torch.equal(store.get(Prefixes(sequence), 599, 639), states(sequence)[599:639])


def test_a_sequence_that_grew_adds_its_growth(store):
    sequence, tokens, rng = list(range(500)), 0, random.Random(0)
    while tokens < len(sequence):
        before, tokens = tokens, min(len(sequence), tokens + rng.randrange(1, 50))
        stored = store.bytes
        store.put(Prefixes(sequence[:tokens]), states(sequence[:tokens]))
        rows = tokens - before
        assert rows * (2 * SIZE + 4) < store.bytes - stored <= rows * (2 * SIZE + 4) + 256 * (rows // 64 + 2)
    assert torch.equal(store.get(Prefixes(sequence)), states(sequence))


def test_what_lies_behind_a_gap_is_given_to_who_wants_no_more(store):
    """A request that scores from position 300 on has nothing before it computed."""
    sequence = list(range(400))
    store.put(Prefixes(sequence), states(sequence)[290:], 290)
    assert store.get(Prefixes(sequence)) is None
    assert store.get(Prefixes(sequence), 289, 400) is None
    assert torch.equal(store.get(Prefixes(sequence), 290, 395), states(sequence)[290:395])
    assert Prefixes(sequence) not in store
    store.put(Prefixes(sequence), states(sequence))
    assert torch.equal(store.get(Prefixes(sequence)), states(sequence))


def test_a_longer_sequence_gets_as_far_as_a_shorter_one_goes(store):
    store.put(Prefixes(range(100)), states(list(range(100))))
    found = store.get(Prefixes([*range(100), 7, 8, 9]), 10)
    assert torch.equal(found, states(list(range(100)))[10:])
    found = store.get(Prefixes([*range(90), 500, 501]), 10)  # it shares the whole blocks
    assert torch.equal(found, states(list(range(100)))[10:64])


@settings(max_examples=60, deadline=None)
@given(data())
def test_whatever_was_put_what_is_given_is_right(tmp_path_factory, data):
    """Sequences over two ids share beginnings of all lengths; the store is too small for all of them."""
    store = SignalStore(tmp_path_factory.mktemp("store"), "teacher", 30_000)
    for _ in range(12):
        sequence = data.draw(lists(integers(0, 1), min_size=1, max_size=4)) * data.draw(integers(1, 60))
        start = data.draw(integers(0, len(sequence) - 1))
        if data.draw(booleans()):
            store.put(Prefixes(sequence), states(sequence)[start:], start)
        end = data.draw(integers(start + 1, len(sequence)))
        found = store.get(Prefixes(sequence), start, end)
        assert found is None or torch.equal(found, states(sequence)[start : start + len(found)])
        assert found is None or len(found) <= end - start
        assert store.bytes <= 30_000
    assert sum(path.stat().st_size for path in store._folder.glob("*.safetensors")) == store.bytes
    store.close()


def test_a_store_of_whole_sequences_is_read_and_added_to(tmp_path):
    """As it was written when a sequence was one file, whatever its length."""
    old = list(range(300))
    (tmp_path / "teacher").mkdir()
    tensors = {"states": states(old), "token_ids": torch.tensor(old, dtype=torch.int32)}
    checksum = digest(tensors["states"].view(torch.uint16).numpy(), tensors["token_ids"].numpy())
    content = save(tensors, metadata={"sha256": checksum})
    (tmp_path / "teacher" / f"{sequence_key(old)}.safetensors").write_bytes(content)
    store = SignalStore(tmp_path, "teacher", 10**6)
    assert torch.equal(store.get(Prefixes(old)), states(old))
    grown = [*old, 7, 8]
    store.put(Prefixes(grown), states(grown))
    assert store.bytes < len(content) + 2 * (2 * SIZE + 4) + 256
    assert torch.equal(store.get(Prefixes(grown)), states(grown))


def test_what_was_used_longest_ago_goes_first(tmp_path):
    sequences = [[number] * 60 for number in range(10)]
    probe = SignalStore(tmp_path / "probe", "teacher", 10**6)
    probe.put(Prefixes(sequences[0]), states(sequences[0]))
    room = 3 * probe.bytes
    store = SignalStore(tmp_path, "teacher", room)
    for tokens in sequences[:3]:
        store.put(Prefixes(tokens), states(tokens))
    assert store.get(Prefixes(sequences[0])) is not None
    store.put(Prefixes(sequences[3]), states(sequences[3]))
    assert [store.get(Prefixes(tokens)) is not None for tokens in sequences[:4]] == [True, False, True, True]
    for tokens in sequences:
        store.put(Prefixes(tokens), states(tokens))
        assert store.bytes <= room
    assert sum(path.stat().st_size for path in tmp_path.glob("teacher/*.safetensors")) == store.bytes


def test_the_order_of_use_outlives_a_restart(tmp_path):
    store = SignalStore(tmp_path, "teacher", 10**6)
    for number in range(3):
        store.put(Prefixes([number] * 60), states([number] * 60))
        os.utime(tmp_path / "teacher" / f"{sequence_key([number] * 60)}.safetensors", (number, number))
    assert store.get(Prefixes([0] * 60)) is not None
    store.close()
    smaller = SignalStore(tmp_path, "teacher", store.bytes - 1, shrink=True)
    assert [smaller.get(Prefixes([number] * 60)) is not None for number in range(3)] == [True, False, True]


def test_a_store_of_another_process_is_refused(store, tmp_path):
    with pytest.raises(ConfigurationError, match="in use by another teacher"):
        SignalStore(tmp_path, "teacher", 10**6)


def test_a_damaged_file_is_never_served(store, tmp_path, caplog):
    rng, tokens = random.Random(0), [7, 8, 9]
    store.put(Prefixes(tokens), states(tokens))
    (path,) = tmp_path.glob("teacher/*.safetensors")
    good = path.read_bytes()
    for attempt in range(300):
        position = rng.randrange(len(good))
        damaged = bytearray(good)
        damaged[position] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged if attempt % 3 else good[:position])
        found = store.get(Prefixes(tokens))
        # A flip in the header's padding changes nothing that matters.
        assert found is None or torch.equal(found, states(tokens))
        if found is None:
            assert not path.exists()
            store.put(Prefixes(tokens), states(tokens))
    assert "will be computed again" in caplog.text
    assert store.bytes == len(good)


def test_a_file_under_another_name_is_not_believed(store, tmp_path):
    store.put(Prefixes([1, 2]), states([1, 2]))
    (one,) = tmp_path.glob("teacher/*.safetensors")
    store.put(Prefixes([3, 4]), states([3, 4]))
    (other,) = set(tmp_path.glob("teacher/*.safetensors")) - {one}
    other.write_bytes(one.read_bytes())
    assert store.get(Prefixes([3, 4])) is None
    assert torch.equal(store.get(Prefixes([1, 2])), states([1, 2]))


def test_a_smaller_limit_is_refused_and_deletes_nothing(store, tmp_path):
    for number in range(20):
        store.put(Prefixes([number] * 60), states([number] * 60))
    store.close()
    with pytest.raises(ConfigurationError, match=rf"store\.bytes: .*1,000 bytes.*{store.bytes:,}"):
        SignalStore(tmp_path, "teacher", 1000)
    again = SignalStore(tmp_path, "teacher", store.bytes)
    assert len(again) == len(list(tmp_path.glob("teacher/*.safetensors"))) == 20


def test_a_refused_store_is_free_for_who_asks_rightly(store, tmp_path):
    store.put(Prefixes([1] * 60), states([1] * 60))
    store.close()
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=r"store\.shrink"):
            SignalStore(tmp_path, "teacher", 1000)


def test_a_sequence_larger_than_the_store_costs_the_others_nothing(tmp_path, caplog):
    store = SignalStore(tmp_path, "teacher", 5000)
    store.put(Prefixes([1, 2]), states([1, 2]))
    store.put(Prefixes([3] * 500), states([3] * 500))
    assert [Prefixes(tokens) in store for tokens in ([1, 2], [3] * 500)] == [True, False]
    assert len(list(tmp_path.glob("teacher/*.safetensors"))) == 1
    assert "store.bytes" in caplog.text


def test_a_file_that_cannot_be_read_just_now_is_kept(store, monkeypatch, caplog):
    store.put(Prefixes([7, 8]), states([7, 8]))
    with monkeypatch.context() as patched:

        def too_many_files(*_):
            raise OSError(24, "Too many open files")

        patched.setattr("tutelage.teacher_server.signals.store.read_block", too_many_files)
        assert store.get(Prefixes([7, 8])) is None
    assert "Too many open files" in caplog.text
    assert torch.equal(store.get(Prefixes([7, 8])), states([7, 8]))
