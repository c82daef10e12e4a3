"""What every sampler is, and which one a student's configuration asks for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

from tutelage.trainer.config.student import StudentConfig
from tutelage.trainer.data.sequences import Completion, TokenIds
from tutelage.trainer.model.student import Student
from tutelage.trainer.rollout.student_copy import StudentCopy

_log = logging.getLogger(__name__)
# Of transformers' GenerationConfig: what changes the distribution that is drawn from.
_SAMPLING_SETTINGS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "sequence_bias",
    "min_length",
    "min_new_tokens",
)


OnPiece = Callable[[int, TokenIds], None]
"""Told, in whatever thread writes, an index of the step's batch and all ids of its completion that are written so far:
a few more each time, and all of them at last."""
_T = TypeVar("_T")


class Sampler(Protocol):
    """Writes a student's own sequences, in the student's process or elsewhere."""

    def write(
        self,
        step: int,
        indices: Sequence[int],
        prompts: Sequence[TokenIds],
        *,
        turn: int = 0,
        on_piece: OnPiece | None = None,
    ) -> Future[list[Completion]]:
        """One continuation a prompt, with the newest weights that the sampler has.

        In the student's process it is there on return; of a writer elsewhere it comes later, and the student steps
        meanwhile.

        Args:
            step: whose batch it is.
            indices: of the sequences in the step's batch; the same step, index and turn draw the same, whoever else
                is written for.
            prompts: token ids, none empty, one for each index.
            turn: how often they have been continued before, by those who write a sequence in several parts.
            on_piece: told what is written while it is.

        """

    def take_weights(self, version: int) -> None:
        """Has what is begun from now on written with the student's present weights.

        Args:
            version: steps that they have seen.

        """

    def close(self) -> None:
        """Writes nothing more."""


def done(result: _T) -> Future[_T]:
    """A future of what is there already."""
    future: Future[_T] = Future()
    future.set_result(result)
    return future


def ignored_settings(generation_config: Any) -> list[str]:
    """What a checkpoint's own generation configuration says about sampling beyond its end tokens, and is not used."""
    said = generation_config.to_diff_dict()
    return [f"{name} {said[name]}" for name in _SAMPLING_SETTINGS if name in said]


def open_sampler(config: StudentConfig, student: Student) -> Sampler:
    """What writes the student's sequences; no vLLM is started for one that never writes any.

    Raises:
        ConfigurationError: as `sampler_in_process` and `Writers`.

    """
    if config.objective.on_policy_fraction > 0:
        ignored = ignored_settings(student.model.generation_config)
        if ignored:
            _log.warning(
                "%s: its generation_config.json says %s, which no sample follows; `sampling` alone says how to write",
                *(config.init, ", ".join(ignored)),
            )
    if config.sampling.writers is not None:
        from tutelage.trainer.rollout.writers import Writers

        return Writers(config, student)
    return sampler_in_process(config, student)


def sampler_in_process(config: StudentConfig, student: Student | StudentCopy) -> Sampler:
    """What writes in this process, with the weights of the student that is here.

    Raises:
        ConfigurationError: as `VllmSampler` and `TransformersSampler`.

    """
    if config.sampling.written_by == "vllm" and config.objective.on_policy_fraction > 0:
        from tutelage.trainer.rollout.vllm_sampler import VllmSampler

        return VllmSampler(config, student)
    from tutelage.trainer.rollout.hf_sampler import TransformersSampler

    return TransformersSampler(config, student)
