"""Attention maps and masks as pictures: PNG (or SVG, PDF), a page to hover over, the raw numbers.

Shapes: L layers, H heads, T rows, S columns, B sentences.
"""

import html
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from transformers import PreTrainedModel

from dragoman.data.tokenizers import ProcessingClass, source_and_target_tokenizer
from dragoman.inference.attention_maps import AttentionMap, alignments, eager, encode_pair, labels, pieces


DRAWN_FORMATS = (".png", ".svg", ".pdf")
FORMATS = (*DRAWN_FORMATS, ".html", ".npy")
# Of a picture with more cells the numbers would be too small to read.
_CELLS_WITH_NUMBERS = 300


def save_attention(found: AttentionMap, path: Path) -> list[str]:
    """Write a map in the format that the name ends in.

    `.png`, `.svg` and `.pdf` are drawn; `.html` is one file to hover over, which needs nothing else; `.npy` holds the
    weights (L, H, T, S) of all layers and heads, and a `.json` beside it the tokens.

    Returns:
        Warnings, one line each: characters for which no font is installed.

    Raises:
        ValueError: another ending.
    """
    check_format(path, FORMATS)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".html":
        path.write_text(attention_page(found), encoding="utf-8")
    elif path.suffix == ".npy":
        np.save(path, found.weights)
        about = {
            "kind": found.kind,
            "shape": "layers, heads, rows, columns",
            "rows": found.rows,
            "columns": found.columns,
            "source": found.source,
            "target": found.target,
        }
        path.with_suffix(".json").write_text(json.dumps(about, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    else:
        figure, missing = draw_attention(found)
        figure.savefig(path, dpi=150)
        return missing
    return []


def check_format(path: Path, formats: Sequence[str]) -> None:
    """
    Raises:
        ValueError: the name of the file ends in none of these.
    """
    if path.suffix not in formats:
        raise ValueError(f"--out {path}: the name has to end in {', '.join(formats[:-1])} or {formats[-1]}.")


def draw_attention(found: AttentionMap) -> tuple[Figure, list[str]]:
    """A heat map of `found.matrix`, the rows on the left, the columns above; and warnings as of `save_attention`."""
    matrix = found.matrix
    fonts, missing = fonts_for([*found.rows, *found.columns])
    rows, columns = matrix.shape
    cell = 0.46
    left, above = (0.25 + 0.093 * _longest(texts) for texts in (found.rows, found.columns))
    width, height = left + cell * columns + 1.1, above + cell * rows + 0.75
    width = max(width, 4.2)  # room for the title
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((left / width, 0.2 / height, cell * columns / width, cell * rows / height))
    image = axes.imshow(matrix, cmap="Blues", vmin=0, vmax=max(float(matrix.max()), 1e-9), aspect="auto")
    _label(axes, found.rows, found.columns, fonts)
    if matrix.size <= _CELLS_WITH_NUMBERS:
        for (row, column), weight in np.ndenumerate(matrix):
            color = "white" if weight > 0.6 * matrix.max() else "black"
            if weight >= 0.01:
                axes.text(column, row, f"{weight:.2f}".lstrip("0"), ha="center", va="center", fontsize=8, color=color)
    beside = (left + cell * columns + 0.15) / width
    bar = figure.add_axes((beside, 0.2 / height, 0.14 / width, cell * rows / height))
    figure.colorbar(image, cax=bar).ax.tick_params(labelsize=8)
    figure.text(0.15 / width, 1 - 0.15 / height, found.title, fontsize=10, va="top")
    rows_are = "rows: source" if found.kind == "encoder" else "rows: output"
    columns_are = "columns: output so far" if found.kind == "decoder" else "columns: source"
    figure.text(0.15 / width, 1 - 0.36 / height, f"{rows_are}, {columns_are}", fontsize=8, va="top", color="0.35")
    return figure, missing


def _label(axes: Any, rows: Sequence[str], columns: Sequence[str], fonts: list[str]) -> None:
    """Every token named; those above lie on their side where one of them is longer than its cell."""
    rotation = 0 if _longest(columns) <= 3 else 90
    axes.set_xticks(range(len(columns)), columns, rotation=rotation, fontfamily=fonts, fontsize=10, parse_math=False)
    axes.set_yticks(range(len(rows)), rows, fontfamily=fonts, fontsize=10, parse_math=False)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_color("0.8")
    axes.set_xticks(np.arange(len(columns) - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(rows) - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="minor", length=0)


def _longest(texts: Iterable[str]) -> int:
    """Length of the longest text, in narrow characters."""
    return max(sum(2 if ord(character) > 0x2E80 else 1 for character in text) for text in texts)


@lru_cache
def _installed_fonts() -> list[tuple[str, str]]:
    """Paths and names of the fonts of this machine, those first that are made for screens and for many scripts."""
    paths = sorted(font_manager.findSystemFonts(), key=lambda path: ("Sans" not in path, "Regular" not in path, path))
    found = []
    for path in paths:
        try:
            found.append((path, font_manager.get_font(path).family_name))
        except RuntimeError:
            continue  # a kind of font that matplotlib cannot read, such as one of colored pictures
    return found


@lru_cache
def _characters(path: str) -> frozenset[int]:
    return frozenset(font_manager.get_font(path).get_charmap())


def fonts_for(texts: Iterable[str]) -> tuple[list[str], list[str]]:
    """
    Names of fonts that together have the characters of the texts: matplotlib's own, and installed ones where that
    lacks some; and a warning of one line about what no font has.
    """
    own = font_manager.findfont("DejaVu Sans")
    names, wanted = ["DejaVu Sans"], {ord(character) for text in texts for character in text} - _characters(own)
    for path, name in _installed_fonts() if wanted else []:
        if has := wanted & _characters(path):
            font_manager.fontManager.addfont(path)
            names.append(name)
            wanted = wanted - has
        if not wanted:
            break
    if not wanted:
        return names, []
    unknown = "".join(map(chr, sorted(wanted)))
    return names, [
        f"no font on this machine has {unknown!r}, drawn as boxes: install one (on Debian and Ubuntu, fonts-noto-cjk "
        "for Chinese, Japanese and Korean), or write .html, which the browser's fonts show."
    ]


def heat_table(found: AttentionMap, chosen_row: int | None = None) -> str:
    """`found.matrix` as an HTML table; each cell says what it is when the pointer rests on it."""
    matrix = found.matrix
    strongest = max(float(matrix.max()), 1e-9)
    head = "".join(f'<th scope="col"><span>{html.escape(text)}</span></th>' for text in found.columns)
    lines = [f'<table class="heat"><thead><tr><td></td>{head}</tr></thead><tbody>']
    for number, (text, weights) in enumerate(zip(found.rows, matrix, strict=True)):
        chosen = ' class="chosen"' if number == chosen_row else ""
        lines.append(f'<tr{chosen}><th scope="row">{html.escape(text)}</th>')
        for column, weight in zip(found.columns, weights, strict=True):
            says = html.escape(f"{text} → {column}: {weight:.3f}", quote=True)
            share = weight / strongest
            lines.append(f'<td style="background:rgba(8,81,156,{share:.3f})" title="{says}"></td>')
        lines.append("</tr>")
    return "".join(lines) + "</tbody></table>"


HEAT_STYLE = """
.heat { border-collapse: collapse; width: auto; margin: 0; }
.heat td, .heat th { border: 0; padding: 0; }
.heat thead th { height: 1em; vertical-align: bottom; font-weight: normal; }
.heat thead th span { writing-mode: vertical-rl; transform: rotate(180deg); padding: .3em 0; white-space: nowrap; }
.heat tbody th { text-align: right; font-weight: normal; padding: 0 .6em 0 .3em; white-space: nowrap; }
.heat tbody td { width: 1.9em; min-width: 1.9em; height: 1.9em; border: 1px solid rgba(128,128,128,.25); }
.heat tbody td:hover { outline: 2px solid #d95f0e; }
.heat tr:hover th { text-decoration: underline; }
.heat tr.chosen th { font-weight: bold; color: #d95f0e; }
.heat tr.chosen td { border-top: 2px solid #d95f0e; border-bottom: 2px solid #d95f0e; }
"""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.4 system-ui, "Noto Sans CJK SC", sans-serif; margin: 2em; color: #222; background: #fff; }}
h1 {{ font-size: 1.2em; }} .scroll {{ overflow-x: auto; }} #says {{ min-height: 1.4em; font-weight: bold; }}
.words td, .words th {{ padding: .1em 1em .1em 0; text-align: left; }}
{style}</style></head><body>
<h1>{title}</h1>
<p>{source} → {target}</p>
<div class="scroll">{table}</div>
<p id="says">Point at a cell: what is predicted there → where it looked: how much.</p>
<table class="words"><tr><th>output</th><th>looked at</th><th>weight</th><th>entropy (bits)</th></tr>{words}</table>
<script>
const says = document.getElementById("says");
document.querySelectorAll(".heat tbody td").forEach(cell =>
  cell.addEventListener("mouseenter", () => {{ says.textContent = cell.title; }}));
</script></body></html>
"""


def attention_page(found: AttentionMap) -> str:
    """One HTML file with the map, its numbers under the pointer, and the word alignments."""
    words = "".join(
        f"<tr><td>{html.escape(one.word)}</td><td>{html.escape(one.looked_at)}</td><td>{one.weight:.2f}</td>"
        f"<td>{one.entropy:.2f}</td></tr>"
        for one in alignments(found)
    )
    return PAGE.format(
        title=html.escape(found.title),
        source=html.escape(found.source),
        target=html.escape(found.target),
        style=HEAT_STYLE,
        table=heat_table(found),
        words=words,
    )


@dataclass
class MaskPicture:
    """The masks of a batch, as the first layer of the model was given them.

    Attributes:
        source_tokens, target_tokens: B rows of tokens as text, padding included.
        source_real, target_real: (B, S) and (B, T), false at padding.
        masks: (B, rows, columns) by name, true where attention is allowed.
    """

    source_tokens: list[list[str]]
    target_tokens: list[list[str]]
    source_real: np.ndarray
    target_real: np.ndarray
    masks: dict[str, np.ndarray]


SELF, CAUSAL, CROSS = "encoder: source to source", "decoder: output to output", "cross: output to source"


@torch.no_grad()
def read_masks(
    model: PreTrainedModel,
    processing_class: ProcessingClass,
    sources: Sequence[str],
    targets: Sequence[str] | None,
    *,
    source_lang: str | None = None,
    target_lang: str | None = None,
    source_prefix: str | None = None,
) -> MaskPicture:
    """Run a batch of sentence pairs and keep the masks that arrive at the first layers.

    Args:
        targets: as many as sources; None decodes them.
        source_lang, target_lang, source_prefix: as in `translate`, for every pair.

    Raises:
        ValueError: an empty text, other numbers of sources and targets, a model of another package, or what `translate`
            refuses of the languages.
    """
    if model.config.model_type not in ("dragoman", "dragoman_rnn"):
        raise ValueError(
            f"masks are read from models of Dragoman, and this is a {model.config.model_type!r}: `dragoman convert` "
            "makes one of it."
        )
    if targets is not None and len(targets) != len(sources):
        raise ValueError(f"{len(sources)} sources need as many targets, not {len(targets)}: one --target for each.")
    settings = {"source_lang": source_lang, "target_lang": target_lang, "source_prefix": source_prefix}
    pairs = [
        encode_pair(model, processing_class, source, None if targets is None else targets[number], **settings)
        for number, source in enumerate(sources)
    ]
    source_tokenizer, target_tokenizer = source_and_target_tokenizer(processing_class)
    source = _padded([ids for ids, _, _ in pairs], source_tokenizer.pad_token_id)
    target = _padded([fed for _, fed, _ in pairs], target_tokenizer.pad_token_id)
    source_real = _padded([[1] * len(ids) for ids, _, _ in pairs], 0)
    target_real = _padded([[1] * len(fed) for _, fed, _ in pairs], 0)
    masks: dict[str, np.ndarray] = {}
    recurrent = model.config.model_type == "dragoman_rnn"
    hooks = _hooks_of_recurrent(model, masks) if recurrent else _hooks_of_transformer(model, masks, source.shape[1])
    try:
        with eager(model):
            model(
                input_ids=source.to(model.device),
                attention_mask=source_real.to(model.device),
                decoder_input_ids=target.to(model.device),
                decoder_attention_mask=target_real.to(model.device),
                use_cache=False,
            )
    finally:
        for hook in hooks:
            hook.remove()
    return MaskPicture(
        [labels(pieces(source_tokenizer, row)) for row in source.tolist()],
        [labels(pieces(target_tokenizer, row)) for row in target.tolist()],
        source_real.bool().numpy(),
        target_real.bool().numpy(),
        masks,
    )


def _padded(rows: list[list[int]], value: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def _hooks_of_transformer(model: Any, masks: dict[str, np.ndarray], source_length: int) -> list[Any]:
    """The additive masks (B, 1, rows, columns) that eager attention adds to its scores, or None where all is open."""
    encoder, decoder = model.get_encoder().layers[0], model.get_decoder().layers[0]

    def keep(name: str) -> Any:
        def hook(module, arguments):
            states, mask, *_ = arguments
            if mask is None:
                masks[name] = np.ones((*states.shape[:2], source_length), dtype=bool)
            else:
                masks[name] = (mask[:, 0] >= 0).expand(-1, states.shape[1], -1).cpu().numpy()

        return hook

    return [
        encoder.self_attn.register_forward_pre_hook(keep(SELF)),
        decoder.self_attn.register_forward_pre_hook(keep(CAUSAL)),
        decoder.cross_attn.register_forward_pre_hook(keep(CROSS)),
    ]


def _hooks_of_recurrent(model: Any, masks: dict[str, np.ndarray]) -> list[Any]:
    """A recurrent decoder has the one mask of its attention, (B, 1, T, S), or a part of it at each step."""

    def hook(module, arguments):
        visible = arguments[2].visible[:, 0].cpu().numpy()
        masks[CROSS] = np.concatenate([masks[CROSS], visible], axis=1) if CROSS in masks else visible

    return [model.get_decoder().recurrence.register_forward_pre_hook(hook)]


def save_masks(picture: MaskPicture, path: Path) -> list[str]:
    """Draw the masks of every sentence below each other; returns and raises as `save_attention`."""
    check_format(path, DRAWN_FORMATS)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, missing = draw_masks(picture)
    figure.savefig(path, dpi=150)
    return missing


def draw_masks(picture: MaskPicture) -> tuple[Figure, list[str]]:
    """A row for each sentence, a column for each mask; returns the figure and warnings as of `save_attention`."""
    fonts, missing = fonts_for([text for rows in (*picture.source_tokens, *picture.target_tokens) for text in rows])
    tokens = {
        SELF: (picture.source_tokens, picture.source_tokens),
        CAUSAL: (picture.target_tokens, picture.target_tokens),
        CROSS: (picture.target_tokens, picture.source_tokens),
    }
    rows_real = {SELF: picture.source_real, CAUSAL: picture.target_real, CROSS: picture.target_real}
    columns_real = {SELF: picture.source_real, CAUSAL: picture.target_real, CROSS: picture.source_real}
    cell, gap, top = 0.27, 0.25, 0.75
    longest = max(_longest(texts) for texts in (*picture.source_tokens, *picture.target_tokens))
    margin = 0.15 + 0.08 * longest
    sizes = {name: (mask.shape[1] * cell, mask.shape[2] * cell) for name, mask in picture.masks.items()}
    titles = {name: max(0.09 * len(name), wide) for name, (_, wide) in sizes.items()}
    tallest = max(high for high, _ in sizes.values())
    width = max(sum(margin + wide + gap for wide in titles.values()), 7.6)  # 7.6: the legend
    sentences = len(picture.source_tokens)
    height = top + sentences * (margin + tallest + gap)
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    colors = ["#2171b5", "#c6dbef", "#969696", "#fdae6b"]
    for sentence in range(sentences):
        left = 0.0
        for name, mask in picture.masks.items():
            high, wide = sizes[name]
            left += margin
            bottom = height - top - sentence * (margin + tallest + gap) - margin - high
            axes = figure.add_axes((left / width, bottom / height, wide / width, high / height))
            hidden = ~mask[sentence]
            in_use = rows_real[name][sentence]
            seen = np.where(in_use[:, None], 0, 1)  # the row of a padding token may look, but nobody reads it
            unseen = np.where(columns_real[name][sentence], 3, 2)
            kinds = np.where(hidden, unseen, seen)
            axes.imshow(kinds, cmap=ListedColormap(colors), vmin=0, vmax=3, aspect="auto")
            rows, columns = (texts[sentence] for texts in tokens[name])
            _label(axes, rows, columns, fonts)
            axes.tick_params(axis="x", labelrotation=90, labelsize=8)
            axes.tick_params(axis="y", labelsize=8)
            for label, is_real in zip(axes.get_yticklabels(), in_use, strict=True):
                label.set_color("black" if is_real else "0.55")
            for label, is_real in zip(axes.get_xticklabels(), columns_real[name][sentence], strict=True):
                label.set_color("black" if is_real else "0.55")
            if sentence == 0:
                figure.text(left / width, 1 - 0.42 / height, name, fontsize=10, va="top")
            left += titles[name] + gap
    meanings = zip(
        ("may look", "may look, but is padding", "hidden: padding", "hidden: comes later"), colors, strict=True
    )
    at = 0.15
    for text, color in meanings:
        figure.text(at / width, 1 - 0.15 / height, "■", color=color, fontsize=12, va="top")
        figure.text((at + 0.2) / width, 1 - 0.17 / height, text, fontsize=9, va="top")
        at += 0.55 + 0.07 * len(text)
    return figure, missing
