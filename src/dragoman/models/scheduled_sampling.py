"""Teacher forcing: how often a decoder in training is fed the true token, and what it is fed otherwise."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch


# Shapes: R target rows, T target length, D hidden size, V target vocabulary.


def teacher_forcing_schedule(
    step: int, kind: str = "constant", k: float = 1.0, slope: float = 0.0, minimum: float = 0.0
) -> float:
    """
    The teacher forcing ratio of an optimizer step (Bengio 2015, section 2.4).

    Args:
        step: optimizer steps taken so far, from 0.
        kind: `constant`: k; `linear`: k - slope * step; `exponential`: k ** step;
            `inverse_sigmoid`: k / (k + exp(step / k)).
        k: between 0 and 1 if constant or linear, strictly between them if exponential, at least 1 if inverse sigmoid.
        slope: what a linear schedule loses per step.
        minimum: the ratio never falls below it.

    Raises:
        ValueError: an unknown kind; numbers outside their ranges.
    """
    ranges = {
        "constant": (0 <= k <= 1, "between 0 and 1"),
        "linear": (0 <= k <= 1, "between 0 and 1"),
        "exponential": (0 < k < 1, "more than 0 and less than 1"),
        "inverse_sigmoid": (k >= 1, "at least 1"),
    }
    if kind not in ranges:
        raise ValueError(f"teacher forcing schedule {kind!r} is unknown: choose one of {', '.join(ranges)}.")
    valid, allowed = ranges[kind]
    if not valid:
        raise ValueError(f"k={k} of a teacher forcing schedule that is {kind} must be {allowed}.")
    if slope < 0 or (slope > 0 and kind != "linear"):
        raise ValueError(f"slope={slope} of a teacher forcing schedule must be 0, or positive where kind is linear.")
    if not 0 <= minimum <= 1:
        raise ValueError(f"minimum={minimum} of a teacher forcing schedule must be between 0 and 1.")
    ratio = {
        "constant": lambda: k,
        "linear": lambda: k - slope * step,
        "exponential": lambda: k**step,
        "inverse_sigmoid": lambda: k / (k + math.exp(min(step / k, 700.0))),  # beyond 700 a float overflows
    }[kind]()
    return max(minimum, ratio)


@dataclass
class ScheduledSampling:
    """
    The coins of one forward pass (Bengio 2015, section 2.4).

    Attributes:
        gold: (R or 1, T) on the CPU, true where the decoder is fed the true token. The first token is always that.
        chance: (R, T) on the CPU, uniform numbers that choose among the model's own tokens; None for the most probable.
        predict: states (R, 1, D) -> logits (R, 1, V).
    """

    gold: torch.Tensor
    chance: torch.Tensor | None
    predict: Callable[[torch.Tensor], torch.Tensor]

    @classmethod
    def toss(
        cls,
        rows: int,
        length: int,
        ratio: float,
        coin: str,
        feedback: str,
        generator: torch.Generator | None,
        predict: Callable[[torch.Tensor], torch.Tensor],
    ) -> "ScheduledSampling":
        """
        Tosses all coins of a pass at once, so that they depend on the generator and the shape of the batch alone.

        Args:
            ratio: chance of the true token.
            coin: `token` or `step`; feedback: `argmax` or `sample` (see the configuration).
            generator: on the CPU; None is torch's own.
        """
        gold = torch.rand(rows if coin == "token" else 1, length, generator=generator) < ratio
        gold[:, :1] = True
        chance = torch.rand(rows, length, generator=generator) if feedback == "sample" else None
        return cls(gold, chance, predict)

    @torch.no_grad()
    def own_tokens(self, states: torch.Tensor, step: int) -> torch.Tensor:
        """The tokens (R, 1) for this step that the states (R, 1, D) of the step before it predict."""
        logits = self.predict(states)
        if self.chance is None:
            return logits.argmax(dim=-1)
        below = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1).cumsum(dim=-1)
        chance = self.chance[:, step, None, None].to(below)
        return (below < chance).sum(dim=-1).clamp(max=logits.shape[-1] - 1)
