"""Files and folders that are there whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


UNFINISHED = ".unfinished"


def write_whole(path: Path, text: str) -> None:
    """Write a file under another name and rename it, so that it is never half there."""
    unfinished = path.with_name(path.name + UNFINISHED)
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def check_new_folder(output: Path) -> None:
    """
    Raises:
        ValueError: something is there already, other than an empty folder.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is not empty: choose a new folder")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to be filled. It becomes `output` at the end, and nothing is left of it where that is not reached."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as scratch:
        partial = Path(scratch) / output.name
        partial.mkdir()
        yield partial
        os.replace(partial, output)
