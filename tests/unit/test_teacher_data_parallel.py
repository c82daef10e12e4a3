"""Several engines as one: who gets a sequence, and what the death of one means."""

from __future__ import annotations

import asyncio
import sys
from types import SimpleNamespace

import pytest
import torch

from tutelage.errors import ConfigurationError
from tutelage.teacher_server.config import TeacherConfig
from tutelage.teacher_server.engine import vllm as vllm_engine
from tutelage.teacher_server.engine.base import ComputedStates
from tutelage.teacher_server.engine.cpu_affinity import cores_of, shares_of
from tutelage.teacher_server.engine.data_parallel import DataParallelScoringEngine


class Engine:
    """Notes what it was given, and answers when it is told to."""

    block_tokens, cache_tokens, batch_tokens = 4, 10_000, 512

    def __init__(self) -> None:
        self.dead, self.given, self.adapters, self.may_answer = False, [], [], asyncio.Event()

    async def hidden_states(self, token_ids, first, salt, adapter):
        self.given.append(len(token_ids))
        self.adapters.append(adapter)
        await self.may_answer.wait()
        return ComputedStates(torch.tensor(token_ids), 0, len(token_ids))

    def shutdown(self) -> None:
        self.dead = True


@pytest.fixture
def engines():
    return [Engine(), Engine(), Engine()]


async def asked(replicas, lengths, adapter=None):
    """Tasks that have reached their engines."""
    tasks = [asyncio.create_task(replicas.hidden_states([7] * length, adapter=adapter)) for length in lengths]
    await asyncio.sleep(0)
    return tasks


async def test_a_sequence_goes_to_the_engine_with_the_fewest_tokens_to_do(engines):
    replicas = DataParallelScoringEngine(engines)
    await asked(replicas, [10, 3, 4, 2, 1, 1])
    assert [engine.given for engine in engines] == [[10], [3, 2, 1], [4, 1]]
    engines[0].may_answer.set()
    await asyncio.sleep(0)
    await asked(replicas, [9])
    assert engines[0].given == [10, 9]


async def test_each_idle_engine_gets_one_of_the_first_sequences(engines):
    replicas = DataParallelScoringEngine(engines)
    for engine in engines:
        engine.may_answer.set()
    for length in (8, 24, 64):
        assert len((await replicas.hidden_states([7] * length)).states_RD) == length
    assert [engine.given for engine in engines] == [[8], [24], [64]]


async def test_what_was_cancelled_no_longer_counts(engines):
    replicas = DataParallelScoringEngine(engines)
    long, *_ = await asked(replicas, [100, 5, 5])
    long.cancel()
    await asyncio.gather(long, return_exceptions=True)
    await asked(replicas, [50])
    assert engines[0].given == [100, 50]


async def test_the_adapter_is_passed_on(engines):
    await asked(DataParallelScoringEngine(engines), [1, 1], adapter=SimpleNamespace(name="chemistry"))
    assert [[adapter.name for adapter in engine.adapters] for engine in engines] == [["chemistry"], ["chemistry"], []]


async def test_a_prefix_stays_with_the_engine_that_has_it_unless_that_is_far_behind(engines):
    replicas, prompt = DataParallelScoringEngine(engines), list(range(40))

    async def ask(token_ids, first):
        task = asyncio.create_task(replicas.hidden_states(token_ids, first))
        await asyncio.sleep(0)
        return task

    await ask([99] * 60, 0)
    await ask(prompt, 0)
    await ask([98] * 70, 0)
    for completion in range(8):
        await ask([*prompt, completion, 1, 2, 3], 40)
    assert [len(engine.given) for engine in engines] == [1, 9, 1]
    await ask([*prompt, 9, 1, 2, 3], 20)  # 24 tokens to do behind 72, or 44 behind 60
    assert [len(engine.given) for engine in engines] == [1, 10, 1]
    await ask([*prompt, 10, 1, 2, 3], 20)
    assert [len(engine.given) for engine in engines] == [2, 10, 1]


async def test_one_that_is_dead_is_the_end_and_all_are_shut_down(engines):
    replicas = DataParallelScoringEngine(engines)
    assert not replicas.dead
    engines[1].dead = True
    assert replicas.dead
    replicas.shutdown()
    assert all(engine.dead for engine in engines)


@pytest.mark.parametrize(
    ("cores", "engines", "expected"),
    [([0, 1], 1, [[0, 1]]), ([0, 1], 2, [[0], [1]]), ([2, 3, 4, 5, 6], 2, [[2, 3], [4, 5, 6]]), ([9], 1, [[9]])],
)
def test_each_engine_has_its_share_of_the_cores(cores, engines, expected):
    assert shares_of(cores, engines) == expected


def test_more_engines_than_cores_are_refused():
    with pytest.raises(ConfigurationError, match="2 cores for 3 processes"):
        shares_of([0, 1], 3)


def test_several_engines_share_all_cores_with_the_head():
    assert cores_of("score", TeacherConfig(model="tiny", score_engines=2), [0, 1, 2, 3]) == [0, 1, 2, 3]


def test_several_engines_are_for_a_cpu(monkeypatch, tmp_path):
    gpu = SimpleNamespace(current_platform=SimpleNamespace(is_cpu=lambda: False))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(platforms=gpu))
    monkeypatch.setitem(sys.modules, "vllm.platforms", gpu)
    with pytest.raises(ConfigurationError, match="score_engines: given 2, allowed: 1, except on a CPU"):
        vllm_engine.start_engines(tmp_path, TeacherConfig(model="tiny", score_engines=2), 512)
