"""Which checkpoints of a run are whole: those with their marker, which is written last."""

import json
from pathlib import Path


COMPLETE_FILE = "complete.json"
TEST_FILE = "test_results.json"


def complete_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run that were written to their end, in the order of their steps."""
    markers = run.glob(f"checkpoint-*/{COMPLETE_FILE}")
    return sorted((marker.parent for marker in markers), key=lambda folder: int(folder.name.rpartition("-")[2]))


def unfinished_checkpoints(run: Path) -> list[Path]:
    return [folder for folder in sorted(run.glob("checkpoint-*")) if not (folder / COMPLETE_FILE).exists()]


def step_of(folder: Path) -> int:
    """The step after which a finished model or a complete checkpoint was written."""
    return json.loads((folder / COMPLETE_FILE).read_text(encoding="utf-8"))["step"]
