"""The numbers of a server in the text format of Prometheus (exposition format 0.0.4)."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator


class Histogram:
    def __init__(self, *bounds: float) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # of values up to each bound and above the one before; the rest
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str) -> Iterator[str]:
        count = 0
        for bound, more in zip([*self.bounds, "+Inf"], self.counts, strict=True):
            count += more
            yield f'{name}_bucket{{le="{bound}"}} {count}'
        yield f"{name}_sum {self.sum}"
        yield f"{name}_count {count}"


class Metrics:
    """Written and read in the event loop only, so without locks."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.request_seconds = Histogram(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
        self.batch_sentences = Histogram(1, 2, 4, 8, 16, 32, 64, 128)
        self.source_tokens = self.generated_tokens = self.dropped_sentences = 0

    def text(self, queue_sentences: int) -> str:
        """Of the queue only the present length is known, to the one who asks."""
        return "\n".join(self._lines(queue_sentences)) + "\n"

    def _lines(self, queue_sentences: int) -> Iterator[str]:
        yield from _head("requests_total", "counter", "Requests by path and status.")
        for (path, status), count in sorted(self.requests.items()):
            yield f'dragoman_requests_total{{path="{path}",status="{status}"}} {count}'
        yield from _head("request_seconds", "histogram", "Time from a request for a translation to its answer.")
        yield from self.request_seconds.lines("dragoman_request_seconds")
        yield from _head("batch_sentences", "histogram", "Sentences decoded together.")
        yield from self.batch_sentences.lines("dragoman_batch_sentences")
        for name, kind, value, help_text in (
            ("queue_sentences", "gauge", queue_sentences, "Sentences that wait."),
            ("source_tokens_total", "counter", self.source_tokens, "Tokens of the sentences decoded."),
            ("generated_tokens_total", "counter", self.generated_tokens, "Tokens of the outputs."),
            ("dropped_sentences_total", "counter", self.dropped_sentences, "Given up before they were decoded."),
        ):
            yield from _head(name, kind, help_text)
            yield f"dragoman_{name} {value}"


def _head(name: str, kind: str, help_text: str) -> tuple[str, str]:
    return f"# HELP dragoman_{name} {help_text}", f"# TYPE dragoman_{name} {kind}"
