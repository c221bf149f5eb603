"""The guides are true: each is followed from top to bottom, with tiny models and few steps."""

import ast
import os
import re
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import MarianConfig, MarianMTModel
from typer.testing import CliRunner

import dragoman.cli
from commands import run_line
from dragoman.data.tokenizers import train_tokenizer
from dragoman.settings import parse_yaml
from dragoman.training.arguments import DataArguments, TokenizerArguments, TrainingArguments, load_experiment
from dragoman.training.run import train
from hub.server import USER, serve, used_here
from training.experiments import WORDS, write_experiment, write_pairs


ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def blocks(page: str) -> list[tuple[str, str]]:
    """The fenced blocks of a page in their order, each with its language."""
    return re.findall(r"^```(bash|python)\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.MULTILINE | re.DOTALL)


def test_every_key_is_explained_with_its_default():
    page = (ROOT / "docs" / "keys.md").read_text(encoding="utf-8")
    written = {
        key: parse_yaml(default, key) for key, default in re.findall(r"^\| `(\S+)` \| (.*?) ?\| ", page, re.MULTILINE)
    }
    expected = {"data.train": None}
    for section, arguments in (
        ("data", DataArguments),
        ("tokenizer", TokenizerArguments),
        ("training", TrainingArguments),
    ):
        for key in fields(arguments):
            if key.name in vars(arguments).get("__annotations__", {}) and key.name not in (
                "train",
                "dataloader_pin_memory",
            ):
                default = key.default_factory() if key.default is MISSING else key.default
                expected[f"{section}.{key.name}"] = default
    assert written == expected


def stock_marian(folder: Path) -> Path:
    """What stands for a checkpoint on the Hub."""
    tokenizer = train_tokenizer(WORDS, "word")
    sizes = {"d_model": 12, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 17, "decoder_ffn_dim": 19}
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    torch.manual_seed(0)
    model = MarianMTModel(MarianConfig(vocab_size=len(tokenizer), forced_eos_token_id=None, **sizes, **heads, **ids))
    model.generation_config.max_length = 9
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_fine_tuning(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    stock = stock_marian(tmp_path / "stock")
    for number, split in enumerate(("train", "validation", "test")):
        write_pairs(tmp_path / f"{split}.jsonl", 6, first=6 * number)
    page = blocks("fine_tuning.md")
    assert [language for language, _ in page] == ["bash", "bash", "python", "bash"]
    with serve() as hub, used_here(hub, tmp_path / "cache"):
        for language, block in page:
            if language == "python":
                exec(block, {})
                continue
            for line in block.splitlines():
                # Three steps are all warm-up, and the best of three equals is the first.
                few_steps = " training.warmup_steps=0 training.load_best_model_at_end=false" * (
                    "dragoman train" in line
                )
                run_line(line.replace("Helsinki-NLP/opus-mt-en-it", str(stock)) + few_steps)
        assert "model.safetensors" in hub.commits(f"{USER}/my-translator")[0].files
    names = ("opus-en-it", "opus-all", "opus-mine")
    before, every, after = (load_file(f"runs/{name}/model.safetensors") for name in names)
    # Key biases get no gradient, for the softmax does not see them.
    assert [name for name in before if torch.equal(before[name], every[name]) and "k_proj.bias" not in name] == []
    assert "fine-tuned from `runs/opus-en-it`" in Path("runs/opus-all/README.md").read_text()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if re.search(r"(q|k|v|o|up|down)_proj\.weight", name)}


def test_export(tmp_path, monkeypatch, capsys):
    pytest.importorskip("ctranslate2", reason="needs the extra [export]")
    monkeypatch.chdir(tmp_path)
    tokenizer = train_tokenizer(WORDS, "word")
    torch.manual_seed(0)
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = dragoman.preset(
        "modern", vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1, **heads
    )
    model = dragoman.DragomanForConditionalGeneration(config)
    model.save_pretrained("runs/quickstart")
    tokenizer.save_pretrained("runs/quickstart")
    for language, block in blocks("export.md"):
        if language == "bash":
            for line in block.splitlines():
                assert "is now a model for" in run_line(line)
        else:
            exec(block, {})
            (text,) = ast.literal_eval(capsys.readouterr().out.splitlines()[-1])
            assert set(text.split()) <= set(WORDS)


@pytest.mark.slow
def test_several_processes(tmp_path):
    """Two of them, each with half the batch, end with the weights of one."""
    on_gpus, on_cpus, decoding = (block.strip() for _, block in blocks("multi_gpu.md"))
    assert on_gpus.replace("training.bf16=true", "training.use_cpu=true") == on_cpus
    assert (ROOT / "configs" / "quickstart.yaml").is_file()
    # Two steps, because the last one of a pass has fewer pairs than two processes share out.
    training = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 2, "weight_decay": 0.0}
    path = write_experiment(tmp_path, model={"dropout": 0.0}, training=training)
    alone, together = tmp_path / "alone", tmp_path / "together"
    train(load_experiment(path, [f"training.output_dir={alone}", "training.per_device_train_batch_size=8"]))
    command = on_cpus.replace(
        "accelerate launch", f"{sys.executable} -m accelerate.commands.launch --main_process_port 0"
    )
    command = command.replace("configs/quickstart.yaml", f"{path} training.output_dir={together}")
    process = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.count("vocabulary: 11 joint") == 1  # one process speaks
    assert (together / "complete.json").is_file()
    weights, others = (load_file(folder / "model.safetensors") for folder in (alone, together))
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=0, atol=1e-5)
    assert (alone / "test_results.json").read_text() == (together / "test_results.json").read_text()

    lines = "".join(f"{word} {WORDS[0]}\n" for word in WORDS)  # seven
    expected = CliRunner().invoke(dragoman.cli.app, ["generate", str(alone), "--batch-size", "2"], input=lines)
    command = decoding.replace(
        "accelerate launch", f"{sys.executable} -m accelerate.commands.launch --main_process_port 0"
    ).replace("runs/quickstart", f"{alone} --batch-size 2")
    (tmp_path / "lines.txt").write_text(lines)
    process = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout == expected.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []
    assert f"docs/{page.name}" in (ROOT / "README.md").read_text()
