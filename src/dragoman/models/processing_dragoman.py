"""Two vocabularies in one saved object: the processor of models whose source and target are tokenized differently."""

from typing import Any

from transformers import BatchEncoding, ProcessorMixin
from transformers.utils import cached_file


class DragomanProcessor(ProcessorMixin):
    """A source tokenizer and a target tokenizer that are saved, loaded and passed around as one.

    It answers like a tokenizer: calling and padding use the source's vocabulary, `text_target` and decoding the
    target's. Saved, the source's files lie in the folder itself and the target's in its subfolder `target_tokenizer`.

    Args:
        tokenizer: tokenizer of the source.
        target_tokenizer: tokenizer of the target. Its ids of the special tokens must be the source's, because a model
            has one of each.

    Raises:
        ValueError: the two disagree about the id of a special token.
    """

    target_tokenizer: Any

    def __init__(self, tokenizer, target_tokenizer):
        super().__init__(tokenizer, target_tokenizer)
        for name in ("bos_token_id", "pad_token_id", "eos_token_id", "unk_token_id"):
            source_id, target_id = getattr(tokenizer, name), getattr(target_tokenizer, name)
            if source_id != target_id:
                raise ValueError(
                    f"{name} is {source_id} in the source tokenizer and {target_id} in the target tokenizer; "
                    "both must be the same"
                )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Load both tokenizers.

        Raises:
            OSError: there is no second vocabulary, where Transformers would take the first one twice, with a warning.
        """
        hub = {name: kwargs[name] for name in ("cache_dir", "local_files_only", "revision", "token") if name in kwargs}
        cached_file(pretrained_model_name_or_path, "target_tokenizer/tokenizer_config.json", **hub)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def __call__(self, text=None, text_target=None, **kwargs) -> BatchEncoding:
        """Encode source text, target text or both.

        Args:
            text: source sentence or list of sentences.
            text_target: target sentence or list of sentences.
            **kwargs: for the tokenizers: `padding`, `truncation`, `max_length`, `return_tensors`, ...

        Returns:
            `input_ids` and `attention_mask` of the source, with the target's ids as `labels` when both are given (not
            masked: padding in them is the padding token, as tokenizers do it); of the target when it alone is given.

        Raises:
            ValueError: neither is given.
        """
        if text is None and text_target is None:
            raise ValueError("the processor needs text, text_target or both")
        if text is None:
            return self.target_tokenizer(text_target=text_target, **kwargs)
        encoding = self.tokenizer(text, **kwargs)
        if text_target is not None:
            encoding["labels"] = self.target_tokenizer(text_target=text_target, **kwargs)["input_ids"]
        return encoding

    def pad(self, *args, **kwargs):
        """Pad encoded sources, as the source tokenizer's `pad` does."""
        return self.tokenizer.pad(*args, **kwargs)

    def decode(self, *args, **kwargs):
        """Target ids to text, as the target tokenizer's `decode` does."""
        return self.target_tokenizer.decode(*args, **kwargs)

    def batch_decode(self, *args, **kwargs):
        """Rows of target ids to texts, as the target tokenizer's `batch_decode` does."""
        return self.target_tokenizer.batch_decode(*args, **kwargs)

    @property
    def model_input_names(self):
        return self.tokenizer.model_input_names

    @property
    def bos_token_id(self):
        return self.tokenizer.bos_token_id

    @property
    def pad_token_id(self):
        return self.tokenizer.pad_token_id

    @property
    def eos_token_id(self):
        return self.tokenizer.eos_token_id

    @property
    def unk_token_id(self):
        return self.tokenizer.unk_token_id


__all__ = ["DragomanProcessor"]
