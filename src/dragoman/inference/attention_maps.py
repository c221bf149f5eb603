"""Where a model looks: the attention weights of a sentence and its output, as labeled arrays and as word alignments.

Shapes: L layers, H heads, T rows (queries), S columns (keys).
"""

import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from rich.cells import cell_len
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dragoman.data.languages import encode_texts, saved_prefix
from dragoman.data.tokenizers import ProcessingClass, source_and_target_tokenizer
from dragoman.inference.translate import translate


KINDS = ("cross", "encoder", "decoder")
ROW_LABELS = ("predicted", "fed")


@dataclass
class AttentionMap:
    """The attention weights of one sentence pair.

    Attributes:
        kind: "cross" (output to source), "encoder" (source to source) or "decoder" (output to what was fed before).
        weights: (L, H, T, S), of every layer and head.
        rows: T tokens as text, the queries: those of the output as they are predicted (or fed), or of the source.
        columns: S tokens as text, the keys.
        row_words, column_words: for each word its text and the numbers of its tokens.
        layer, head: the chosen ones; None is the average over all.
        source, target: the texts.
    """

    kind: str
    weights: np.ndarray
    rows: list[str]
    columns: list[str]
    row_words: list[tuple[str, list[int]]]
    column_words: list[tuple[str, list[int]]]
    layer: int | None
    head: int | None
    source: str
    target: str

    @property
    def matrix(self) -> np.ndarray:
        """(T, S): the chosen layer and head, averaged over those that are not chosen."""
        return select(self.weights, self.layer, self.head)

    @property
    def entropy(self) -> np.ndarray:
        """(T,), in bits: 0 where a row looks at one token, log2(S) where it looks at all alike."""
        return entropy(self.matrix)

    @property
    def title(self) -> str:
        layer = "all layers" if self.layer is None else f"layer {self.layer}"
        head = "all heads" if self.head is None else f"head {self.head}"
        kind = "cross-attention" if self.kind == "cross" else f"self-attention of the {self.kind}"
        return f"{kind}, {layer}, {head}"


@dataclass
class Alignment:
    """Where a word of the output looked.

    Attributes:
        word: of the output.
        looked_at: the word of the source with the largest weight.
        weight: that weight: summed over the tokens of `looked_at`, averaged over those of `word`.
        entropy: of the word's weights over the words of the source, in bits.
    """

    word: str
    looked_at: str
    weight: float
    entropy: float


def attention_map(
    model: PreTrainedModel,
    processing_class: ProcessingClass,
    source: str,
    target: str | None = None,
    kind: str = "cross",
    layer: int | None = None,
    head: int | None = None,
    rows: str = "predicted",
    *,
    source_lang: str | None = None,
    target_lang: str | None = None,
    source_prefix: str | None = None,
    **generation_arguments: Any,
) -> AttentionMap:
    """The attention weights for a sentence and its translation, by one teacher-forced pass over the pair.

    For an output of `generate` these are the weights with which it was decoded, beam search included: a row depends
    on the tokens before it alone (`attention_of_generation` reads them off the decoding instead). They exist in the
    eager implementation of attention only, so the model is switched to it and back.

    Args:
        model, processing_class: as `load` gives them.
        target: the output to look at; None decodes one.
        kind: "cross", "encoder" or "decoder"; recurrent models have cross-attention only.
        layer, head: counted from 0, from the end if negative; None is the average over all.
        rows: label the rows by the token that is "predicted" there, or by the one that is "fed" to the decoder.
        source_lang, target_lang, source_prefix: as in `translate`.
        **generation_arguments: settings of `generate` for a decoded target: `num_beams=4`, ...

    Raises:
        ValueError: an empty source or target; a kind, layer or head that the model does not have; arguments that
            `translate` refuses.
    """
    check_choices(model, kind, layer, head)
    if rows not in ROW_LABELS:
        raise ValueError(f"rows={rows!r} is unknown: label them by the token 'predicted' or 'fed'.")
    if kind == "encoder" and rows == "fed":
        raise ValueError("rows='fed' is for rows of the output; those of kind='encoder' are tokens of the source.")
    if target is not None and generation_arguments:
        raise ValueError(f"with a target nothing is decoded: leave out {', '.join(generation_arguments)}.")
    pair = encode_pair(
        model,
        processing_class,
        source,
        target,
        source_lang=source_lang,
        target_lang=target_lang,
        source_prefix=source_prefix,
        **generation_arguments,
    )
    return map_of_ids(model, processing_class, *pair, kind, layer, head, rows)


def map_of_ids(
    model: PreTrainedModel,
    processing_class: ProcessingClass,
    input_ids: list[int],
    fed_ids: list[int],
    predicted_ids: list[int],
    kind: str = "cross",
    layer: int | None = None,
    head: int | None = None,
    rows: str = "predicted",
) -> AttentionMap:
    """The same for token ids, as `encode_pair` gives them."""
    check_choices(model, kind, layer, head)
    source_tokenizer, target_tokenizer = source_and_target_tokenizer(processing_class)
    of_source, of_fed = pieces(source_tokenizer, input_ids), pieces(target_tokenizer, fed_ids)
    of_output = pieces(target_tokenizer, predicted_ids) if rows == "predicted" else of_fed
    queries, keys = {
        "cross": (of_output, of_source),
        "encoder": (of_source, of_source),
        "decoder": (of_output, of_fed),
    }[kind]
    weights = forced_attention(model, torch.tensor([input_ids]), torch.tensor([fed_ids]))[kind]
    layers, heads = weights.shape[0], weights.shape[2]
    return AttentionMap(
        kind=kind,
        weights=weights[:, 0].numpy(),
        rows=labels(queries),
        columns=labels(keys),
        row_words=words(queries),
        column_words=words(keys),
        layer=None if layer is None else layer % layers,
        head=None if head is None else head % heads,
        source=str(source_tokenizer.decode(input_ids, skip_special_tokens=True)),
        target=str(target_tokenizer.decode(predicted_ids, skip_special_tokens=True)),
    )


def encode_pair(
    model: Any,
    processing_class: ProcessingClass,
    source: str,
    target: str | None = None,
    *,
    source_lang: str | None = None,
    target_lang: str | None = None,
    source_prefix: str | None = None,
    **generation_arguments: Any,
) -> tuple[list[int], list[int], list[int]]:
    """Source ids, the target ids that are fed to the decoder, and those that it predicts from them, equally many.

    Args and what is raised are those of `attention_map`.
    """
    if not source.strip():
        raise ValueError("the source is empty: there is nothing to look at.")
    if target is not None and not target.strip():
        raise ValueError("the target is empty: there is nothing that looks; leave it out to have one decoded.")
    prefix = saved_prefix(processing_class) if source_prefix is None else source_prefix
    (input_ids,) = encode_texts(processing_class, "source", [prefix + source], [source_lang])
    if target is None:
        hypothesis = translate(
            model,
            processing_class,
            [source],
            scores=False,
            source_lang=source_lang,
            target_lang=target_lang,
            source_prefix=source_prefix,
            **generation_arguments,
        )[0][0]
        predicted = hypothesis.token_ids
        fed = [cast(int, hypothesis.start_id), *predicted[:-1]]
    else:
        (predicted,) = encode_texts(processing_class, "target", [target], [target_lang])
        fed = model.prepare_decoder_input_ids_from_labels(torch.tensor([predicted]))[0].tolist()
    return input_ids, fed, predicted


@torch.no_grad()
def forced_attention(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    decoder_input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """All weights of a batch, (B, S) and (B, T) -> (L, B, H, T, S) by kind, on the CPU; without those it has not."""
    with eager(model):
        outputs = model(
            input_ids=input_ids.to(model.device),
            attention_mask=None if attention_mask is None else attention_mask.to(model.device),
            decoder_input_ids=decoder_input_ids.to(model.device),
            output_attentions=True,
            use_cache=False,
        )
    found = {
        "cross": outputs.cross_attentions,
        "encoder": outputs.encoder_attentions,
        "decoder": outputs.decoder_attentions,
    }
    return {kind: torch.stack(layers).float().cpu() for kind, layers in found.items() if layers}


def attention_of_generation(outputs: Any, row: int = 0) -> dict[str, torch.Tensor]:
    """The weights with which `generate` itself decoded one of its sequences.

    With beams, the row that a sequence occupied changes from step to step; `beam_indices` tells which it was.

    Args:
        outputs: of `generate(..., output_attentions=True, return_dict_in_generate=True)`, with a cache or without,
            from a model whose attention is eager.
        row: of `outputs.sequences`.

    Returns:
        "cross" (L, H, T, S) and, of Transformers, "decoder" (L, H, T, T), for T generated tokens.

    Raises:
        ValueError: the outputs hold no attention.
    """
    if not outputs.cross_attentions or not outputs.cross_attentions[0]:
        raise ValueError(
            "these outputs hold no attention weights: generate(..., output_attentions=True, "
            "return_dict_in_generate=True) with a model loaded with attn_implementation='eager' gives them."
        )
    beams = outputs.get("beam_indices")
    steps = [row] * len(outputs.cross_attentions) if beams is None else [int(at) for at in beams[row] if at >= 0]
    by_kind = {}
    for kind, recorded in (("cross", outputs.cross_attentions), ("decoder", outputs.decoder_attentions)):
        if not recorded or not recorded[0]:
            continue
        # Without a cache each step repeats the rows of the steps before it; a static cache is longer than the step.
        last = [torch.stack([layer[at, :, -1] for layer in recorded[step]]) for step, at in enumerate(steps)]
        if kind == "decoder":
            last = [
                torch.nn.functional.pad(weights[..., : step + 1], (0, len(steps) - step - 1))
                for step, weights in enumerate(last)
            ]
        by_kind[kind] = torch.stack(last, dim=2).float().cpu()
    return by_kind


@contextmanager
def eager(model: PreTrainedModel) -> Iterator[None]:
    """The implementation of attention that keeps the weights, no dropout; afterwards what there was before."""
    before, was_training = model.config._attn_implementation, model.training
    model.eval()
    if before != "eager":
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        if before != "eager":
            model.set_attn_implementation(before)
        model.train(was_training)


def sizes(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Number of layers and heads of each kind of attention that the model has.

    Raises:
        ValueError: a model of another package whose configuration has other names for them, such as T5.
    """
    settings = model.config.to_dict()
    if settings["model_type"] != "dragoman_rnn":
        names = [f"{side}_{what}" for side in ("encoder", "decoder") for what in ("layers", "attention_heads")]
        if not settings.keys() >= set(names):
            raise ValueError(
                f"the configuration of this {settings['model_type']!r} model does not name its layers and heads as "
                "others do: `dragoman convert` makes a model of Dragoman of it."
            )
        of_decoder = (settings["decoder_layers"], settings["decoder_attention_heads"])
        return {
            "cross": of_decoder,
            "encoder": (settings["encoder_layers"], settings["encoder_attention_heads"]),
            "decoder": of_decoder,
        }
    if settings["attention"] == "none":
        return {}
    return {"cross": (settings["decoder_layers"] if settings["attention"] == "context_as_state" else 1, 1)}


def check_choices(model: PreTrainedModel, kind: str, layer: int | None = None, head: int | None = None) -> None:
    """
    Raises:
        ValueError: a kind, layer or head that the model does not have.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is no kind of attention: choose cross, encoder or decoder.")
    available = sizes(model)
    if not available:
        raise ValueError("this model has no attention: all that its decoder knows of the source is one vector.")
    if kind not in available:
        raise ValueError(f"kind={kind!r}: a recurrent model has no self-attention; its attention is kind='cross'.")
    for name, number, count in zip(("layer", "head"), (layer, head), available[kind], strict=True):
        if number is not None and not -count <= number < count:
            having = f"has the {name}s 0 to {count - 1}" if count > 1 else f"has one {name}, 0"
            raise ValueError(f"{name}={number}: the {kind} attention of this model {having}.")


def select(weights: np.ndarray, layer: int | None, head: int | None) -> np.ndarray:
    """(L, H, T, S) -> (T, S): one layer and head, or the average over all."""
    of_layer = weights.mean(axis=0) if layer is None else weights[layer]
    return of_layer.mean(axis=0) if head is None else of_layer[head]


def entropy(matrix: np.ndarray) -> np.ndarray:
    """(T, S) -> (T,), in bits"""
    return (matrix * -np.log2(np.where(matrix > 0, matrix, 1.0))).sum(axis=-1) + 0.0  # not -0.0


def alignments(found: AttentionMap) -> list[Alignment]:
    """For each word of the output, the word of the source at which it looked most."""
    matrix = found.matrix
    by_word = np.stack([matrix[:, tokens].sum(axis=1) for _, tokens in found.column_words], axis=1)
    aligned = []
    for word, tokens in found.row_words:
        row = by_word[tokens].mean(axis=0)
        at = int(row.argmax())
        aligned.append(Alignment(word, found.column_words[at][0], float(row[at]), float(entropy(row[None])[0])))
    return aligned


def alignment_text(found: AttentionMap) -> str:
    """One line for each word of the output: the word, where it looked, with which weight, and the entropy in bits."""
    rows = [("output", "looked at", "weight", "entropy")]
    rows += [(one.word, one.looked_at, f"{one.weight:.2f}", f"{one.entropy:.2f}") for one in alignments(found)]
    widths = [max(cell_len(row[column]) for row in rows) for column in range(4)]
    lines = []
    for row in rows:
        padded = [cell + " " * (width - cell_len(cell)) for cell, width in zip(row[:2], widths[:2], strict=True)]
        padded += [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join(padded))
    return "\n".join(lines)


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """
    The text that each token adds, spaces included: "Delete", " the", " fi", "les". A token that ends within a
    character adds nothing; the one that completes it adds the character.
    """
    special = set(tokenizer.all_special_ids)
    texts, known, before = [], [], ""
    for token in ids:
        if token in special:
            texts.append(str(tokenizer.convert_ids_to_tokens(token)))
            continue
        known.append(token)
        text = str(tokenizer.decode(known, clean_up_tokenization_spaces=False))
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            texts.append("")
            continue
        texts.append(text[len(before) :])
        before = text
    return texts


def labels(texts: Sequence[str]) -> list[str]:
    """Pieces as they label rows and columns: a space is made visible, and so is a part of a character."""
    return [text.strip() or ("␣" if text else "…") for text in texts]


def words(texts: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Pieces joined into words: a word begins at a space, and each Chinese or Japanese character is one of its own."""
    units: list[tuple[str, list[int]]] = []  # the tokens of one character belong together
    unfinished: list[int] = []
    for number, text in enumerate(texts):
        unfinished.append(number)
        if text or number == len(texts) - 1:
            units.append((text, unfinished))
            unfinished = []
    found: list[tuple[str, list[int]]] = []
    begins = True
    for text, tokens in units:
        bare = text.strip()
        alone = _is_special(bare) or any(_is_ideograph(character) for character in bare)
        if found and not (begins or alone or text[:1].isspace()):
            word, before = found[-1]
            found[-1] = (word + bare, before + tokens)
        elif bare:
            found.append((bare, tokens))
        begins = alone or text[-1:].isspace()
    return found


def _is_special(text: str) -> bool:
    return text.startswith("<") and text.endswith(">") and len(text) > 2


def _is_ideograph(character: str) -> bool:
    return unicodedata.name(character, "").startswith(("CJK", "HIRAGANA", "KATAKANA"))
