"""The folder of a run: whether a run may use, overwrite or resume it, and what a full disk says."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from dragoman.data.reading import EMBEDDED_PREFIX
from dragoman.files import UNFINISHED
from dragoman.training.arguments import SPLITS, Experiment, load_experiment
from dragoman.training.checkpoints import (
    COMPLETE_FILE,
    EXPERIMENT_FILE,
    complete_checkpoints,
    last_complete_checkpoint,
    unfinished_checkpoints,
)


def check_output(output: Path, experiment: Experiment, resume: bool, overwrite: bool) -> None:
    """
    Refuse what would harm an output folder, or what it holds.

    Raises:
        OSError: it cannot be written.
        ValueError: it is in use, and neither `resume` nor `overwrite` is given, or both are; no run made it; this run
            begins with something in it, which `overwrite` would delete; or what is resumed would not be the same run.
    """
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    present = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not present.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    try:
        # Its name is one that another process, which looks whether the folder is in use, passes over.
        tempfile.TemporaryDirectory(UNFINISHED, dir=present).cleanup()
    except OSError as error:
        raise OSError(f"cannot write to {output}: {error.strerror}") from error
    in_use = output.is_dir() and any(file.suffix != UNFINISHED for file in output.iterdir())
    if in_use and not (resume or overwrite):
        raise ValueError(f"{output} is not empty: --resume goes on with its run, --overwrite deletes it")
    if in_use and not (output / EXPERIMENT_FILE).is_file():
        raise ValueError(f"{output} is not empty and holds no {EXPERIMENT_FILE}: no run made it, so choose another")
    if in_use and overwrite:
        _check_inputs(output, experiment)
    if in_use and resume:
        _check_resumed(output, load_experiment(output / EXPERIMENT_FILE), experiment)


# Of the section `training`: what the weights and the order of the pairs depend on, beside the number of processes.
_OF_THE_RUN = (
    "ema_decay",
    "seed",
    "data_seed",
    "per_device_train_batch_size",
    "max_tokens_per_batch",
    "packing",
    "train_sampling_strategy",
    "dataloader_drop_last",
    "tensor_parallel_size",
    "deepspeed",
)


def _check_resumed(output: Path, before: Experiment, now: Experiment) -> None:
    """Refuse what would not go on with the same model, or would leave out pairs and repeat others."""
    changed = [
        f"{section}.{key}"
        for section in ("model", "data", "tokenizer")
        for key in sorted(before.given[section].keys() | now.given[section].keys())
        if before.given[section].get(key) != now.given[section].get(key)
    ]
    changed += [f"training.{key}" for key in _OF_THE_RUN if getattr(before.training, key) != getattr(now.training, key)]
    if changed:
        raise ValueError(f"cannot resume {output}: it was started with another {', '.join(changed)}")
    checkpoint = last_complete_checkpoint(output)
    if checkpoint is None:
        return
    marker = json.loads((checkpoint / COMPLETE_FILE).read_text(encoding="utf-8"))
    accumulated, processes = before.training.gradient_accumulation_steps, marker["processes"]
    now_accumulated, now_processes = now.training.gradient_accumulation_steps, now.training.data_processes
    batches = accumulated * processes
    is_of_their_number = now.data.streaming or now.training.deepspeed is not None  # the streams, DeepSpeed's parts
    if batches != now_accumulated * now_processes or (is_of_their_number and processes != now_processes):
        remedy = f"start as many processes, with training.gradient_accumulation_steps={accumulated}"
        if batches % now_processes == 0 and not is_of_their_number:
            remedy = f"set training.gradient_accumulation_steps={batches // now_processes}"
        raise ValueError(
            f"cannot resume {output}: {processes} processes with {accumulated} batches each made an update, now it "
            f"would be {now_processes} with {now_accumulated}; {remedy}"
        )


def is_finished(output: Path, experiment: Experiment) -> bool:
    """Whether this very experiment has made the model in the folder; with more steps, say, it goes on."""
    return (output / COMPLETE_FILE).is_file() and load_experiment(output / EXPERIMENT_FILE).given == experiment.given


def _check_inputs(output: Path, experiment: Experiment) -> None:
    """Refuse to delete what the run begins with, or a folder of the user's own that merely has such a file."""
    inputs = {"the experiment": str(experiment.path)}
    for section, keys in (("data", SPLITS), ("tokenizer", ("path",)), ("model", ("from_pretrained",))):
        for key in keys:
            value = experiment.given[section].get(key)
            for number, path in enumerate(value if isinstance(value, list) else [value]):
                if path is not None and not str(path).startswith(EMBEDDED_PREFIX):
                    inputs[f"{section}.{key}" + f"[{number}]" * isinstance(value, list)] = path
    for name, path in inputs.items():
        if Path(path).expanduser().resolve().is_relative_to(output.resolve()):
            raise ValueError(f"--overwrite would delete {path} ({name}), which lies in {output}: choose another folder")


def claim_output(output: Path, experiment: Experiment, overwrite: bool) -> None:
    """Make the folder this run's own; only now, so that a mistake found before leaves it as it was."""
    if overwrite and output.exists():
        for folder in (output, *complete_checkpoints(output)):
            (folder / COMPLETE_FILE).unlink(missing_ok=True)
        # What tells that a run made the folder goes last, lest a second try refuse what is left of it.
        for entry in sorted(output.iterdir(), key=lambda entry: entry.name == EXPERIMENT_FILE):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    output.mkdir(parents=True, exist_ok=True)
    (output / COMPLETE_FILE).unlink(missing_ok=True)
    for unfinished in unfinished_checkpoints(output):
        shutil.rmtree(unfinished)
    experiment.save(output / EXPERIMENT_FILE)


@contextmanager
def one_sentence_for_disk_errors(output: Path) -> Iterator[None]:
    """Say which folder it was that could not be written, and whether its disk is full, as an `OSError`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch.save and safetensors report a full disk in their own exceptions, without an errno
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        if full or (not isinstance(error, OSError) and _is_full(output)):
            raise OSError(f"the disk of {output} is full; make room and go on with --resume") from error
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise OSError(f"cannot write to {output}: {error.strerror}") from error
        raise


def _is_full(folder: Path) -> bool:
    return folder.is_dir() and shutil.disk_usage(folder).free < 1 << 20
