"""What is seen of a run: how fast it is, what it says so far, how its curves go, and whether it still learns at all."""

import json
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from dragoman.data.tokenizers import ProcessingClass, source_and_target_tokenizer
from dragoman.files import write_whole
from dragoman.training.checkpoints import SAMPLES_FILE


# A gradient so many times the usual one is no noise if it comes so many steps in a row.
EXPLODING, EXPLODING_STEPS = 100, 10


class Speed:
    """Tokens of the training steps since it was last asked, a second. Evaluations and checkpoints take no time here."""

    def __init__(self) -> None:
        self.since: float | None = None
        self.seconds = 0.0
        self.tokens: dict[str, torch.Tensor | int] = {}

    def add(self, inputs: dict[str, Any]) -> None:
        """Count a batch; nothing waits for the device."""
        if self.since is None:
            self.go_on()
        sources, targets = inputs["attention_mask" if "attention_mask" in inputs else "segment_ids"], inputs["labels"]
        counts = {
            "target": (targets != -100).sum(),
            "padded_target": targets.numel(),
            "all": (targets != -100).sum() + (sources != 0).sum(),
            "padded_all": targets.numel() + sources.numel(),
        }
        self.tokens = {name: count + self.tokens.get(name, 0) for name, count in counts.items()}

    def go_on(self) -> None:
        self.since = time.perf_counter()

    def pause(self) -> None:
        if self.since is not None:
            self.seconds += time.perf_counter() - self.since
            self.since = None

    def figures(self, gather: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Real and padded target tokens a second of all processes, and the share of padding of both sides."""
        names = ("target", "padded_target", "all", "padded_all")
        counts = torch.tensor([float(self.tokens[name]) for name in names])
        target, padded_target, every, padded_every = gather(counts[None]).sum(dim=0).tolist()
        seconds, self.seconds, self.tokens = self.seconds, 0.0, {}
        return {
            "target_tokens_per_second": target / seconds,
            "padded_target_tokens_per_second": padded_target / seconds,
            "padding": 1 - every / padded_every,
        }


class Divergence:
    """
    Stops a run before it spoils its weights.

    Args:
        last_good: finds the last complete checkpoint, which the sentence names.
    """

    def __init__(self, last_good: Callable[[], Path | None]) -> None:
        self.last_good = last_good
        self.usual: deque[float] = deque(maxlen=100)
        self.exploded = 0

    def check(self, norm: float, step: int, learning_rate: float) -> None:
        """
        Args:
            norm: of the gradients of this step, before clipping; the weights do not have them yet.

        Raises:
            ValueError: it is not finite, or has been far above the usual for some steps.
        """
        if not math.isfinite(norm):
            self._stop(f"the gradient became {norm} in step {step}", learning_rate)
        if len(self.usual) < 20 or norm <= EXPLODING * statistics.median(self.usual):
            self.usual.append(norm)
            self.exploded = 0
            return
        self.exploded += 1
        if self.exploded == EXPLODING_STEPS:
            usual = statistics.median(self.usual)
            what = f"the norm of the gradient is {norm:.3g} in step {step}, the {EXPLODING_STEPS}th above"
            self._stop(f"{what} {EXPLODING} times the usual {usual:.3g}", learning_rate)

    def _stop(self, what: str, learning_rate: float) -> None:
        last = self.last_good()
        rest = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
        raise ValueError(
            f"training diverged: {what}, at a learning rate of {learning_rate:.3g}; {rest}; "
            "start anew with a lower training.learning_rate or a longer training.warmup_steps"
        )


class Samples:
    """
    What the model makes of the validation sources that come first, at each evaluation: said, kept in `samples.jsonl`,
    and shown by TensorBoard where the run reports to it.

    Args:
        say: prints a line.
        count: how many.
    """

    def __init__(self, processing_class: ProcessingClass, say: Callable[..., None], count: int) -> None:
        self.source_tokenizer, self.target_tokenizer = source_and_target_tokenizer(processing_class)
        self.say = say
        self.count = count
        self.rows: list[tuple[Any, Any, Any]] = []

    def add(self, sources: torch.Tensor, outputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Take what is still wanted of a batch of ids, each (B, length)."""
        wanted = slice(0, self.count - len(self.rows))
        self.rows += zip(sources[wanted], outputs[wanted], targets[wanted], strict=True)

    def texts(self) -> list[dict[str, str]]:
        tokenizers = {"source": self.source_tokenizer, "output": self.target_tokenizer, "target": self.target_tokenizer}
        texts = []
        for row in self.rows:
            text = {}
            for (side, tokenizer), ids in zip(tokenizers.items(), row, strict=True):
                real = [token for token in ids.tolist() if token not in (-100, tokenizer.pad_token_id)]
                text[side] = str(tokenizer.decode(real, skip_special_tokens=True))
            texts.append(text)
        self.rows = []
        return texts

    def report(self, folder: Path, step: int, callbacks: Sequence[TrainerCallback]) -> None:
        """Of the evaluation after this step; what an interrupted run said about later steps is forgotten."""
        texts = self.texts()
        if not texts:
            return
        path = folder / SAMPLES_FILE
        lines = []
        if path.exists():
            with path.open(encoding="utf-8") as before:  # its lines end at "\n" alone, those of str.splitlines() do not
                lines = [line for line in before if json.loads(line)["step"] < step]
        lines += [json.dumps({"step": step, **row}, ensure_ascii=False) + "\n" for row in texts]
        write_whole(path, "".join(lines))
        for row in texts:
            self.say(f"  {row['source']} → {row['output']} ({row['target']})", markup=False)
        for callback in callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                table = "| source | output | target |\n|---|---|---|\n" + "".join(
                    f"| {row['source']} | {row['output']} | {row['target']} |\n" for row in texts
                )
                callback.tb_writer.add_text("eval/samples", table, step)


def plot_run(log_history: Sequence[dict[str, float]], path: Path) -> None:
    """
    Draw the curves of a run from the log of its `trainer_state.json`: loss, validation scores, learning rate, norm of
    the gradients, tokens a second and padding. Panels without data are left out; without any, no picture is made.
    """
    steps = [log for log in log_history if "loss" in log]
    evaluations = [log for log in log_history if "eval_loss" in log]
    hidden = ("eval_loss", "eval_gen_len", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    scores = [name for name in (evaluations[0] if evaluations else {}) if name.startswith("eval_")]
    panels = [
        ("loss, nats a token", [(steps, "loss", "training"), (evaluations, "eval_loss", "validation")], False),
        ("validation", [(evaluations, name, name[5:]) for name in scores if name not in hidden], False),
        ("learning rate", [(steps, "learning_rate", "")], False),
        ("norm of the gradients, before clipping", [(steps, "grad_norm", "")], True),
        (
            "target tokens a second",
            [(steps, "target_tokens_per_second", "real"), (steps, "padded_target_tokens_per_second", "with padding")],
            False,
        ),
        ("share of padding, both sides", [(steps, "padding", "")], False),
    ]
    drawn = []
    for title, curves, logarithmic in panels:
        lines = [(points(logs, name), label) for logs, name, label in curves]
        if lines := [(line, label) for line, label in lines if len(line[0])]:
            drawn.append((title, lines, logarithmic))
    if not drawn:
        return
    figure = Figure(figsize=(11, 2.6 * math.ceil(len(drawn) / 2)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(math.ceil(len(drawn) / 2), 2, squeeze=False).flat
    for axis, (title, lines, logarithmic) in zip(axes, drawn, strict=False):
        for (at, values), label in lines:
            axis.plot(at, values, label=label or None, linewidth=1.5, marker="." if len(at) < 40 else None)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(which="both", labelsize=8)
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        if logarithmic:
            axis.set_yscale("log")
        elif title != "loss, nats a token":
            axis.set_ylim(bottom=0)
        if any(label for _, label in lines):
            axis.legend(fontsize=8, frameon=False)
    for axis in list(axes)[len(drawn) :]:
        axis.set_visible(False)
    figure.savefig(path, dpi=100)


def points(logs: Sequence[dict[str, float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the logs that have this figure."""
    found = [(log["step"], log[name]) for log in logs if name in log]
    return np.array([step for step, _ in found]), np.array([value for _, value in found])
