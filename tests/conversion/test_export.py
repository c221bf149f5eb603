"""`export` and `dragoman export`: what is written, and what is refused in one sentence."""

import importlib
import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

import dragoman.cli
from conftest import V, family
from dragoman.conversion import export
from dragoman.data.tokenizers import train_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of a model that can be exported, of one that cannot, and of a recurrent one."""
    home = tmp_path_factory.mktemp("saved")
    for name in ("modern", "learned", "gru"):
        family(name).build(dtype=torch.float32).save_pretrained(home / name)
        train_tokenizer(["abcdefghijklmnopqrs"], kind="char").save_pretrained(home / name)
    return home


def command(*arguments):
    return CliRunner().invoke(dragoman.cli.app, ["export", *map(str, arguments)])


def test_the_command(saved, tmp_path):
    pytest.importorskip("ctranslate2")
    out = tmp_path / "new" / "ct2"
    result = command(saved / "modern", out, "--format", "ctranslate2", "--quantization", "int8")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"{saved / 'modern'} is now a model for ctranslate2 in {out}, ")
    assert {file.name for file in out.iterdir()} >= {"model.bin", "config.json", "tokenizer.json"}
    again = command(saved / "modern", out, "--format", "ctranslate2")
    assert again.exit_code == 2
    assert again.stderr == f"dragoman export: {out} is not empty: choose a new folder\n"


def test_settings_that_stay_behind_are_named(saved, tmp_path, caplog):
    pytest.importorskip("ctranslate2")
    model = shutil.copytree(saved / "modern", tmp_path / "model")
    file = model / "generation_config.json"
    settings = json.loads(file.read_text())
    changes = {"num_beams": 3, "length_penalty": 0.0, "forced_bos_token_id": 0, "top_p": 0.9, "eos_token_id": 5}
    file.write_text(json.dumps({**settings, **changes}))
    caplog.set_level("WARNING", "dragoman")
    out = export(model, tmp_path / "out", format="ctranslate2")
    assert [record.getMessage() for record in caplog.records if record.name.startswith("dragoman")] == [
        f"{out} does not decode with all that the model was saved with: it does not hold num_beams=3, "
        "length_penalty=0.0, forced_bos_token_id=0."
    ]
    assert json.loads((out / "config.json").read_text())["eos_token"] == "b"
    file.write_text(json.dumps({**settings, "eos_token_id": [5, 2]}))
    second = export(model, tmp_path / "second", format="ctranslate2")
    assert caplog.records[-1].getMessage().endswith("it does not hold eos_token_id=[5, 2].")
    assert json.loads((second / "config.json").read_text())["eos_token"] == "b"


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("modern", {"format": "tflite"}, "format 'tflite' is unknown: use ctranslate2 or onnx"),
        (
            "modern",
            {"format": "ctranslate2", "quantization": "int4"},
            "quantization 'int4' is unknown to ctranslate2: use float32, int8, .*, bfloat16",
        ),
        ("modern", {"format": "onnx", "quantization": "int8"}, "quantization 'int8' is unknown to onnx: use float32"),
        ("gru", {"format": "ctranslate2"}, "of type 'dragoman_rnn', but ctranslate2 takes only dragoman"),
        ("learned", {"format": "ctranslate2"}, "cannot express qk_norm=True with decoder_attention_heads=2"),
        ("nothing", {"format": "ctranslate2"}, "nothing does not exist"),
    ],
)
def test_refusals(saved, tmp_path, name, options, sentence):
    pytest.importorskip("ctranslate2")
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        export(saved / name, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package(saved, tmp_path, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name="ctranslate2")

    monkeypatch.setattr(importlib.import_module(export.__module__), "import_module", missing)
    with pytest.raises(ValueError, match=r"needs ctranslate2, .*: pip install 'dragoman\[export\]'"):
        export(saved / "modern", tmp_path / "out", format="ctranslate2")


def test_a_vocabulary_in_the_order_of_its_ids(saved, tmp_path):
    pytest.importorskip("ctranslate2")
    out = export(saved / "modern", tmp_path / "ct2", format="ctranslate2")
    lines = (out / "shared_vocabulary.json").read_text()
    assert lines.index("<s>") < lines.index("<pad>") < lines.index("</s>") < lines.index("<unk>")
    assert lines.count('"') == 2 * V
