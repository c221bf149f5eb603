"""
The pipeline that travels with every saved model: where the package is not installed,
`transformers.pipeline("seq2seq-generation", model=..., trust_remote_code=True)` takes it from beside the weights.
"""

from collections.abc import Iterator, Mapping, Sequence
from threading import Thread
from typing import Any

import torch
from transformers import Pipeline, TextIteratorStreamer
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


class Seq2SeqGenerationPipeline(Pipeline):
    """
    Texts to texts, with any encoder-decoder and every argument of its `generate()`.

    An input is a text, a row `{"source": text, "history": [earlier turns, the oldest first]}` of which the history may
    be left out, or a chat as elsewhere in Transformers: a list of `{"role": ..., "content": ...}`. Lists of inputs are
    decoded in batches; datasets and generators too, while they are read.

    Arguments of the constructor, beside those of every pipeline, are defaults of these arguments of a call:
        batch_size: inputs decoded together; 1 by default.
        num_return_sequences: outputs for each input, the best first; more than one needs beams or sampling.
        scores: add to each output `log_probability`, the natural logarithm of its probability given the input, before
            any temperature, truncation or penalty, and `score`: that divided by `length ** length_penalty`.
        history: earlier turns of inputs that bring none of their own.
        **generate_kwargs: `num_beams=4`, `do_sample=True`, `penalty_alpha=0.6`, `max_new_tokens=80`, `streamer=...`

    Returns, as the pipelines of Transformers 4 did:
        for one input, a list of its outputs, each `{"generated_text": ...}` (`translation_text` for the task
        "translation", `summary_text` for "summarization"); for a list of inputs, the one output of each, or the list of
        its outputs where it has several. An empty input gives empty outputs.

    Raises:
        ValueError: an input that is no text; earlier turns for a tokenizer without `<sep>`; an argument that
            `generate()` does not know.
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
        """Saves the model, this code, and the tokenizer or processor."""
        super().save_pretrained(save_directory, **kwargs)
        if self.processor is not None:
            self.processor.save_pretrained(save_directory)

    def _sanitize_parameters(self, history=None, scores=None, **generate_kwargs):
        preprocess = {} if history is None else {"history": history}
        forward = generate_kwargs if scores is None else {**generate_kwargs, "scores": scores}
        return preprocess, forward, {}

    def preprocess(self, input_, history=()):
        """One input -> `input_ids (1,S)`, `attention_mask (1,S)`, `is_empty (1,)`."""
        if isinstance(input_, Chat):
            turns = [message["content"] for message in input_.messages]
            input_ = {"source": turns[-1], "history": turns[:-1]}
        row: Mapping[str, Any] = input_ if isinstance(input_, Mapping) else {"source": input_}
        source: Any = row.get("source")
        history = row.get("history", history)
        for text in (source, *history):
            if not isinstance(text, str):
                raise ValueError(f"an input has to be a text, or a row with a text as its source, not {text!r}.")
        if history:
            known = self.tokenizer.get_vocab()
            if TURN_SEPARATOR not in known:
                raise ValueError(
                    f"this tokenizer has no {TURN_SEPARATOR}, which stands between the turns of a dialogue: the model "
                    "was not trained with earlier turns."
                )
        encoded = self.tokenizer(join_turns([*history, source]), return_tensors="pt")
        is_empty = torch.tensor([not source.strip()])
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], "is_empty": is_empty}

    def _forward(self, model_inputs, scores=False, **generate_kwargs):
        is_empty = model_inputs.pop("is_empty")  # (B,)
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
