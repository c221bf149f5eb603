"""Averages of weights: over the steps of a run while it trains, or over checkpoints that lie there."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState

from dragoman.files import check_new_folder, new_folder
from dragoman.training.checkpoints import (
    COMPLETE_FILE,
    PLOT_FILE,
    SAMPLES_FILE,
    TEST_FILE,
    complete_checkpoints,
    load_parts,
)


# Of a checkpoint whose model.safetensors is the average: the weights that the optimizer goes on with.
CURRENT_WEIGHTS_FILE = "current_weights.safetensors"
WEIGHTS_FILE = "model.safetensors"
# What a checkpoint or a run's folder holds for the Trainer alone, or says about one model.
_OF_ONE_CHECKPOINT = (
    "optimizer*",
    "pytorch_model_fsdp*",
    "scheduler.*",
    "scaler.*",
    "rng_state*",
    "trainer_state.json",
    "training_args.bin",
    "model*.safetensors*",
    CURRENT_WEIGHTS_FILE,
    COMPLETE_FILE,
    "checkpoint-*",
    "runs",
    PLOT_FILE,
    SAMPLES_FILE,
    TEST_FILE,
    "evaluation",
    "README.md",
)


class WeightAverage(TrainerCallback):
    """
    The exponential moving average of a model's weights, one update a step: `a += (1 - d) * (w - a)`, where `d` is
    `decay`, or `(1 + step) / (10 + step)` as long as that is less, lest the random first weights linger.

    It takes the memory of the weights once more, on the same device; where FSDP2 shares those out among processes, the
    average is shared out, too.
    """

    def __init__(self, model: PreTrainedModel, decay: float) -> None:
        self.model = model
        self.decay = decay
        self.average: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self.average:
            self.average = {name: weight.detach().clone() for name, weight in self._weights()}

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        step = state.global_step
        update = get_ema_multi_avg_fn(min(self.decay, (1 + step) / (10 + step)))
        update(list(self.average.values()), [weight.detach() for _, weight in self._weights()], None)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the average of its weights meanwhile."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def save_current(self, checkpoint: Path) -> None:
        weights = {name: weight.detach().contiguous() for name, weight in self._weights()}
        save_file(weights, checkpoint / CURRENT_WEIGHTS_FILE)

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint whose average the model has just loaded."""
        self.average = {name: weight.detach().clone() for name, weight in self._weights()}
        current = load_file(checkpoint / CURRENT_WEIGHTS_FILE)
        with torch.no_grad():
            for name, weight in self._weights():
                weight.copy_(current[name])

    def resume_shared_out(self, checkpoint: Path) -> None:
        """Go on from a checkpoint of FSDP2, whose shards the model has just loaded: those are the current weights."""
        self.average = {name: weight.detach().clone() for name, weight in self._weights()}
        self.load(checkpoint)
        self._exchange()

    def keep(self) -> None:
        """The model has the average of its weights for good."""
        self._exchange()

    def load(self, checkpoint: Path) -> None:
        """The model has the average in a checkpoint of FSDP2 for good; each process takes its share of it."""
        self._reshard()
        load_parts(self.model, checkpoint)

    def _weights(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        self._reshard()
        return ((name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad)

    def _reshard(self) -> None:
        """After a pass without gradients FSDP2 may hold whole weights in place of the shares."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, weight in self._weights():  # in place, since FSDP2 gathers from where the shares lie
            current = weight.clone()
            weight.copy_(self.average[name])
            self.average[name].copy_(current)


def average_checkpoints(sources: Sequence[str | Path], output: str | Path, last: int | None = None) -> list[Path]:
    """
    Write a model whose parameters are the means of those of several checkpoints (Vaswani 2017, section 6.1, averages
    the last 5 or 20). Each tensor is read, averaged in at least single precision and stored in its own type; the memory
    needed is that of one model. All other files come from the last checkpoint.

    Args:
        sources: folders of models; a run's folder stands for its complete checkpoints, in the order of their steps.
        output: folder to write, new or empty. It appears when all of it is written.
        last: take the last so many checkpoints alone.

    Returns:
        the checkpoints averaged.

    Raises:
        ValueError: fewer than two checkpoints, models that differ in more than their weights, a folder in use.
        FileNotFoundError: a folder that does not exist or holds no weights.
    """
    output = Path(output)
    checkpoints = [checkpoint for source in sources for checkpoint in _checkpoints_of(Path(source))]
    if last is not None:
        if last > len(checkpoints):
            raise ValueError(f"--last {last}: there are {len(checkpoints)} complete checkpoints")
        checkpoints = checkpoints[-last:]
    if len(checkpoints) < 2:
        named = f"{checkpoints[0]} alone" if checkpoints else f"{', '.join(map(str, sources))}: no complete checkpoint"
        raise ValueError(f"an average needs two checkpoints or more, not {named}")
    check_new_folder(output)
    _check_configs(checkpoints)
    averaged = _average_weights(checkpoints)
    about = {"averaged": [str(checkpoint) for checkpoint in checkpoints]}
    others = shutil.ignore_patterns(*_OF_ONE_CHECKPOINT)
    with new_folder(output) as partial:
        shutil.copytree(checkpoints[-1], partial, ignore=others, dirs_exist_ok=True)
        save_file(averaged, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        (partial / COMPLETE_FILE).write_text(json.dumps(about) + "\n", encoding="utf-8")
    return checkpoints


def _checkpoints_of(source: Path) -> list[Path]:
    if not source.is_dir():
        raise FileNotFoundError(f"{source} does not exist" if not source.exists() else f"{source} is not a folder")
    if inside := complete_checkpoints(source):
        return inside
    if not list(source.glob("model*.safetensors")):
        raise FileNotFoundError(f"{source} holds neither complete checkpoints nor weights in safetensors")
    return [source]


def _check_configs(checkpoints: list[Path]) -> None:
    first, *others = [json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in checkpoints]
    for folder, other in zip(checkpoints[1:], others, strict=True):
        differing = [key for key in sorted(first.keys() | other.keys()) if first.get(key) != other.get(key)]
        if differing and differing != ["transformers_version"]:
            raise ValueError(f"{checkpoints[0]} and {folder} are different models: their {', '.join(differing)} differ")


def _average_weights(checkpoints: list[Path]) -> dict[str, torch.Tensor]:
    with ExitStack() as stack:
        tensors: list[dict[str, Any]] = []  # of each checkpoint: the open file that holds a tensor, by its name
        for folder in checkpoints:
            files = [
                stack.enter_context(safe_open(file, framework="pt"))
                for file in sorted(folder.glob("model*.safetensors"))
            ]
            tensors.append({name: file for file in files for name in file.keys()})  # noqa: SIM118 (no mapping)
            for name in tensors[0].keys() ^ tensors[-1].keys():
                raise ValueError(f"{checkpoints[0]} and {folder} do not both have the weight {name}")
        averaged = {}
        for name in tensors[0]:
            parts = (files[name].get_tensor(name) for files in tensors)
            total = next(parts)
            stored, shape = total.dtype, total.shape
            total = total.to(torch.promote_types(stored, torch.float32))
            for folder, part in zip(checkpoints[1:], parts, strict=True):
                if part.shape != shape:
                    raise ValueError(
                        f"{name} is {tuple(shape)} in {checkpoints[0]} and {tuple(part.shape)} in {folder}"
                    )
                total += part
            averaged[name] = total.div_(len(checkpoints)).to(stored)
    return averaged
