"""Several processes share one stream: the outputs are those of one process, in the same order, each once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import PartialState

from dragoman.inference.processes import launched_processes, map_in_processes
from dragoman.inference.translate import translate
from inference.tiny import SOURCES, learned_by_heart


LAUNCH_FILE = Path(__file__).parents[2] / "configs" / "accelerate" / "ddp_cpu.yaml"
# Every process writes what it got and how many batches it decoded itself. Inputs of the second one must not be read.
WORKER = """
import json, os, sys
from dragoman.inference.loading import load
from dragoman.inference.processes import launched_processes
from dragoman.inference.translate import translate_stream

folder, cases = sys.argv[1], json.load(open(sys.argv[2]))
processes = launched_processes()
rank = processes.process_index
model, tokenizer = load(folder, "cpu")
decode, batches, found = model.generate, [], []
model.generate = lambda **arguments: batches.append(1) or decode(**arguments)
for sentences, arguments in cases:
    batches.clear()
    read = iter(sentences) if rank == 0 else (1 / 0 for _ in range(1))
    try:
        stream = translate_stream(model, tokenizer, read, processes=processes, **arguments)
        outputs = [list(map(vars, one)) for one in stream]
    except (ValueError, RuntimeError) as error:
        outputs = f"{type(error).__name__}: {error}"
    found.append([outputs, len(batches)])
model.generate = lambda **arguments: 1 / 0 if rank == 1 else decode(**arguments)
try:
    list(translate_stream(model, tokenizer, iter(cases[0][0]), processes=processes, batch_size=1))
except (RuntimeError, ZeroDivisionError) as error:
    found.append(f"{type(error).__name__}: {error}")
model.generate = decode
try:
    list(translate_stream(model, tokenizer, (1 / 0 for _ in range(1)), processes=processes))
except (RuntimeError, ZeroDivisionError) as error:
    found.append(f"{type(error).__name__}: {error}")
json.dump(found, open(f"{sys.argv[2]}.{rank}", "w"))
processes.destroy_process_group()
"""

LINES = [*SOURCES[:4], "", *SOURCES[4:]]
CASES = [
    (LINES, {"batch_size": 2}),
    (LINES, {"max_tokens_per_batch": 20, "window": 4, "num_beams": 3, "num_return_sequences": 2}),  # 11 = 4 + 4 + 3
    (LINES[:1], {}),  # nothing for the second
    ([], {}),
    ([*LINES[:3], None], {"window": 2}),
]


def test_two_processes_give_what_one_gives(tmp_path):
    model, tokenizer = learned_by_heart()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "cases.json").write_text(json.dumps(CASES))
    process = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file", LAUNCH_FILE,
         "worker.py", "model", "cases.json"],
        cwd=tmp_path, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"cases.json.{rank}").read_text()) for rank in range(2))
    assert second.pop().startswith("RuntimeError: process 0 failed: ZeroDivisionError")  # while reading
    assert first.pop().startswith("ZeroDivisionError")
    assert first[-1].startswith("RuntimeError: process 1 failed: ZeroDivisionError")
    assert second[-1].startswith("ZeroDivisionError")
    outputs = [found for found, _ in first[:-1]]
    assert outputs == [found for found, _ in second[:-1]]
    for (sentences, arguments), found in zip(CASES[:-1], outputs, strict=False):
        settings = {name: value for name, value in arguments.items() if name != "window"}
        expected = translate(model, tokenizer, sentences, **settings)
        assert [[one["token_ids"] for one in row] for row in found] == [
            [one.token_ids for one in row] for row in expected
        ]
        assert [one["score"] for row in found for one in row] == pytest.approx(
            [one.score for row in expected for one in row], abs=1e-5
        )
    assert outputs[-1] == "ValueError: line 4 is None: each has to be a string."
    batches = [[count for _, count in found[:-1]] for found in (first, second)]
    assert [batches[rank][0] for rank in range(2)] == [3, 2]  # of the empty line alone there is nothing to decode
    assert [batches[rank][2:4] for rank in range(2)] == [[1, 0], [0, 0]]


def test_one_process_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert launched_processes() is None
    batches = []
    found = map_in_processes(
        iter(range(7)), lambda batch: batches.append(batch) or [-one for one in batch], PartialState(cpu=True),
        length=lambda one: one, batch_size=2, window=3,
    )  # fmt: skip
    assert list(found) == [0, -1, -2, -3, -4, -5, -6]
    assert batches == [[2, 1], [0], [5, 4], [3], [6]]
