"""Which checkpoints of a run are whole: those with their marker, which is written last."""

from pathlib import Path


COMPLETE_FILE = "complete.json"


def complete_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run that were written to their end, in the order of their steps."""
    markers = run.glob(f"checkpoint-*/{COMPLETE_FILE}")
    return sorted((marker.parent for marker in markers), key=lambda folder: int(folder.name.rpartition("-")[2]))


def unfinished_checkpoints(run: Path) -> list[Path]:
    return [folder for folder in sorted(run.glob("checkpoint-*")) if not (folder / COMPLETE_FILE).exists()]
