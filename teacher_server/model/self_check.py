"""The first real requests of a teacher: they must be the model's own, and they measure its noise floor.

The same tokens computed alone and in a batch give slightly different logits, because sums are split
differently. A student whose KL to the teacher is below that difference has nothing left to learn.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tutelage.errors import NotServed, TutelageError
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.teacher_server.engine.base import GenerationEngine, Sampling

if TYPE_CHECKING:
    from tutelage.teacher_server.model.teacher import ScoringParts, Teacher

logger = logging.getLogger(__name__)

TEXT = """\
A baker has 24 rolls. She sells 9 of them in the morning and bakes 12 more at noon, so in the afternoon there
are 24 - 9 + 12 = 27 rolls. Of these, a third goes to the school next door. How many are left? A third of 27
is 9, and 27 - 9 = 18, so 18 rolls are left.

The harbour lies on the northern side of the island, where the water is deep enough for larger ships. In
winter, when storms come from the west, the fishing boats stay in the bay for weeks, and the people mend their
nets, tell stories, and wait for the wind to turn."""
# The first must have more than four tokens: on a CPU with AMX, a process must ask the kernel for its tiles before it
# uses them. vLLM's small matrix products do, but only for more than four rows; its attention relies on it and dies of
# SIGILL else. One longer sequence, once, makes every length safe.
_LENGTHS = (8, 24, 64, 128)
COMPARED_TEXT = 1
"""Which of the check sequences is compared with the model's own logits."""
_COPIES = 8
# nats a token. bfloat16 costs a few thousandths; states of another layer, or normalised once more, whole nats.
_LARGEST_KL = 0.1
# Of the size of the logits, each position's without their mean: 1.4 if they have nothing to do with each other, 0.02 to
# 0.15 by rounding (benchmarks/teacher_architectures.py). Where distributions are nearly flat, no KL is large.
_FURTHEST_APART = 0.5


def check_sequences(checkpoint: Path, longest: int) -> list[list[int]]:
    """Ordinary text as the teacher's token ids, cut to several lengths of at most `longest` tokens."""
    from tokenizers import Tokenizer

    token_ids = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode(TEXT).ids
    return [token_ids[: min(length, longest)] for length in _LENGTHS]


async def check(teacher: Teacher) -> None:
    """All checks of a teacher that was just loaded; fills in its noise floor.

    Raises:
        NotServed: its distributions are not the model's own.
        TutelageError: its log-probabilities are not finite.
        Unreachable: an engine died.

    """
    logger.info("checking")
    if teacher.scoring is not None:
        floor = await check_scoring(teacher.scoring, teacher.check_sequences)
        teacher.info.noise_floor.CopyFrom(floor)
        logger.info("noise floor: KL %.2g nats a token, over %d tokens", floor.mean_kl, floor.positions)
        await check_reuse(teacher.scoring, teacher.check_sequences[-1])
        # None if its layers could not be run beside the engine, and of an adapter, whose layers are others.
        if teacher.own_logits is not None:
            text = teacher.check_sequences[COMPARED_TEXT]
            kl = await check_states(teacher.scoring, text, teacher.own_logits)
            logger.info("KL to the model's own logits: %.2g nats a token, over %d tokens", kl, len(text))
    if teacher.generation is not None:
        await check_generation(teacher.generation, teacher.check_sequences[0])
    for name, adapted in teacher.adapters.items():
        logger.info("adapter %s", name)
        await check(adapted)
        if adapted.scoring is not None and teacher.scoring is not None:
            text = teacher.check_sequences[COMPARED_TEXT]
            one, other = [
                (await parts.engine.hidden_states(text)).states_RD for parts in (adapted.scoring, teacher.scoring)
            ]
            # vLLM loads an adapter that fits no module of the model without a word, and computes the base model.
            if torch.equal(one, other):
                raise NotServed(
                    "it changes nothing; is it trained, and for layers of this model?", f"lora_modules.{name}"
                )


async def check_scoring(scoring: ScoringParts, sequences: Sequence[Sequence[int]]) -> pb.NoiseFloor:
    """Scores sequences alone, then among copies of themselves, and compares.

    The copies are more than a batch, so that the engine computes some of them in parts.

    Raises:
        NotServed: a copy is not the same but for rounding.
        TutelageError: log-probabilities are not finite.

    """
    alone = [await scoring.engine.hidden_states(sequence) for sequence in sequences]
    copies = max(_COPIES, 2 * scoring.engine.batch_tokens // sum(map(len, sequences)) + 1)
    # The first to arrive are computed before the others are there; the last ones are in the fullest batch.
    batched = await asyncio.gather(*map(scoring.engine.hidden_states, [*sequences] * copies))
    both, logits = zip(alone, batched[-len(sequences) :], strict=True), scoring.head.logits
    pairs = [(one.states_RD, other.states_RD) for one, other in both]
    # KL(alone ‖ batched) of each position; not below 0 but for rounding.
    kl = await asyncio.to_thread(lambda: torch.cat([_kl(logits(one), logits(other)) for one, other in pairs]))
    if not torch.isfinite(kl).all():
        raise TutelageError("the teacher's log-probabilities are not finite; its weights or its dtype are broken")
    for index, one in enumerate(alone):
        furthest = max((each.states_RD for each in batched[index :: len(sequences)]), key=_distance_from(one.states_RD))
        _, problem = _difference(logits(one.states_RD).cpu(), logits(furthest).cpu())
        if problem:
            raise NotServed(
                f"a text of {len(furthest)} tokens has other distributions in company, where the engine may compute it "
                f"in parts, than alone ({problem}); this version of vLLM treats the model differently",
                "model",
            )
    return pb.NoiseFloor(
        mean_kl=kl.mean().item(), max_kl=kl.max().item(), positions=len(kl), canary_token_ids=sequences[-1]
    )


async def check_states(scoring: ScoringParts, sequence: Sequence[int], own_logits_TV: torch.Tensor) -> float:
    """Mean KL of the model's own distributions and those of the engine's states, nats a token.

    Args:
        scoring: engine and head.
        sequence: a text.
        own_logits_TV: the model's own logits of it.

    Raises:
        NotServed: they are not the same but for rounding.

    """
    served = (await scoring.engine.hidden_states(sequence)).states_RD[: len(own_logits_TV)]
    kl, problem = _difference(own_logits_TV, scoring.head.logits(served).cpu())
    if problem:
        raise NotServed(
            f"the engine's hidden states give other distributions than the model's own ({problem}); this version of "
            "vLLM treats the model differently",
            "model",
        )
    return kl


async def check_reuse(scoring: ScoringParts, sequence: Sequence[int]) -> None:
    """Computes the end of a text whose beginning the engine has cached, and compares it with that of the whole.

    vLLM leaves the cache off for models whose state of a prefix is more than keys and values (hybrids); told to use it
    all the same, it warns that results may be wrong.

    Raises:
        NotServed: they are not the same but for rounding.

    """
    whole = await scoring.engine.hidden_states(sequence)
    end = await scoring.engine.hidden_states(sequence, first=len(sequence) - 1)
    if end.start == 0:  # nothing is reused
        return
    wanted, given = (scoring.head.logits(states) for states in (whole.states_RD[end.start :], end.states_RD))
    _, problem = _difference(wanted.cpu(), given.cpu())
    if problem:
        raise NotServed(
            f"a text whose first {end.start} tokens are cached has other distributions than as a whole ({problem}); "
            "this version of vLLM cannot reuse prefixes of the model, so say --no-enable-prefix-caching",
            "enable_prefix_caching",
        )


async def check_generation(engine: GenerationEngine, prompt_token_ids: Sequence[int]) -> None:
    """Generates one token."""
    one_token = Sampling(samples=1, max_new_tokens=1, temperature=0.0, top_p=1.0, seed=0, stop=())
    async for _ in engine.generate(prompt_token_ids, one_token):
        pass


def _distance_from(states_TD: torch.Tensor) -> Callable[[torch.Tensor], float]:
    return lambda others_TD: float((others_TD.float() - states_TD.float()).norm())


def _difference(wanted_TV: torch.Tensor, given_TV: torch.Tensor) -> tuple[float, str]:
    """Mean KL, nats a token, and why two sets of logits differ by more than rounding; empty if they do not."""
    kl = _kl(wanted_TV, given_TV).mean().item()
    wanted, given = (logits - logits.mean(dim=1, keepdim=True) for logits in (wanted_TV, given_TV))
    apart = ((wanted - given).norm() / wanted.norm()).item()
    if kl < _LARGEST_KL and apart < _FURTHEST_APART:  # false for NaN, as it should be
        return kl, ""
    return kl, (
        f"KL {kl:.3g} nats a token, at most {_LARGEST_KL} is rounding; logits apart by {apart:.2g} of their size, "
        f"{_FURTHEST_APART} at most"
    )


def _kl(p_TV: torch.Tensor, q_TV: torch.Tensor) -> torch.Tensor:
    p_logp, q_logp = (logits.double().log_softmax(dim=1) for logits in (p_TV, q_TV))
    return (p_logp.exp() * (p_logp - q_logp)).sum(dim=1)
