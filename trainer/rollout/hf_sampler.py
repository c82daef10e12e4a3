"""Live sampling: the student writes continuations with the weights that it has now.

Here with its own transformers model; with vLLM in `trainer/rollout/vllm_sampler.py`. The loop is
`tutelage.decoding`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tutelage.decoding import decode
from tutelage.errors import ConfigurationError
from tutelage.trainer.config.student import StudentConfig
from tutelage.trainer.data.seeding import derived_seed
from tutelage.trainer.data.sequences import Completion, TokenIds
from tutelage.trainer.model.self_check import TEXT_TOLERANCE, largest_probed_id
from tutelage.trainer.model.student import Student
from tutelage.trainer.rollout.base import OnPiece, done
from tutelage.trainer.rollout.student_copy import StudentCopy

# Lengths of the prompts that a model is tried with; the shortest is mostly padding beside the longest.
_PROBE_TOKENS = (5, 17, 40)
_ROOM = (4, 2, 3)


class TransformersSampler:
    """A `Sampler` that uses the very model that is trained.

    Args:
        config: the student's.
        student: whose weights write; it is tried at once, if it is to write at all.

    Raises:
        ConfigurationError: token by token the model computes otherwise than at once.

    """

    def __init__(self, config: StudentConfig, student: Student | StudentCopy) -> None:
        self._config, self._student = config, student
        if config.objective.on_policy_fraction > 0:
            with student.unsharded():
                _require_plain_decoding(student)

    def write(
        self,
        step: int,
        indices: Sequence[int],
        prompts: Sequence[TokenIds],
        *,
        turn: int = 0,
        on_piece: OnPiece | None = None,
    ) -> Future[list[Completion]]:
        """As `Sampler.write`."""
        config, model = self._config, self._student.model
        seeds = [sampling_seed(config, step, index, turn) for index in indices]

        def tell(row: int, written: list[int]) -> None:
            assert on_piece is not None
            on_piece(indices[row], np.array(written, np.int32))

        model.eval()
        completions = sample(
            model,
            prompts,
            generators=[torch.Generator().manual_seed(seed) for seed in seeds],
            max_new_tokens=config.sampling.max_new_tokens,
            max_tokens=config.batch.max_tokens,
            temperature=config.sampling.temperature,
            top_p=config.sampling.top_p,
            repetition_penalty=config.sampling.repetition_penalty,
            end_ids=self._student.end_ids,
            vocabulary_size=self._student.vocabulary_size,
            on_piece=tell if on_piece else None,
        )
        model.train()
        return done(completions)

    def take_weights(self, version: int) -> None:
        """It has them."""

    def close(self) -> None:
        """Nothing is left to end."""


def sampling_seed(config: StudentConfig, step: int, batch_index: int, turn: int) -> int:
    """Of one continuation: its student's, its place in the training and its own, and no one else's."""
    return derived_seed(config.seed, "sampling", config.id, step, batch_index, *([turn] if turn else []))


@torch.inference_mode()
def _require_plain_decoding(student: Student | StudentCopy) -> None:
    """Refuses a model that computes otherwise token by token, in a batch whose prompts differ in length, than at once.

    Such are models whose state is no `past_key_values` (Mamba), or is reached by the padding before a prompt.
    """
    model = student.model
    largest = largest_probed_id(model, student.vocabulary_size)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or np.inf
    lengths = [int(min(length, positions - max(_ROOM))) for length in _PROBE_TOKENS]
    prompts = [np.linspace(0, largest, length).astype(np.int64).tolist() for length in lengths]
    steps: list[list[Tensor]] = [[] for _ in prompts]

    def likeliest(logits_BV: Tensor, rows: Sequence[int]) -> Tensor:
        for row, logits_V in zip(rows, logits_BV, strict=True):
            steps[row].append(logits_V.float())
        return logits_BV.argmax(-1)

    model.eval()
    try:
        # Of different lengths, so that the batch shrinks on the way and its cache is cut.
        completions = decode(model, prompts, next_ids=likeliest, room=_ROOM, end_ids=frozenset())
        found = 0.0
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            ids_1T = torch.tensor([[*prompt, *completion[:-1]]], device=model.device)
            plain_TV = model(input_ids=ids_1T, use_cache=False).logits[0, len(prompt) - 1 :].float()
            found = max(
                found, float((torch.stack(steps[row]) - plain_TV).abs().mean() / plain_TV.std().clamp(min=1e-6))
            )
        problem = f"its logits differ from those of a plain pass by {found:.2g} of their spread"
    except torch.OutOfMemoryError:  # A RuntimeError, too, and no fault of the model.
        raise
    # Whatever a cache that was not made to be cut raises.
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        found, problem = float("inf"), f"{type(error).__name__}: {error}"
    model.train()
    if found > TEXT_TOLERANCE[model.dtype]:
        raise ConfigurationError(
            f"{type(model).__name__} does not compute token by token what it computes at once ({problem}), so it "
            "cannot write here; learn from given sequences (0), or choose another model",
            "objective.on_policy_fraction",
        )


@torch.inference_mode()
def sample(
    model: Any,
    prompts: Sequence[TokenIds],
    *,
    generators: Sequence[torch.Generator],
    max_new_tokens: int,
    max_tokens: int,
    temperature: float,
    top_p: float,
    end_ids: frozenset[int],
    vocabulary_size: int,
    repetition_penalty: float = 1.0,
    on_piece: Callable[[int, list[int]], None] | None = None,
) -> list[Completion]:
    """One continuation a prompt; it ends with an end token unless it was cut off.

    Args:
        model: a transformers causal language model.
        prompts: token ids, none empty.
        generators: on the CPU, one for each prompt; the only sources of randomness.
        max_new_tokens: tokens to write at most.
        max_tokens: prompt and continuation together at most.
        temperature: of the sampling; > 0.
        top_p: nucleus mass, in (0, 1].
        end_ids: tokens that end a continuation.
        vocabulary_size: ids from here on (padded rows of the head) are never written.
        repetition_penalty: as in `SamplingConfig`.
        on_piece: as in `decode`.

    """
    seen_BV = torch.zeros(len(prompts), vocabulary_size if repetition_penalty != 1.0 else 0, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        seen_BV[row, torch.from_numpy(prompt[prompt < seen_BV.shape[1]]).long()] = True
    logps: list[list[float]] = [[] for _ in prompts]

    def next_ids(logits_BV: Tensor, rows: Sequence[int]) -> Tensor:
        own, logits_BV = [generators[row] for row in rows], logits_BV[:, :vocabulary_size].float()
        if repetition_penalty != 1.0:
            weighed_BV = torch.where(logits_BV > 0, logits_BV / repetition_penalty, logits_BV * repetition_penalty)
            logits_BV = torch.where(seen_BV[list(rows)].to(logits_BV.device), weighed_BV, logits_BV)
        chosen_B, logp_B = choose(logits_BV, own, temperature=temperature, top_p=top_p)
        if repetition_penalty != 1.0:
            seen_BV[list(rows), chosen_B.cpu()] = True
        for row, logp in zip(rows, logp_B.tolist(), strict=True):
            logps[row].append(logp)
        return chosen_B

    written = decode(
        model,
        [prompt.tolist() for prompt in prompts],
        next_ids=next_ids,
        room=[min(max_new_tokens, max_tokens - len(prompt)) for prompt in prompts],
        end_ids=end_ids,
        on_piece=on_piece,
    )
    return [
        Completion(np.asarray(tokens, np.int32), np.asarray(logp, np.float32))
        for tokens, logp in zip(written, logps, strict=True)
    ]


def choose(
    logits_BV: Tensor, generators: Sequence[torch.Generator], *, temperature: float, top_p: float
) -> tuple[Tensor, Tensor]:
    """One id a row, int64 [B], drawn from softmax(logits / temperature) within its nucleus, and ln of its probability.

    Inverts the cumulative distribution with one uniform number a row, of the row's own generator; `torch.multinomial`
    draws one per vocabulary id, which on a CPU takes longer than the head of a small model.
    """
    scaled_BV = logits_BV.float() if temperature == 1.0 else logits_BV.float() / temperature
    probabilities_BV = torch.softmax(scaled_BV, dim=-1)
    if top_p < 1.0:
        sorted_BV, order_BV = probabilities_BV.sort(dim=-1, descending=True, stable=True)
        outside_BV = sorted_BV.cumsum(-1) - sorted_BV >= top_p
        probabilities_BV = probabilities_BV.scatter(-1, order_BV, sorted_BV.masked_fill(outside_BV, 0.0))
    cumulative_BV = probabilities_BV.cumsum(-1)
    uniform_B1 = torch.cat([torch.rand(1, 1, generator=own) for own in generators]).to(logits_BV.device)
    # right=True steps over ids of probability 0, whose cumulative value equals their left neighbour's.
    index_B1 = torch.searchsorted(cumulative_BV, uniform_B1 * cumulative_BV[:, -1:], right=True)
    index_B1 = index_B1.clamp(max=logits_BV.shape[1] - 1)
    logp_B1 = (probabilities_BV.gather(-1, index_B1) / cumulative_BV[:, -1:]).log()
    return index_B1[:, 0], logp_B1[:, 0]
