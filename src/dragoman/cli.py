"""The `dragoman` command: parse, call, nothing else.

A mistake of the user's is one sentence on standard error and exit status 2; Ctrl-C ends with 130.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from typer.core import TyperGroup

from dragoman.apps.limits import Limits


ANY_OPTION = {"allow_extra_args": True, "ignore_unknown_options": True}
# Of every mistake in the options; Typer exports only this one kind of it.
UsageError = cast(type[Exception], typer.BadParameter.__mro__[1])


Model = Annotated[str, typer.Argument(help="Folder of a trained model, or its name on the Hub.")]
Models = Annotated[list[str], typer.Argument(help="Folders of trained models, or their names on the Hub.")]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a model on the Hub.", show_default="its main branch")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; a GPU if there is one.")]


class _Commands(TyperGroup):
    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _one_sentence_for_errors(lambda: "dragoman"):
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _one_sentence_for_errors(lambda: f"dragoman {ctx.invoked_subcommand or ''}".strip()):
            return super().invoke(ctx)


@contextmanager
def _one_sentence_for_errors(command: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError as error:
        # The reader (head, less) has left; without this, Python complains once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(141) from error
    except UsageError as error:
        _complain(f"{command()}: {_usage_message(error)}")
        raise typer.Exit(2) from error
    except (ValueError, OSError) as error:
        _complain(f"{command()}: {' '.join(str(error).split())}")
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        print(f"{command()}: {str(error) or 'interrupted'}", file=sys.stderr)
        raise typer.Exit(130) from error


def _complain(sentence: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # once, of all processes that a launcher started on this machine
        print(sentence, file=sys.stderr)


def _usage_message(error: Any) -> str:
    """Typer's message as a sentence, with the nearest valid name where one was misspelled."""
    from dragoman.settings import nearest

    message = " ".join(error.format_message().split()).rstrip(".")
    unknown = re.match(r"No such (option|command):? '?([^\s']+)", message)
    if unknown is None:
        return f"{message[0].lower()}{message[1:]}; {error.ctx.command_path} --help says more"
    kind, name = unknown.groups()
    options = [option for parameter in error.ctx.command.params for option in parameter.opts if option.startswith("-")]
    valid = [*options, "--help"] if kind == "option" else list(error.ctx.command.commands)
    return f"no such {kind}: {name}; the nearest valid one is {nearest(name, valid)}"


def _show_version(wanted: bool) -> None:
    if wanted:
        for package in ("dragoman", "transformers", "torch"):
            print(package, version_of(package))
        raise typer.Exit()


def _quiet_bars() -> None:
    """No bars of loading, saving and encoding between the lines of a command, nor in a file or pipe at all."""
    from datasets.utils.logging import disable_progress_bar as disable_encoding_bar
    from huggingface_hub.utils import disable_progress_bars as disable_transfer_bars
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    disable_transfer_bars()
    if not sys.stderr.isatty():
        disable_encoding_bar()


app = typer.Typer(cls=_Commands, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback(
    invoke_without_command=True,
    epilog="""\b
Examples:
  dragoman train configs/quickstart.yaml
  echo "Open the settings page" | dragoman generate runs/quickstart

"dragoman COMMAND --help" explains a command. Mistakes are answered in one
sentence and with exit status 2.""",
)
def dragoman(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Versions of dragoman, transformers and torch."
        ),
    ] = False,
) -> None:
    """Train, use and score encoder-decoder models: translation, summarization, dialogue, text to text."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command(
    short_help="Train a model from one YAML file.",
    epilog="""\b
Examples:
  dragoman train configs/quickstart.yaml
  dragoman train configs/quickstart.yaml training.seed=1 model.dropout=0.2
  dragoman train configs/quickstart.yaml --resume

\b
In several processes or on several GPUs, with the same arguments:
  accelerate launch scripts/train.py configs/quickstart.yaml""",
)
def train(
    config: Annotated[Path, typer.Argument(help="A YAML file as in configs/, which explain their keys.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Changes to it: section.key=value, the value as in YAML.", show_default=False),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last complete checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete what an earlier run left.")] = False,
) -> None:
    """Train a model from one YAML file: read the pairs, train the tokenizer and the model, test, save.

    The finished model is in training.output_dir: weights, tokenizer, settings, test scores and a model card. Ctrl-C
    saves and stops; --resume goes on from there.
    """
    from dragoman.training.arguments import load_experiment
    from dragoman.training.run import train as run

    _quiet_bars()
    run(load_experiment(config, overrides or []), resume=resume, overwrite=overwrite)


@app.command(
    context_settings=ANY_OPTION,
    short_help="Turn lines into lines: translate, summarize, reply.",
    epilog="""\b
Examples:
  dragoman generate runs/quickstart < lines.txt > translations.txt
  dragoman generate runs/quickstart --num-beams 5 --nbest 3 --scores < lines.txt
  dragoman generate runs/quickstart --do-sample --top-p 0.9 --top-k 0 < lines.txt
  dragoman generate runs/quickstart --penalty-alpha 0.6 --top-k 4 < lines.txt
  dragoman generate runs/quickstart --num-beams 6 --num-beam-groups 3 --diversity-penalty 0.5 --nbest 3 < lines.txt
  dragoman generate runs/quickstart --num-beams 6 --force-word "file|documento" < lines.txt
  dragoman generate runs/quickstart --compare < lines.txt

\b
In several processes or on several GPUs, with the same arguments:
  accelerate launch --multi_gpu -m dragoman generate runs/quickstart < lines.txt""",
)
def generate(
    context: typer.Context,
    model: Model,
    batch_size: Annotated[int, typer.Option(min=1, help="Sentences decoded together.")] = 32,
    max_tokens_per_batch: Annotated[
        int | None, typer.Option(min=1, help="Instead: source tokens of a batch, padding included.", show_default=False)
    ] = None,
    window: Annotated[
        int, typer.Option(min=1, help="Lines read ahead and sorted by length; at a keyboard, one.")
    ] = 2048,
    nbest: Annotated[
        int, typer.Option("--nbest", "--num-return-sequences", min=1, help="Outputs a line, each after its number.")
    ] = 1,
    scores: Annotated[bool, typer.Option("--scores", help="Write the score and a tab before each output.")] = False,
    force_word: Annotated[
        list[str] | None,
        typer.Option(help="Word or phrase of every output, A|B for either; repeat for more.", show_default=False),
    ] = None,
    revision: Revision = None,
    device: Device = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    source_lang: Annotated[str | None, typer.Option(help="Code of a model with many languages: it, ita_Latn.")] = None,
    target_lang: Annotated[str | None, typer.Option(help="The same for the output.")] = None,
    source_prefix: Annotated[
        str | None, typer.Option(help="Text before every source, as for T5.", show_default="as the model was trained")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="A table of every decoding strategy instead.")] = False,
) -> None:
    """Turn lines on standard input into lines on standard output, in the same order; an empty line stays empty.

    Every argument of Transformers' generate() is an option too, with its name in hyphens: --num-beams, --do-sample,
    --max-new-tokens, --repetition-penalty and so on. What is not given is as the model was saved.

    The input may be larger than memory. Under "accelerate launch" all processes share one input and one output.
    """
    from rich.console import Console
    from rich.table import Table
    from transformers import set_seed

    from dragoman.data.reading import read_lines
    from dragoman.inference.arguments import forced_words, parse_generation_options
    from dragoman.inference.loading import load
    from dragoman.inference.processes import launched_processes
    from dragoman.inference.translate import compare_strategies, translate_stream

    own_options = [name for parameter in context.command.params for name in parameter.opts]
    options = parse_generation_options(context.args, own_options).given()
    if compare and (nbest > 1 or scores):
        raise ValueError("--compare shows one output per strategy; leave out --nbest and --scores")
    if compare and max_tokens_per_batch is not None:
        raise ValueError("--compare takes --batch-size; leave out --max-tokens-per-batch")
    if force_word and (compare or "force_words_ids" in options):
        raise ValueError("--force-word goes with neither --compare nor --force-words-ids")
    processes = launched_processes(device)
    if processes is not None:
        if compare:
            raise ValueError("--compare runs in one process: leave out the launcher")
        device = str(processes.device)
    is_main = processes is None or processes.is_main_process
    _quiet_bars()
    loaded, tokenizer = load(model, device, revision=revision)
    if force_word:
        options["force_words_ids"] = forced_words(tokenizer, force_word)
    rows: dict[str, Any] = {"source_lang": source_lang, "target_lang": target_lang, "source_prefix": source_prefix}
    if seed is not None:  # sampling the same in every process would be less random than it seems
        set_seed(seed if processes is None else seed + processes.process_index)
    if compare:
        sentences = list(read_lines("-"))
        outputs = compare_strategies(
            loaded, tokenizer, sentences, **rows, batch_size=batch_size, scores=False, **options
        )
        table = Table("source", "strategy", "output")
        for number, sentence in enumerate(sentences):
            for strategy, hypotheses in outputs.items():
                table.add_row(sentence, strategy, hypotheses[number].text)
                sentence = ""
            table.add_section()
        Console().print(table)
        return
    lines = translate_stream(
        loaded,
        tokenizer,
        read_lines("-"),
        window=1 if sys.stdin.isatty() else window,
        **rows,
        batch_size=batch_size,
        max_tokens_per_batch=max_tokens_per_batch,
        num_return_sequences=nbest,
        scores=scores,
        progress=sys.stderr.isatty() and not (sys.stdin.isatty() or sys.stdout.isatty()),
        processes=processes,
        **options,
    )
    for number, hypotheses in enumerate(lines, start=1):
        for hypothesis in hypotheses if is_main else ():  # the others have them, too
            columns = [str(number)] if nbest > 1 else []
            columns += [f"{hypothesis.score:.4f}"] if scores else []
            text = hypothesis.text.replace("\n", " ")  # one output, one line
            print(*columns, text, sep="\t", flush=True)  # who reads a pipe need not wait


@app.command(
    context_settings=ANY_OPTION,
    short_help="Score a model on a test set, under one or more decoding strategies.",
    epilog="""\b
Examples:
  dragoman evaluate runs/quickstart embedded:tiny_en_it/test
  dragoman evaluate runs/quickstart test.tsv --strategy greedy --strategy beam:num_beams=8
  dragoman evaluate runs/quickstart test.en --target test.it --metric bleu --metric ter""",
)
def evaluate(
    context: typer.Context,
    model: Model,
    data: Annotated[str, typer.Argument(help="Pairs: .jsonl, .tsv, embedded:NAME/SPLIT, or a text file of sources.")],
    target: Annotated[Path | None, typer.Option(help="With a text file of sources: that of the targets.")] = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option(help="greedy, beam, sampling, contrastive, or changed: beam:num_beams=8; repeat to compare."),
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="bleu, chrf, ter, rouge, wer, ..., or bleu:tokenize=zh; repeat for more.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the predictions and scores.json.",
            show_default="MODEL/evaluation, or evaluation/ORG--NAME for a name on the Hub",
        ),
    ] = None,
    references_column: Annotated[str, typer.Option(help="Column to score against.")] = "target",
    source_lang: Annotated[str | None, typer.Option(help="For rows without such a column.")] = None,
    target_lang: Annotated[str | None, typer.Option(help="The same for the output.")] = None,
    source_prefix: Annotated[
        str | None, typer.Option(help="Text before every source, as for T5.", show_default="as the model was trained")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sentences decoded together.")] = 32,
    revision: Revision = None,
    device: Device = None,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
) -> None:
    """Translate a data set, write the predictions and their scores, and print the table of the strategies.

    Every argument of generate() is an option too and holds for all strategies: --max-new-tokens 80.
    """
    from rich.console import Console

    from dragoman.evaluation.run import comparison_table, evaluate_model
    from dragoman.inference.arguments import parse_generation_options

    own_options = [name for parameter in context.command.params for name in parameter.opts]
    options = parse_generation_options(context.args, own_options).given()
    _quiet_bars()
    is_local = (Path(model) / "config.json").is_file()
    folder = output or (Path(model) / "evaluation" if is_local else Path("evaluation", model.replace("/", "--")))
    chosen: dict[str, Any] = {"strategies": strategy, "metrics": metric}
    report = evaluate_model(
        model,
        data if target is None else [data, target],
        folder,
        references_column=references_column,
        source_lang=source_lang,
        target_lang=target_lang,
        source_prefix=source_prefix,
        batch_size=batch_size,
        seed=seed,
        revision=revision,
        device=device,
        progress=sys.stderr.isatty(),
        **{name: names for name, names in chosen.items() if names},
        **options,
    )
    Console().print(comparison_table(report))
    print(f"Predictions and scores.json are in {folder}")


@app.command(
    context_settings=ANY_OPTION,
    short_help="Show where a model looks: word alignments and attention maps.",
    epilog="""\b
Examples:
  dragoman attention runs/quickstart "Open the settings page"
  dragoman attention runs/quickstart "Open the settings page" --out map.png --layer -1""",
)
def attention(
    context: typer.Context,
    model: Model,
    text: Annotated[str, typer.Argument(help="The source sentence.")],
    target: Annotated[str | None, typer.Option(help="An output to look at.", show_default="one is decoded")] = None,
    kind: Annotated[str, typer.Option(help="cross, encoder or decoder.")] = "cross",
    layer: Annotated[int | None, typer.Option(help="From 0, or -1 for the last.", show_default="average")] = None,
    head: Annotated[int | None, typer.Option(help="The same.", show_default="average")] = None,
    rows: Annotated[str, typer.Option(help="Label rows by the token that is predicted, or fed.")] = "predicted",
    out: Annotated[
        list[Path] | None,
        typer.Option(help="Picture (.png, .svg, .pdf), page (.html) or weights (.npy); repeat for more."),
    ] = None,
    source_lang: Annotated[str | None, typer.Option(help="Code of a model with many languages: it, ita_Latn.")] = None,
    target_lang: Annotated[str | None, typer.Option(help="The same for the output.")] = None,
    source_prefix: Annotated[
        str | None, typer.Option(help="Text before the source.", show_default="what the model was trained with")
    ] = None,
    revision: Revision = None,
    device: Device = None,
) -> None:
    """Show where a model looks: word alignments as text, and a map of the attention weights with --out.

    Every argument of generate() is an option too, for the output that is decoded: --num-beams 1.
    """
    from dragoman.inference.arguments import parse_generation_options
    from dragoman.inference.attention_maps import alignment_text, attention_map
    from dragoman.inference.loading import load
    from dragoman.inference.pictures import FORMATS, check_format, save_attention

    own_options = [name for parameter in context.command.params for name in parameter.opts]
    options = parse_generation_options(context.args, own_options).given()
    for path in out or []:
        check_format(path, FORMATS)
    _quiet_bars()
    found = attention_map(
        *load(model, device, revision=revision),
        text,
        target,
        kind,
        layer,
        head,
        rows,
        source_lang=source_lang,
        target_lang=target_lang,
        source_prefix=source_prefix,
        **options,
    )
    print(f"{found.target}\n\n{alignment_text(found)}")
    for path in out or []:
        for warning in save_attention(found, path):
            print(f"dragoman attention: {warning}", file=sys.stderr)
        print(f"{'The weights are' if path.suffix == '.npy' else 'The map is'} in {path}", file=sys.stderr)


@app.command(
    short_help="Draw the masks of a batch: padding, look-ahead, cross.",
    epilog="""\b
Example:
  dragoman masks runs/quickstart "Open the settings page" "Delete" --out masks.png""",
)
def masks(
    model: Model,
    texts: Annotated[list[str], typer.Argument(help="Source sentences, padded to one batch.")],
    target: Annotated[
        list[str] | None, typer.Option(help="An output for each, in the same order.", show_default="they are decoded")
    ] = None,
    out: Annotated[Path, typer.Option(help="Picture to write: .png, .svg or .pdf.")] = Path("masks.png"),
    revision: Revision = None,
    device: Device = None,
) -> None:
    """Draw who may look at whom in a batch: its padding, look-ahead and cross masks."""
    from dragoman.inference.loading import load
    from dragoman.inference.pictures import DRAWN_FORMATS, check_format, read_masks, save_masks

    check_format(out, DRAWN_FORMATS)
    _quiet_bars()
    for warning in save_masks(read_masks(*load(model, device, revision=revision), texts, target), out):
        print(f"dragoman masks: {warning}", file=sys.stderr)
    print(f"The masks are in {out}")


@app.command(
    short_help="Serve a page on which to try models and see where they look.",
    epilog="""\b
Example:
  dragoman demo runs/quickstart --port 7861""",
)
def demo(
    models: Models,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.")] = 7860,
    revision: Revision = None,
    device: Device = None,
) -> None:
    """Serve a page on which to try models, and to see where they look."""
    from dragoman.apps.demo import serve

    _quiet_bars()
    serve(models, host, port, device, revision)


@app.command(
    short_help="Answer requests over HTTP, decoded together.",
    epilog="""\b
Example:
  dragoman serve runs/quickstart --port 8000 --max-batch-size 64""",
)
def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is everybody's network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    revision: Revision = None,
    device: Device = None,
    max_batch_size: Annotated[int, typer.Option(help="Sentences decoded together.")] = Limits.max_batch_size,
    max_batch_tokens: Annotated[
        int, typer.Option(help="Source tokens decoded together, padding and beams included.")
    ] = Limits.max_batch_tokens,
    max_wait_ms: Annotated[
        float, typer.Option(help="How long a sentence waits for others while the model is idle.")
    ] = Limits.max_wait_ms,
    max_queue: Annotated[int, typer.Option(help="Sentences that wait; more are refused.")] = Limits.max_queue,
    timeout: Annotated[float, typer.Option(help="Seconds from a request to its answer.")] = Limits.timeout,
    max_texts: Annotated[int, typer.Option(help="Texts of a request.")] = Limits.max_texts,
    max_characters: Annotated[int, typer.Option(help="Characters of a text.")] = Limits.max_characters,
    max_tokens: Annotated[int, typer.Option(help="Tokens of a text.")] = Limits.max_tokens,
    max_body_bytes: Annotated[int, typer.Option(help="Of a request.")] = Limits.max_body_bytes,
    max_beams: Annotated[
        int, typer.Option(help="Also outputs per text, and candidates of contrastive search.")
    ] = Limits.max_beams,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an output.")] = Limits.max_new_tokens,
) -> None:
    """Answer translation requests over HTTP, decoding those together that wait together; GET /docs explains."""
    from dragoman.apps.server import serve as run

    _quiet_bars()
    limits = Limits(
        max_batch_size=max_batch_size,
        max_batch_tokens=max_batch_tokens,
        max_wait_ms=max_wait_ms,
        max_queue=max_queue,
        timeout=timeout,
        max_texts=max_texts,
        max_characters=max_characters,
        max_tokens=max_tokens,
        max_body_bytes=max_body_bytes,
        max_beams=max_beams,
        max_new_tokens=max_new_tokens,
    )
    run(model, host=host, port=port, device=device, revision=revision, limits=limits)


@app.command(
    short_help="Score targets that are given: rerank, filter, find pairs that do not match.",
    epilog="""\b
Examples:
  dragoman score runs/quickstart pairs.tsv > scored.tsv
  dragoman score runs/quickstart pairs.tsv --no-header | sort -g | head
  dragoman score runs/quickstart test.en --target test.it --jsonl

The second shows the pairs whose targets the model finds least probable: wrong
translations, shifted lines, other languages.""",
)
def score(
    model: Model,
    pairs: Annotated[str, typer.Argument(help="Pairs: .jsonl, .tsv, embedded:NAME/SPLIT, or a text file of sources.")],
    target: Annotated[Path | None, typer.Option(help="With a text file of sources: that of the targets.")] = None,
    header: Annotated[bool, typer.Option("--header/--no-header", help="Begin the table with a heading.")] = True,
    jsonl: Annotated[
        bool, typer.Option("--jsonl", help="An object a line, with the log-probability of each token.")
    ] = False,
    length_penalty: Annotated[
        float | None,
        typer.Option(
            help="The score is the log-probability / tokens ** LENGTH-PENALTY: 1 for the mean of a token.",
            show_default="as the model was saved, else 1",
        ),
    ] = None,
    source_lang: Annotated[
        str | None, typer.Option(help="Code of a model with many languages, if the rows have no such column.")
    ] = None,
    target_lang: Annotated[str | None, typer.Option(help="The same for the target.")] = None,
    source_prefix: Annotated[
        str | None, typer.Option(help="Text before every source, as for T5.", show_default="as the model was trained")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs scored together.")] = 32,
    revision: Revision = None,
    device: Device = None,
) -> None:
    """Score the targets of pairs: how probable the model finds each, given its source.

    The output has the order of the pairs. As a table, below a heading, its columns are the score, the log-probability
    of the whole target, source and target, between tabs; with the heading it can be read as pairs again, without it
    sort and awk read it. Logarithms are natural.
    """
    from dragoman.data.reading import read_pairs
    from dragoman.inference.loading import load
    from dragoman.inference.scoring import score as run
    from dragoman.inference.scoring import write_jsonl, write_table

    _quiet_bars()
    rows = read_pairs(pairs if target is None else [pairs, target])
    scores = run(
        *load(model, device, revision=revision),
        rows,
        source_lang=source_lang,
        target_lang=target_lang,
        source_prefix=source_prefix,
        batch_size=batch_size,
        length_penalty=length_penalty,
    )
    if jsonl:
        write_jsonl(rows, scores, sys.stdout)
    else:
        write_table(rows, scores, sys.stdout, header=header)


@app.command(
    short_help="Test whether the scores of two systems differ by more than chance.",
    epilog="""\b
Examples:
  dragoman compare a/predictions.default.jsonl b/predictions.default.jsonl
  dragoman compare a.txt b.txt --references test.it --metric bleu --metric ter""",
)
def compare(
    a: Annotated[Path, typer.Argument(help="Predictions of one system.", metavar="A")],
    b: Annotated[Path, typer.Argument(help="Predictions of another, for the same sources.", metavar="B")],
    references: Annotated[
        Path | None, typer.Option(help="Text file, one reference a line; for predictions that are plain text.")
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="bleu, chrf, ter, or bleu:tokenize=zh; repeat for more.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Test sets drawn from the given one.")] = 1000,
) -> None:
    """Compare two files of predictions by paired bootstrap resampling (Koehn 2004), by sacreBLEU.

    The files are predictions.*.jsonl, which "dragoman evaluate" writes, or plain text with one prediction a line. A
    small p says that a difference like this hardly comes about by the choice of the test sentences.
    """
    from rich.console import Console

    from dragoman.evaluation.compare import compare_predictions, difference_table

    chosen: dict[str, Any] = {"metrics": metric} if metric else {}
    differences = compare_predictions(a, b, references, samples=samples, **chosen)
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"A: {a}\nB: {b}")
    console.print(difference_table(differences))
    console.print("\n".join(f"{one.metric}: {one.signature}" for one in differences))


@app.command(
    short_help="Convert a checkpoint of Marian, BART, T5 and others into a Dragoman model.",
    epilog="""\b
Examples:
  dragoman convert Helsinki-NLP/opus-mt-en-it runs/opus-en-it
  dragoman convert checkpoints/my-t5 runs/my-t5 --dtype bfloat16""",
)
def convert(
    source: Annotated[
        str, typer.Argument(help="Folder of a Marian, BART, T5, ... checkpoint, or its name on the Hub.")
    ],
    output: Annotated[Path, typer.Argument(help="Folder to write, new or empty.")],
    dtype: Annotated[
        str | None,
        typer.Option(help="Store weights as float32, bfloat16, float16, float64.", show_default="as they are"),
    ] = None,
    revision: Revision = None,
) -> None:
    """Turn a checkpoint of Transformers' own seq2seq classes into a Dragoman checkpoint that computes the same."""
    from dragoman.conversion import convert as run

    _quiet_bars()
    made = run(source, output, dtype=dtype, revision=revision)
    tokenizer = "and its tokenizer" if made.has_tokenizer else "without a tokenizer, since it has none"
    print(f"{source} ({made.model_type}, {made.parameters:,} parameters) {tokenizer}: now a Dragoman model in {output}")


@app.command(
    short_help="Average checkpoints into one model.",
    epilog="""\b
Examples:
  dragoman average runs/quickstart runs/averaged
  dragoman average runs/quickstart runs/averaged --last 5
  dragoman average runs/a/checkpoint-900 runs/b/checkpoint-900 runs/averaged""",
)
def average(
    folders: Annotated[
        list[Path],
        typer.Argument(
            help="Checkpoints, or runs, which stand for their complete checkpoints; then the folder to write.",
            metavar="CHECKPOINTS... OUTPUT",
        ),
    ],
    last: Annotated[int | None, typer.Option(min=2, help="Only the last so many of them.", show_default="all")] = None,
) -> None:
    """Write a model whose weights are the means of those of several checkpoints of one model.

    Everything else comes from the last of them. A run keeps as many checkpoints as training.save_total_limit says.
    """
    from dragoman.training.averaging import average_checkpoints

    _quiet_bars()
    *sources, output = folders
    averaged = average_checkpoints(sources, output, last)
    print(f"{output} is the average of {', '.join(map(str, averaged))}")


@app.command(
    short_help="Write a model for CTranslate2 or ONNX.",
    epilog="""\b
Examples:
  dragoman export runs/quickstart runs/quickstart-ct2 --format ctranslate2 --quantization int8
  dragoman export runs/quickstart runs/quickstart-onnx --format onnx""",
)
def export(
    model: Annotated[str, typer.Argument(help="Folder of a trained Transformer, or its name on the Hub.")],
    output: Annotated[Path, typer.Argument(help="Folder to write, new or empty.")],
    format: Annotated[str, typer.Option(help="ctranslate2 or onnx.")],
    quantization: Annotated[
        str | None,
        typer.Option(help="Of ctranslate2: int8, int8_float32, int16, float16 and so on.", show_default="float32"),
    ] = None,
) -> None:
    """Write a model and its tokenizer for another runtime: CTranslate2, or ONNX (onnxruntime).

    docs/export.md shows how to translate with them. Needs pip install 'dragoman[export]'.
    """
    from dragoman.conversion import export as run

    _quiet_bars()
    folder = run(model, output, format=format, quantization=quantization)
    megabytes = sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) / 1e6
    print(f"{model} is now a model for {format} in {folder}, {megabytes:.1f} MB")


@app.command(
    short_help="Push a model to the Hub.",
    epilog="""\b
Examples:
  dragoman push runs/quickstart my-translator --private
  dragoman push runs/quickstart my-organization/my-translator --revision v2""",
)
def push(
    model: Annotated[Path, typer.Argument(help="Folder of a finished model.")],
    repository: Annotated[str, typer.Argument(help="Its name on the Hub: ORGANIZATION/NAME, or NAME for your own.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, made if need be.", show_default="main")] = None,
    message: Annotated[str | None, typer.Option(help="Message of the commit.", show_default=False)] = None,
) -> None:
    """Push a model to the Hub: weights, tokenizer, modeling code, training YAML and a model card with its scores.

    Only files that differ from what is there travel. The token comes from HF_TOKEN or `hf auth login`.
    """
    from dragoman.training.push import push as run

    _quiet_bars()
    commit = run(model, repository, private=private or None, revision=revision, message=message)
    print(f"{model} is now {commit.repo_url} at revision {commit.oid}")


def main() -> None:
    """Entry point of the `dragoman` command."""
    app()


if __name__ == "__main__":
    main()
