"""What every sampler is, and which one a student's configuration asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tutelage.trainer.config.student import StudentConfig
from tutelage.trainer.data.sequences import Completion, TokenIds
from tutelage.trainer.model.student import Student
from tutelage.trainer.rollout.hf_sampler import TransformersSampler


class Sampler(Protocol):
    """Writes a student's own sequences."""

    def generate(
        self, step: int, batch_indices: Sequence[int], prompts: Sequence[TokenIds], turn: int = 0
    ) -> list[Completion]:
        """One continuation a prompt, as `sample`, with the weights that the student has now.

        Args:
            step: optimizer steps done.
            batch_indices: of the sequences in the step's batch; the same step, index and turn draw the same, whoever
                else generates.
            prompts: token ids, none empty, one for each index.
            turn: how often they have been continued before, by those who write a sequence in several parts.

        """
        ...


def open_sampler(config: StudentConfig, student: Student) -> Sampler:
    """What writes the student's sequences; no vLLM is started for one that never writes any.

    Raises:
        ConfigurationError: as `VllmSampler`.

    """
    if config.sampling.engine == "vllm" and config.objective.on_policy_fraction > 0:
        from tutelage.trainer.rollout.vllm_sampler import VllmSampler

        return VllmSampler(config, student)
    return TransformersSampler(config, student)
