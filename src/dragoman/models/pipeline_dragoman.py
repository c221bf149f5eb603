"""
The pipeline that travels with every saved model: where the package is not installed,
`transformers.pipeline("seq2seq-generation", model=..., trust_remote_code=True)` takes it from beside the weights.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from threading import Thread
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, Pipeline, TextIteratorStreamer
from transformers.utils.chat_template_utils import Chat


# Shapes: B inputs, n outputs for each, T generated tokens, S source tokens, V target vocabulary.

TASK = "seq2seq-generation"
TURN_SEPARATOR = "<sep>"
# What the pipelines of these names called their outputs before Transformers 5 removed them.
OUTPUT_NAMES = {"translation": "translation_text", "summarization": "summary_text"}


def custom_pipelines() -> dict[str, dict[str, Any]]:
    """The entry of `config.json` by which Transformers finds this pipeline."""
    implementation = f"{__name__.rpartition('.')[2]}.{Seq2SeqGenerationPipeline.__name__}"
    return {TASK: {"impl": implementation, "pt": ["AutoModelForSeq2SeqLM"], "type": "text"}}


def join_turns(turns: Sequence[str]) -> str:
    """The source of a dialogue model: all turns, the oldest first, with ` <sep> ` between them."""
    return f" {TURN_SEPARATOR} ".join(turns)


def language_ids(tokenizer, side: str) -> dict[str, int]:
    """
    The languages of a tokenizer's side, "source" or "target": their codes, and the ids of their tokens. Empty for a
    tokenizer without languages.
    """
    kind = type(tokenizer).__name__
    if kind == "M2M100Tokenizer":
        return {code: tokenizer.get_lang_id(code) for code in tokenizer.lang_code_to_id}
    if kind in ("NllbTokenizer", "MBart50Tokenizer", "MBartTokenizer"):
        codes = [token for token in tokenizer.all_special_tokens if re.fullmatch("[a-z]{2,3}_[A-Z][A-Za-z]+", token)]
        return {code: tokenizer.convert_tokens_to_ids(code) for code in codes}
    codes = tokenizer.init_kwargs.get(f"{side}_languages", ())
    return {code: tokenizer.convert_tokens_to_ids(f"<{code}>") for code in codes}


def language_arguments(
    argument: str, token_ids: Sequence[int], processors: Sequence[LogitsProcessor] | None = None
) -> dict[str, Any]:
    """
    What `generate()` has to be told for rows that begin with these tokens, (B,).

    Args:
        argument: `forced_bos_token_id` or, for mBART, `decoder_start_token_id`.
        processors: the `logits_processor` that it is to be told anyway.
    """
    if len(set(token_ids)) == 1:
        return {argument: token_ids[0]}
    if argument == "decoder_start_token_id":
        return {argument: list(token_ids)}
    return {"logits_processor": LogitsProcessorList([*(processors or ()), ForcedFirstTokens(token_ids)])}


class ForcedFirstTokens(LogitsProcessor):
    """`forced_bos_token_id` with a token for each row of the batch; beams and samples of a row share its token."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        self.token_ids = torch.tensor(token_ids)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Decoder ids (N, t), scores (N, V), N a multiple of the rows -> scores (N, V)"""
        if input_ids.shape[1] > 1:
            return scores
        token_ids = self.token_ids.to(scores.device).repeat_interleave(len(scores) // len(self.token_ids))
        return torch.full_like(scores, -torch.inf).scatter_(1, token_ids[:, None], 0.0)


class Seq2SeqGenerationPipeline(Pipeline):
    """
    Texts to texts, with any encoder-decoder and every argument of its `generate()`.

    An input is a text, a row as in training data, `{"source": text}` with its own `history`, `source_lang`,
    `target_lang` or `source_prefix` if wanted, or a chat as elsewhere in Transformers: a list of
    `{"role": ..., "content": ...}`. Lists of inputs are decoded in batches; datasets and generators too, while they are
    read.

    Arguments of the constructor, beside those of every pipeline, are defaults of these arguments of a call:
        batch_size: inputs decoded together; 1 by default.
        num_return_sequences: outputs for each input, the best first; more than one needs beams or sampling.
        scores: add to each output `log_probability`, the natural logarithm of its probability given the input, before
            any temperature, truncation or penalty, and `score`: that divided by `length ** length_penalty`.
        history: earlier turns, the oldest first, of inputs that bring none of their own.
        source_lang, target_lang: for a model with languages, their codes; may be left out where there is only one.
        source_prefix: text before every source; the one that the model was trained with, if it is left out.
        **generate_kwargs: `num_beams=4`, `do_sample=True`, `penalty_alpha=0.6`, `max_new_tokens=80`, `streamer=...`

    Returns, as the pipelines of Transformers 4 did:
        for one input, a list of its outputs, each `{"generated_text": ...}` (`translation_text` for the task
        "translation", `summary_text` for "summarization"); for a list of inputs, the one output of each, or the list of
        its outputs where it has several. An empty input gives empty outputs.

    Raises:
        ValueError: an input that is no text; earlier turns for a tokenizer without `<sep>`; a language that the model
            does not have, or none where it has several; an argument that `generate()` does not know.
    """

    model: Any
    tokenizer: Any
    processor: Any
    _load_feature_extractor: Any = False
    _load_image_processor: Any = False
    _load_video_processor: Any = False
    _pipeline_calls_generate = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.tokenizer is None:
            raise ValueError(
                "the model comes without a tokenizer: give tokenizer=, or processor= for two vocabularies."
            )
        tokenizers = {"source": self.tokenizer, "target": self.target_tokenizer}
        self.language_ids = {side: language_ids(tokenizer, side) for side, tokenizer in tokenizers.items()}
        # pipeline() has put a class in the place of its name there, which no file can hold.
        if "custom_pipelines" in vars(self.model.config):
            self.model.config.custom_pipelines = custom_pipelines()

    @property
    def target_tokenizer(self):
        """What decodes: the tokenizer, or the second one of a processor with two vocabularies."""
        return self.tokenizer if self.processor is None else self.processor.target_tokenizer

    def __call__(self, inputs, **kwargs):
        if isinstance(inputs, list) and not inputs:
            return []
        results = super().__call__(inputs, **kwargs)
        # One chat is a list, too, and a list of outputs is its result.
        is_batch = isinstance(inputs, list) and isinstance(results[0], list)
        if is_batch and all(len(outputs) == 1 for outputs in results):
            return [output for (output,) in results]
        return results

    def stream(self, text, **kwargs) -> Iterator[str]:
        """
        The output of one input, piece by piece while it is decoded: by greedy search, or as the arguments say.

        Raises:
            ValueError: as a call; beams, which know their output only at the end.
        """
        streamer = TextIteratorStreamer(self.target_tokenizer, skip_prompt=True, skip_special_tokens=True)
        errors = []

        def decode():
            try:
                self(text, streamer=streamer, **{"num_beams": 1, **kwargs})
            except Exception as error:  # raised again where the pieces are read
                errors.append(error)
                streamer.on_finalized_text("", stream_end=True)

        thread = Thread(target=decode, daemon=True)
        thread.start()
        yield from (piece for piece in streamer if piece)
        thread.join()
        if errors:
            raise errors[0]

    def save_pretrained(self, save_directory, **kwargs):
        """Saves the model with its code, this file among it, and the tokenizer or processor."""
        self.model.save_pretrained(save_directory, **kwargs)
        (self.processor or self.tokenizer).save_pretrained(save_directory)

    def _sanitize_parameters(
        self, history=None, source_lang=None, target_lang=None, source_prefix=None, scores=None, **generate_kwargs
    ):
        preprocess = {
            "history": history,
            "source_lang": source_lang,
            "target_lang": target_lang,
            "source_prefix": source_prefix,
        }
        forward = generate_kwargs if scores is None else {**generate_kwargs, "scores": scores}
        return {name: value for name, value in preprocess.items() if value is not None}, forward, {}

    def preprocess(self, input_, **defaults):
        """One input -> `input_ids (1,S)`, `attention_mask (1,S)`, `is_empty (1,)`, `first_token (1,)`."""
        if isinstance(input_, Chat):
            turns = [message["content"] for message in input_.messages]
            input_ = {"source": turns[-1], "history": turns[:-1]}
        row: dict[str, Any] = {**defaults, **(input_ if isinstance(input_, Mapping) else {"source": input_})}
        turns = [*(row.get("history") or ()), row.get("source")]
        for text in turns:
            if not isinstance(text, str):
                raise ValueError(f"an input has to be a text, or a row with a text as its source, not {text!r}.")
        if len(turns) > 1 and TURN_SEPARATOR not in self.tokenizer.all_special_tokens:
            raise ValueError(
                f"this tokenizer has no {TURN_SEPARATOR}, which stands between the turns of a dialogue: the model was "
                "not trained with earlier turns."
            )
        prefix = row.get("source_prefix")
        if prefix is None:
            prefix = self.tokenizer.init_kwargs.get("source_prefix", "")
        input_ids = self._encode(prefix + join_turns(turns), self._language("source", row.get("source_lang")))
        target = self._language("target", row.get("target_lang"))
        first_token = -1 if target is None else self.language_ids["target"][target]
        return {
            "input_ids": torch.tensor([input_ids]),
            "attention_mask": torch.ones(1, len(input_ids), dtype=torch.long),
            "is_empty": torch.tensor([not turns[-1].strip()]),
            "first_token": torch.tensor([first_token]),
        }

    def _language(self, side: str, code: str | None) -> str | None:
        """The language of a text, given or the only one; None for what the tokenizer or the model is set to."""
        tokenizer = self.tokenizer if side == "source" else self.target_tokenizer
        known = list(self.language_ids[side])
        if code is None:
            if f"{side}_languages" not in tokenizer.init_kwargs:
                return None
            if len(known) == 1:
                return known[0]
        if code not in known:
            choice = f"one of {', '.join(known)}" if known else "nothing, because its tokenizer has no languages"
            raise ValueError(f"{side}_lang={code!r}: this model takes {choice}.")
        return code

    def _encode(self, text: str, language: str | None) -> list[int]:
        if language is None:
            return self.tokenizer(text).input_ids
        if "source_languages" not in self.tokenizer.init_kwargs:
            before, self.tokenizer.src_lang = self.tokenizer.src_lang, language
            try:
                return self.tokenizer(text).input_ids
            finally:
                self.tokenizer.src_lang = before
        # Where languages are the only special tokens, their spellings in a text are text.
        languages = {f"<{code}>" for codes in self.language_ids.values() for code in codes}
        only_languages = set(self.tokenizer.extra_special_tokens) <= languages
        input_ids = self.tokenizer(text, split_special_tokens=only_languages).input_ids
        return [self.language_ids["source"][language], *input_ids]

    def _forward(self, model_inputs, scores=False, **generate_kwargs):
        is_empty, first_tokens = model_inputs.pop("is_empty"), model_inputs.pop("first_token").tolist()  # (B,)
        if max(first_tokens) >= 0:
            if min(first_tokens) < 0:
                raise ValueError("some inputs of a batch have a target_lang: give one to the others, too.")
            is_mbart = type(self.target_tokenizer).__name__ == "MBartTokenizer"
            argument = "decoder_start_token_id" if is_mbart else "forced_bos_token_id"
            if generate_kwargs.get(argument) is None:
                processors = generate_kwargs.get("logits_processor")
                generate_kwargs |= language_arguments(argument, first_tokens, processors)
        settings = self._prepare_generate_kwargs(generate_kwargs, return_dict_in_generate=False)
        sequences = self.model.generate(**model_inputs, **settings)  # (B * n, 1 + T), the start token first
        outputs = {"sequences": sequences.view(len(is_empty), -1, sequences.shape[1]), "is_empty": is_empty}
        if scores:
            defaults = self.model.generation_config
            eos = settings.get("eos_token_id", defaults.eos_token_id)
            penalty = settings.get("length_penalty", defaults.length_penalty)
            log_probability, lengths = self._log_probability(model_inputs, sequences, eos)
            score = log_probability / lengths ** (1.0 if penalty is None else penalty)
            for name, values in (("log_probability", log_probability), ("score", score)):
                outputs[name] = values.view(len(is_empty), -1).masked_fill(is_empty[:, None], 0.0)
        return outputs

    def _log_probability(self, model_inputs, sequences, eos):
        """
        Sequences (B * n, 1 + T) -> their log-probabilities (B * n,), by one more pass, and how many tokens count
        (B * n,): those up to and with the first of the `eos` ids.
        """
        labels = sequences[:, 1:]
        pad = self.model.config.pad_token_id
        ends = torch.isin(labels, torch.tensor([] if eos is None else eos, device=labels.device))
        counts = (ends.cumsum(dim=1) - ends.long() == 0) & ((labels != pad) | ends)
        copies = len(sequences) // len(model_inputs["input_ids"])
        repeated = {name: values.repeat_interleave(copies, dim=0) for name, values in model_inputs.items()}
        logits = self.model(**repeated, decoder_input_ids=sequences[:, :-1], use_cache=False).logits  # (B * n, T, V)
        chosen = logits.float().log_softmax(dim=-1).gather(-1, labels[..., None])[..., 0]
        return (chosen * counts).sum(dim=1), counts.sum(dim=1)

    def postprocess(self, model_outputs):
        """Outputs of one input -> its n records."""
        (sequences,) = model_outputs["sequences"]  # (n, 1 + T)
        texts = self.target_tokenizer.batch_decode(sequences, skip_special_tokens=True)
        name = OUTPUT_NAMES.get(self.task, "generated_text")
        records = [{name: "" if model_outputs["is_empty"].item() else text} for text in texts]
        for figure in ("score", "log_probability"):
            if figure in model_outputs:
                for record, value in zip(records, model_outputs[figure][0].tolist(), strict=True):
                    record[figure] = value
        return records
