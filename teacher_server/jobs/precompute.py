"""Fills the signal store for a data set: one engine pass for each sequence that is not there yet.

Sequences and files are those that a server and a trainer would name, so either finds what was computed here. What
is stored already is read and checked; so an interrupted run goes on where it was.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tutelage.data.signal_store import Prefixes, sequence_key
from tutelage.errors import ConfigurationError, DataError, TutelageError
from tutelage.identity import require_tokenizer_as_its_file
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.teacher_server.config import PrecomputeConfig
from tutelage.teacher_server.jobs.progress import Progressed
from tutelage.teacher_server.model.self_check import check
from tutelage.teacher_server.model.teacher import Teacher
from tutelage.teacher_server.signals.hidden_states import HiddenStates
from tutelage.teacher_server.signals.store import stored_bytes

_NAME = "precompute"


@dataclass(frozen=True)
class Filled:
    """What was done."""

    sequences: int
    tokens: int
    computed: int
    """Sequences that were not stored before."""
    stored_bytes: int
    """Size of the teacher's store now."""


def read_sequences(config: PrecomputeConfig, checkpoint: Path) -> list[list[int]]:
    """The different sequences of a data set, prompt and completion, as the teacher's token ids.

    Raises:
        DataError: the file is not as it must be, or has a row without a completion.

    """
    from transformers import AutoTokenizer

    from tutelage.data.dataset_files import stream_examples, truncate

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    require_tokenizer_as_its_file(tokenizer, checkpoint)
    examples = stream_examples(config.data, tokenizer, template=config.template, chat=config.chat)
    different = {}
    for example in truncate(examples, config.max_tokens, config.data).examples:
        if not len(example.completion_ids):
            raise DataError(
                f"a row of {config.data} has no completion to score; have one generated (`tutelage teacher write`)",
                "data",
            )
        told = example.prompt_ids if example.teacher_prompt_ids is None else example.teacher_prompt_ids
        ids = np.concatenate([told, example.completion_ids])
        different[sequence_key(ids)] = ids.tolist()
    return list(different.values())


async def precompute(
    config: PrecomputeConfig,
    sequences: Sequence[Sequence[int]],
    load: Callable[[str, float], Teacher],
    progressed: Progressed,
) -> Filled:
    """Has the teacher compute the states of all sequences that are not stored.

    Args:
        config: names the store.
        sequences: token ids, no two alike.
        load: makes the teacher; called in a thread.
        progressed: told after each sequence.

    Raises:
        ConfigurationError: a sequence is too long for the teacher, or the store too small for all of them.
        DataError: the disk did not take all of them.
        TutelageError: as `model.self_check.check`.

    """
    from tutelage.teacher_server.server.server import in_daemon_thread

    teacher = await in_daemon_thread(lambda: load(uuid.uuid4().hex, 0.0))
    try:
        assert teacher.scoring is not None
        states, head = teacher.scoring.states, teacher.scoring.head
        assert states.store is not None
        longest, most = max(map(len, sequences)), teacher.limits.max_sequence_tokens
        if longest > most:
            raise ConfigurationError(f"a sequence has {longest} tokens, the teacher takes {most}", "max_tokens")
        needed, allowed = stored_bytes(map(Prefixes, sequences), head.hidden_size), states.store.max_bytes
        if needed > allowed:
            message = f"the store may have {allowed:,} bytes and these sequences need {needed:,}; raise it"
            raise ConfigurationError(message, "store.bytes")
        await check(teacher)
        states.describe(teacher.info, head.unembedding)
        # The batch that the engine computes, and the next one.
        found = await _fill(states, sequences, 2 * config.max_num_seqs, progressed)
        missing = sum(Prefixes(sequence) not in states.store for sequence in sequences)
        if missing:
            message = f"{missing} of {len(sequences)} sequences could not be stored; the log says why"
            raise DataError(message, "store.path")
        tokens = sum(map(len, sequences))
        return Filled(len(sequences), tokens, len(sequences) - found, states.store.bytes)
    finally:
        teacher.shutdown()


async def _fill(
    states: HiddenStates, sequences: Sequence[Sequence[int]], in_flight: int, progressed: Progressed
) -> int:
    """How many of them were stored already."""
    counters = pb.StudentUsage(student_id=_NAME)
    remaining, done = iter(sequences), 0

    async def work() -> None:
        nonlocal done
        for sequence in remaining:
            async for _ in states.of(sequence, 0, len(sequence), counters):
                pass
            done += 1
            progressed(done, len(sequences))

    try:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(in_flight):
                tasks.create_task(work())
    except* TutelageError as errors:
        failure = errors.exceptions[0]
    else:
        return counters.store_hits
    raise failure
