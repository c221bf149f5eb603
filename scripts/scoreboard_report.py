"""Tables and plots from the results of scoreboard.py; `write_report` is what `scoreboard.py report` does."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter, NullLocator, StrMethodFormatter


GENERATED = "## Figures"  # history.md is written by hand above this heading and by this file below it
STYLES = {  # color and line: recurrent without attention dashed, with attention solid, Transformers dotted
    "gru_2014": ("#c44e52", "--"),
    "lstm_2014": ("#dd8452", "--"),
    "lstm_additive": ("#1b7837", "-"),
    "lstm_dot": ("#5aae61", "-"),
    "attention_edm": ("#8c8c8c", "-"),
    "attention_edm_forced": ("#3a3a3a", "-"),
    "transformer_2017": ("#4c72b0", ":"),
    "modern": ("#12305e", ":"),
    "decoder_only": ("#8172b3", "-."),
}
PUBLISHED = {
    "cmudict": (
        "Published on CMUdict, each on its own split (not ours: not to be compared across splits):",
        ("system", "split", "WER %", "PER %"),
        [
            ("biLSTM with alignments (Yao and Zweig 2015)", "theirs", "23.55", "5.45"),
            ("LSTM + WFST (Rao et al. 2015)", "theirs", "21.3", "-"),
            ("attention, ensemble (Toshniwal and Livescu 2016)", "theirs", "20.24", "4.69"),
            ("CNN + biLSTM (Yolchuyeva et al. 2019)", "theirs", "25.13", "4.81"),
            ("cmusphinx g2p-seq2seq, Transformer 3 x 256", "PRONASYL 2007", "20.6", "-"),
            ("cmusphinx g2p-seq2seq, Transformer 3 x 256", "its cmudict, no stress", "30.2", "-"),
        ],
    ),
    "ddtp_en_it": (
        "Nothing is published on ddtp_en_it. What attention was worth on WMT14 English-French, newstest2014 (Bahdanau "
        "et al. 2015, table 1; other data, other sizes):",
        ("system", "BLEU"),
        [("RNNencdec-50, no attention", "17.82"), ("RNNsearch-50, additive attention", "26.75")],
    ),
}


def write_report(folder: Path) -> Path:
    """Write `history.md` and the plots from every result in the folder; text above the figures is kept."""
    sections = [GENERATED]
    for path in sorted(folder.glob("peaks_*.json")):
        sections += peaks_section(path)
    for path in sorted(folder.glob("systems_*.json")):
        sections += systems_section(path)
    for path in sorted(folder.glob("steps_*.json")):
        sections += steps_section(path)
    for path in sorted(folder.glob("ablations_*.json")):
        sections += ablations_section(path)
    for path in sorted(folder.glob("g2p_*.json")):
        sections += converged_section(path)
    history = folder / "history.md"
    before = history.read_text().split(GENERATED)[0] if history.is_file() else "# Results of scripts/scoreboard.py\n\n"
    history.write_text(before + "\n\n".join(sections) + "\n")
    return history


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    rule = tuple("---" if column == 0 else "--:" for column in range(len(header)))
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def spread(values: list[float], digits: int = 1) -> str:
    """Mean, and half the range where there are several seeds."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:.{digits}f}"


def conditions(settings: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    loads = [run["load_5_minutes"] for run in runs]
    wall, cpu = (sum(run.get(f"{clock}_minutes", 0) for run in runs) for clock in ("wall", "cpu"))
    clock = "of the wall clock" if settings["clock"] == "wall" else "of processor time"
    budget = f"{settings['minutes']:g} min {clock}" if settings["updates"] is None else f"{settings['updates']} updates"
    return (
        f"Training budget of each: {budget}, {settings['threads']} thread; {settings['test_size']} test pairs. "
        f"All trainings together: {wall:.0f} minutes by the wall clock, {cpu:.0f} of processor time. Load of the "
        f"machine (5-minute average, as each run ended): {min(loads):.1f} to {max(loads):.1f}; last run ended "
        f"{max(run['ended'] for run in runs)}."
    )


def peaks_section(path: Path) -> list[str]:
    results = json.loads(path.read_text())
    runs = results["runs"]
    metric = list(next(iter(runs.values()))["scores"])[-1]
    peaks = sorted({run["peak"] for run in runs.values()})
    cells: dict[str, dict[float, str]] = {}
    for name in sorted(runs, key=lambda name: list(STYLES).index(name.split("/")[0])):
        run = runs[name]
        scores = f"{run['forced_loss']:.3f} / {run['scores'][metric]:.1f}"
        cells.setdefault(run["label"], {})[run["peak"]] = scores
    header = ("system", *(f"{peak:g}" for peak in peaks))
    return [
        f"### Learning rates on {results['settings']['task']}",
        f"Loss a token under the true prefix / greedy {metric}, both on validation pairs, by the peak of the learning "
        "rate; one seed. " + conditions(results["settings"], list(runs.values())),
        table(header, [(label, *(by_peak.get(peak, "-") for peak in peaks)) for label, by_peak in cells.items()]),
    ]


def systems_table(by_name: dict[str, list[dict[str, Any]]]) -> str:
    metrics = list(next(iter(by_name.values()))[0]["scores"])
    header = ("system", "parameters", "peak rate", "updates", "target tokens/s", "outputs/s", *metrics, "seeds")
    rows: list[tuple[str, ...]] = []
    for runs in by_name.values():
        rows.append(
            (
                runs[0]["label"],
                f"{runs[0]['parameters']:,}",
                f"{runs[0]['peak']:g}",
                spread([run["updates"] for run in runs], 0),
                spread([run["tokens_per_second"] for run in runs], 0),
                spread([run["sentences_per_second"] for run in runs], 0),
                *(spread([run["scores"][metric] for run in runs]) for metric in metrics),
                str(len(runs)),
            )
        )
    return table(header, rows)


def lengths_table(by_name: dict[str, list[dict[str, Any]]], metric: str) -> str:
    buckets = next(iter(by_name.values()))[0]["by_length"]
    header = ("system", *(f"to {bucket['longest']} ({bucket['rows']})" for bucket in buckets[:-1]),
              f"longer ({buckets[-1]['rows']})")  # fmt: skip
    rows = [
        (runs[0]["label"], *(spread([run["by_length"][b][metric] for run in runs]) for b in range(len(buckets))))
        for runs in by_name.values()
    ]
    return table(header, rows)


def systems_section(path: Path) -> list[str]:
    results = json.loads(path.read_text())
    task, by_name = results["settings"]["task"], {}
    for key, run in results["runs"].items():
        by_name.setdefault(key.split("/")[0], []).append(run)
    variants = {name: runs for name, runs in by_name.items() if name not in STYLES}
    by_name = {name: by_name[name] for name in STYLES if name in by_name}
    metrics = next(iter(by_name.values()))[0]["scores"]
    metric = "PER" if "PER" in metrics else "BLEU"
    plot_lengths(by_name, metric, path.with_name(f"lengths_{task}.png"))
    sections = [
        f"### Systems on {task}",
        conditions(results["settings"], [run for runs in by_name.values() for run in runs])
        + " Several seeds: mean ± half the range.",
        systems_table(by_name),
    ]
    if task in PUBLISHED:
        text, published_header, published = PUBLISHED[task]
        sections += [text, table(published_header, published)]
    unit = "letters" if metric == "PER" else "words"
    sections += [
        f"{metric} by the {unit} of the source (number of test pairs):",
        lengths_table(by_name, metric),
        f"![quality by source length](lengths_{task}.png)",
    ]
    if variants:
        base = {name: by_name[name] for name in ("attention_edm_forced",) if name in by_name}
        sections += [
            f"### AttentionEDM changed, on {task}",
            "One thing at a time, on the terms of the table above.",
            systems_table(base | variants),
            lengths_table(base | variants, metric),
        ]
    return sections


def steps_section(path: Path) -> list[str]:
    results = json.loads(path.read_text())
    settings, runs = results["settings"], results["runs"]
    lengths = list(next(iter(runs.values()))["milliseconds"])
    rows = [(run["label"], *(f"{run['milliseconds'][length]:.0f}" for length in lengths)) for run in runs.values()]
    name = f"steps_{settings['task']}.png"
    plot_steps(runs, path.with_name(name))
    return [
        f"### Training step by length, sizes of {settings['task']}",
        f"Milliseconds ({settings['clock']} clock, {settings['threads']} thread) of forward, loss and backward pass on "
        f"{settings['batch_size']} pairs whose source and target have so many tokens each.",
        table(("system", *lengths), rows),
        f"![step time by length]({name})",
    ]


def ablations_section(path: Path) -> list[str]:
    results = json.loads(path.read_text())
    runs = results["runs"]
    metrics = list(next(iter(runs.values()))["scores"])
    header = ("changed", "updates", "training loss", "test loss", "wrong tokens, true prefix, %",
              *(f"greedy {metric}" for metric in metrics))  # fmt: skip
    rows = [
        (run["label"], f"{run['updates']}", f"{run['final_training_loss']:.3f}", f"{run['forced_loss']:.3f}",
         f"{run['forced_errors']:.1f}", *(f"{run['scores'][metric]:.1f}" for metric in metrics))
        for run in runs.values()
    ]  # fmt: skip
    examples = [
        f"- {runs[name]['label']}: "
        + "; ".join(f"`{source}` -> `{output}` (right: `{right}`)" for source, right, output in runs[name]["examples"])
        for name in ("baseline", "no_look_ahead_mask", "no_source")
        if name in runs
    ]
    return [
        f"### Ablations on {results['settings']['task']}",
        conditions(results["settings"], list(runs.values()))
        + f" The LSTMs: {results['settings']['forcing_updates']} updates each instead.",
        table(header, rows),
        "\n".join(["First test rows, greedy:", "", *examples]),
    ]


def converged_section(path: Path) -> list[str]:
    result = json.loads(path.read_text())
    rows = [
        (label, f"{100 * result[key]['sequence_error_rate']:.1f}", f"{100 * result[key]['wer']:.1f}")
        for label, key in (
            ("any listed pronunciation counts", "any_pronunciation"),
            ("only the first", "first_pronunciation"),
        )
    ]  # fmt: skip
    return [
        "### CMUdict, the longer training",
        f"`{result['model']}`: {result['parameters']:,} parameters, {result['training']['step']} updates "
        f"({result['training']['epoch']:.1f} epochs); {result['test_words']} test words, "
        f"{result['generation'].get('num_beams', 1)} beams, {result['sentences_per_second']:.0f} words/s.",
        table(("references", "WER %", "PER %"), rows),
    ]


def plot_lengths(by_name: dict[str, list[dict[str, Any]]], metric: str, path: Path) -> None:
    """Quality by source length, as figure 2 of Bahdanau et al. 2015; of an error rate, the rest to 100 %."""
    figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
    for name, runs in by_name.items():
        color, line = STYLES[name]
        by_bucket = list(zip(*([bucket[metric] for bucket in run["by_length"]] for run in runs), strict=True))
        if metric == "PER":
            by_bucket = [tuple(100 - value for value in values) for values in by_bucket]
        lengths = [bucket["mean"] for bucket in runs[0]["by_length"]]
        means = [statistics.mean(values) for values in by_bucket]
        axes.plot(lengths, means, line, color=color, marker="o", markersize=4, label=runs[0]["label"])
        axes.fill_between(
            lengths, list(map(min, by_bucket)), list(map(max, by_bucket)), color=color, alpha=0.15, linewidth=0
        )
    axes.set_xlabel("letters of the word" if metric == "PER" else "words of the source")
    axes.set_ylabel("phonemes right, % (100 - PER)" if metric == "PER" else metric)
    finish(figure, axes, path)


def plot_steps(runs: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
    for name, run in runs.items():
        color, line = STYLES[name]
        lengths = [int(length) for length in run["milliseconds"]]
        axes.loglog(
            lengths, list(run["milliseconds"].values()), line, color=color, marker="o", markersize=4, label=run["label"]
        )
    axes.set_xticks(lengths, map(str, lengths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("tokens of source and target each")
    axes.set_ylabel("ms per training step")
    finish(figure, axes, path)


def finish(figure: Any, axes: Any, path: Path) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
