"""Batches of a token budget, of packed rows and of streams: exact, shuffled by seed and epoch, equal after resuming."""

import json
import re

import pytest
import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from safetensors.torch import load_file
from transformers.trainer_pt_utils import LengthGroupedSampler

import reference
from dragoman.data.batching import TokenBudgetBatches
from dragoman.models import varlen
from dragoman.training import checks, run
from dragoman.training.arguments import load_experiment
from dragoman.training.batches import LengthGroups, StreamedBatches, TokenBudgetSampler, side_lengths
from dragoman.training.run import train
from training.experiments import write_experiment, write_pairs
from training.test_run import assert_equal_weights, interrupt_in_step


@pytest.fixture(scope="module")
def lengths():
    """Lengths of 307 sources and targets; long ones are rare, and the two sides go together."""
    generator = torch.Generator().manual_seed(5)
    sources = (1 + 40 * torch.rand(307, generator=generator) ** 3).long()
    targets = (sources + torch.randint(-3, 5, (307,), generator=generator)).clamp(min=1)
    return sources.tolist(), targets.tolist()


def cost(batch, lengths):
    sources, targets = lengths
    return len(batch) * (max(sources[pair] for pair in batch) + max(targets[pair] for pair in batch))


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("packing", [False, True])
def test_every_pair_once_and_within_the_budget(lengths, processes, packing):
    made = TokenBudgetBatches(*lengths, 200, multiple_of=processes, packing=packing)
    for epoch in range(4):
        shares = [
            list(TokenBudgetSampler(made, 7, lambda epoch=epoch: epoch, rank, processes)) for rank in range(processes)
        ]
        assert {len(share) for share in shares} == {len(made) // processes}
        every = [batch for share in shares for batch in share]
        assert sorted(pair for batch in every for pair in batch) == list(range(307))
        assert min(map(len, every)) >= 1
        if packing:
            assert max(sum(lengths[0][pair] + lengths[1][pair] for pair in batch) for batch in every) <= 200
        else:
            assert max(cost(batch, lengths) for batch in every) <= 200


def test_little_padding(lengths):
    made = TokenBudgetBatches(*lengths, 400)
    real = sum(map(sum, lengths))
    padded = sum(cost(batch, lengths) for batch in made.shuffled(1, 0))
    order = torch.randperm(307, generator=torch.Generator().manual_seed(0)).tolist()
    at_random = sum(cost(order[begin : begin + 16], lengths) for begin in range(0, 307, 16))
    assert real / padded > 0.85  # with 17 batches; 0.99 with hundreds
    assert real / at_random < 0.6


def test_the_order_comes_from_seed_and_epoch_alone(lengths):
    made = TokenBudgetBatches(*lengths, 200)
    state = torch.get_rng_state()
    first = made.shuffled(1, 0)
    assert torch.equal(state, torch.get_rng_state())
    assert made.shuffled(1, 0) == first == TokenBudgetBatches(*lengths, 200).shuffled(1, 0)
    for other in (made.shuffled(1, 1), made.shuffled(2, 0)):
        assert len(other) == len(first)
        assert sorted(map(sorted, other)) != sorted(map(sorted, first))  # other pairs meet, too


@pytest.mark.parametrize("packing", [False, True])
def test_budgets_that_cannot_be_kept(packing):
    with pytest.raises(ValueError, match="a pair has 9 source and 4 target tokens, more than the 12 of max_tokens"):
        TokenBudgetBatches([2, 9], [3, 4], 12, packing=packing)
    with pytest.raises(ValueError, match="3 pairs do not make equal numbers of batches of 13 tokens for 2 processes"):
        TokenBudgetBatches([9, 9, 9], [4, 4, 4], 13, multiple_of=2, packing=packing)


def test_lengths_are_read_from_the_table():
    rows = [{"input_ids": [5] * (n % 3 + 1), "labels": [6] * (n + 2), "length": 0} for n in range(5)]
    sources, targets = side_lengths(Dataset.from_list(rows).select([3, 0, 4]))
    assert (sources.tolist(), targets.tolist()) == ([1, 1, 2], [5, 2, 6])


# ---- in a run ----

TRAIN_ONLY = {"validation": None, "test": None}
WITHOUT_EVALUATION = {"eval_strategy": "no", "load_best_model_at_end": False}
GROUPED = "group_by_length"
BUDGET = {"per_device_train_batch_size": None, "max_tokens_per_batch": 40, "max_steps": -1, "num_train_epochs": 2}


def experiment(folder, *overrides, **sections):
    folder.mkdir(exist_ok=True)
    training = {**BUDGET, **sections.pop("training", {})}
    path = write_experiment(folder, training=training, **sections)
    text = re.sub(r"\n +\w+: null", "", path.read_text())  # keys of the tiny experiment that are taken away
    path.write_text(text)
    return load_experiment(path, overrides)


@pytest.fixture
def seen(monkeypatch):
    """Sources of every training batch, as ids."""
    found = []

    class Watching(run.Seq2SeqCollator):
        def __call__(self, features, return_tensors=None):
            found.append([tuple(row["input_ids"]) for row in features])
            return super().__call__(features, return_tensors)

    monkeypatch.setattr(run, "Seq2SeqCollator", Watching)
    return found


def log_of(output):
    return json.loads((output / "trainer_state.json").read_text())


def test_epochs_and_steps_are_right(tmp_path, seen):
    output = train(experiment(tmp_path, data=TRAIN_ONLY, training=WITHOUT_EVALUATION))
    state = log_of(output)
    steps = len(seen) // 2
    assert state["max_steps"] == state["global_step"] == 2 * steps
    assert state["epoch"] == 2
    for epoch in (seen[:steps], seen[steps:]):
        assert sum(map(len, epoch)) == 23
    assert seen[:steps] != seen[steps:]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("step", [3, 9])
def test_a_resumed_run_sees_the_same_batches(tmp_path, monkeypatch, packing, step):
    changes = {"packing": packing, "save_steps": 100, "eval_steps": 100, "load_best_model_at_end": False}
    whole = train(experiment(tmp_path / "whole", training=changes))
    assert log_of(whole)["global_step"] >= 10
    name = "PackingCollator" if packing else "Seq2SeqCollator"
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, step, name)
        with pytest.raises(KeyboardInterrupt):
            train(experiment(tmp_path / "broken", training=changes))
    resumed = train(experiment(tmp_path / "broken", training=changes), resume=True)
    assert_equal_weights(resumed, whole)


@pytest.mark.parametrize("packing", [False, True])
def test_attention_over_real_tokens_alone(tmp_path, monkeypatch, varlen_on_cpu, packing):
    """A run makes the steps of a run with masks, by kernels that stand for a GPU's; evaluations have none of them."""
    training = []

    def record(*args, **kwargs):
        training.append(torch.is_grad_enabled())
        return reference.varlen_attn(*args, **kwargs)

    monkeypatch.setattr(checks, "check_kernel", lambda device, dtype, head_dim: None)
    monkeypatch.setattr(varlen, "varlen_attn", record)
    found = []
    for name in ("sdpa", "varlen"):
        changes = {"packing": packing, "attn_implementation": name, "max_steps": 4, "logging_steps": 1}
        log = log_of(train(experiment(tmp_path / name, training=changes)))["log_history"]
        found.append([(entry["loss"], entry["grad_norm"]) for entry in log if "loss" in entry])
        assert bool(training) == (name == "varlen")
    assert all(training)
    assert len(found[0]) == 4
    torch.testing.assert_close(torch.tensor(found[1]), torch.tensor(found[0]), rtol=1e-4, atol=1e-4)


def test_groups_of_like_lengths_are_the_same_after_resuming(tmp_path, monkeypatch):
    """In the second epoch, with dropout, which draws from the global random numbers."""
    changes = {"max_tokens_per_batch": None, "per_device_train_batch_size": 4, "train_sampling_strategy": GROUPED}
    changes |= {"save_steps": 100, "eval_steps": 100, "load_best_model_at_end": False}
    whole = train(experiment(tmp_path / "whole", training=changes))
    assert log_of(whole)["global_step"] == 12
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 9)
        with pytest.raises(KeyboardInterrupt):
            train(experiment(tmp_path / "broken", training=changes))
    assert_equal_weights(train(experiment(tmp_path / "broken", training=changes), resume=True), whole)


def test_the_order_of_groups_comes_from_seed_and_epoch_alone(lengths):
    orders = []
    for seed, epoch in ((1, 0), (1, 0), (1, 1), (2, 0)):
        torch.rand(1)
        orders.append(list(LengthGroups(LengthGroupedSampler(8, lengths=lengths[0]), seed, lambda epoch=epoch: epoch)))
        assert sorted(orders[-1]) == list(range(307))
    assert orders[0] == orders[1]
    assert orders[0] not in orders[2:]


def test_accumulation_is_exact(tmp_path):
    """Two micro-batches of unlike sizes make the step of one batch of both."""
    settings = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 1e9, "num_train_epochs": 1}
    model = {"dropout": 0.0}
    one = train(experiment(tmp_path / "one", training={**settings, "max_tokens_per_batch": 10_000}, model=model))
    assert log_of(one)["global_step"] == 1
    accumulation = {**settings, "max_tokens_per_batch": 40, "gradient_accumulation_steps": 50}
    many = train(experiment(tmp_path / "many", training=accumulation, model=model))
    assert log_of(many)["global_step"] == 1
    for name, weight in load_file(one / "model.safetensors").items():
        torch.testing.assert_close(load_file(many / "model.safetensors")[name], weight, rtol=1e-5, atol=1e-7)


# ---- streams ----


def rows_of(shards):
    for shard in shards:
        for number in range(17):
            yield {"input_ids": [100 * shard + number] * (1 + number % 5), "labels": [7] * (1 + number % 3)}


def stream(shards):
    return IterableDataset.from_generator(rows_of, gen_kwargs={"shards": list(range(shards))})


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("budget", [None, 24])
def test_streams_are_shared_out_exactly(shards, budget):
    """Two processes: within a pass no row comes twice and none is missing, and neither process ever runs dry."""
    shares, sizes = [], (9, 8)
    for rank in range(2):
        rows = split_dataset_by_node(stream(shards).shuffle(seed=3, buffer_size=10), rank, 2)
        made = iter(StreamedBatches(rows, 3, window=10, batch_size=4, max_tokens=budget, packing=False))
        passes = [[], []]
        for one in passes:
            own = sizes[rank] if shards == 1 else 34
            while len(one) < own:
                batch = next(made)
                if budget:
                    sides = [max(len(row[side]) for row in batch) for side in ("input_ids", "labels")]
                    assert len(batch) * sum(sides) <= budget
                one.extend(row["input_ids"][0] for row in batch)
            assert len(one) == own
        shares.append(passes)
    every = [100 * shard + number for shard in range(shards) for number in range(17)]
    for number in range(2):
        assert sorted(shares[0][number] + shares[1][number]) == every
    assert shares[0][0] != shares[0][1]


def test_a_worker_without_a_file_ends():
    nothing = IterableDataset.from_generator(rows_of, gen_kwargs={"shards": [0]}).filter(lambda row: False)
    assert list(StreamedBatches(nothing, 3, window=10, batch_size=4, max_tokens=None, packing=False)) == []


STREAM = {"max_steps": 7, "num_train_epochs": None, "eval_steps": 4, "save_steps": 4, "load_best_model_at_end": False}


def streaming(folder, *overrides, **training):
    folder.mkdir(exist_ok=True)
    for number in range(3):
        write_pairs(folder / f"part-{number}.jsonl", 7, first=7 * number)
    data = {"train": str(folder / "part-*.jsonl"), "streaming": True, "shuffle_buffer": 8}
    data |= {"max_source_length": 9, "max_target_length": 9}
    return experiment(folder, *overrides, training={**STREAM, **training}, data=data)


@pytest.mark.parametrize("settings", [
    {}, {"packing": True}, {"max_tokens_per_batch": None, "per_device_train_batch_size": 4},
    {"dataloader_num_workers": 2},
])  # fmt: skip
def test_a_stream_goes_on_where_it_stopped(tmp_path, settings):
    settings = {"lr_scheduler_type": "constant", **settings}
    whole = train(streaming(tmp_path / "whole", **settings))
    train(streaming(tmp_path / "part", **settings, max_steps=4))
    resumed = train(streaming(tmp_path / "part", **settings), resume=True)
    assert log_of(resumed)["global_step"] == 7
    assert_equal_weights(resumed, whole)


def test_a_stream_of_which_nothing_is_left(tmp_path):
    with pytest.raises(ValueError, match=r"data\.train: no pair is left of the stream, so that nothing was trained"):
        train(streaming(tmp_path, "data.overlong=drop", "data.max_source_length=2", "tokenizer.kind=char"))
    assert not (tmp_path / "run" / "complete.json").exists()
