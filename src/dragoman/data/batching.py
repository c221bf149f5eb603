"""Batches of similar length for inference, with the results in the order of the inputs.

Sorting by length keeps padding, and with it wasted computation, low. A stream is sorted within windows, so that memory
stays bounded whatever its length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar


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
