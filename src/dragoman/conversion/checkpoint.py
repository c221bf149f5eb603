"""Checkpoints on disk, one tensor at a time: read safetensors lazily, write shards."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_SIZE = "5GB"  # as in Transformers


class StoredWeights:
    """
    The weights in a folder, by name, without the prefix `model.` that a head puts before them. Only what is asked for
    is read, and shards are mapped into memory rather than loaded.

    Raises:
        FileNotFoundError: there are none in safetensors files.
        ValueError: a file is damaged.
    """

    def __init__(self, folder: Path):
        self._files = {}
        for path in self._paths(folder):
            try:
                file = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{path} cannot be read as a safetensors file: {error}") from error
            for name in file.keys():  # noqa: SIM118 (not a dictionary)
                self._files[name.removeprefix("model.")] = (name, file)

    @staticmethod
    def _paths(folder: Path) -> list[Path]:
        if (folder / WEIGHTS_FILE).is_file():
            return [folder / WEIGHTS_FILE]
        if (folder / INDEX_FILE).is_file():
            names = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"].values()
            return [folder / name for name in sorted(set(names))]
        others = sorted(path.name for pattern in ("*.bin", "*.h5", "*.msgpack") for path in folder.glob(pattern))
        advice = (
            f" It has {', '.join(others)}; where you trust them, AutoModelForSeq2SeqLM.from_pretrained(...)."
            "save_pretrained(...) writes safetensors."
            if others
            else ""
        )
        raise FileNotFoundError(f"{folder} holds no weights in safetensors files ({WEIGHTS_FILE} is missing).{advice}")

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def names(self) -> list[str]:
        return list(self._files)

    def outline(self, name: str) -> torch.Tensor:
        """A tensor of the same shape and dtype without content."""
        stored, file = self._files[name]
        part = file.get_slice(stored)
        shape = part.get_shape()
        # An empty piece tells the dtype in torch's words.
        dtype = part[0:0].dtype if shape else file.get_tensor(stored).dtype
        return torch.empty(shape, dtype=dtype, device="meta")

    def read(self, name: str) -> torch.Tensor:
        stored, file = self._files[name]
        return file.get_tensor(stored)

    def equal(self, one: str, other: str) -> bool:
        """Whether two names hold the same numbers."""
        if one == other:
            return True
        return self.outline(one).shape == self.outline(other).shape and torch.equal(self.read(one), self.read(other))


@dataclass(frozen=True)
class Origin:
    """Where a weight to be written comes from: a stored one, and what happens to it on the way."""

    name: str
    change: Callable[[torch.Tensor], torch.Tensor]


def write(folder: Path, origins: dict[str, Origin], stored: StoredWeights, dtype: torch.dtype | None) -> None:
    """
    Writes weights as Transformers does, in shards of at most `SHARD_SIZE`; one shard at a time is in memory.

    Args:
        origins: the names to be written; dtype: what to store them as, None as they are.
    """

    def changed(origin: Origin, tensor: torch.Tensor) -> torch.Tensor:
        return origin.change(tensor).to(dtype or tensor.dtype).contiguous()

    shards = split_torch_state_dict_into_shards(
        # A copy, since a part of a tensor counts as the whole of it.
        {name: torch.empty_like(changed(origin, stored.outline(origin.name))) for name, origin in origins.items()},
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_SIZE,
    )

    def content(names: list[str]) -> dict[str, torch.Tensor]:
        return {name: changed(origins[name], stored.read(origins[name].name)) for name in names}

    for filename, names in shards.filename_to_tensors.items():
        # The content has no name here, so that a shard is gone before the next one is read.
        save_file(content(names), folder / filename, metadata={"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
