import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dragoman.data.batching import TokenBudgetBatches, length_sorted_batches, map_in_batches


@given(
    lengths=st.lists(st.integers(0, 9), max_size=30),
    batch_size=st.none() | st.integers(1, 7),
    max_tokens=st.none() | st.integers(1, 40),
)
def test_batches_hold_everything_once_within_the_limits(lengths, batch_size, max_tokens):
    if batch_size is None and max_tokens is None:
        batch_size = 5
    batches = length_sorted_batches(lengths, batch_size=batch_size, max_tokens=max_tokens)
    assert sorted(itertools.chain(*batches)) == list(range(len(lengths)))
    for batch in batches:
        sizes = [lengths[position] for position in batch]
        assert sizes == sorted(sizes, reverse=True)
        assert batch_size is None or len(batch) <= batch_size
        assert max_tokens is None or len(batch) == 1 or len(batch) * sizes[0] <= max_tokens
    for batch, following in itertools.pairwise(batches):
        assert lengths[batch[-1]] >= lengths[following[0]], "the longest come first"
        full = batch_size is not None and len(batch) == batch_size
        wide = max_tokens is not None and (len(batch) + 1) * lengths[batch[0]] > max_tokens
        assert full or wide, "a batch ends only at a limit"


def test_batches_by_count_and_by_tokens():
    lengths = [3, 9, 2, 2, 5]
    assert length_sorted_batches(lengths, batch_size=2) == [[1, 4], [0, 2], [3]]
    assert length_sorted_batches(lengths, max_tokens=6) == [[1], [4], [0, 2], [3]]


@pytest.mark.parametrize("window", [1, 3, 100])
@pytest.mark.parametrize("limits", [{"batch_size": 2}, {"max_tokens": 5}])
def test_results_come_in_the_order_of_the_items(window, limits):
    items = ["a", "bbb", "cc", "dddd", "", "e", "ff"]
    sizes = []

    def upper(batch):
        sizes.append(len(batch))
        return [item.upper() for item in batch]

    assert list(map_in_batches(iter(items), upper, length=len, window=window, **limits)) == [x.upper() for x in items]
    assert max(sizes) == 1 if window == 1 else max(sizes) > 1


def test_a_stream_is_read_one_window_at_a_time():
    taken = []

    def endless():
        for number in itertools.count():
            taken.append(number)
            yield number

    results = map_in_batches(endless(), lambda batch: batch, length=lambda number: number % 4, batch_size=2, window=6)
    assert list(itertools.islice(results, 7)) == list(range(7))
    assert len(taken) == 12


def test_refused_arguments():
    with pytest.raises(ValueError, match="batches need a limit: batch_size, max_tokens or both"):
        length_sorted_batches([1])
    with pytest.raises(ValueError, match="max_tokens is 0; it must be at least 1"):
        length_sorted_batches([1], max_tokens=0)
    with pytest.raises(ValueError, match="window is 0; it must be at least 1"):
        list(map_in_batches([1], list, length=int, batch_size=1, window=0))
    with pytest.raises(ValueError, match="zip"):
        list(map_in_batches([1, 2], lambda batch: batch[1:], length=int, batch_size=2))


def test_a_pair_as_long_as_the_budget_among_few():
    """As in the last window of a stream: whatever the shares would be, single pairs fit."""
    made = TokenBudgetBatches([30, 4, 5], [30, 3, 6], 60, packing=True)
    assert sorted(made.shuffled(1, 0)) == [[0], [1], [2]]
