import json
import re

import numpy as np
import pytest
from PIL import Image
from transformers import T5Config, T5ForConditionalGeneration
from typer.testing import CliRunner

import dragoman.cli
from conftest import family
from dragoman.data.tokenizers import train_tokenizer
from dragoman.inference import attention_map, pictures
from dragoman.inference.pictures import CAUSAL, CROSS, SELF, heat_table, read_masks, save_attention, save_masks
from inference.tiny import learned_by_heart


@pytest.fixture(scope="module")
def by_heart():
    return learned_by_heart()


@pytest.fixture(scope="module")
def found(by_heart):
    return attention_map(*by_heart, "why not", "perché no")


def test_a_drawn_map_is_dark_where_the_weight_is(found, tmp_path):
    found.weights = np.full_like(found.weights, 0.05)
    found.weights[:, :, 1, 0] = 0.9
    assert save_attention(found, tmp_path / "new" / "map.png") == []
    picture = Image.open(tmp_path / "new" / "map.png").convert("RGB")
    dark = [
        (x, y)
        for x in range(0, picture.width // 2, 3)
        for y in range(0, picture.height, 3)
        if picture.getpixel((x, y)) == (8, 48, 107)
    ]
    assert dark  # one cell of the strongest blue, low on the left
    assert max(x for x, _ in dark) - min(x for x, _ in dark) < 80
    for ending in (".svg", ".pdf"):
        save_attention(found, tmp_path / f"map{ending}")
    assert (tmp_path / "map.pdf").read_bytes().startswith(b"%PDF")


def test_the_page_needs_nothing_else_and_escapes(found, tmp_path):
    found.source = "<script>alert(1)</script>"
    save_attention(found, tmp_path / "map.html")
    page = (tmp_path / "map.html").read_text(encoding="utf-8")
    assert "<script>alert(1)" not in page
    assert re.findall(r"https?://", page) == []
    assert re.search(r'title="perché → why: 0\.\d{3}"', page)
    assert heat_table(found, 1).count('class="chosen"') == 1


def test_the_raw_numbers_are_those_of_all_layers_and_heads(by_heart, tmp_path):
    found = attention_map(*by_heart, "why not", "perché no", layer=1)
    save_attention(found, tmp_path / "map.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "map.npy"), found.weights)
    about = json.loads((tmp_path / "map.json").read_text(encoding="utf-8"))
    assert about["rows"] == ["perché", "no", "</s>"]
    assert about["columns"] == ["why", "not", "</s>"]


def test_fonts_of_other_scripts(monkeypatch):
    assert pictures.fonts_for(["perché"]) == (["DejaVu Sans"], [])
    names, missing = pictures.fonts_for(["我爱你"])
    assert missing == [] if len(names) > 1 else "no font on this machine has '你我爱'" in missing[0]
    monkeypatch.setattr(pictures, "_installed_fonts", list)
    names, missing = pictures.fonts_for(["我爱你"])
    assert names == ["DejaVu Sans"]
    assert len(missing) == 1
    assert missing[0].startswith("no font on this machine has '你我爱', drawn as boxes: install one")


def test_masks_of_a_batch(by_heart, tmp_path):
    """Sources of three and two tokens; targets of three and two fed tokens."""
    picture = read_masks(*by_heart, ["why not", "yes"], ["perché no", "sì"])
    assert picture.source_tokens == [["why", "not", "</s>"], ["yes", "</s>", "<pad>"]]
    assert picture.target_tokens == [["<s>", "perché", "no"], ["<s>", "sì", "<pad>"]]
    real = np.array([[True] * 3, [True, True, False]])
    ahead = np.tril(np.ones((3, 3), dtype=bool))
    assert set(picture.masks) == {SELF, CAUSAL, CROSS}
    np.testing.assert_array_equal(picture.masks[SELF], np.broadcast_to(real[:, None], (2, 3, 3)))
    np.testing.assert_array_equal(picture.masks[CAUSAL], ahead[None] & real[:, None])
    np.testing.assert_array_equal(picture.masks[CROSS], np.broadcast_to(real[:, None], (2, 3, 3)))
    assert save_masks(picture, tmp_path / "masks.png") == []
    assert Image.open(tmp_path / "masks.png").width > 500


def test_masks_are_the_models_own(by_heart):
    """Unidirectional cross-attention is another mask."""
    model, tokenizer = by_heart
    model.config.attention_direction = "unidirectional"
    try:
        picture = read_masks(model, tokenizer, ["the moon"], ["la luna"])
    finally:
        model.config.attention_direction = "bidirectional"
    np.testing.assert_array_equal(picture.masks[CROSS][0], np.tril(np.ones((3, 3), dtype=bool)))


@pytest.mark.parametrize("name", ["bahdanau", "general", "edm"])
def test_masks_of_recurrent_models(name):
    model, tokenizer = family(name).build(), train_tokenizer(["a b c"], "word")
    picture = read_masks(model, tokenizer, ["a b c", "a"], ["a b", "c"])
    assert set(picture.masks) == {CROSS}
    expected = np.broadcast_to(picture.source_real[:, None], (2, 3, 4))
    if name == "edm":
        expected = expected & np.tril(np.ones((3, 4), dtype=bool))
    np.testing.assert_array_equal(picture.masks[CROSS], expected)


def test_models_of_other_packages_are_named():
    tokenizer = train_tokenizer(["a b c"], "word")
    config = T5Config(vocab_size=len(tokenizer), d_model=8, d_kv=4, num_heads=2, num_layers=1, d_ff=9)
    model = T5ForConditionalGeneration(config)
    with pytest.raises(ValueError, match="this 't5' model does not name its layers and heads as others do"):
        attention_map(model, tokenizer, "a b", "c")
    with pytest.raises(ValueError, match="masks are read from models of Dragoman, and this is a 't5'"):
        read_masks(model, tokenizer, ["a b"], ["c"])


@pytest.fixture(scope="module")
def folder(by_heart, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    for part in by_heart:
        part.save_pretrained(path)
    return path


def command(*arguments):
    return CliRunner().invoke(dragoman.cli.app, [str(argument) for argument in arguments])


def test_attention_on_the_command_line(folder, tmp_path):
    out = [option for name in ("a.png", "a.html", "a.npy") for option in ("--out", tmp_path / name)]
    result = command("attention", folder, "the moon", "--num-beams", "2", "--layer", "-1", "--head", "1", *out)
    assert result.exit_code == 0, result.stderr
    first, _, header, *rows = result.stdout.splitlines()
    assert first == "la luna"
    assert header.split() == ["output", "looked", "at", "weight", "entropy"]
    assert [row.split()[0] for row in rows] == ["la", "luna", "</s>"]
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "a.html", "a.npy", "a.json"}
    result = command("attention", folder, "the moon", "--target", "il cane", "--kind", "decoder", "--rows", "fed")
    assert result.stdout.splitlines()[3].split()[0] == "<s>"


def test_masks_on_the_command_line(folder, tmp_path):
    result = command("masks", folder, "the moon", "yes", "--out", tmp_path / "m.png")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"The masks are in {tmp_path}/m.png\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["attention", "the moon", "--out", "map.gif"],
            "--out map.gif: the name has to end in .png, ",
        ),
        (["attention", " "], "dragoman attention: the source is empty"),
        (["attention", "the moon", "--kind", "self"], "kind='self' is no kind of attention"),
        (["attention", "the moon", "--lair", "1"], "no such option: --lair; the nearest valid one is --layer"),
        (["masks", "the moon", "--target", "a", "--target", "b"], "1 sources need as many targets, not 2"),
        (["masks", "the moon", "--out", "masks.html"], "has to end in .png, .svg or .pdf"),
    ],
)
def test_mistakes_are_one_line(folder, arguments, sentence):
    result = command(arguments[0], folder, *arguments[1:])
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
