"""Which pairs meet in a training batch: samplers for data with a length, batches of streams without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, IterableDataset
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler

from dragoman.data.batching import TokenBudgetBatches


def side_lengths(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of every source and every target of encoded pairs, read from the Arrow table without its tokens."""
    lengths: dict[str, list[np.ndarray]] = {"input_ids": [], "labels": []}
    for table in dataset.with_format("arrow").iter(batch_size=10_000):
        for column, parts in lengths.items():
            parts.append(pc.list_value_length(table[column]).to_numpy())
    return np.concatenate(lengths["input_ids"]), np.concatenate(lengths["labels"])


class TokenBudgetSampler(BatchRebalanceSampler):
    """
    This process's share of the batches of an epoch: every one belongs to one process, and all have as many.

    A `BatchRebalanceSampler` by name only: the Trainer gives its instances, and no other sampler's, to the loader as a
    batch sampler, and knows that they are shared out among the processes already.

    Args:
        epoch: tells the epoch. Not `set_epoch`, which does not reach the sampler of a resumed run in several processes.
    """

    def __init__(
        self, batches: TokenBudgetBatches, seed: int, epoch: Callable[[], int], rank: int, processes: int
    ) -> None:
        self.batches = batches
        self.seed = seed
        self.current_epoch = epoch
        self.rank = rank
        self.processes = processes

    def __iter__(self) -> Iterator[list[int]]:
        yield from self.batches.shuffled(self.seed, self.current_epoch())[self.rank :: self.processes]

    def __len__(self) -> int:
        return len(self.batches) // self.processes


class LengthGroups(LengthGroupedSampler):
    """
    The order of `train_sampling_strategy: group_by_length`, from the seed and the epoch alone.

    A subclass, because the Trainer's own draws it from the global random numbers, which are neither those of the
    interrupted run nor, with dropout, the same in all processes.

    Args:
        stock: the Trainer's.
        epoch: as in `TokenBudgetSampler`.
    """

    def __init__(self, stock: LengthGroupedSampler, seed: int, epoch: Callable[[], int]) -> None:
        super().__init__(stock.batch_size, lengths=list(stock.lengths))
        self.seed = seed
        self.current_epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.current_epoch())
        return super().__iter__()


class StreamedBatches(torch.utils.data.IterableDataset):
    """
    Batches of encoded pairs from a stream, pass after pass without an end, so that no process waits for another that
    has a longer share. With a token budget, as many pairs as the window holds are read ahead and grouped by length.

    Args:
        rows: this process's share of the stream.
        batch_size: pairs of a batch, where there is no budget.
        max_tokens, packing: as in `TokenBudgetBatches`.
    """

    def __init__(
        self, rows: IterableDataset, seed: int, window: int, batch_size: int, max_tokens: int | None, packing: bool
    ) -> None:
        self.rows = rows
        self.seed = seed
        self.window = window if max_tokens else batch_size
        self.max_tokens = max_tokens
        self.packing = packing

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        for epoch in count():
            self.rows.set_epoch(epoch)
            rows = iter(self.rows)
            for number in count():
                window = list(islice(rows, self.window))
                if not window:
                    break
                yield from self._batches(window, epoch, number)
            if number == 0:  # of several workers, those without a file
                return

    def _batches(self, window: list[dict[str, Any]], epoch: int, number: int) -> Iterator[list[dict[str, Any]]]:
        if self.max_tokens is None:
            yield window
            return
        sources, targets = ([len(row[side]) for row in window] for side in ("input_ids", "labels"))
        batches = TokenBudgetBatches(sources, targets, self.max_tokens, packing=self.packing)
        for batch in batches.shuffled(self.seed, epoch, number):
            yield [window[position] for position in batch]
