"""Commands of the README, the guides and the scripts, in this process: importing the libraries anew takes seconds."""

import importlib
import io
import runpy
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from unittest import mock

from typer.testing import CliRunner

import dragoman.cli


SCRIPTS = Path(__file__).parents[1] / "scripts"


def run_line(line: str) -> str:
    """What a line of a bash block prints: `dragoman ...` here, what stands around it (echo TEXT |, <, >, |) in bash."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="<>|")
    lexer.whitespace_split = True
    words = list(lexer)
    start = words.index("dragoman")
    end = next((place for place, word in enumerate(words) if place > start and word in ("<", ">", "|")), len(words))
    before, arguments, after = words[:start], words[start + 1 : end], words[end:]
    text = in_bash(shlex.join(before[:-1])) if before else ""
    if after[:1] == ["<"]:
        text, after = Path(after[1]).read_text(encoding="utf-8"), after[2:]
    result = CliRunner().invoke(dragoman.cli.app, arguments, input=text)
    assert result.exit_code == 0, f"{line}: {result.output}"
    return in_bash(f"cat {' '.join(after)}", result.stdout) if after else result.stdout


def in_bash(command: str, text: str = "") -> str:
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command], input=text, capture_output=True, text=True, check=True, timeout=240
    ).stdout


def run_script(name: str, *arguments: object) -> str:
    """What a script prints; what lies beside it can be imported meanwhile."""
    path = SCRIPTS / name
    with (
        redirect_stdout(io.StringIO()) as output,
        mock.patch.object(sys, "argv", [str(path), *map(str, arguments)]),
        mock.patch.object(sys, "path", [str(SCRIPTS), *sys.path]),
    ):
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
    return output.getvalue()


def load_script(name: str) -> ModuleType:
    """A script as a module; what lies beside it can be imported meanwhile, as when it is run."""
    with mock.patch.object(sys, "path", [str(SCRIPTS), *sys.path]):
        return importlib.import_module(name)
