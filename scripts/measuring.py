"""What the benchmarks share: sides that take turns, the spread of their ratios, the memory of a process."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def take_turns(
    sides: Sequence[Callable[[], Any]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[list[list[float]], list[Any]]:
    """Seconds of every side in every turn, after one turn that does not count, and the sides' last results."""
    times: list[list[float]] = [[] for _ in sides]
    results: list[Any] = [None] * len(sides)
    for turn in range(repeats + 1):
        for number in range(len(sides)) if turn % 2 else reversed(range(len(sides))):
            start = clock()
            results[number] = sides[number]()
            times[number].append(clock() - start)
    return [side[1:] for side in times], results


def spread(above: Sequence[float], below: Sequence[float]) -> str:
    """The median of the ratios of neighbors, with quartiles."""
    ratios = [one / other for one, other in zip(above, below, strict=True)]
    if len(ratios) < 2:
        return f"**{ratios[0]:.2f}**"
    low, _, high = statistics.quantiles(ratios, n=4)
    return f"**{statistics.median(ratios):.2f}** ({low:.2f} - {high:.2f})"


def memory_from_now() -> Callable[[], float]:
    """MB that the process has needed at most since then, beyond what it had; Linux counts the peak anew when asked."""

    def megabytes(field: str) -> float:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) / 1024  # type: ignore[index]

    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = megabytes("VmRSS")
    return lambda: megabytes("VmHWM") - before
