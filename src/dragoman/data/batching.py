"""Batches of similar length, for inference with the results in the order of the inputs, and for training.

Sorting by length keeps padding, and with it wasted computation, low. A stream is sorted within windows, so that memory
stays bounded whatever its length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

import numpy as np


Item = TypeVar("Item")
Result = TypeVar("Result")


def length_sorted_batches(
    lengths: Sequence[int], *, batch_size: int | None = None, max_tokens: int | None = None
) -> list[list[int]]:
    """Group positions by length, the longest first, so that a batch that does not fit in memory fails at once.

    Args:
        lengths: length of each item, in tokens (or any unit that grows with them).
        batch_size: most items in a batch.
        max_tokens: most tokens in a batch, padding included: items times the longest of them. An item longer than that
            has a batch of its own.

    Returns:
        Batches of positions in `lengths`; each position occurs once. Equal lengths keep their order.

    Raises:
        ValueError: neither limit is given, or one is not positive.
    """
    if batch_size is None and max_tokens is None:
        raise ValueError("batches need a limit: batch_size, max_tokens or both")
    for name, limit in (("batch_size", batch_size), ("max_tokens", max_tokens)):
        if limit is not None and limit < 1:
            raise ValueError(f"{name} is {limit}; it must be at least 1")
    batches: list[list[int]] = []
    longest = 0
    for position in sorted(range(len(lengths)), key=lambda position: -lengths[position]):
        count = len(batches[-1]) + 1 if batches else 1
        too_many = batch_size is not None and count > batch_size
        too_wide = max_tokens is not None and count * longest > max_tokens
        if not batches or too_many or too_wide:
            batches.append([])
            longest = lengths[position]
        batches[-1].append(position)
    return batches


def map_in_batches(
    items: Iterable[Item],
    function: Callable[[list[Item]], Sequence[Result]],
    *,
    length: Callable[[Item], int],
    batch_size: int | None = None,
    max_tokens: int | None = None,
    window: int = 10_000,
) -> Iterator[Result]:
    """Apply a function that works on batches, and yield its results in the order of the items.

    Args:
        items: a list, or a stream of any length.
        function: a batch of items -> as many results, in the same order.
        length: an item's length, for sorting and for `max_tokens`.
        batch_size, max_tokens: as in `length_sorted_batches`.
        window: items read ahead and sorted together. The first result comes after a window has been read.

    Raises:
        ValueError: as `length_sorted_batches`; a window that is not positive; a function that returns more or fewer
            results than it got items.
    """
    if window < 1:
        raise ValueError(f"window is {window}; it must be at least 1")
    stream = iter(items)
    while chunk := list(islice(stream, window)):
        results: dict[int, Result] = {}
        batches = length_sorted_batches([length(item) for item in chunk], batch_size=batch_size, max_tokens=max_tokens)
        for batch in batches:
            results.update(zip(batch, function([chunk[position] for position in batch]), strict=True))
        yield from (results[position] for position in range(len(chunk)))


class TokenBudgetBatches:
    """Training batches under a budget of tokens, padding included: a batch of n pairs costs n * (longest source +
    longest target).

    The pairs are sorted into buckets by target length and within them by source length, there and back, so that
    neighbors are alike on both sides; then they are cut where the next one would break the budget. Which pairs meet
    among those of equal lengths, and the order of the batches, come from the seeds alone. The number of batches is
    always the same, and a multiple of `multiple_of`.

    With `packing`, pairs are to share rows without padding, and a batch is a random set of as many as the budget holds.

    Args:
        source_lengths, target_lengths: of each pair, in tokens.
        max_tokens: the budget.
        multiple_of: number of processes that share the batches out.

    Raises:
        ValueError: a pair that is longer than the budget; too few pairs for the processes or, with `packing`, too small
            a budget.
    """

    def __init__(
        self,
        source_lengths: Sequence[int] | np.ndarray,
        target_lengths: Sequence[int] | np.ndarray,
        max_tokens: int,
        *,
        multiple_of: int = 1,
        packing: bool = False,
    ) -> None:
        self.sources = np.asarray(source_lengths, dtype=np.int32)
        self.targets = np.asarray(target_lengths, dtype=np.int32)
        self.max_tokens = max_tokens
        self.multiple_of = multiple_of
        self.packing = packing
        longest = int((self.sources + self.targets).argmax())
        source, target = self.sources[longest], self.targets[longest]
        if source + target > max_tokens:
            raise ValueError(
                f"a pair has {source} source and {target} target tokens, more than the {max_tokens} of "
                "max_tokens_per_batch: raise it, or set max_source_length and max_target_length"
            )
        # The sorted lengths are the same in every epoch, and so are the places to cut.
        self.cuts = [] if packing else self._cuts()
        self.count = self._packed_count() if packing else len(self.cuts) + 1

    def __len__(self) -> int:
        return self.count

    def shuffled(self, *seeds: int) -> list[list[int]]:
        """The batches as positions of pairs, each once, in the random order of these seeds: the run's and the epoch."""
        generator = np.random.default_rng(seeds)
        pairs = generator.permutation(len(self.sources))
        if not self.packing:
            pairs = pairs[self._order(pairs)]
        batches = np.split(pairs, self._packed_cuts(pairs) if self.packing else self.cuts)
        return [batches[number].tolist() for number in generator.permutation(len(batches))]

    def _order(self, pairs: np.ndarray) -> np.ndarray:
        """Where the pairs go in the buckets; stable, so that pairs of equal lengths stay as they come."""
        by_target = np.lexsort((self.sources[pairs], self.targets[pairs]))
        sources, targets = self.sources[pairs][by_target], self.targets[pairs][by_target]
        tokens = (sources + targets).cumsum(dtype=np.int64)
        buckets = max(round(math.sqrt(tokens[-1] / self.max_tokens)), 1)
        bucket = (tokens - 1) * buckets // tokens[-1]
        there_and_back = np.where(bucket % 2, -sources, sources)
        return by_target[np.lexsort((targets, there_and_back, bucket))]

    def _cuts(self) -> list[int]:
        pairs = np.arange(len(self.sources))
        order = self._order(pairs)
        begins = [0]
        longest_source = longest_target = 0
        lengths = zip(self.sources[order].tolist(), self.targets[order].tolist(), strict=True)
        for place, (source, target) in enumerate(lengths):
            longest_source, longest_target = max(longest_source, source), max(longest_target, target)
            if (place + 1 - begins[-1]) * (longest_source + longest_target) > self.max_tokens:
                begins.append(place)
                longest_source, longest_target = source, target
        ends = [*begins[1:], len(order)]
        sizes = [end - begin for begin, end in zip(begins, ends, strict=True)]
        while len(sizes) % self.multiple_of:  # halve the largest, so that every process has as many
            largest = sizes.index(max(sizes))
            if sizes[largest] == 1:
                raise self._indivisible()
            sizes[largest : largest + 1] = [sizes[largest] // 2, sizes[largest] - sizes[largest] // 2]
        return np.cumsum(sizes)[:-1].tolist()

    def _packed_count(self) -> int:
        lengths = (self.sources + self.targets).astype(np.int64)
        # A batch ends with the first pair that reaches its share, so that a share must leave room for the longest pair.
        room = self.max_tokens - int(lengths.max()) + 1
        count = math.ceil(lengths.sum() / room / self.multiple_of) * self.multiple_of
        if count <= len(lengths):
            return count
        if len(lengths) % self.multiple_of:
            raise self._indivisible()
        return len(lengths)  # each pair fits by itself

    def _indivisible(self) -> ValueError:
        return ValueError(
            f"{len(self.sources)} pairs do not make equal numbers of batches of {self.max_tokens} tokens for "
            f"{self.multiple_of} processes: raise max_tokens_per_batch"
        )

    def _packed_cuts(self, pairs: np.ndarray) -> np.ndarray:
        """Where equal shares of the tokens end, with at least one pair in each batch."""
        tokens = (self.sources + self.targets)[pairs].cumsum(dtype=np.int64)
        number = np.arange(1, self.count)
        cuts = np.searchsorted(tokens, number * (tokens[-1] / self.count)) + 1
        cuts = np.maximum.accumulate(cuts - number) + number
        return np.minimum(cuts, len(pairs) - self.count + number)
