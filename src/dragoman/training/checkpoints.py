"""The files of a run, and which of its checkpoints are whole: those with their marker, which is written last."""

import json
import re
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict


COMPLETE_FILE = "complete.json"
EXPERIMENT_FILE = "experiment.yaml"
TEST_FILE = "test_results.json"
SAMPLES_FILE = "samples.jsonl"
PLOT_FILE = "training.png"


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run in the order of their steps. A folder of another name is not the run's."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", folder.name), folder) for folder in run.glob("checkpoint-*")]
    return [folder for _, folder in sorted((int(match[1]), folder) for match, folder in found if match)]


def complete_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run that were written to their end, in the order of their steps."""
    return [folder for folder in checkpoints(run) if (folder / COMPLETE_FILE).exists()]


def last_complete_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint of a run that was written to its end, or None."""
    return next(reversed(complete_checkpoints(output)), None)


def unfinished_checkpoints(run: Path) -> list[Path]:
    return [folder for folder in checkpoints(run) if not (folder / COMPLETE_FILE).exists()]


def load_parts(model: Any, checkpoint: Path) -> None:
    """The model, shared out among processes, has the whole weights in a checkpoint; each process takes its parts.

    Raises:
        FileNotFoundError: the folder is not there any more, or has no weights.
    """
    files = list(checkpoint.glob("model*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{checkpoint} has no model*.safetensors to go back to; was the run moved or deleted?")
    saved: dict[str, Any] = {name: weight for file in files for name, weight in load_file(file).items()}
    # Not strict: of tied weights one is saved.
    set_model_state_dict(model, saved, options=StateDictOptions(full_state_dict=True, strict=False))


def step_of(folder: Path) -> int:
    """The step after which a finished model or a complete checkpoint was written."""
    return json.loads((folder / COMPLETE_FILE).read_text(encoding="utf-8"))["step"]
