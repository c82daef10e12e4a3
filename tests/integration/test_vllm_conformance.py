"""The installed vLLM has all that is used of it, and reads engine arguments as its own command line does."""

from __future__ import annotations

import pytest

from tutelage.errors import ConfigurationError
from tutelage.runtime import vllm_api
from tutelage.teacher_server.config import REFUSED


def test_nothing_is_missing():
    assert vllm_api.differences() == []


@pytest.mark.parametrize(
    ("path", "arguments", "said"),
    [
        ("LLM.enqueue", ("prompts", "mood"), "LLM.enqueue takes no mood"),
        ("LLM.sing", (), "LLM.sing is not there"),
        ("AsyncEngineArgs", ("runner", "walker"), "AsyncEngineArgs takes no walker"),
        ("PoolingParams", ("task", "chore"), "PoolingParams takes no chore"),
    ],
)
def test_what_is_missing_is_named(path, arguments, said, monkeypatch):
    monkeypatch.setattr(vllm_api, "_USED", {path: arguments})
    (found,) = vllm_api.differences()
    assert said in found


def test_arguments_are_read_by_vllm_itself():
    given = {"tensor_parallel_size": "2", "kv_cache_memory_bytes": "1G", "enable_expert_parallel": True, "seed": 7}
    given |= {"cudagraph_capture_sizes": [1, 2], "hf_overrides": {"rope_theta": 1.0}, "quantization": "fp8"}
    assert vllm_api.parsed_arguments(given) == given | {"tensor_parallel_size": 2, "kv_cache_memory_bytes": 2**30}


@pytest.mark.parametrize(("name", "value"), [("tensor_parallel_size", "many"), ("kv_cache_dtype", "fp9")])
def test_a_value_that_vllm_refuses_is_refused_with_its_name(name, value):
    with pytest.raises(ConfigurationError, match=f"{name}: vLLM refuses"):
        vllm_api.parsed_arguments({name: value})


def test_all_that_is_refused_is_an_argument_of_vllms():
    assert set(REFUSED) <= vllm_api.engine_arguments().keys()
