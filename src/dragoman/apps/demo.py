"""`dragoman demo`: a page to try models, to see where they look, and to take their attention apart.

Reads top-down: what a session remembers, decoding, the parts of the page as HTML, the page itself.
"""

import html
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from dragoman.data.languages import default_language, encode_texts, languages, saved_prefix
from dragoman.data.tokenizers import ProcessingClass, source_and_target_tokenizer
from dragoman.inference.attention_maps import labels, map_of_ids, pieces, sizes
from dragoman.inference.attention_stages import attention_stages
from dragoman.inference.loading import load
from dragoman.inference.pictures import HEAT_STYLE, heat_table
from dragoman.inference.strategies import STRATEGIES
from dragoman.inference.translate import Hypothesis, translate
from dragoman.settings import parse_mapping
from dragoman.training.card import data_name
from dragoman.training.checkpoints import EXPERIMENT_FILE


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
try:
    import gradio as gr
except ImportError as missing:
    raise ValueError("the page needs Gradio, which is not installed: pip install 'dragoman[demo]'") from missing


LONGEST_SOURCE = 256  # tokens
LONGEST_SECONDS = 30.0  # of each strategy; what was decoded by then is shown
REQUESTS_AT_ONCE = 4  # of each kind; the others wait in line
AVERAGE = "average"
CANDIDATES = 5


@dataclass
class Loaded:
    """A model that the page offers."""

    model: PreTrainedModel
    processing_class: ProcessingClass
    about: str


@dataclass
class Output:
    """What one strategy gave for the source."""

    strategy: str
    hypothesis: Hypothesis
    tokens: list[str]
    seconds: float

    @property
    def fed_ids(self) -> list[int]:
        return [self.hypothesis.start_id or 0, *self.hypothesis.token_ids[:-1]]


@dataclass
class Session:
    """What one visitor looks at."""

    model: str = ""
    source: str = ""
    source_ids: list[int] = field(default_factory=list)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)  # of each strategy
    languages: dict[str, Any] = field(default_factory=dict)  # arguments of `translate`
    outputs: list[Output] = field(default_factory=list)
    compared: dict[tuple[str, str], "Session"] = field(default_factory=dict)  # by another model, of one strategy
    output: int = 0
    step: int = 0

    @property
    def chosen(self) -> Output:
        return self.outputs[self.output]


def load_for_demo(name: str, device: str | None = None, revision: str | None = None) -> Loaded:
    """Load a model with the attention that keeps its weights; raises as `load`."""
    model, processing_class = load(name, device, revision=revision)
    if model.config._attn_implementation != "eager":
        # Now, for good: requests that run at the same time must not switch it under each other.
        model.set_attn_implementation("eager")
    return Loaded(model, processing_class, describe(model))


def describe(model: Any) -> str:
    """What the model is and what it was trained on, as its folder tells it, in Markdown."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lines = [f"{type(model).__name__}, {parameters:,} parameters, on {model.device}."]
    path = Path(model.name_or_path) / EXPERIMENT_FILE
    if not path.is_file():
        return f"{lines[0]} Its folder does not say what it was trained on (it has no {EXPERIMENT_FILE})."
    settings = parse_mapping(path.read_text(encoding="utf-8"), path.name)
    data, tokenizer = settings.get("data", {}), settings.get("tokenizer", {})
    validation = f", validated on `{data_name(data['validation'])}`" if data.get("validation") else ""
    lines.append(f"Trained on `{data_name(data['train'])}`{validation}.")
    lines.append(f"Tokens: {tokenizer.get('kind')}.")
    if "attention" in settings.get("model", {}):
        lines.append(f"attention: {settings['model']['attention']}.")
    return " ".join(lines)


def settings_of(
    beams: float, temperature: float, top_k: float, top_p: float, alpha: float, candidates: float
) -> dict[str, dict[str, Any]]:
    """The generation arguments of each strategy, with what the sliders say."""
    changes: dict[str, dict[str, Any]] = {
        "greedy": {},
        "beam": {"num_beams": int(beams)},
        "sampling": {"temperature": float(temperature), "top_k": int(top_k), "top_p": float(top_p)},
        "contrastive": {"penalty_alpha": float(alpha), "top_k": int(candidates)},
    }
    return {name: STRATEGIES[name] | change for name, change in changes.items()}


def decode_all(
    loaded: Loaded,
    name: str,
    source: str,
    settings: dict[str, dict[str, Any]],
    source_lang: str | None = None,
    target_lang: str | None = None,
) -> Session:
    """Decode a source with every strategy, the languages being those of `translate`.

    Raises:
        ValueError: an empty source, or one that is too long for this page or for the model.
    """
    if not source.strip():
        raise ValueError("There is nothing to translate: type a sentence first.")
    _, target_tokenizer = source_and_target_tokenizer(loaded.processing_class)
    text = saved_prefix(loaded.processing_class) + source
    (source_ids,) = encode_texts(loaded.processing_class, "source", [text], [source_lang])
    if len(source_ids) > LONGEST_SOURCE:
        raise ValueError(
            f"The text has {len(source_ids):,} tokens; this page takes up to {LONGEST_SOURCE}: shorten it."
        )
    spoken: dict[str, Any] = {"source_lang": source_lang, "target_lang": target_lang}
    session = Session(name, source, source_ids, settings, spoken)
    for strategy, arguments in settings.items():
        started = time.perf_counter()
        (best, *_), *_ = translate(
            loaded.model,
            loaded.processing_class,
            [source],
            **spoken,
            max_time=LONGEST_SECONDS,
            **arguments,
        )
        seconds = time.perf_counter() - started
        tokens = labels(pieces(target_tokenizer, best.token_ids))
        session.outputs.append(Output(strategy, best, tokens, seconds))
    return session


def cards(session: Session) -> str:
    """The outputs side by side; every token is a button."""
    if not session.outputs:
        return '<p class="hint">The outputs of four strategies will stand here; each token can be clicked.</p>'
    parts = []
    for number, output in enumerate(session.outputs):
        buttons = "".join(
            f'<button type="button" class="token" data-output="{number}" data-step="{step}"'
            f' aria-pressed="{str((number, step) == (session.output, session.step)).lower()}">{html.escape(token)}'
            "</button>"
            for step, token in enumerate(output.tokens)
        )
        score = output.hypothesis.score or 0.0
        parts.append(
            f'<section class="card" aria-label="{output.strategy}"><h3>{output.strategy}</h3>'
            f'<p class="text">{html.escape(output.hypothesis.text) or "(nothing)"}</p>'
            f'<div class="tokens">{buttons}</div>'
            f'<p class="numbers"><span>score {score:.3f}</span> · <span>{len(output.tokens)} tokens</span> · '
            f"<span>{output.seconds:.2f} s</span></p></section>"
        )
    return f'<div class="cards">{"".join(parts)}</div>'


def number_or_none(choice: str) -> int | None:
    return None if choice == AVERAGE else int(choice)


def where_it_looked(loaded: Loaded, session: Session, kind: str, layer: str, head: str) -> str:
    """The chosen token: what it looked at, what else could have stood there, and the whole map."""
    output = session.chosen
    if not output.tokens:
        return '<p class="hint">Nothing was decoded, so nothing looked anywhere.</p>'
    found = map_of_ids(
        loaded.model,
        loaded.processing_class,
        session.source_ids,
        output.fed_ids,
        output.hypothesis.token_ids,
        kind,
        number_or_none(layer),
        number_or_none(head),
    )
    # The rows of the encoder are the source's, which no step of the output chooses.
    row = None if kind == "encoder" else session.step
    parts = [f"<h3>{html.escape(output.strategy)}: {_step_says(loaded, session)}</h3>"]
    if row is not None:
        weights = found.matrix[row]
        spans = "".join(
            f'<span class="seen" style="background:rgba(8,81,156,{weight:.3f});'
            f'{"color:#fff" if weight > 0.5 else ""}" title="{weight:.3f}">{html.escape(text)}</span>'
            for text, weight in zip(found.columns, weights, strict=True)
        )
        where = "so far" if kind == "decoder" else "in the source"
        parts.append(f'<p>It looked {where} at (the darker, the more): </p><p class="sentence">{spans}</p>')
        parts.append(f"<p>Entropy of this row: {found.entropy[row]:.2f} bits.</p>")
    parts.append(_candidates(loaded, session))
    parts.append(f'<h3>{html.escape(found.title)}</h3><div class="scroll">{heat_table(found, row)}</div>')
    return "".join(parts)


def _step_says(loaded: Loaded, session: Session) -> str:
    output = session.chosen
    _, tokenizer = source_and_target_tokenizer(loaded.processing_class)
    fed = labels(pieces(tokenizer, output.fed_ids))[session.step]
    return (
        f"step {session.step + 1} of {len(output.tokens)}, fed <q>{html.escape(fed)}</q>, "
        f"chose <q>{html.escape(output.tokens[session.step])}</q>"
    )


@torch.no_grad()
def _candidates(loaded: Loaded, session: Session) -> str:
    """The most probable tokens at this step, before any temperature or penalty."""
    model: Any = loaded.model
    output = session.chosen
    _, tokenizer = source_and_target_tokenizer(loaded.processing_class)
    logits = model(
        input_ids=torch.tensor([session.source_ids], device=model.device),
        decoder_input_ids=torch.tensor([output.fed_ids], device=model.device),
        use_cache=False,
    ).logits[0, session.step]
    probabilities = logits.float().softmax(dim=-1)
    best = probabilities.topk(min(CANDIDATES, len(probabilities))).indices.tolist()
    chosen = output.hypothesis.token_ids[session.step]
    rows = []
    for token in best if chosen in best else [*best, chosen]:
        share = float(probabilities[token])
        (text,) = labels(pieces(tokenizer, [token]))
        mark = ' class="chosen"' if token == chosen else ""
        rows.append(
            f'<tr{mark}><th scope="row">{html.escape(text)}</th><td class="bar"><div style="width:{100 * share:.1f}%">'
            f"</div></td><td>{share:.3f}</td></tr>"
        )
    return f'<p>What could stand here, with its probability:</p><table class="candidates">{"".join(rows)}</table>'


def numbers(loaded: Loaded, session: Session, kind: str, layer: str, head: str) -> str:
    """The chosen token's row of one layer and head, from the scores to the weighted sum."""
    if not session.outputs or not session.chosen.tokens:
        return ""
    if kind == "encoder":
        return '<p class="hint">The numbers are those of an output token: choose cross or decoder.</p>'
    layers, _ = sizes(loaded.model)[kind]
    at_layer = layers - 1 if layer == AVERAGE else int(layer)
    at_head = 0 if head == AVERAGE else int(head)
    output = session.chosen
    stages = attention_stages(loaded.model, session.source_ids, output.fed_ids, kind, at_layer)
    source_tokenizer, target_tokenizer = source_and_target_tokenizer(loaded.processing_class)
    keys = (
        labels(pieces(target_tokenizer, output.fed_ids))
        if kind == "decoder"
        else labels(pieces(source_tokenizer, session.source_ids))
    )
    at = (at_head, session.step)
    columns = [(f"score<br>{stages.formula}", stages.scores[at])]
    if stages.divisor != 1:
        columns.append((f"scaled<br>÷ {stages.divisor:.2f}", stages.scaled[at]))
    if stages.bias is not None:
        columns.append(("bias of<br>position", stages.bias[at]))
    columns += [("mask", stages.masked[at]), ("softmax:<br>weight", stages.weights[at])]
    width = min(4, stages.values.shape[-1])
    header = "".join(f'<th scope="col">{name}</th>' for name, _ in columns)
    lines = []
    for place, key in enumerate(keys):
        cells = "".join(_cell(name, float(values[place])) for name, values in columns)
        value = ", ".join(f"{number:.2f}" for number in stages.values[at_head, place, :width].tolist())
        lines.append(f'<tr><th scope="row">{html.escape(key)}</th>{cells}<td>{value}, …</td></tr>')
    total = ", ".join(f"{number:.3f}" for number in stages.output[at][:width].tolist())
    lines.append(
        f'<tr class="total"><th scope="row">sum</th>{"<td></td>" * (len(columns) - 1)}'
        f"<td>{float(stages.weights[at].sum()):.3f}</td><td>{total}, …</td></tr>"
    )
    averaged = " (of the averages above, one is shown)" if AVERAGE in (layer, head) else ""
    says = f"Layer {at_layer}, head {at_head}{averaged}, {_step_says(loaded, session)}"
    header += f'<th scope="col">value: {width} of its<br>{stages.values.shape[-1]} numbers</th>'
    return (
        f'<h3>{says}</h3><div class="scroll"><table class="stages"><thead><tr><td></td>{header}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
        "<p>The last line is the weighted sum: each value times its weight, added up.</p>"
    )


def _cell(name: str, number: float) -> str:
    if name == "mask":
        return f"<td>{'hidden' if number == float('-inf') else 'open'}</td>"
    return f"<td>{number:.3f}</td>"


def message(text: str) -> str:
    return f'<p role="alert" class="message">{html.escape(text)}</p>'


STYLE = (
    HEAT_STYLE
    + """
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(15em, 1fr)); gap: 1em; }
.card { border: 1px solid rgba(128,128,128,.4); border-radius: 8px; padding: .8em 1em; min-width: 0; }
.card h3 { margin: 0 0 .3em; } .card .text { font-size: 1.1em; margin: 0 0 .6em; overflow-wrap: anywhere; }
.card .numbers span { white-space: nowrap; } .card .numbers { margin: .6em 0 0; opacity: .75; font-size: .9em; }
.tokens { display: flex; flex-wrap: wrap; gap: .3em; align-items: stretch; }
button.token { border: 1px solid rgba(128,128,128,.5); border-radius: 5px; padding: .15em .45em; cursor: pointer;
  background: transparent; color: inherit; font: inherit; min-height: 1.9em; overflow-wrap: anywhere; }
button.token:hover { border-color: #d95f0e; } button.token:focus-visible { outline: 3px solid #d95f0e; }
button.token[aria-pressed=true] { background: #d95f0e; border-color: #d95f0e; color: #fff; }
.sentence { display: flex; flex-wrap: wrap; gap: .25em; }
.seen { border: 1px solid rgba(128,128,128,.35); border-radius: 4px; padding: .1em .4em; }
.scroll { overflow-x: auto; max-width: 100%; padding-bottom: .5em; }
.candidates { width: 100%; max-width: 32em; border-collapse: collapse; }
.candidates td, .candidates th { padding: .1em .5em .1em 0; text-align: left; font-weight: normal; line-height: 1.4; }
.candidates th { width: 9em; } .candidates .bar { width: 55%; }
.candidates .bar div { background: #3182bd; height: .8em; min-width: 1px; }
.candidates .chosen td, .candidates .chosen th { font-weight: bold; color: #d95f0e; }
.stages { border-collapse: collapse; } .stages thead { border-bottom: 1px solid currentColor; }
.stages td, .stages th { padding: .15em .7em; text-align: right; white-space: nowrap; }
.stages .total { border-top: 2px solid currentColor; font-weight: bold; }
.message { border-left: 4px solid #c00; padding: .5em .8em; margin: 0; background: rgba(204,0,0,.08); }
.hint { opacity: .75; }
#outputs, #where, #compared, #stages, #message { padding: 0 !important; }
#where h3, #compared h3, #stages h3, .card h3 { font-weight: 600; font-size: 1.05em; }
#where h3, #compared h3, #stages h3 { margin: .9em 0 .4em; }
#where p, #compared p, #stages p { margin: .4em 0; }
"""
)

# Tokens are real buttons, so Tab and Enter reach them; drawn anew, the pressed one gets the focus back.
CLICKS = """
let pressed = false;
element.addEventListener('click', event => {
  const token = event.target.closest('button.token');
  if (!token) return;
  pressed = true;
  trigger('click', {output: Number(token.dataset.output), step: Number(token.dataset.step)});
});
watch('value', () => {
  if (pressed) element.querySelector('button.token[aria-pressed=true]')?.focus();
  pressed = false;
});
"""


def build_page(models: dict[str, Loaded]) -> gr.Blocks:
    """The page for these models, ready to launch."""
    first = next(iter(models))

    def kinds(name: str) -> list[str]:
        return list(sizes(models[name].model))

    def numbered(count: int) -> list[str]:
        return [AVERAGE, *map(str, range(count))]

    def choices(name: str, kind: str) -> tuple[list[str], list[str]]:
        layers, heads = sizes(models[name].model).get(kind, (0, 0))
        return numbered(layers), numbered(heads)

    def shown(session: Session, kind: str, layer: str, head: str, beside: str, trouble: str = ""):
        """Everything that depends on the chosen token."""
        attentive = session.outputs and kind in kinds(session.model)
        loaded = models[session.model or first]
        where = where_it_looked(loaded, session, kind, layer, head) if attentive else ""
        stages = numbers(loaded, session, kind, layer, head) if attentive else ""
        if session.outputs and not attentive:
            where = '<p class="hint">This model has no attention: it carries the source in one vector.</p>'
        last = max(len(session.chosen.tokens), 1) if session.outputs else 1
        # A slider from 1 to 1 cannot be drawn.
        step = gr.Slider(maximum=max(last, 2), value=session.step + 1, interactive=last > 1)
        compared = other(session, kind, beside)
        return (
            session,
            cards(session),
            step,
            where,
            stages,
            gr.HTML(compared, visible=bool(compared)),
            gr.HTML(message(trouble), visible=bool(trouble)),
        )

    def other(session: Session, kind: str, beside: str) -> str:
        """The same sentence, strategy, settings and languages in another model, decoded once."""
        if not session.outputs or beside not in models:
            return ""
        loaded = models[beside]
        name = session.chosen.strategy
        if (beside, name) not in session.compared:
            try:
                settings = {name: session.settings[name]}
                theirs = decode_all(loaded, beside, session.source, settings, **session.languages)
            except ValueError as error:  # such as a model without these languages
                return message(str(error))
            session.compared[beside, name] = theirs
        theirs = session.compared[beside, name]
        (output,) = theirs.outputs
        head = f"<h3>{html.escape(beside)}, {name}</h3><p>{html.escape(output.hypothesis.text)}</p>"
        if kind not in kinds(beside):
            return head + f'<p class="hint">It has no {html.escape(kind)} attention.</p>'
        found = map_of_ids(
            loaded.model,
            loaded.processing_class,
            theirs.source_ids,
            output.fed_ids,
            output.hypothesis.token_ids,
            kind,
        )
        return f'{head}<h3>{found.title}</h3><div class="scroll">{heat_table(found)}</div>'

    def language_choice(name: str, side: Any) -> gr.Dropdown:
        codes = languages(models[name].processing_class, side)
        chosen = default_language(models[name].processing_class, side) or (codes[0] if codes else None)
        return gr.Dropdown(codes, value=chosen, label=f"Language of the {side}", visible=bool(codes))

    def on_translate(session, name, source, from_language, to_language, kind, layer, head, beside, *sliders):
        try:
            settings = settings_of(*sliders)
            session = decode_all(models[name], name, source, settings, from_language or None, to_language or None)
            return shown(session, kind, layer, head, beside)
        except ValueError as error:
            return shown(Session(name), kind, layer, head, beside, str(error))

    def on_token(session, kind, layer, head, beside, event: gr.EventData):
        session = replace(session, output=event.output, step=event.step)
        return shown(session, kind, layer, head, beside)

    def on_step(session, step, kind, layer, head, beside):
        if not session.outputs:
            return shown(session, kind, layer, head, beside)
        session = replace(session, step=min(int(step), max(len(session.chosen.tokens), 1)) - 1)
        return shown(session, kind, layer, head, beside)

    def on_kind(session, name, kind, beside):
        layers, heads = choices(name, kind)
        return (
            gr.Dropdown(choices=layers, value=AVERAGE),
            gr.Dropdown(choices=heads, value=AVERAGE),
            *shown(session, kind, AVERAGE, AVERAGE, beside),
        )

    def on_model(name, kind):
        available = kinds(name) or ["cross"]
        kind = kind if kind in available else available[0]
        layers, heads = choices(name, kind)
        return (
            models[name].about,
            language_choice(name, "source"),
            language_choice(name, "target"),
            gr.Radio(choices=available, value=kind),
            gr.Dropdown(choices=layers, value=AVERAGE),
            gr.Dropdown(choices=heads, value=AVERAGE),
        )

    layers, heads = choices(first, "cross")
    with gr.Blocks(title="Dragoman", analytics_enabled=False) as page:
        session = gr.State(Session(first))
        gr.Markdown(
            "# Dragoman\nType a sentence, compare four ways of decoding it, and click a token to see where it looked."
        )
        name = gr.Radio(list(models), value=first, label="Model", visible=len(models) > 1, elem_id="model")
        about = gr.Markdown(models[first].about, elem_id="about")
        source = gr.Textbox(label="Source", lines=2, max_lines=8, submit_btn=False, autofocus=True, elem_id="source")
        from_language, to_language = language_choice(first, "source"), language_choice(first, "target")
        button = gr.Button("Translate", variant="primary", elem_id="translate")
        wide: dict[str, Any] = {"min_width": 280}  # a label beside its number on one line
        with gr.Accordion("Settings of the strategies", open=False), gr.Row():
            beams = gr.Slider(2, 12, STRATEGIES["beam"]["num_beams"], step=1, label="beam: number of beams", **wide)
            temperature = gr.Slider(0.1, 2.0, 1.0, step=0.05, label="sampling: temperature", **wide)
            top_k = gr.Slider(0, 100, 0, step=1, label="sampling: top-k (0: all)", **wide)
            top_p = gr.Slider(0.05, 1.0, STRATEGIES["sampling"]["top_p"], step=0.05, label="sampling: top-p", **wide)
            alpha = gr.Slider(
                0.05,
                1.0,
                STRATEGIES["contrastive"]["penalty_alpha"],
                step=0.05,
                label="contrastive: penalty_alpha",
                **wide,
            )
            candidates = gr.Slider(
                2, 12, STRATEGIES["contrastive"]["top_k"], step=1, label="contrastive: candidates (top-k)", **wide
            )
        trouble = gr.HTML(elem_id="message", visible=False, apply_default_css=False)
        outputs = gr.HTML(cards(Session()), js_on_load=CLICKS, elem_id="outputs", apply_default_css=False)
        gr.Markdown("## Where it looked")
        with gr.Row():
            kind = gr.Radio(kinds(first) or ["cross"], value="cross", label="Attention", elem_id="kind")
            layer = gr.Dropdown(layers, value=AVERAGE, label="Layer", elem_id="layer")
            head = gr.Dropdown(heads, value=AVERAGE, label="Head", elem_id="head")
            others = ["nothing", *models]
            beside = gr.Dropdown(others, value="nothing", label="Beside it", visible=len(models) > 1, elem_id="beside")
        with gr.Row(equal_height=True):
            back = gr.Button("◀ step back", size="sm", elem_id="back")
            forward = gr.Button("step on ▶", size="sm", elem_id="forward")
        step = gr.Slider(1, 2, 1, step=1, label="Step of decoding: the token of the output", elem_id="step")
        with gr.Row():
            where = gr.HTML(elem_id="where", min_width=320, apply_default_css=False)
            compared = gr.HTML(elem_id="compared", min_width=320, visible=False, apply_default_css=False)
        with gr.Accordion("The numbers of each stage: scores, scaling, mask, softmax, weighted sum", open=True):
            stages = gr.HTML(elem_id="stages", apply_default_css=False)

        results = [session, outputs, step, where, stages, compared, trouble]
        view = [kind, layer, head, beside]
        everything = [
            session,
            name,
            source,
            from_language,
            to_language,
            *view,
            beams,
            temperature,
            top_k,
            top_p,
            alpha,
            candidates,
        ]
        quiet: dict[str, Any] = {"show_progress": "hidden"}
        gr.on([button.click, source.submit], on_translate, everything, results)
        name.change(on_model, [name, kind], [about, from_language, to_language, kind, layer, head]).then(
            on_translate, everything, results
        )
        outputs.click(on_token, [session, *view], results, **quiet)
        step.input(on_step, [session, step, *view], results, **quiet)
        back.click(
            lambda session, *view: on_step(session, max(session.step, 1), *view), [session, *view], results, **quiet
        )
        forward.click(
            lambda session, *view: on_step(session, session.step + 2, *view), [session, *view], results, **quiet
        )
        kind.input(on_kind, [session, name, kind, beside], [layer, head, *results], **quiet)
        for choice in (layer, head, beside):
            choice.input(shown, [session, *view], results, **quiet)
    page.queue(default_concurrency_limit=REQUESTS_AT_ONCE, api_open=False)
    return page


def launch(
    models: dict[str, Loaded], host: str = "127.0.0.1", port: int = 7860, wait: bool = True
) -> tuple[gr.Blocks, str]:
    """Serve the page; with `wait`, until Ctrl-C. Nothing is asked of the network, and nothing told to it.

    Returns:
        The page, which `close()` ends, and its address.

    Raises:
        OSError: the port is taken.
    """
    page = build_page(models)
    fonts = ["system-ui", "Noto Sans CJK SC", "sans-serif"]
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        theme=gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"]),
        css=STYLE,
    )
    if wait:
        print(f"The page is at {address} (Ctrl-C ends it)", flush=True)
        page.block_thread()
    return page, address


def serve(names: Sequence[str], host: str, port: int, device: str | None = None, revision: str | None = None) -> None:
    """Load the models and serve the page until Ctrl-C; raises as `load` and `launch`."""
    models = {}
    for name in names:
        short = Path(name).name
        models[name if short in models else short] = load_for_demo(name, device, revision)
    launch(models, host, port)
