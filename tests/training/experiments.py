"""A tiny experiment for the tests of training: 23 pairs, a model of width 12, seconds on one core."""

import gc
import json
import sys
from pathlib import Path

import yaml


WORDS = ["uno", "due", "tre", "quattro", "cinque", "sei", "sette"]


def shorten_trainings() -> None:
    """
    In this process, from now on. A tiny training takes half a second, and another whole one for what is left out: the
    picture of its curves, which test_watching.py has drawn, and the garbage of all libraries that the Trainer collects.
    """
    gc.freeze()
    if "dragoman.training.run" in sys.modules:
        sys.modules["dragoman.training.run"].plot_run = lambda log_history, path: None


SECTIONS = {
    "model": {
        "preset": "modern",
        "d_model": 12,
        "encoder_layers": 2,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 17,
        "decoder_ffn_dim": 19,
        "dropout": 0.1,
    },
    "tokenizer": {"kind": "word"},
    "training": {
        "use_cpu": True,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "learning_rate": 0.01,
        "logging_steps": 3,
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "save_total_limit": 9,
        "disable_tqdm": True,
    },
}


def training_section(folder: Path, steps: int, **keys) -> dict:
    """Of an experiment that is scored and saved once, after these steps."""
    often = dict.fromkeys(("max_steps", "eval_steps", "save_steps"), steps)
    return {**SECTIONS["training"], **often, "output_dir": str(folder / "run"), **keys}


def write_pairs(path: Path, count: int, first: int = 0) -> str:
    """Pairs whose target is the source turned round."""
    rows = []
    for number in range(first, first + count):
        words = [WORDS[(number * step + step) % len(WORDS)] for step in range(1, 2 + number % 4)]
        rows.append({"source": " ".join(words), "target": " ".join(reversed(words))})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_experiment(folder: Path, **changes) -> Path:
    """The tiny experiment as a file; `changes` are sections, merged key by key."""
    data = {
        "train": write_pairs(folder / "train.jsonl", 23),
        "validation": write_pairs(folder / "validation.jsonl", 5, first=23),
        "test": write_pairs(folder / "test.jsonl", 4, first=28),
    }
    sections = {name: dict(keys) for name, keys in {**SECTIONS, "data": data}.items()}
    sections["training"]["output_dir"] = str(folder / "run")
    for section, keys in changes.items():
        sections[section] = {**sections.get(section, {}), **keys}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path
