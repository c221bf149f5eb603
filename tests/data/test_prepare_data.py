import gzip
import json

import pytest
import typer
from typer.testing import CliRunner

from commands import load_script
from dragoman.data.reading import read_pairs


@pytest.fixture(scope="module")
def script():
    return load_script("prepare_data")


@pytest.fixture(scope="module")
def run(script):
    app = typer.Typer()
    app.command()(script.main)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


ENGLISH = """\
Package: cat
Description-md5: 0001
Description-en: small feline
 It eats mice. It sleeps
 all day.
 .
 Features:
  * soft  fur
  * long
    tail

Package: dog
Description-md5: 0002
Description-en: barking animal
"""
ITALIAN = """\
Package: cat
Description-md5: 0001
Description-it: piccolo felino
 Mangia topi. Dorme tutto
 il giorno.
 .
 Caratteristiche:
  - pelo morbido,
  - coda lunga.
"""


def test_descriptions_are_aligned(script):
    english, italian = script.parse_descriptions(ENGLISH, "en"), script.parse_descriptions(ITALIAN, "it")
    assert english.keys() == {("cat", "0001"), ("dog", "0002")}
    assert english["dog", "0002"] == "barking animal"
    assert list(script.align_descriptions(english["cat", "0001"], italian["cat", "0001"])) == [
        ("small feline", "piccolo felino"),
        ("It eats mice.", "Mangia topi."),
        ("It sleeps all day.", "Dorme tutto il giorno."),
        ("Features:", "Caratteristiche:"),
        ("soft fur", "pelo morbido,"),
        ("long tail", "coda lunga."),
    ]


@pytest.mark.parametrize(
    ("english", "italian", "pairs"),
    [
        ("s\nOne. Two.", "t\nUno e due.", [("s", "t"), ("One. Two.", "Uno e due.")]),
        ("s\nList:\n * one\n * two", "t\nElenco: uno, due", [("s", "t"), ("List: one two", "Elenco: uno, due")]),
        ("s\nOne.\n.\nTwo.", "t\nUno e due.", [("s", "t")]),
    ],
)
def test_differing_structure_stays_together_or_is_left_out(script, english, italian, pairs):
    assert list(script.align_descriptions(english, italian)) == pairs


@pytest.mark.parametrize(
    ("source", "target", "kept"),
    [
        ("small feline of the house", "piccolo felino di casa", True),
        ("feline", "felino piccolo", False),
        ("small feline", "felino", False),
        ("small " * 61, "piccolo " * 61, False),
        ("a cat", "un animale piccolo con il pelo morbido", False),
        ("needs version 2 or 3", "richiede la versione 2 o 4", False),
        ("see http://cats.example now", "vedere http://cats.example ora", False),
        ("Gnome Cat Viewer Deluxe", "Gnome Cat Viewer speciale", False),
        ("a tool for cats", "the tool for felini belli", False),
    ],
)
def test_filters(script, source, target, kept):
    assert script.is_translation(source, target) == kept


def test_ddtp_en_it_is_built(script, monkeypatch, tmp_path, run):
    def download(folder):
        files = folder / "Translation-en", folder / "Translation-it"
        for file, text in zip(files, (ENGLISH, ITALIAN), strict=True):
            file.write_text(text, encoding="utf-8")
        return [files[0]], [files[1]]

    monkeypatch.setattr(script, "download_descriptions", download)
    result = run("ddtp_en_it", "--output", tmp_path)
    assert "1 descriptions with a translation" in result.output
    assert "do not publish it" in result.output
    rows = [
        json.loads(line)
        for split in script.SPLITS
        for line in gzip.decompress((tmp_path / "ddtp_en_it" / f"{split}.jsonl.gz").read_bytes()).splitlines()
    ]
    assert sorted(row["source"] for row in rows) == [
        "It eats mice.",
        "It sleeps all day.",
        "long tail",
        "small feline",
        "soft fur",
    ]


def test_pronunciations(script):
    lines = ["cat K AE1 T", "record R AH0 K AO1 R D # verb", "record(2) R EH1 K ER0 D", "record(3) R EH2 K ER0 D"]
    others = ["'bout B AW1 T", "a AH0", "3d TH R IY1", "x.y EH1 K S"]
    assert script.parse_cmudict(lines + others) == [
        {"source": "c a t", "target": "K AE T", "word": "cat"},
        {"source": "r e c o r d", "target": "R AH K AO R D", "word": "record", "variants": ["R EH K ER D"]},
    ]


def write_splits(folder, **splits):
    folder.mkdir()
    for split, sources in splits.items():
        rows = [{"source": source, "target": "x", "word": source} for source in sources]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_built_sets_are_checked_and_copied(tmp_path, run):
    write_splits(tmp_path / "built", train=["a b", "c"], validation=["d"], test=["e f g"])
    for output in ("first", "second"):
        result = run("cmudict_g2p", "--from", tmp_path / "built", "--output", tmp_path / output)
        assert result.exit_code == 0, result.output
        assert "train.jsonl.gz: 2 pairs" in result.output
    files = [tmp_path / output / "cmudict_g2p" / "train.jsonl.gz" for output in ("first", "second")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert next(iter(read_pairs(files[0]))) == {
        "source": "a b",
        "target": "x",
        "word": "a b",
        "pronunciations": ["x"],
    }


def test_every_row_has_its_accepted_pronunciations(tmp_path, run):
    write_splits(tmp_path / "built", train=["a b"], validation=["d"], test=["e f g", "h"])
    with (tmp_path / "built" / "test.jsonl").open("a") as file:
        file.write(json.dumps({"source": "i", "target": "y", "word": "i", "variants": ["z", "v"]}) + "\n")
    result = run("cmudict_g2p", "--from", tmp_path / "built", "--output", tmp_path)
    assert result.exit_code == 0, result.output
    rows = read_pairs(tmp_path / "cmudict_g2p" / "test.jsonl.gz")
    assert rows["pronunciations"][:] == [["x"], ["x"], ["y", "z", "v"]]
    assert rows["variants"][:] == [None, None, ["z", "v"]]
    (train,) = read_pairs(tmp_path / "cmudict_g2p" / "train.jsonl.gz")
    assert train["pronunciations"] == ["x"]
    # ... and a copy of the copy is the same
    run("cmudict_g2p", "--from", tmp_path / "cmudict_g2p", "--output", tmp_path / "again")
    assert list(read_pairs(tmp_path / "again" / "cmudict_g2p" / "test.jsonl.gz")) == list(rows)


def test_faulty_sets_are_refused(tmp_path, run):
    write_splits(tmp_path / "leaky", train=["a b", "c"], validation=["d"], test=["A  B"])
    result = run("ddtp_en_it", "--from", tmp_path / "leaky", "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert "error: 1 sources of test are in the training split too, for example 'A  B'" in result.output
    assert not (tmp_path / "out").exists()
    write_splits(tmp_path / "partial", train=["a b"])
    result = run("ddtp_en_it", "--from", tmp_path / "partial")
    assert result.exit_code == 2
    assert "validation.jsonl.gz does not exist in" in result.output


def test_debian_summary_is_built(script, monkeypatch, tmp_path, run):
    long = " ".join(f"word{number}" for number in range(25))
    texts = {"a-one": long, "a-two": f"{long} more", "b": long, "c": "too short", "d": f"{long} x"}
    synopses = dict.fromkeys(texts, "tools for words") | {"d": "transitional dummy package"}

    def download(folder):
        translations, index = folder / "Translation-en", folder / "Packages"
        fields = "Package: {0}\nDescription-md5: {0}\nDescription-en: {1}\n {2}\n"
        translations.write_text("\n".join(fields.format(name, synopses[name], text) for name, text in texts.items()))
        index.write_text("\n".join(f"Package: {name}\nSource: {name[0]} (1.0)\n" for name in texts))
        return [translations], [index]

    monkeypatch.setattr(script, "download_packages", download)
    result = run("debian_summary", "--output", tmp_path)
    assert "do not publish it" in result.output
    rows = {}
    for split in script.SPLITS:
        for line in gzip.decompress((tmp_path / "debian_summary" / f"{split}.jsonl.gz").read_bytes()).splitlines():
            rows[json.loads(line)["package"]] = (split, json.loads(line))
    assert sorted(rows) == ["a-one", "a-two"]  # b says what a-one says
    assert rows["a-one"][0] == rows["a-two"][0]
    assert rows["a-one"][1]["source"] == long
    assert rows["a-one"][1]["target"] == "tools for words"
    assert rows["a-one"][1]["first_words"] == " ".join(long.split()[:10])


def test_what_is_cut_is_not_held_out_as_well(script):
    same, other = (" ".join(f"{word}{number}" for number in range(45)) for word in ("Word", "other"))
    splits = {
        "train": [{"source": same, "target": "a"}],
        "validation": [{"source": f"{same.lower()} more", "target": "b"}],
        "test": [{"source": other, "target": "c"}],
    }
    short = script.shortened(splits)
    assert [len(rows) for rows in short.values()] == [1, 0, 1]
    assert short["train"][0]["source"] == " ".join(same.split()[:40])
    assert short["test"][0]["first_words"] == " ".join(other.split()[:10])


def test_earlier_turns_stand_before_a_reply(script):
    rows = list(script.dialog_rows("conversations", ["Hello", "Hi  there", "How are\nyou?", "Fine", "Good", "Bye"]))
    assert [row["source"] for row in rows[:2]] == ["Hello", "Hello <sep> Hi there"]
    assert rows[-1]["source"] == "Hi there <sep> How are you? <sep> Fine <sep> Good"
    assert rows[-1]["target"] == "Bye"
    answers = list(script.dialog_rows("emotion", ["Are you sad?", "No.", "Sometimes.", "word " * 41, "```x```"]))
    assert [(row["source"], row["target"]) for row in answers] == [
        ("Are you sad?", "No."),
        ("Are you sad?", "Sometimes."),
    ]
