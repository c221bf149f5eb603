"""Text pairs from files and datasets: the door through which all training and test data enters.

Every source of pairs ends as a `datasets.Dataset` (or `IterableDataset`) with the columns `source` and `target`;
further columns are kept. A row that is not a pair of strings is a `ValueError` of one sentence naming file and line.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from itertools import islice, zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, TypeAlias, cast

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, IterableDataset, Value, concatenate_datasets, config, load_from_disk
from datasets.utils import tqdm


logger = logging.getLogger(__name__)

# The columns of a pair, besides the two texts, that tell how it is encoded.
SETTING_COLUMNS = ("source_lang", "target_lang", "source_prefix")
EMBEDDED_DIR = Path(__file__).parent / "embedded"
EMBEDDED_PREFIX = "embedded:"
LARGEST_IN_MEMORY = 64 << 20  # bytes of files, compressed or not
# Of two such cells a first line may be a heading; the pair is kept, with a warning.
HEADING = re.compile(
    r"(src|tgt|trg|source|target|text|input|output)(_(text|sentence|lang))?"
    r"|ar|cs|de|el|en|es|fi|fr|hi|it|ja|ko|nl|pl|pt|ro|ru|sv|tr|uk|zh|english|french|german|italian|spanish",
    flags=re.IGNORECASE,
)

Pairs: TypeAlias = Dataset | IterableDataset
PairSpec: TypeAlias = "str | Path | Sequence[str | Path] | Pairs"


def read_pairs(
    spec: PairSpec, *, streaming: bool = False, source_column: str = "source", target_column: str = "target"
) -> Pairs:
    """Read sentence pairs from wherever they lie.

    Args:
        spec: one of
            - a path that ends in `.jsonl` or `.jsonl.gz`: one JSON object a line; here and below a path may be a
              pattern such as `train-*.jsonl.gz`, whose files are read one after another in the order of their names;
            - a path that ends in `.tsv` or `.tsv.gz`: two columns without a heading, or any number of columns below a
              first line that names them (it must hold both column names; one that seems to name others is remarked
              upon); no quoting, no escapes;
            - two paths `[source, target]` of parallel text files, plain or `.gz`, one sentence a line;
            - `"embedded:NAME/SPLIT"`: data that ships in the package, for example `"embedded:tiny_en_it/train"`;
            - a folder written by `Dataset.save_to_disk` (of a `DatasetDict`: the folder of one split);
            - a loaded `datasets.Dataset` or `datasets.IterableDataset`.
        streaming: give an `IterableDataset` that reads while it is iterated, for data larger than memory. Errors in the
            rows then come up during the iteration. An `IterableDataset` stays one in any case.
        source_column, target_column: their names in the data, renamed to `source` and `target`; `a.b` reaches into a
            nested column, as `translation.en` does in many published translation sets. Not for parallel text files.

    Returns:
        `Dataset`, or `IterableDataset` when streaming, with the string columns `source` and `target`; others are kept.
        Three of those have a meaning wherever pairs are encoded: `source_lang` and `target_lang`, the codes of the
        languages of a pair, and `source_prefix`, what is put before its source. Every row or none has each of them.

    Raises:
        FileNotFoundError: no such path; names what lies there under a similar name.
        ValueError: a row is malformed, the data is empty or the specification is none of the above.
    """
    columns = (source_column, target_column)
    if isinstance(spec, Dataset | IterableDataset):
        return _pairs_of_dataset(spec, "the dataset", columns, streaming)
    if isinstance(spec, str) and spec.startswith(EMBEDDED_PREFIX):
        spec = _embedded_path(spec)
    if isinstance(spec, str | Path):
        files = _matching(Path(spec))
        if files[0].is_dir():
            return _pairs_of_folder(files[0], columns, streaming)
        return _pairs_of_rows([(file,) for file in files], columns, streaming)
    paths = tuple(Path(part) for part in spec)
    if len(paths) != 2:
        raise ValueError(f"parallel text files come as two paths [source, target], but {len(paths)} were given: {spec}")
    if columns != ("source", "target"):
        raise ValueError(f"parallel text files have no column names, so {columns} cannot be chosen in {paths[0]}")
    sources, targets = map(_matching, paths)
    if len(sources) != len(targets):
        raise ValueError(f"{paths[0]} matches {len(sources)} files and {paths[1]} {len(targets)}: they must be as many")
    return _pairs_of_rows(list(zip(sources, targets, strict=True)), columns, streaming)


def with_settings(
    pairs: Pairs, where: str, *, source_lang: str | None, target_lang: str | None, source_prefix: str | None
) -> Pairs:
    """Pairs whose languages and prefix are the same in every row; None leaves a column as it is.

    Args:
        where: what the pairs are called in an error.

    Raises:
        ValueError: the rows have one of their own (for streams during the iteration).
    """
    settings = {"source_lang": source_lang, "target_lang": target_lang, "source_prefix": source_prefix}
    given = {name: value for name, value in settings.items() if value is not None}
    if not given:
        return pairs

    def columns(batch: dict[str, list[Any]]) -> dict[str, list[str]]:
        for name, value in given.items():
            if name in batch:
                raise ValueError(
                    f"{where} has a column {name!r}, so a {name} for all of it ({value!r}) must be left out"
                )
        return {name: [value] * len(batch["source"]) for name, value in given.items()}

    return pairs.map(columns, batched=True)


def turned_round(pairs: Dataset, where: str) -> Dataset:
    """Every pair, and after them all every pair with its sides exchanged, for a model of both directions.

    Args:
        where: what the pairs are called in an error.

    Raises:
        ValueError: the pairs have no languages, without which nothing tells the directions apart; or they have
            prefixes, of which it is not known what they would be in the other direction.
    """
    names = ("source", "target", "source_lang", "target_lang")
    if not {*names} <= {*pairs.column_names}:
        raise ValueError(f"{where} needs source_lang and target_lang, or the two directions cannot be told apart")
    if "source_prefix" in pairs.column_names:
        raise ValueError(f"{where} has a source_prefix, and nobody knows that of the other direction: leave one out")
    pairs = pairs.select_columns(list(names))
    other = pairs.rename_columns(dict(zip(names, ("target", "source", "target_lang", "source_lang"), strict=True)))
    return concatenate_datasets([pairs, other.select_columns(list(names))])


def languages_of(pairs: Pairs, side: str) -> list[str]:
    """The languages of the pairs on one side, "source" or "target", in the order in which they come.

    Raises:
        ValueError: a pair of a stream has none, and others have.
    """
    if isinstance(pairs, IterableDataset):
        return _languages_of_stream(pairs)[side]
    return pairs.unique(f"{side}_lang") if f"{side}_lang" in pairs.column_names else []


@lru_cache(maxsize=1)
def _languages_of_stream(pairs: IterableDataset) -> dict[str, list[str]]:
    """Of both sides. The stream is read to its end for them, once for all that ask."""
    found: dict[str, dict[str, None]] = {"source": {}, "target": {}}
    names = pairs.column_names or list(next(iter(pairs)))
    columns = {side: f"{side}_lang" for side in found if f"{side}_lang" in names}
    for number, row in enumerate(pairs if columns else (), start=1):
        for side, column in columns.items():
            if not isinstance(row.get(column), str):
                raise ValueError(f"pair {number} has no text as its {column!r}, which other pairs have")
            found[side][row[column]] = None
    return {side: list(codes) for side, codes in found.items()}


def read_lines(path: str | Path = "-") -> Iterator[str]:
    """Yield the lines of a text file (plain or `.gz`), or of standard input for `"-"`, without their line ends.

    Raises:
        FileNotFoundError: no such file.
        ValueError: bytes that are not UTF-8, or a damaged gzip file, with the line.
    """
    if str(path) == "-":
        yield from (line for _, line in _numbered_lines(sys.stdin.buffer, "standard input"))
        return
    existing = existing_path(Path(path))
    with _open(existing) as handle:
        yield from (line for _, line in _numbered_lines(handle, existing))


def _pairs_of_rows(shards: list[tuple[Path, ...]], columns: tuple[str, str], streaming: bool) -> Pairs:
    """Read files: each shard is one file of pairs, or the two halves of parallel text.

    What is large goes through the cache of `datasets` on the disk, once for each content of the files, and is mapped
    into memory from there. Either way the columns are those of all rows together.
    """
    if streaming:
        # A list is dealt out to processes and workers, and shuffled, by shards.
        return IterableDataset.from_generator(_rows, gen_kwargs={"shards": shards, "columns": columns})
    files = [path for shard in shards for path in shard]
    try:
        if sum(path.stat().st_size for path in files) > LARGEST_IN_MEMORY:
            dataset = _mapped(shards, columns)
        else:
            dataset = Dataset(pa.concat_tables(_tables(shards, columns), promote_options="permissive"))
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        raise ValueError(f"{files[0]}: an extra column holds values that fit no single type ({error})") from error
    return _checked(dataset, str(files[0]))


def _mapped(shards: list[tuple[Path, ...]], columns: tuple[str, str]) -> Dataset:
    """Files read into the cache. Twice: any row may be the first with a column, or the first to tell its type."""
    content = repr((shards, columns, [_digest(path) for paths in shards for path in paths]))
    key = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
    file = Path(config.HF_DATASETS_CACHE) / "dragoman" / key / "pairs.arrow"
    if not file.exists():

        def tables(what: str) -> Iterable[pa.Table]:
            return tqdm(_tables(shards, columns), desc=what, unit=" thousand pairs")

        schemas = dict.fromkeys(table.schema for table in tables("Checking pairs"))
        schema = pa.unify_schemas(list(schemas), promote_options="permissive")
        file.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=file.parent) as scratch:
            unfinished = Path(scratch) / file.name
            with pa.ipc.new_stream(unfinished, schema) as writer:
                for table in tables("Reading pairs"):
                    whole = pa.concat_tables([schema.empty_table(), table], promote_options="permissive")
                    writer.write_table(whole)
            unfinished.replace(file)
    return Dataset.from_file(str(file))


def _tables(shards: list[tuple[Path, ...]], columns: tuple[str, str]) -> Iterator[pa.Table]:
    """The rows of files, some at a time, each time with the columns that these have."""
    rows = _rows(shards, columns)
    while some := list(islice(rows, 1000)):
        names = dict.fromkeys(name for row in some for name in row)
        yield pa.table({name: [row.get(name) for row in some] for name in names})


def _rows(shards: list[tuple[Path, ...]], columns: tuple[str, str]) -> Iterator[dict[str, Any]]:
    """Yield checked rows `{"source": str, "target": str, ...}` of files of pairs, or of parallel text files."""
    for paths in shards:
        rows = _parallel_rows(*paths) if len(paths) == 2 else _formats(paths[0])(paths[0], columns)
        empty = True
        for row in rows:
            empty = False
            yield row
        if empty:
            raise ValueError(f"{paths[0]}: the file holds no pairs")


def _digest(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "blake2b").hexdigest()


def _formats(path: Path):
    name = path.name.removesuffix(".gz")
    if name.endswith(".jsonl"):
        return _jsonl_rows
    if name.endswith(".tsv"):
        return _tsv_rows
    raise ValueError(
        f"{path}: pairs are read from .jsonl, .tsv (both also .gz), a folder of a saved dataset, "
        "or two parallel text files given as [source, target]"
    )


def _jsonl_rows(path: Path, columns: tuple[str, str]) -> Iterator[dict[str, Any]]:
    with _open(path) as handle:
        for number, line in _numbered_lines(handle, path):
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                problem = f"{error.msg} at character {error.pos + 1}" if line.strip() else "the line is empty"
                raise ValueError(f"{where}: not a JSON object: {problem}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{where}: not a JSON object: the line holds a {type(row).__name__}")
            if "\\ud" in line.lower():
                _refuse_lone_surrogates(row, where)
            yield _named_pair(row, columns, where)


def _tsv_rows(path: Path, columns: tuple[str, str]) -> Iterator[dict[str, Any]]:
    names = list(columns)
    with _open(path) as handle:
        for number, line in _numbered_lines(handle, path):
            cells = line.split("\t")
            if number == 1 and set(columns) <= set(cells):
                names = cells
                continue
            if number == 1 and len(cells) == 2 and all(map(HEADING.fullmatch, cells)):
                logger.warning(
                    "%s:1: %r and %r are read as a pair; if they are a heading, give source_column and target_column",
                    path,
                    *cells,
                )
            if not line.strip():
                raise ValueError(f"{path}:{number}: the line is empty; expected {', '.join(names)} between tabs")
            if len(cells) != len(names):
                raise ValueError(
                    f"{path}:{number}: {len(cells)} tab-separated column{'s' * (len(cells) != 1)} "
                    f"where {len(names)} are expected ({', '.join(names)})"
                )
            yield _named_pair(dict(zip(names, cells, strict=True)), columns, f"{path}:{number}")


def _parallel_rows(source_path: Path, target_path: Path) -> Iterator[dict[str, Any]]:
    with _open(source_path) as source_file, _open(target_path) as target_file:
        sources = _numbered_lines(source_file, source_path)
        targets = _numbered_lines(target_file, target_path)
        for number, (source, target) in enumerate(zip_longest(sources, targets), start=1):
            if source is None or target is None:
                shorter, longer = (source_path, target_path) if source is None else (target_path, source_path)
                raise ValueError(
                    f"{shorter} ends after line {number - 1} but {longer} goes on at line {number}: "
                    "parallel files need as many lines"
                )
            yield {"source": source[1], "target": target[1]}


def _pairs_of_folder(path: Path, columns: tuple[str, str], streaming: bool) -> Pairs:
    try:
        dataset = load_from_disk(str(path))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: the folder holds no dataset written by Dataset.save_to_disk") from error
    if isinstance(dataset, DatasetDict):
        splits = ", ".join(str(path / split) for split in dataset)
        raise ValueError(f"{path}: the folder holds several splits, name one of them: {splits}")
    return _pairs_of_dataset(dataset, str(path), columns, streaming)


def _pairs_of_dataset(dataset: Pairs, where: str, columns: tuple[str, str], streaming: bool) -> Pairs:
    names = dataset.column_names
    if names is not None:
        for column in columns:
            if column.split(".")[0] not in names:
                raise ValueError(f"{where} has no column {column!r} (it has {', '.join(names)})")
    if columns != ("source", "target"):
        used = {column.split(".")[0] for column in columns}
        dataset = dataset.map(
            lambda row, index: _named_pair(row, columns, f"{where}, row {index + 1}"),
            with_indices=True,
            remove_columns=sorted(used) if names is not None else None,
        )
    if isinstance(dataset, IterableDataset):
        return dataset.map(
            lambda row, index: _named_pair(row, ("source", "target"), f"{where}, row {index + 1}"), with_indices=True
        )
    if len(dataset) == 0:
        raise ValueError(f"{where} holds no pairs")
    _checked(dataset, where)
    return dataset.to_iterable_dataset() if streaming else dataset


def _checked(dataset: Dataset, where: str) -> Dataset:
    """Refuse anything but text in the columns that pairs are made of. By Arrow, which need not load them."""
    for name in ("source", "target", *(name for name in SETTING_COLUMNS if name in dataset.column_names)):
        field = dataset.features[name]
        if not isinstance(field, Value) or field.dtype not in ("string", "large_string"):
            raise ValueError(f"{where}: the column {name!r} holds {field} instead of strings")
        if dataset.data.column(name).null_count:  # maybe in rows that were not selected
            values = dataset.select_columns(name).with_format("arrow")[:][name]
            row = pc.index(pc.is_null(values), True).as_py()
            if row >= 0:
                raise ValueError(f"{where}: pair {row + 1} has no text as its {name!r}, which other pairs have")
    return dataset


def _named_pair(row: Mapping[str, Any], columns: tuple[str, str], where: str) -> dict[str, Any]:
    """Rename the two columns to `source` and `target`, in front of all others; they and the settings are strings."""
    pair = {}
    for name, column in zip(("source", "target"), columns, strict=True):
        value: Any = row
        for part in column.split("."):
            if not isinstance(value, Mapping) or part not in value:
                raise ValueError(f"{where}: no key {column!r} (the row has {', '.join(map(str, row))})")
            value = value[part]
        if not isinstance(value, str):
            raise ValueError(f"{where}: the value of {column!r} is of type {type(value).__name__}, not a string")
        pair[name] = value
    for name in SETTING_COLUMNS:
        if name in row and not isinstance(row[name], str):
            raise ValueError(f"{where}: the value of {name!r} is of type {type(row[name]).__name__}, not a string")
    used = {column.split(".")[0] for column in columns}
    return pair | {name: value for name, value in row.items() if name not in used | {"source", "target"}}


def _refuse_lone_surrogates(row: dict[str, Any], where: str) -> None:
    for name, value in row.items():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{where}: the value of {name!r} holds half of a surrogate pair, no text") from error


def _numbered_lines(handle: IO[bytes], name: str | Path) -> Iterator[tuple[int, str]]:
    """Yield `(line number, text)`. Only a line feed (or CR LF) ends a line; other separators stay in the text."""
    number = 0
    try:
        for number, raw in enumerate(handle, start=1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{name}:{number}: not UTF-8 (byte {error.start + 1} of the line is 0x{raw[error.start]:02x})"
                ) from error
            if "\0" in text:
                raise ValueError(f"{name}:{number}: the line has a NUL character, so this is no text")
            yield number, text.removesuffix("\n").removesuffix("\r")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{name}:{number + 1}: the gzip file is damaged or cut short ({error})") from error


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def existing_path(path: Path) -> Path:
    """The path itself.

    Raises:
        FileNotFoundError: there is nothing; names what lies there under a similar name.
    """
    if path.exists():
        return path
    folder = path.parent
    where = f"{path} does not exist in {folder.resolve()}"
    if not folder.is_dir():
        where = f"{path} does not exist: there is no folder {folder}"
    similar = similar_paths(path)
    raise FileNotFoundError(where + (f"; did you mean {' or '.join(map(str, similar))}?" if similar else ""))


def similar_paths(path: Path) -> list[Path]:
    """At most three existing paths that are spelled like this one, the nearest first; folders may be misspelled too."""
    folders = [path.parent]
    if not path.parent.is_dir():
        folders = similar_paths(path.parent) if path.parent != path else []
    found = [
        folder / name
        for folder in folders
        if folder.is_dir()
        for name in get_close_matches(path.name, [entry.name for entry in folder.iterdir()])
    ]
    return found[:3]


def _matching(path: Path) -> list[Path]:
    """The file of this path, or the files that match it as a pattern."""
    if path.exists() or not any(sign in path.name for sign in "*?["):
        return [existing_path(path)]
    files = sorted(path.parent.glob(path.name))
    if not files:
        raise FileNotFoundError(f"no file matches {path}")
    return files


def _embedded_path(spec: str) -> Path:
    path = EMBEDDED_DIR / f"{spec.removeprefix(EMBEDDED_PREFIX)}.jsonl.gz"
    available = embedded_names()
    if spec not in available:
        raise ValueError(f"{spec!r} is not in the package; it has {', '.join(available)}")
    return path


def embedded_names() -> list[str]:
    """Names of the data that ships in the package, as `read_pairs` takes them."""
    files: Iterable[Path] = sorted(EMBEDDED_DIR.glob("*/*.jsonl.gz"))
    return [f"{EMBEDDED_PREFIX}{file.parent.name}/{file.name.removesuffix('.jsonl.gz')}" for file in files]
