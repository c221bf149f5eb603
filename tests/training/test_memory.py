"""The estimate of memory: its parts against counting, and the whole against what a process really took."""

import re
import subprocess
import sys

import pytest
import torch
from transformers import Seq2SeqTrainingArguments

from conftest import FAMILIES, V, family
from dragoman.training.memory import estimate_memory


@pytest.fixture
def arguments(tmp_path):
    return lambda **given: Seq2SeqTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **given)


def test_weights_gradients_and_optimizer_are_counted(arguments):
    model = family("modern").build(dtype=torch.float32)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    for name, states in (("adamw_torch", 2), ("sgd", 0), ("adafactor", 0), ("adamw_torch_fused", 2)):
        found = estimate_memory(model, arguments(optim=name), 3, 7, 5)
        assert found.weights == 4 * numbers + buffers
        assert found.gradients == 4 * numbers
        assert found.optimizer == 4 * numbers * states
        assert found.total == found.weights + found.gradients + found.optimizer + found.activations
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    found = estimate_memory(model, arguments(), 3, 7, 5)
    assert found.gradients == 4 * model.lm_head.weight.numel()
    assert found.optimizer == 2 * found.gradients


@pytest.mark.parametrize("one", FAMILIES, ids=lambda one: one.name)
def test_it_leaves_no_trace_and_grows_with_the_batch(one, arguments):
    model = one.build(dtype=torch.float32)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    small, middle, large = (estimate_memory(model, arguments(), rows, 7, 5).activations for rows in (2, 4, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert large - middle == middle - small > 0
    assert estimate_memory(model, arguments(), 2, 14, 5).activations > small
    more_logits = 2 * 2 * 5 * V * 4  # twice: rows, tokens, ids, bytes
    assert estimate_memory(model, arguments(), 2, 7, 10).activations > small + more_logits


def test_the_logits_of_all_positions_are_never_there(arguments):
    model = family("modern").build(dtype=torch.float32, vocab_size=50_000)
    found = estimate_memory(model, arguments(), 64, 7, 40)
    assert 4 * 256 * 50_000 < found.activations < 0.5 * 4 * 64 * 40 * 50_000


def test_checkpointing_keeps_less(arguments):
    model = family("modern").build(dtype=torch.float32)
    full = estimate_memory(model, arguments(), 3, 7, 5).activations
    every_layer = estimate_memory(model, arguments(activation_checkpointing=True), 3, 7, 5).activations
    assert every_layer < 0.7 * full
    assert not model.is_activation_checkpointing
    every_second = {"every_n_layers": 2, "use_reentrant": False}
    found = estimate_memory(
        model, arguments(activation_checkpointing=True, activation_checkpointing_kwargs=every_second), 3, 7, 5
    )
    assert every_layer < found.activations < full


def test_several_ends_or_none(arguments):
    for ends in ([2, 3], None):
        model = family("modern").build(dtype=torch.float32, eos_token_id=ends)
        assert estimate_memory(model, arguments(), 3, 7, 5).activations > 0


def test_an_average_is_counted(arguments):
    model = family("modern").build(dtype=torch.float32)
    without, found = (estimate_memory(model, arguments(), 3, 7, 5, averaging=averaging) for averaging in (False, True))
    assert found.average == found.gradients == found.total - without.total
    assert "average" in str(found)


def test_the_sentence(arguments):
    found = estimate_memory(family("modern").build(dtype=torch.float32), arguments(), 3, 7, 5)
    size = r"\d+(\.\d)? [MG]B"
    assert re.fullmatch(
        f"about {size} at most: weights {size}, gradients {size}, optimizer {size}, "
        f"a batch of 3 x 7 source and 5 target tokens {size}",
        str(found),
    )


# Trains two steps as the Trainer does, and prints by how much the process grew and what was estimated.
MEASUREMENT = """
import sys, torch, transformers
from dragoman import preset
from dragoman.training.memory import estimate_memory
from transformers import AutoModelForSeq2SeqLM, Seq2SeqTrainingArguments

def peak():  # of this program: ru_maxrss begins with what the one that started it had
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

rows, source, target, name = *map(int, sys.argv[1:4]), sys.argv[4]
warm = torch.nn.Linear(64, 64)  # what the libraries load with the first backward pass is no part of the model
torch.optim.AdamW(warm.parameters()).step(lambda: warm(torch.ones(64, 64)).sum().backward())
start = peak()
model = AutoModelForSeq2SeqLM.from_config(preset(name, vocab_size=8000, encoder_layers=2, decoder_layers=2)).train()
estimate = estimate_memory(model, Seq2SeqTrainingArguments(output_dir=sys.argv[5], use_cpu=True), rows, source, target)
optimizer = torch.optim.AdamW(model.parameters())
for _ in range(2):
    ids, labels = torch.full((rows, source), 5), torch.full((rows, target), 5)
    count = torch.tensor(labels.numel())
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, num_items_in_batch=count).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print((peak() - start) / estimate.total)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["modern", "lstm_bahdanau"])
def test_the_process_grows_by_what_was_estimated(name, tmp_path):
    command = [sys.executable, "-c", MEASUREMENT, "16", "60", "40", name, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert 0.7 < float(result.stdout) < 1.5
