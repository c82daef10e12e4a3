"""One server, several teachers: each call is answered by the model that has the adapter it names."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fake_teacher import HIDDEN_SIZE, VOCABULARY_SIZE, FakeScoringEngine, fake_teacher, serving
from tutelage.config import validate
from tutelage.data.signal_store import Prefixes
from tutelage.errors import ConfigurationError, DataError, IdentityMismatch, NotServed
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.teacher_server.config import TeacherConfig
from tutelage.teacher_server.engine.lora_adapters import lora_rank, read_adapters
from tutelage.teacher_server.model import self_check
from tutelage.teacher_server.model.teacher import Teacher, adapted_parts
from tutelage.teacher_server.signals.store import SignalStore
from tutelage.trainer.data.sequences import TokenSequence
from tutelage.trainer.teacher.base import SignalSpec
from tutelage.trainer.teacher.grpc_client import TeacherClient

IDS = np.array([3, 1, 4, 1, 5], np.int32)
HIDDEN = SignalSpec("hidden")


def engine(seed: int) -> FakeScoringEngine:
    generator = torch.Generator().manual_seed(seed)
    return FakeScoringEngine(embeddings=torch.randn(VOCABULARY_SIZE, HIDDEN_SIZE, generator=generator))


def with_adapters(base: Teacher, **engines: FakeScoringEngine) -> Teacher:
    adapters = {}
    for name, each in engines.items():
        info = pb.GetTeacherInfoResponse()
        info.CopyFrom(base.info)
        info.model_name, info.weights_digest = f"fake@{name}", f"weights of {name}"
        adapters[name] = replace(base, info=info, scoring=adapted_parts(base.scoring, each, None))
    return replace(base, adapters=adapters)


def client(address: str, adapter: str | None = None, weights_digest: str = "") -> TeacherClient:
    values = {"student_id": "ann", "wait_seconds": 5, "tokenizer_digests": {}, "weights_digest": weights_digest}
    return TeacherClient(address, adapter=adapter, **values)


def ask(address: str) -> dict:
    answers = {}
    for adapter in (None, "maths", "law"):
        with client(address, adapter) as teacher:
            (signals,) = teacher.score([TokenSequence(IDS, 0, 5)], HIDDEN)
            answers[adapter] = teacher.identity, signals["hidden_RD"]
    return answers


async def test_each_call_is_answered_by_the_teacher_that_it_names():
    engines = {None: engine(1), "maths": engine(2), "law": engine(3)}
    teacher = with_adapters(fake_teacher(engines[None]), maths=engines["maths"], law=engines["law"])
    async with serving(teacher) as server:
        answers = await asyncio.to_thread(ask, server.address)
        assert server.servicer.usage().engine_passes == 3
        with pytest.raises(IdentityMismatch, match="this run began with"):
            await asyncio.to_thread(client, server.address, "law", "weights of maths")
        with pytest.raises(NotServed, match="'physics' is not served; served are: law, maths"):
            await asyncio.to_thread(client, server.address, "physics")
    for adapter, (identity, hidden_RD) in answers.items():
        expected = (await engines[adapter].hidden_states(IDS.tolist())).states_RD.view(torch.uint16).numpy()
        np.testing.assert_array_equal(hidden_RD, expected)
        assert identity.model_name == ("fake" if adapter is None else f"fake@{adapter}")


async def test_an_adapter_that_changes_nothing_is_refused():
    base = replace(fake_teacher(engine(1)), check_sequences=[[1, 2, 3], [4, 5]])
    await self_check.check(with_adapters(base, maths=engine(2)))
    with pytest.raises(NotServed, match=r"lora_modules\.maths: it changes nothing"):
        await self_check.check(with_adapters(base, maths=engine(1)))


def write_adapter(folder, **changes):
    folder.mkdir(exist_ok=True)
    settings = {"r": 8, "target_modules": ["q_proj"], "modules_to_save": None} | changes
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file({"a": torch.ones(2)}, folder / "adapter_model.safetensors")
    return folder


def read(**adapters):
    return read_adapters(validate(TeacherConfig, {"model": "m", "lora_modules": adapters}))


def test_adapters_are_known_by_their_files(tmp_path):
    one, other = write_adapter(tmp_path / "one"), write_adapter(tmp_path / "other", r=20)
    law, maths = read(maths=one, law=other)
    assert (law.name, law.number, law.rank, maths.name, maths.number) == ("law", 1, 20, "maths", 2)
    assert len({law.weights_digest("base"), maths.weights_digest("base"), maths.weights_digest("x"), "base"}) == 4
    assert read(again=write_adapter(tmp_path / "again"))[0].digest == maths.digest
    assert lora_rank([law, maths], (8, 16, 32)) == 32
    with pytest.raises(ConfigurationError, match="rank 20, at most 16"):
        lora_rank([law, maths], (8, 16))


def test_folders_that_are_no_adapters_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"lora_modules\.maths: .* is no LoRA adapter"):
        read(maths=tmp_path)
    pickled = write_adapter(tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(DataError, match=r"adapter_model\.safetensors"):
        read(maths=pickled)
    for changes in ({"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "embed_tokens"]}):
        with pytest.raises(NotServed, match="the head is the base model's"):
            read(maths=write_adapter(tmp_path / "head", **changes))
    with pytest.raises(ConfigurationError, match="is not a name"):
        read(**{"../x": tmp_path})


async def test_stores_of_adapters_are_apart(tmp_path):
    base = fake_teacher(engine(1))
    stores = {name: SignalStore(tmp_path, name, 10**6) for name in ("maths", "law")}
    adapters = {
        name: replace(base, scoring=adapted_parts(base.scoring, engine(index), store))
        for index, (name, store) in enumerate(stores.items())
    }
    usage = pb.StudentUsage(student_id="ann")
    for teacher in adapters.values():
        assert [len(piece) async for piece in teacher.scoring.states.of(IDS.tolist(), 0, len(IDS), usage)] == [len(IDS)]
    assert [len(store) for store in stores.values()] == [1, 1]
    assert not torch.equal(stores["maths"].get(Prefixes(IDS)), stores["law"].get(Prefixes(IDS)))
    for store in stores.values():
        store.close()
