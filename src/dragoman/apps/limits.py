"""What a server accepts and how it batches: every default in one place."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of batches, of the queue and of requests.

    Raises:
        ValueError: a bound that is not positive (the wait may be 0), or a queue shorter than one request.
    """

    max_batch_size: int = 32  # sentences decoded together
    max_batch_tokens: int = 8192  # source tokens decoded together: sentences x rows of each (beams) x the longest one
    max_wait_ms: float = 5.0  # how long a sentence waits for others while the model is idle
    max_queue: int = 512  # sentences that wait
    timeout: float = 30.0  # seconds from a request to its answer
    max_texts: int = 64  # of a request
    max_characters: int = 4000  # of a text
    max_tokens: int = 512  # of a text
    max_body_bytes: int = 1_000_000
    max_beams: int = 8  # also outputs per text, and candidates of contrastive search
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 0 or (value == 0 and name != "max_wait_ms"):
                raise ValueError(f"{name} must be greater than 0, got {value}")
        if self.max_queue < self.max_texts:
            raise ValueError(
                f"max_queue={self.max_queue} has no room for one request of max_texts={self.max_texts} texts"
            )
