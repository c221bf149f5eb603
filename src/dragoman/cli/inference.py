"""`dragoman generate`, `score`, `attention` and `masks`: what a model makes of sentences."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dragoman.cli.options import (
    ANY_OPTION,
    BatchSize,
    Device,
    Model,
    Pairs,
    Revision,
    SourceLang,
    SourcePrefix,
    TargetFile,
    TargetLang,
    generation_options,
)
from dragoman.cli.terminal import quiet_bars


commands = typer.Typer()


@commands.command(
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
    batch_size: BatchSize = 32,
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
    source_lang: SourceLang = None,
    target_lang: TargetLang = None,
    source_prefix: SourcePrefix = None,
    compare: Annotated[bool, typer.Option("--compare", help="A table of every decoding strategy instead.")] = False,
) -> None:
    """Turn lines on standard input into lines on standard output, in the same order; an empty line stays empty.

    The arguments of Transformers' generate() are options too, with their names in hyphens: --num-beams, --do-sample,
    --max-new-tokens, --repetition-penalty and so on. What is not given is as the model was saved.

    The input may be larger than memory. Under "accelerate launch" all processes share one input and one output.
    """
    from rich.console import Console
    from rich.table import Table
    from transformers import set_seed

    from dragoman.data.reading import read_lines
    from dragoman.inference.arguments import forced_words
    from dragoman.inference.loading import load
    from dragoman.inference.processes import launched_processes
    from dragoman.inference.translate import compare_strategies, translate_stream

    options = generation_options(context)
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
    quiet_bars()
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


@commands.command(
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
    pairs: Pairs,
    target: TargetFile = None,
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
    source_prefix: SourcePrefix = None,
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

    quiet_bars()
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


@commands.command(
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
    source_lang: SourceLang = None,
    target_lang: TargetLang = None,
    source_prefix: SourcePrefix = None,
    revision: Revision = None,
    device: Device = None,
) -> None:
    """Show where a model looks: word alignments as text, and a map of the attention weights with --out.

    The arguments of generate() are options too, for the output that is decoded: --num-beams 1.
    """
    from dragoman.inference.attention_maps import alignment_text, attention_map
    from dragoman.inference.loading import load
    from dragoman.inference.pictures import FORMATS, check_format, save_attention

    options = generation_options(context)
    for path in out or []:
        check_format(path, FORMATS)
    quiet_bars()
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


@commands.command(
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
    source_lang: SourceLang = None,
    target_lang: TargetLang = None,
    source_prefix: SourcePrefix = None,
    revision: Revision = None,
    device: Device = None,
) -> None:
    """Draw who may look at whom in a batch: its padding, look-ahead and cross masks."""
    from dragoman.inference.loading import load
    from dragoman.inference.pictures import DRAWN_FORMATS, check_format, read_masks, save_masks

    check_format(out, DRAWN_FORMATS)
    quiet_bars()
    picture = read_masks(
        *load(model, device, revision=revision),
        texts,
        target,
        source_lang=source_lang,
        target_lang=target_lang,
        source_prefix=source_prefix,
    )
    for warning in save_masks(picture, out):
        print(f"dragoman masks: {warning}", file=sys.stderr)
    print(f"The masks are in {out}")
