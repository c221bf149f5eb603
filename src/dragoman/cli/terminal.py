"""What commands say beside their output: mistakes in one sentence, no bars where nobody watches."""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import typer
from typer.core import TyperGroup


# Of every mistake in the options; Typer exports only this one kind of it.
UsageError = cast(type[Exception], typer.BadParameter.__mro__[1])


# What people look for, and under which name they find it.
_OTHER_NAMES = dict.fromkeys(("translate", "summarize", "predict", "decode", "inference"), "generate")


class Commands(TyperGroup):
    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _one_sentence_for_errors(lambda: "dragoman"):
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _one_sentence_for_errors(lambda: f"dragoman {ctx.invoked_subcommand or ''}".strip()):
            return super().invoke(ctx)


@contextmanager
def _one_sentence_for_errors(command: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError as error:
        # The reader (head, less) has left; without this, Python complains once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(141) from error
    except UsageError as error:
        _complain(f"{command()}: {_usage_message(error)}")
        raise typer.Exit(2) from error
    except (ValueError, OSError) as error:
        sentence = str(error)
        if isinstance(error, OSError) and error.filename is not None:  # "[Errno 2] No such file ...", of Python
            sentence = f"{error.filename}: {error.strerror}"
        _complain(f"{command()}: {' '.join(sentence.split())}")
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        print(f"{command()}: {str(error) or 'interrupted'}", file=sys.stderr)
        raise typer.Exit(130) from error


def _complain(sentence: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # once, of all processes that a launcher started on this machine
        print(sentence, file=sys.stderr)


def _usage_message(error: Any) -> str:
    """Typer's message as a sentence, with the nearest valid name where one was misspelled."""
    from dragoman.settings import nearest

    message = " ".join(error.format_message().split()).rstrip(".")
    unknown = re.match(r"No such (option|command):? '?([^\s']+)", message)
    if unknown is None:
        return f"{message[0].lower()}{message[1:]}; {error.ctx.command_path} --help says more"
    kind, name = unknown.groups()
    options = [option for parameter in error.ctx.command.params for option in parameter.opts if option.startswith("-")]
    valid = [*options, "--help"] if kind == "option" else list(error.ctx.command.commands)
    closest = _OTHER_NAMES.get(name) or nearest(name, valid)
    return f"no such {kind}: {name}; the nearest valid one is {closest}"


def quiet_bars() -> None:
    """No bars of loading, saving and encoding between the lines of a command, nor in a file or pipe at all."""
    from datasets.utils.logging import disable_progress_bar as disable_encoding_bar
    from huggingface_hub.utils import disable_progress_bars as disable_transfer_bars
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    disable_transfer_bars()
    if not sys.stderr.isatty():
        disable_encoding_bar()
