"""Dynamic batching: sentences of different requests that wait with the same settings are decoded together."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from dragoman.apps.limits import Limits
from dragoman.apps.metrics import Metrics
from dragoman.inference.translate import Hypothesis


class QueueFull(Exception):
    """No room for the sentences of one more request."""


class Stopped(Exception):
    """The batcher takes nothing more."""


@dataclass(frozen=True)
class Settings:
    """How to decode; sentences with equal settings may share a batch.

    Attributes:
        generation: arguments of `generate()`, as pairs.
        num_return_sequences: outputs per sentence.
        rows: rows of the decoder that a sentence needs: its beams, outputs or candidates.
        scores: whether to compute them.
        source_lang, target_lang: codes, for a model with languages.
        seed: of sampling. The noise that a row gets depends on the rows beside it, so a sentence with a seed is
            decoded alone: its outputs depend on nothing but the sentence and these settings.
    """

    generation: tuple[tuple[str, Any], ...] = ()
    num_return_sequences: int = 1
    rows: int = 1
    scores: bool = True
    source_lang: str | None = None
    target_lang: str | None = None
    seed: int | None = None


@dataclass(eq=False)
class _Sentence:
    text: str
    tokens: int
    settings: Settings
    arrived: float
    deadline: float
    answer: asyncio.Future[list[Hypothesis]] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


# (texts, settings, seconds left until nobody waits for the outputs any more) -> the hypotheses of each text
Decode = Callable[[list[str], Settings, float], Sequence[list[Hypothesis]]]


class Batcher:
    """A bounded queue in the event loop, and one thread that decodes what `run` takes from it."""

    def __init__(self, decode: Decode, limits: Limits, metrics: Metrics) -> None:
        self._decode, self._limits, self._metrics = decode, limits, metrics
        self._waiting: list[_Sentence] = []  # the oldest first
        self._arrival = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._task: asyncio.Task[None] | None = None
        self._hurries = False
        self._stopping = False

    def __len__(self) -> int:
        """Sentences that wait."""
        return len(self._waiting)

    @property
    def running(self) -> bool:
        return self._task is not None and not self._task.done() and not self._stopping

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    def hurry(self) -> None:
        """From now on nothing waits for company: hardly any more will come."""
        self._hurries = True
        self._arrival.set()

    async def stop(self) -> None:
        """Take nothing more; return when what was taken is answered."""
        self._stopping = True
        self.hurry()
        if self._task is not None:
            await self._task
        await asyncio.to_thread(self._thread.shutdown)

    async def answer(self, texts: Sequence[str], tokens: Sequence[int], settings: Settings) -> list[list[Hypothesis]]:
        """Decode the texts of one request, each in whatever batch it fits into.

        Args:
            tokens: the length of each text.

        Returns:
            The hypotheses of each text, in order. Cancelling the call gives up what is not being decoded yet.

        Raises:
            QueueFull, Stopped: nothing was queued.
            TimeoutError: `Limits.timeout` has passed; what still waited is given up.
            ValueError: `generate()` cannot do this.
        """
        if not self.running:
            raise Stopped
        if len(self._waiting) + len(texts) > self._limits.max_queue:
            raise QueueFull
        now = asyncio.get_running_loop().time()
        deadline = now + self._limits.timeout
        sentences = [
            _Sentence(text, length, settings, now, deadline) for text, length in zip(texts, tokens, strict=True)
        ]
        self._waiting += sentences
        self._arrival.set()
        try:
            async with asyncio.timeout_at(deadline):
                return await asyncio.gather(*(sentence.answer for sentence in sentences))
        finally:
            for sentence in sentences:
                sentence.answer.cancel()  # nothing, where the answer is there
            before = len(self._waiting)
            self._waiting = [sentence for sentence in self._waiting if not sentence.answer.done()]
            self._metrics.dropped_sentences += before - len(self._waiting)

    async def _run(self) -> None:
        now = asyncio.get_running_loop().time
        while self._waiting or not self._stopping:
            if not self._waiting:
                self._arrival.clear()
                await self._arrival.wait()
                continue
            batch, full = self._next_batch()
            start = self._waiting[0].arrived + self._limits.max_wait_ms / 1000
            if not full and now() < start and not self._hurries:
                self._arrival.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(start):
                        await self._arrival.wait()
                continue
            self._waiting = [sentence for sentence in self._waiting if sentence not in batch]
            await self._decode_batch(batch)

    def _next_batch(self) -> tuple[list[_Sentence], bool]:
        """The oldest sentence and those most like it in length, and whether that is all that one batch can hold."""
        first, *others = self._waiting
        if first.settings.seed is not None:
            return [first], True
        others = [sentence for sentence in others if sentence.settings == first.settings]
        others.sort(key=lambda sentence: abs(sentence.tokens - first.tokens))
        batch, longest, left_out = [first], first.tokens, False
        for sentence in others:
            width = max(longest, sentence.tokens)
            tokens = (len(batch) + 1) * first.settings.rows * width
            if len(batch) == self._limits.max_batch_size or tokens > self._limits.max_batch_tokens:
                left_out = True
            else:
                batch.append(sentence)
                longest = width
        return batch, left_out or len(batch) == self._limits.max_batch_size

    async def _decode_batch(self, batch: list[_Sentence]) -> None:
        loop = asyncio.get_running_loop()
        seconds = max(sentence.deadline for sentence in batch) - loop.time()
        texts = [sentence.text for sentence in batch]
        self._metrics.batch_sentences.observe(len(batch))
        self._metrics.source_tokens += sum(sentence.tokens for sentence in batch)
        try:
            outputs = await loop.run_in_executor(self._thread, self._decode, texts, batch[0].settings, seconds)
        except Exception as error:
            if len(batch) > 1:  # one sentence must not spoil the others' answers
                for sentence in batch:
                    if not sentence.answer.done():
                        await self._decode_batch([sentence])
            elif not batch[0].answer.done():
                batch[0].answer.set_exception(error)
            return
        for sentence, hypotheses in zip(batch, outputs, strict=True):
            self._metrics.generated_tokens += sum(len(hypothesis.token_ids) for hypothesis in hypotheses)
            if not sentence.answer.done():
                sentence.answer.set_result(hypotheses)
