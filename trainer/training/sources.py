"""The data of a student: its sources read by their settings, what is held out of them, the rest in proportion."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from tutelage.data.dataset_files import TokenizedExample, shortened, stream_examples
from tutelage.errors import DataError
from tutelage.trainer.config.student import SourceConfig, StudentConfig
from tutelage.trainer.data.dataset import Dataset, fingerprint, read_dataset
from tutelage.trainer.data.mixture import WINDOW, Examples, Mixture, Shuffled, Stream
from tutelage.trainer.data.seeding import numpy_generator

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """What a student learns from and is measured on."""

    mixture: Mixture
    held_out: tuple[TokenizedExample, ...]
    fingerprint: str
    rows: int
    """Of all sources to train on; of streams, none are counted."""
    labels: tuple[str, ...]
    """Of the sources, for metrics; none if there is one source only."""
    read: tuple[tuple[SourceConfig, Dataset | None], ...]
    """Each source, and what was read of it and is trained on; None of a stream."""

    def counts(self) -> dict[str, int]:
        """`Dataset.counts` of all sources together; streams are not counted."""
        total: Counter[str] = Counter()
        for _, dataset in self.read:
            total.update(dataset.counts() if dataset else {})
        return dict(total)

    def cost_of_length(self, max_tokens: int) -> tuple[str, ...]:
        """`Dataset.cost_of_length` of each source, which is named where there are several."""
        lines = []
        for source, dataset in self.read:
            name = f"{source.path}: " if len(self.read) > 1 else ""
            lines += [name + line for line in (dataset.cost_of_length(max_tokens) if dataset else ())]
        return tuple(lines)


def read_data(config: StudentConfig, tokenizer: Any) -> Data:
    """Reads all sources.

    Raises:
        ConfigurationError: as `SourceConfig.chat`.
        DataError: a source is not as it must be, or nothing is left to train on.

    """
    sources, several = config.sources, len(config.sources) > 1
    held_counts = [0] * len(sources) if config.held_out.data else _divided(config.held_out.sequences, sources)
    examples: list[Examples] = []
    held_out: list[TokenizedExample] = []
    prints, rows = [], 0
    read: list[tuple[SourceConfig, Dataset | None]] = []
    for index, (source, held) in enumerate(zip(sources, held_counts, strict=True)):
        place = (index,) if several else ()
        if source.streaming:
            stream = _Streamed(source, config, tokenizer, held)
            held_out += islice(stream.all_rows(), held)
            examples.append(Stream(stream.rows, config.seed, place))
            prints.append(fingerprint(islice(stream.all_rows(), WINDOW)))
            read.append((source, None))
            continue
        whole = _whole(source, config, tokenizer)
        dataset, own = whole.split(held_out=held, seed=config.seed)
        held_out += own
        examples.append(Shuffled(dataset, config.seed, place))
        prints.append(dataset.fingerprint)
        rows += len(dataset.examples)
        read.append((source, dataset))
    if config.held_out.data:
        held_out += _measured(config.held_out.data, config, tokenizer)
    if not all(len(example.completion_ids) for example in held_out):
        raise DataError(
            f"a held-out row of {_paths(sources)} has no completion to measure on; give completions, or set "
            "held_out.sequences: 0",
            "held_out.sequences",
        )
    weights = [source.weight for source in sources]
    labels = tuple(f"{index}-{source.path.stem}" for index, source in enumerate(sources)) if several else ()
    return Data(
        Mixture(examples, weights, config.seed),
        tuple(held_out),
        "+".join(prints),
        rows,
        labels,
        tuple(read),
    )


class _Streamed:
    """Passes over a source that is read as it is trained on."""

    def __init__(self, source: SourceConfig, config: StudentConfig, tokenizer: Any, held: int) -> None:
        self._source, self._held, self._tokenizer = source, held, tokenizer
        self._max_tokens = config.batch.max_tokens

    def all_rows(self) -> Iterator[TokenizedExample]:
        """The rows that fit."""
        source = self._source
        for example in stream_examples(
            source.path,
            self._tokenizer,
            template=source.template,
            chat=source.chat,
            turns=source.turns,
            part=source.part,
        ):
            short = shortened(_asked(example, source), self._max_tokens)
            if short is not None:
                yield short

    def rows(self) -> Iterator[TokenizedExample]:
        """Those of them that are trained on."""
        return islice(self.all_rows(), self._held, None)


def _whole(source: SourceConfig, config: StudentConfig, tokenizer: Any) -> Dataset:
    whole = read_dataset(
        source.path,
        tokenizer,
        template=source.template,
        max_tokens=config.batch.max_tokens,
        chat=source.chat,
        turns=source.turns,
        part=source.part,
    )
    if whole.dropped_prompts or whole.truncated_completions:
        _log.warning(
            "%s: %d rows left out because their prompt fills batch.max_tokens, %d completions lost %d tokens",
            *(source.path, whole.dropped_prompts, whole.truncated_completions, whole.tokens_cut),
        )
    return replace(whole, examples=tuple(_asked(example, source) for example in whole.examples))


def _asked(example: TokenizedExample, source: SourceConfig) -> TokenizedExample:
    """The example, with its source's teacher if it names none itself."""
    return example if source.teacher is None or example.teacher else replace(example, teacher=source.teacher)


def _measured(source: SourceConfig, config: StudentConfig, tokenizer: Any) -> list[TokenizedExample]:
    """Seeded rows of a data set that is only measured on, all of them if there are no more."""
    examples = _whole(source, config, tokenizer).examples
    order = numpy_generator(config.seed, "held-out").permutation(len(examples))
    return [examples[index] for index in sorted(order[: config.held_out.sequences].tolist())]


def _divided(count: int, sources: Sequence[SourceConfig]) -> list[int]:
    """How many of `count` sequences come from each source by weight: whole ones first, then by what is left."""
    weights = np.array([source.weight for source in sources])
    exact = count * weights / weights.sum()
    whole = exact.astype(int)
    largest = np.argsort(-(exact - whole), kind="stable")[: count - whole.sum()]
    whole[largest] += 1
    return [int(each) for each in whole]


def _paths(sources: Sequence[SourceConfig]) -> str:
    return ", ".join(str(source.path) for source in sources)
