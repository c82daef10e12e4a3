"""Which engine goes by which name."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from tutelage.errors import CheckpointError, ConfigurationError
from tutelage.evaluator.config import Dtype, EngineName
from tutelage.evaluator.models.base import Engine
from tutelage.evaluator.models.transformers_engine import TransformersEngine
from tutelage.evaluator.models.vllm_engine import VllmEngine

_logger = logging.getLogger(__name__)


def open_engine(name: EngineName, checkpoint: Path, *, dtype: Dtype, batch_size: int) -> Engine:
    """Loads a checkpoint.

    Raises:
        CheckpointError: it does not load.
        ConfigurationError: its engine is not installed.

    """
    kind: type[VllmEngine] | type[TransformersEngine] = VllmEngine if name == "vllm" else TransformersEngine
    started = time.perf_counter()
    try:
        engine = kind(checkpoint, dtype=dtype, batch_size=batch_size)
    except ConfigurationError:  # which is a ValueError, and no fault of the checkpoint
        raise
    except (
        Exception
    ) as error:  # whatever transformers, tokenizers and safetensors raise for files that they do not take
        raise not_loading(checkpoint, error) from error
    _logger.info("loaded %s with %s in %.1f s", checkpoint, name, time.perf_counter() - started)
    return engine


def not_loading(checkpoint: Path, error: Exception) -> CheckpointError:
    """What transformers says of a checkpoint that it does not load, in one line."""
    reason = " ".join(str(error).split()) or repr(error)
    if "trust_remote_code" in reason:
        reason = "it brings code of its own, which is not run; give a model of an architecture that transformers has"
    return CheckpointError(f"{checkpoint} does not load as a causal language model: {reason}", "checkpoint")
