"""Examples of several data sets in proportion to their weights; the n-th of a training is always the same one.

    mixture = Mixture([Shuffled(sums, seed=0, source=(0,)), Shuffled(talks, seed=0, source=(1,))], (3.0, 1.0), seed=0)
    batch = mixture.take(drawn=0, count=8)

Which data set a draw is from is drawn by weight alone, whatever their sizes; each then gives its rows in an order of
its own, all of them before one comes again. Nothing has a state that a checkpoint would have to keep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tutelage.data.dataset_files import TokenizedExample
from tutelage.errors import DataError
from tutelage.trainer.data.dataset import Dataset, Order
from tutelage.trainer.data.seeding import numpy_generator

_BLOCK = 4096
"""Draws that one generator makes."""
WINDOW = 1024
"""Rows of a stream among which its order is drawn."""


class Examples(Protocol):
    """The examples of one data set, in the order in which a training draws them."""

    def take(self, drawn: int, count: int) -> list[TokenizedExample]:
        """The `count` examples that follow the first `drawn`; after the last one they begin again."""
        ...


class Shuffled:
    """A data set that is here whole, in a seeded order, another one each epoch."""

    def __init__(self, dataset: Dataset, seed: int, source: tuple[int, ...] = ()) -> None:
        self._examples, self._order = dataset.examples, Order(len(dataset.examples), seed, source)

    def take(self, drawn: int, count: int) -> list[TokenizedExample]:
        """As `Examples.take`."""
        return [self._examples[index] for index in self._order.take(drawn, count)]


class Stream:
    """A data set that is read as it is asked for, in a seeded order within each window of it.

    Going on from a checkpoint reads what was drawn before once more.

    Args:
        rows: begins a pass over the data set.
        seed: of the order.
        source: which of several data sets it is.

    """

    def __init__(self, rows: Callable[[], Iterator[TokenizedExample]], seed: int, source: tuple[int, ...] = ()) -> None:
        self._rows, self._seed, self._source = rows, seed, source
        self._begin()

    def _begin(self) -> None:
        self._pass, self._window, self._examples = self._rows(), -1, list[TokenizedExample]()

    def take(self, drawn: int, count: int) -> list[TokenizedExample]:
        """As `Examples.take`."""
        return [self._at(number) for number in range(drawn, drawn + count)]

    def _at(self, number: int) -> TokenizedExample:
        window, offset = divmod(number, WINDOW)
        if window < self._window:  # a batch that is asked for once more
            self._begin()
        while self._window < window:
            self._window += 1
            examples = self._next_window()
            order = numpy_generator(self._seed, "stream", *self._source, self._window).permutation(WINDOW)
            self._examples = [examples[index] for index in order]
        return self._examples[offset]

    def _next_window(self) -> list[TokenizedExample]:
        examples: list[TokenizedExample] = []
        empty = False
        while len(examples) < WINDOW:
            before = len(examples)
            for example in self._pass:
                examples.append(example)
                if len(examples) == WINDOW:
                    return examples
            if len(examples) == before and empty:
                raise DataError("a streamed data set has no row that fits into batch.max_tokens", "data")
            empty = len(examples) == before
            self._pass = self._rows()
        return examples


class Mixture:
    """Several data sets in proportion.

    Args:
        sources: the data sets.
        weights: of each, above 0; their sum does not matter.
        seed: of the draws.

    """

    def __init__(self, sources: Sequence[Examples], weights: Sequence[float], seed: int) -> None:
        self._sources, self._seed = sources, seed
        self._shares = tuple((np.asarray(weights, float) / np.sum(weights)).tolist())
        self._before = [np.zeros(len(sources), int)]

    def take(self, drawn: int, count: int) -> list[TokenizedExample]:
        """The `count` examples that follow the first `drawn`."""
        if len(self._sources) == 1:
            return self._sources[0].take(drawn, count)
        examples = []
        for number in range(drawn, drawn + count):
            block, offset = divmod(number, _BLOCK)
            draws = self._block(block)
            source = int(draws[offset])
            earlier = self._counts_before(block)[source] + np.count_nonzero(draws[:offset] == source)
            examples += self._sources[source].take(int(earlier), 1)
        return examples

    def shares(self, drawn: int) -> list[float]:
        """Of the first `drawn` examples, at least one, the share that each data set gave."""
        block, offset = divmod(drawn, _BLOCK)
        own = np.bincount(self._block(block)[:offset], minlength=len(self._sources))
        return ((self._counts_before(block) + own) / drawn).tolist()  # type: ignore[no-any-return]

    def _block(self, block: int) -> npt.NDArray[np.int64]:
        return _draws(self._seed, self._shares, block)

    def _counts_before(self, block: int) -> npt.NDArray[np.int64]:
        while len(self._before) <= block:
            draws = self._block(len(self._before) - 1)
            self._before.append(self._before[-1] + np.bincount(draws, minlength=len(self._sources)))
        return self._before[block]


@lru_cache(maxsize=4)
def _draws(seed: int, shares: tuple[float, ...], block: int) -> npt.NDArray[np.int64]:
    return numpy_generator(seed, "mixture", block).choice(len(shares), _BLOCK, p=shares)
