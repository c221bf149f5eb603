"""One stream of inputs shared by several processes, as `accelerate launch` starts them: nothing lost, nothing doubled.

The main process alone reads the inputs. It sends a window of them to all; each takes its share of the batches, and all
get the results of all. The batches are those of a single process, and so are the results, unless drawn at random.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from dragoman.data.batching import length_sorted_batches


Item = TypeVar("Item")
Result = TypeVar("Result")


def launched_processes(device: str | None = None) -> PartialState | None:
    """The processes of `accelerate launch`, joined by this one; None where it is alone.

    Args:
        device: "cpu" keeps them off the GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    return PartialState(cpu=device == "cpu" or not torch.accelerator.is_available())


def map_in_processes(
    items: Iterable[Item],
    function: Callable[[list[Item]], Sequence[Result]],
    processes: PartialState,
    *,
    length: Callable[[Item], int],
    batch_size: int | None = None,
    max_tokens: int | None = None,
    window: int = 10_000,
) -> Iterator[Result]:
    """`map_in_batches` with the batches of every window dealt out to all processes.

    Args:
        items: read in the main process; the others' are left alone.
        processes: the state of this process.

    The other arguments are those of `map_in_batches`, as is what is yielded, in every process; each has to go on to the
    end, for the others wait for it.

    Raises:
        ValueError: as `map_in_batches`.
        RuntimeError: what the function raised in another process, or reading in the main one; but ValueError and
            OSError of reading, mistakes in the inputs, are the same everywhere. An error in one process ends all.
    """
    if window < 1:
        raise ValueError(f"window is {window}; it must be at least 1")
    stream = iter(items)
    while chunk := _read_by_main(lambda: list(islice(stream, window)), processes):
        batches = length_sorted_batches([length(item) for item in chunk], batch_size=batch_size, max_tokens=max_tokens)
        # The longest come first: dealt out in turn, every process gets batches of all lengths.
        mine = batches[processes.process_index :: processes.num_processes]
        results: dict[int, Result] = {}
        failure: Exception | None = None
        try:
            for batch in mine:
                results.update(zip(batch, function([chunk[position] for position in batch]), strict=True))
        except Exception as error:  # raised below, when the others know of it
            failure = error
        shares = gather_object([(results, None if failure is None else repr(failure))])
        if failure is not None:
            raise failure
        for number, (found, other_failure) in enumerate(shares):
            if other_failure is not None:
                raise RuntimeError(f"process {number} failed: {other_failure}")
            results.update(found)
        yield from (results[position] for position in range(len(chunk)))


def _read_by_main(read: Callable[[], list[Any]], processes: PartialState) -> list[Any]:
    """What the main process reads, in all processes; or what its reading raised."""
    message: list[Any] = [None]
    failure: Exception | None = None
    if processes.is_main_process:
        try:
            message = [read()]
        except (ValueError, OSError) as error:
            message, failure = [error], error
        except Exception as error:  # which others could not be sure to unpickle
            message, failure = [RuntimeError(f"process 0 failed: {error!r}")], error
    (found,) = broadcast_object_list(message)
    if failure is not None:
        raise failure
    if isinstance(found, Exception):
        raise found
    return found
