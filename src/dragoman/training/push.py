"""A model folder to the Hub."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

from dragoman.settings import one_line
from dragoman.training.card import write_card
from dragoman.training.checkpoints import COMPLETE_FILE, EXPERIMENT_FILE, SAMPLES_FILE


# What makes a model. Not the checkpoints of its training, their marker and log, or predictions on somebody's data.
PUSHED = [
    *("README.md", EXPERIMENT_FILE, "*.json", "*.safetensors", "*.py"),
    *("*.model", "*.spm", "*.bpe", "*.txt", "*.jinja"),  # files of converted tokenizers
]
NOT_PUSHED = ["checkpoint-*", "runs/*", COMPLETE_FILE, "trainer_state.json", "evaluation/predictions*"]
# Of an earlier push: weights and code that the folder no longer has, and what the Trainer's own uploads.
REPLACED = ["*.safetensors", "*.py", "training_args.bin", SAMPLES_FILE]


def push(
    folder: str | Path,
    repository: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
) -> CommitInfo:
    """Push a finished model to the Hub: weights, configurations, tokenizer, modeling code, YAML and model card.

    The repository is made if need be, and only files that differ from what is there travel. The card is written anew
    (see `write_card`), with the model's new name in it.

    Args:
        folder: what `dragoman train`, `dragoman convert` or `save_pretrained` wrote.
        repository: `organization/name`, or `name` for one's own.
        private: whether a new repository is private; None is what the organization or user has as default.
        revision: branch, made if need be; None is `main`.
        message: of the commit.

    Returns:
        the commit; its `oid` pins this state of the model, as `from_pretrained(..., revision=oid)`.

    Raises:
        FileNotFoundError: the folder holds no model.
        ValueError: an unfinished run, an impossible name, or no token.
        OSError: the Hub cannot be reached, or refuses.
    """
    folder = Path(folder).expanduser()
    _check_folder(folder)
    check_token()
    api = HfApi()
    with one_sentence_for_hub_errors(repository):
        name = api.create_repo(repository, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        write_card(folder, name)
        return api.upload_folder(
            repo_id=name,
            folder_path=folder,
            revision=revision,
            commit_message=message or "Push with Dragoman",
            allow_patterns=PUSHED,
            ignore_patterns=NOT_PUSHED,
            delete_patterns=REPLACED,
        )


def check_token() -> None:
    """Raise a ValueError where nobody is signed in."""
    if get_token() is None:
        raise ValueError("there is no token for the Hub: set HF_TOKEN to one that may write, or run `hf auth login`")


@contextmanager
def one_sentence_for_hub_errors(repository: str) -> Iterator[None]:
    try:
        yield
    except HfHubHTTPError as error:
        reason = error.server_message or one_line(error)
        raise OSError(f"{constants.ENDPOINT} refuses the push to {repository!r}: {reason}") from error
    except (HTTPError, OfflineModeIsEnabled) as error:
        raise OSError(f"{constants.ENDPOINT} cannot be reached: {one_line(error)}") from error


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist: give the folder of a finished model")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no model (config.json is missing)")
    if not any(re.fullmatch(r"model.*\.safetensors", path.name) for path in folder.iterdir()):
        raise FileNotFoundError(f"{folder} holds no weights (model.safetensors is missing)")
    if (folder / EXPERIMENT_FILE).is_file() and not (folder / COMPLETE_FILE).is_file():
        raise ValueError(
            f"{folder} is not finished ({COMPLETE_FILE} is missing): go on with --resume before pushing it"
        )
