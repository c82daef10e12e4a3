"""From a configuration to a loaded teacher that has answered real requests."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from tutelage import identity
from tutelage.data.signal_store import teacher_key
from tutelage.errors import ConfigurationError, DataError
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.runtime import vllm_api
from tutelage.teacher_server.config import TeacherConfig
from tutelage.teacher_server.engine import vllm as vllm_engine
from tutelage.teacher_server.engine.base import GenerationEngine, ScoringEngine
from tutelage.teacher_server.engine.lora_adapters import read_adapters
from tutelage.teacher_server.model.head_check import check_head, load_unembedding
from tutelage.teacher_server.model.self_check import COMPARED_TEXT, check_sequences
from tutelage.teacher_server.model.teacher import Teacher, adapted_parts, generation_queue, scoring_parts
from tutelage.teacher_server.signals.logit_head import (
    CHUNK_LOGITS_BYTES,
    COPIES_OF_LOGITS,
    SignalHead,
    use_bfloat16_products,
)
from tutelage.teacher_server.signals.store import SignalStore

logger = logging.getLogger(__name__)

_ROLES = {"score": pb.TEACHER_ROLE_SCORE, "write": pb.TEACHER_ROLE_WRITE}
DEFAULT_SEQUENCE_TOKENS = 2048
# No pickles (`*.bin`, `*.pt`), which run what is in them when they are loaded.
_NEEDED_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


@dataclass(frozen=True)
class Checkpoint:
    """A teacher's files, and what was read from them."""

    folder: Path
    weights_digest: str
    tokenizer_digests: dict[str, str]
    chat_template_digest: str
    end_token_ids: list[int]
    vocabulary_size: int
    hidden_size: int
    max_model_len: int
    """Longest sequence that is served."""


def find_checkpoint(model: str, revision: str | None) -> Path:
    """The directory of a model, downloaded from the hub if `model` is no directory.

    Raises:
        ConfigurationError: neither a directory nor a model that the hub gives us.

    """
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_NEEDED_FILES))
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{model!r} is no directory, and the hub does not give it: {error}", "model"
        ) from error


def read_checkpoint(folder: Path, config: TeacherConfig) -> Checkpoint:
    """Digests and sizes of a checkpoint.

    Raises:
        ConfigurationError: the model is shorter than `max_model_len`.
        DataError: tokenizer, weights or configuration are missing, or cannot be read.

    """
    digests = identity.tokenizer_digests(folder)
    sizes = _text_config(folder)
    # Some models have no limit of their own; then `max_position_embeddings` is not there, or None.
    longest, wanted = getattr(sizes, "max_position_embeddings", None), config.max_model_len
    if wanted is not None and longest is not None and wanted > longest:
        raise ConfigurationError(f"{wanted} tokens are more than the model's {longest}", "max_model_len")
    own = longest or DEFAULT_SEQUENCE_TOKENS
    return Checkpoint(
        folder=folder,
        weights_digest=_weights_digest(folder, config),
        tokenizer_digests=digests,
        chat_template_digest=identity.chat_template_digest(folder),
        end_token_ids=identity.end_token_ids(folder),
        vocabulary_size=identity.vocabulary_size(folder),
        hidden_size=sizes.hidden_size,
        max_model_len=wanted or (own if config.length_fits_the_cache else min(own, DEFAULT_SEQUENCE_TOKENS)),
    )


def _weights_digest(folder: Path, config: TeacherConfig) -> str:
    """Of the files; and of what makes another teacher of them, such as being quantized when they are loaded."""
    digest, others = identity.weights_digest(folder), config.other_numbers
    return hashlib.sha256(f"{digest} {json.dumps(others, sort_keys=True)}".encode()).hexdigest() if others else digest


def _text_config(folder: Path) -> Any:
    """What `config.json` says of the model's text part: the one place where a teacher's sizes are read.

    transformers knows where a type of model keeps them (`text_config`, `llm_config`) and what it calls them (`n_embd`).

    Raises:
        DataError: it does not know that type, or the file is no configuration.

    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder).get_text_config(decoder=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # the last three for odd JSON
        raise DataError(f"transformers cannot read {folder / 'config.json'}: {error}", "model") from error


def load_teacher(config: TeacherConfig, instance_id: str, started_at_seconds: float) -> Teacher:
    """Reads the checkpoint and starts the engines: a minute or more, to be run outside the event loop.

    Sets how torch computes in this process, which is the teacher's alone.

    Raises:
        ConfigurationError: vLLM is not installed, or does not start with this configuration.
        NotServed: the model's logits are more than its head with a bias, a scale and a softcap.
        DataError: files of the checkpoint are missing.

    """
    vllm_api.require_vllm()
    vllm_engine.prepare_environment(config)
    # Before the checkpoint is read, which may take minutes.
    logger.info("importing vLLM %s", vllm_api.statement())
    vllm_api.require_conforming()
    vllm_api.parsed_arguments(config.engine_arguments)
    import torch

    adapters = read_adapters(config)  # to refuse them before the minute that an engine takes
    logger.info("reading %s", config.model)
    checkpoint = read_checkpoint(find_checkpoint(config.model, config.revision), config)
    texts = check_sequences(checkpoint.folder, checkpoint.max_model_len)
    head = load_head(checkpoint, config) if "score" in config.roles else None
    own_logits = None if head is None else check_head(checkpoint.folder, head, texts[COMPARED_TEXT])
    torch.set_num_threads(1)  # each head thread computes alone; more would fight the engine for its cores
    use_bfloat16_products()  # not before the model's own code has computed in float32, for the comparison
    info = describe(checkpoint, config, head)
    info.instance_id, info.started_at_seconds, info.engine = instance_id, started_at_seconds, vllm_engine.version()
    infos = {"": info}
    for adapter in adapters:
        infos[adapter.name] = of_adapter = pb.GetTeacherInfoResponse()
        of_adapter.CopyFrom(info)
        of_adapter.model_name = f"{info.model_name}@{adapter.name}"
        of_adapter.weights_digest = adapter.weights_digest(info.weights_digest)
    # Before the engines are started, so that a store that is refused is so at once.
    stores = {name: _open_store(config, each) for name, each in infos.items()} if head else {}
    logger.info("starting vLLM to %s, in %s", " and to ".join(config.roles), config.dtype)
    engines = vllm_engine.start_engines(checkpoint.folder, config, checkpoint.max_model_len)
    longest = min(checkpoint.max_model_len, *(engine.max_model_len for engine in engines.values()))
    if longest < checkpoint.max_model_len:
        logger.warning(
            "sequences of at most %d tokens: the key-value cache holds no more, the model would take %d",
            longest,
            checkpoint.max_model_len,
        )
    for each in infos.values():
        each.limits.max_sequence_tokens = longest
    scoring = None
    if head is not None:
        engine = cast(ScoringEngine, engines["score"])
        if engine.block_tokens:
            cache = pb.PrefixCache(
                block_tokens=engine.block_tokens,
                capacity_tokens=engine.cache_tokens,
                isolated=config.isolate_students,
            )
            for each in infos.values():
                each.prefix_cache.CopyFrom(cache)
        scoring = scoring_parts(engine, head, config, stores[""])
    generation = cast(GenerationEngine | None, engines.get("write"))
    base = Teacher(info, scoring, generation, generation_queue(config), texts, own_logits)
    with_adapters = {}
    for adapter in adapters:
        scoring = generation = None
        if base.scoring is not None:
            lora_engine = vllm_engine.LoraScoringEngine(base.scoring.engine, adapter)
            scoring = adapted_parts(base.scoring, lora_engine, stores[adapter.name])
        if base.generation is not None:
            generation = vllm_engine.LoraGenerationEngine(base.generation, adapter)
        parts = replace(base, scoring=scoring, generation=generation, own_logits=None)
        with_adapters[adapter.name] = replace(parts, info=infos[adapter.name])
    return replace(base, adapters=with_adapters)


def _open_store(config: TeacherConfig, info: pb.GetTeacherInfoResponse) -> SignalStore | None:
    if config.store is None:
        return None
    key = teacher_key(info.weights_digest, info.dtype, info.engine)
    store = SignalStore(config.store.path, key, config.store.bytes, shrink=config.store.shrink)
    logger.info("%d blocks of hidden states (%.1f MiB) are stored", len(store), store.bytes / 2**20)
    return store


def load_head(checkpoint: Checkpoint, config: TeacherConfig) -> SignalHead:
    """The signal head of a checkpoint, on the device that the configuration names."""
    import torch

    device = config.head_device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chunk_bytes = min(CHUNK_LOGITS_BYTES, config.head_mib * 2**20 // (config.head_threads * COPIES_OF_LOGITS))
    head = load_unembedding(checkpoint.folder, checkpoint.vocabulary_size)
    return SignalHead(head, device=device, chunk_bytes=chunk_bytes)


def describe(checkpoint: Checkpoint, config: TeacherConfig, head: SignalHead | None) -> pb.GetTeacherInfoResponse:
    """Who the teacher is and what it serves; what is measured or drawn at start is filled in later."""
    import torch

    info = pb.GetTeacherInfoResponse(
        model_name=config.served_name,
        weights_digest=checkpoint.weights_digest,
        tokenizer_digests=checkpoint.tokenizer_digests,
        chat_template_digest=checkpoint.chat_template_digest,
        end_token_ids=checkpoint.end_token_ids,
        vocabulary_size=checkpoint.vocabulary_size,
        hidden_size=checkpoint.hidden_size,
        dtype=config.dtype,
        limits=pb.Limits(
            max_sequence_tokens=checkpoint.max_model_len,
            max_k=min(config.max_k, checkpoint.vocabulary_size),
            max_temperatures=config.max_temperatures,
            max_samples=config.max_samples,
            max_requests_in_flight=config.max_requests_in_flight,
            frame_bytes=config.frame_bytes,
        ),
        roles=[_ROLES[role] for role in config.roles],
    )
    if head is not None:
        info.kinds.extend([pb.SIGNAL_KIND_TOPK, pb.SIGNAL_KIND_CANDIDATES, pb.SIGNAL_KIND_HIDDEN])
        matrix = head.unembedding
        info.unembedding.CopyFrom(
            pb.Unembedding(
                rows=head.vocabulary_size,
                columns=head.hidden_size,
                dtype=pb.DTYPE_BFLOAT16 if matrix.weight_VD.dtype == torch.bfloat16 else pb.DTYPE_FLOAT32,
                digest=matrix.digest,
                has_bias=matrix.bias_V is not None,
                logit_scale=matrix.scale,
                logit_softcap=matrix.softcap,
            )
        )
    return info
