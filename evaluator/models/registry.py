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
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint} does not load as a causal language model: {error}", "checkpoint"
        ) from error
    _logger.info("loaded %s with %s in %.1f s", checkpoint, name, time.perf_counter() - started)
    return engine
