"""Entry point of the `dragoman` command, beside the package because importing that takes seconds."""

import sys
from importlib.metadata import version


def print_versions() -> None:
    for package in ("dragoman", "transformers", "torch"):
        print(package, version(package))


def main() -> None:
    """Run the command; Ctrl-C during the import ends it with a sentence and 130, as it does later."""
    if sys.argv[1:] == ["--version"]:
        print_versions()
        return
    try:
        from dragoman.cli import main as run
    except KeyboardInterrupt:
        print("dragoman: interrupted", file=sys.stderr)
        sys.exit(130)
    run()
