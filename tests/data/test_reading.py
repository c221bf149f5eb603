import gzip
import io
import json
import re
import sys

import datasets
import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from dragoman.data import reading
from dragoman.data.collators import encode_pairs
from dragoman.data.reading import embedded_names, languages_of, read_lines, read_pairs
from dragoman.data.tokenizers import train_tokenizer


PAIRS = [("I love you", "我爱你"), ("a\u2028b", "c\x85d "), ("", "vuoto")]
ROWS = [{"source": source, "target": target} for source, target in PAIRS]


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def tsv(rows):
    return "".join(f"{row['source']}\t{row['target']}\n" for row in rows)


def pairs_of(dataset):
    return [(row["source"], row["target"]) for row in dataset]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("name", "text"), [("p.jsonl", jsonl(ROWS)), ("p.tsv", tsv(ROWS))])
@pytest.mark.parametrize("compressed", [False, True])
def test_files_of_pairs(tmp_path, name, text, compressed, streaming):
    path = tmp_path / (name + ".gz" * compressed)
    path.write_bytes(gzip.compress(text.encode()) if compressed else text.encode())
    dataset = read_pairs(path, streaming=streaming)
    assert isinstance(dataset, IterableDataset if streaming else Dataset)
    assert pairs_of(dataset) == PAIRS
    assert pairs_of(dataset) == PAIRS, "a second pass gives the same"


@pytest.mark.parametrize("streaming", [False, True])
def test_parallel_files(tmp_path, streaming):
    source, target = tmp_path / "a.en", tmp_path / "a.it.gz"
    source.write_bytes("\ufeffone\r\ntwo\r\n".encode())  # as some editors write it: byte order mark and CR LF
    target.write_bytes(gzip.compress(b"uno\ndue"))  # no line feed at the end
    assert pairs_of(read_pairs([source, str(target)], streaming=streaming)) == [("one", "uno"), ("two", "due")]


@pytest.fixture(params=[False, True])
def large(request, tmp_path, monkeypatch):
    """Whether files of any size are mapped from the cache."""
    if request.param:
        monkeypatch.setattr(reading, "LARGEST_IN_MEMORY", -1)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return request.param


def test_further_columns_are_kept(tmp_path, large):
    """Whichever row is the first to have them; of numbers, the type that holds them all."""
    path = tmp_path / "p.jsonl"
    late = {"word": "w", "variants": ["x", "y"], "from": {"site": "s"}, "score": 0.5}
    rows = [ROWS[0] | {"score": 1, "from": {"page": 7}, "note": "n"}, *[ROWS[0]] * 1500, ROWS[1] | late, ROWS[2]]
    path.write_text(jsonl(rows), encoding="utf-8")
    dataset = read_pairs(path)
    assert bool(dataset.cache_files) == large
    assert dataset.column_names[:2] == ["source", "target"]
    assert pairs_of(dataset) == [PAIRS[0]] * 1501 + PAIRS[1:]
    expected = {"word": "w", "variants": ["x", "y"], "from": {"site": "s", "page": None}, "score": 0.5, "note": None}
    assert dataset[1501] == ROWS[1] | expected
    assert dataset[1502] == ROWS[2] | dict.fromkeys(expected)
    assert dataset[0]["from"] == {"site": None, "page": 7}
    assert dataset["score"][:3] == [1.0, None, None]
    assert dataset["note"][:2] == ["n", None]


def test_a_prefix_that_one_pair_lacks(tmp_path, large):
    path = tmp_path / "p.jsonl"
    prefixed = ROWS[0] | {"source_prefix": "x "}
    for number, rows in ((2, [prefixed, ROWS[0], prefixed]), (1, [*[ROWS[0]] * 1500, prefixed])):
        path.write_text(jsonl(rows), encoding="utf-8")
        with pytest.raises(ValueError, match=rf"p\.jsonl: pair {number} has no text as its 'source_prefix', "):
            read_pairs(path)


def test_tsv_with_a_heading_keeps_its_columns(tmp_path):
    path = tmp_path / "p.tsv"
    path.write_text("target\tlang\tsource\nuno\tit\tone\n")
    assert list(read_pairs(path)) == [{"source": "one", "target": "uno", "lang": "it"}]


@pytest.mark.parametrize(
    ("first", "warned"),
    [("src\ttgt", True), ("en\tit", True), ("source_text\tTarget_text", True), ("the source\tla fonte", False)],
)
def test_a_heading_with_other_names_is_remarked_upon(tmp_path, caplog, first, warned):
    path = tmp_path / "p.tsv"
    path.write_text(f"{first}\nen\tit\n")
    assert pairs_of(read_pairs(path)) == [tuple(first.split("\t")), ("en", "it")]
    source, target = first.split("\t")
    sentence = f"{path}:1: {source!r} and {target!r} are read as a pair; if they are a heading, give source_column and "
    assert [record.getMessage() for record in caplog.records] == [sentence + "target_column"] * warned


def test_a_file_changed_between_two_reads_is_read_anew(tmp_path):
    path = tmp_path / "p.tsv"
    path.write_text("one\tuno\n")
    read_pairs(path)
    path.write_text("one\tEIN\n")
    assert pairs_of(read_pairs(path)) == [("one", "EIN")]
    assert pairs_of(read_pairs(path, streaming=True)) == [("one", "EIN")]


@pytest.mark.parametrize("streaming", [False, True])
def test_other_column_names_and_nested_columns(tmp_path, streaming):
    path = tmp_path / "p.jsonl"
    path.write_text(jsonl([{"translation": {"en": "one", "it": "uno"}, "source": "some site", "id": 7}]))
    expected = [{"source": "one", "target": "uno", "id": 7}]
    columns = {"source_column": "translation.en", "target_column": "translation.it"}
    assert list(read_pairs(path, streaming=streaming, **columns)) == expected
    loaded = Dataset.from_list([{"translation": {"en": "one", "it": "uno"}, "id": 7}])
    assert list(read_pairs(loaded, streaming=streaming, **columns)) == expected


def test_loaded_datasets(tmp_path):
    dataset = Dataset.from_list(ROWS)
    assert pairs_of(read_pairs(dataset)) == PAIRS
    assert isinstance(read_pairs(dataset, streaming=True), IterableDataset)
    assert pairs_of(read_pairs(dataset.to_iterable_dataset())) == PAIRS
    dataset.save_to_disk(tmp_path / "saved")
    assert pairs_of(read_pairs(tmp_path / "saved")) == PAIRS
    DatasetDict(train=dataset).save_to_disk(tmp_path / "splits")
    assert pairs_of(read_pairs(tmp_path / "splits" / "train")) == PAIRS
    message = f"several splits, name one of them: {tmp_path / 'splits' / 'train'}"
    with pytest.raises(ValueError, match=re.escape(message)):
        read_pairs(tmp_path / "splits")
    with pytest.raises(ValueError, match="holds no dataset"):
        read_pairs(tmp_path)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Dataset.from_dict({"source": ["a"], "tgt": ["b"]}), r"no column 'target' \(it has source, tgt\)"),
        (Dataset.from_dict({"source": ["a"], "target": [1]}), "column 'target' holds Value.* instead of strings"),
        (Dataset.from_dict({"source": ["a", None], "target": ["b", "c"]}), "pair 2 has no text as its 'source'"),
        (Dataset.from_dict({"source": [], "target": []}), "the dataset holds no pairs"),
    ],
)
def test_loaded_datasets_that_are_no_pairs(dataset, message):
    with pytest.raises(ValueError, match=message):
        read_pairs(dataset)


def test_rows_that_were_not_selected_do_not_matter():
    dataset = Dataset.from_dict({"source": ["a", None, "c"], "target": ["x", "y", None]})
    assert pairs_of(read_pairs(dataset.select([0]))) == [("a", "x")]
    with pytest.raises(ValueError, match="pair 2 has no text as its 'target'"):
        read_pairs(dataset.select([0, 2]))


def test_a_stream_of_a_loaded_dataset_checks_its_rows():
    stream = Dataset.from_dict({"source": ["a", None], "target": ["b", "c"]}).to_iterable_dataset()
    with pytest.raises(ValueError, match="row 2: the value of 'source' is of type NoneType, not a string"):
        list(read_pairs(stream))


GOOD = b'{"source": "a", "target": "b"}\n'


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", GOOD + b'{"source": "a"\n', r"p\.jsonl:2: not a JSON object: Expecting ',' delimiter at char"),
        ("p.jsonl", GOOD + b"\n", r"p\.jsonl:2: not a JSON object: the line is empty"),
        ("p.jsonl", GOOD + b'["a", "b"]\n', r"p\.jsonl:2: not a JSON object: the line holds a list"),
        ("p.jsonl", GOOD + b'{"source": "a", "tgt": "b"}', r"p\.jsonl:2: no key 'target' \(the row has source, tgt\)"),
        ("p.jsonl", b'{"source": 3, "target": "b"}', r"p\.jsonl:1: the value of 'source' is of type int, not a string"),
        ("p.jsonl", b'{"source": "\\uD83D", "target": "b"}', r"p\.jsonl:1: the value of 'source' holds half of a"),
        ("p.jsonl", GOOD + b'{"source": "\xe8"}', r"p\.jsonl:2: not UTF-8 \(byte 13 of the line is 0xe8\)"),
        ("p.jsonl", b"", r"p\.jsonl: the file holds no pairs"),
        ("p.jsonl.gz", gzip.compress(GOOD * 9, mtime=0)[:-9], r"p\.jsonl\.gz:\d+: the gzip file is damaged"),
        ("p.jsonl.gz", GOOD, r"p\.jsonl\.gz:1: the gzip file is damaged or cut short"),
        ("p.tsv", b"a\tb\na b\n", r"p\.tsv:2: 1 tab-separated column where 2 are expected \(source, target\)"),
        ("p.tsv", b"a\tb\tc\n", r"p\.tsv:1: 3 tab-separated columns where 2 are expected"),
        ("p.csv", b"a,b\n", r"p\.csv: pairs are read from \.jsonl, \.tsv"),
    ],
)
def test_malformed_files(tmp_path, name, content, message, streaming):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        list(read_pairs(path, streaming=streaming))
    assert "\n" not in str(caught.value), "one sentence"


@pytest.mark.parametrize("between", [0, 1500])
@pytest.mark.parametrize("other", ["one", 2**70])
def test_mixed_types_in_a_further_column(tmp_path, large, between, other):
    path = tmp_path / "p.jsonl"
    path.write_text(jsonl([ROWS[0] | {"id": 1}, *[ROWS[0]] * between, ROWS[0] | {"id": other}]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"p\.jsonl: an extra column holds values that fit no single type \("):
        read_pairs(path)


@pytest.mark.parametrize(("short", "long"), [("a.en", "a.it"), ("a.it", "a.en")])
def test_parallel_files_of_different_length(tmp_path, short, long):
    (tmp_path / short).write_text("x\ny\n")
    (tmp_path / long).write_text("x\ny\nz\n")
    message = f"{short} ends after line 2 but {tmp_path / long} goes on at line 3: parallel files need as many lines"
    with pytest.raises(ValueError, match=re.escape(message)):
        read_pairs([tmp_path / "a.en", tmp_path / "a.it"])


def test_parallel_files_are_two_without_column_names(tmp_path):
    (tmp_path / "a").write_text("x\n")
    with pytest.raises(ValueError, match=r"two paths \[source, target\], but 3 were given"):
        read_pairs([tmp_path / "a"] * 3)
    with pytest.raises(ValueError, match="parallel text files have no column names"):
        read_pairs([tmp_path / "a"] * 2, source_column="en")


def stream_of_languages(*codes):
    """And how often it was read to its end."""
    ends = []

    def rows():
        for code in codes:
            yield {"source": "a", "target": "b", "source_lang": "en", "target_lang": code}
        ends.append(len(codes))

    return IterableDataset.from_generator(rows), ends


def test_the_languages_of_a_stream_are_read_once():
    pairs, ends = stream_of_languages("it", "de", "it")
    assert [languages_of(pairs, side) for side in ("target", "source", "target")] == [
        ["it", "de"],
        ["en"],
        ["it", "de"],
    ]
    assert ends == [3]
    assert languages_of(IterableDataset.from_generator(lambda: iter([{"source": "a", "target": "b"}])), "target") == []
    with pytest.raises(ValueError, match="pair 2 has no text as its 'target_lang', which other pairs have"):
        languages_of(stream_of_languages("it", None)[0], "target")


def test_missing_files_name_their_neighbors(tmp_path):
    (tmp_path / "train.jsonl.gz").touch()
    with pytest.raises(FileNotFoundError, match=r"train\.jsonl does not exist in .*; did you mean .*l\.gz\?"):
        read_pairs(tmp_path / "train.jsonl")
    with pytest.raises(FileNotFoundError, match=r"x\.tsv does not exist: there is no folder .*nowhere"):
        read_pairs([tmp_path / "train.jsonl.gz", tmp_path / "nowhere" / "x.tsv"])


def test_embedded_data():
    sizes = {"train": 7217, "validation": 356, "test": 439}
    names = ("tiny_en_it", "tiny_en_zh")
    assert embedded_names() == sorted(f"embedded:{name}/{split}" for name in names for split in sizes)
    splits = {split: read_pairs(f"embedded:tiny_en_it/{split}") for split in sizes}
    assert {split: len(dataset) for split, dataset in splits.items()} == sizes
    trained = {source.lower() for source in splits["train"]["source"]}
    assert not trained & {source.lower() for split in ("validation", "test") for source in splits[split]["source"]}
    with pytest.raises(ValueError, match="'embedded:tiny_en_it/dev' is not in the package; it has embedded:tiny_en"):
        read_pairs("embedded:tiny_en_it/dev")


def test_read_lines(tmp_path, monkeypatch):
    path = tmp_path / "lines.txt.gz"
    path.write_bytes(gzip.compress(b"uno\n\n due \r\ntre"))
    assert list(read_lines(path)) == ["uno", "", " due ", "tre"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"uno\n\xff\n")))
    lines = read_lines()
    assert next(lines) == "uno"
    with pytest.raises(ValueError, match="standard input:2: not UTF-8"):
        next(lines)
    with pytest.raises(FileNotFoundError, match=r"lines\.txt does not exist .* did you mean .*lines\.txt\.gz\?"):
        list(read_lines(tmp_path / "lines.txt"))


def test_a_pattern_reads_its_files_in_order(tmp_path):
    for number in (2, 0, 1):
        (tmp_path / f"part-{number}.tsv").write_text(f"a{number}\tb{number}\n")
        (tmp_path / f"part-{number}.en").write_text(f"c{number}\n")
        (tmp_path / f"part-{number}.it").write_text(f"d{number}\n")
    pairs = read_pairs(str(tmp_path / "part-*.tsv"))
    assert pairs["source"] == ["a0", "a1", "a2"]
    stream = read_pairs([str(tmp_path / "part-*.en"), str(tmp_path / "part-*.it")], streaming=True)
    assert stream.num_shards == 3
    assert [row["target"] for row in stream] == ["d0", "d1", "d2"]
    (tmp_path / "part-2.it").unlink()
    with pytest.raises(ValueError, match=r"part-\*.en matches 3 files and .*part-\*.it 2: they must be as many"):
        read_pairs([str(tmp_path / "part-*.en"), str(tmp_path / "part-*.it")])
    with pytest.raises(FileNotFoundError, match=r"no file matches .*other-\*.tsv"):
        read_pairs(str(tmp_path / "other-*.tsv"))


def test_large_files_are_mapped_from_a_cache_of_their_content(tmp_path, monkeypatch):
    """Read and encoded once for each content, whatever the file's name or date; mapped, not held in memory."""
    monkeypatch.setattr(reading, "LARGEST_IN_MEMORY", 10)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    calls = []
    original = reading._tsv_rows
    monkeypatch.setattr(reading, "_tsv_rows", lambda *arguments: calls.append(1) or original(*arguments))
    path = tmp_path / "pairs.tsv"
    path.write_text("uno due\tdue uno\n" * 3)
    tokenizer = train_tokenizer(["uno due"], kind="word")
    first = read_pairs(path)
    assert first.cache_files
    encoded, _ = encode_pairs(first, tokenizer)
    assert encoded.cache_files
    again, _ = encode_pairs(read_pairs(path), train_tokenizer(["uno due"], kind="word"))
    assert again.cache_files == encoded.cache_files
    assert len(calls) == 2, "once for the columns, once for the rows"
    path.write_text("uno due\tdue due\n" * 3)
    assert read_pairs(path)["target"] == ["due due"] * 3
    path.write_text("no tab\n" * 3)
    with pytest.raises(ValueError, match=r"pairs.tsv:1: 1 tab-separated column where 2 are expected"):
        read_pairs(path)
