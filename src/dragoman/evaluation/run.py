"""Evaluate a saved model on sentence pairs: predictions, scores, and a table when strategies are compared."""

import json
import platform
import re
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from rich import box
from rich.table import Table

from dragoman.data.reading import SETTING_COLUMNS, read_pairs, with_settings
from dragoman.evaluation.scores import check_metrics, compute_scores, headline
from dragoman.inference.loading import load
from dragoman.inference.strategies import strategy_arguments
from dragoman.inference.translate import check_generation_arguments, score_hypotheses, translate


_PACKAGES = ("dragoman", "torch", "transformers", "tokenizers", "evaluate", "sacrebleu", "rouge-score", "jiwer")


def evaluate_model(
    model: str | Path,
    data: Any,
    out_dir: str | Path,
    *,
    metrics: Sequence[str] = ("bleu", "chrf", "diversity"),
    strategies: Sequence[str] = ("default",),
    references_column: str = "target",
    source_lang: str | None = None,
    target_lang: str | None = None,
    source_prefix: str | None = None,
    batch_size: int = 32,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    progress: bool = False,
    **generation_arguments: Any,
) -> dict[str, Any]:
    """Translate the sources of a data set with each strategy, score the results and write everything down.

    Args:
        model: folder of a saved model, or its name on the Hub.
        data: what `read_pairs` reads.
        out_dir: gets, per strategy, `predictions.NAME.txt` (one a line; line breaks inside a prediction become spaces)
            and `predictions.NAME.jsonl` (source, target, prediction, score, log_probability), and `scores.json`, the
            report, written last. Files of an earlier evaluation are overwritten.
        metrics: as in `compute_scores`: `"bleu"`, `"bleu:tokenize=zh"`, ...
        strategies: as in `strategy_arguments`: `"default"` (the settings saved with the model), `"greedy"`,
            `"beam:num_beams=8,length_penalty=0.8"`, ...
        references_column: column to score against; each of its values is a text or a list of accepted ones.
        source_lang, target_lang, source_prefix: as in `translate`, for every row; what the rows have in columns of
            these names is used without being given here.
        batch_size: sentences decoded together.
        seed: of the random numbers, set anew for each strategy; the caller's are left as they were.
        device, dtype, revision: as in `load`.
        progress: show bars on standard error.
        **generation_arguments: for every strategy, for example `max_new_tokens=80`.

    Returns:
        the report: `model`, `data`, `rows`, `settings`, `versions`, and by strategy its `arguments`, full `scores`,
        `headline` figures, `seconds` (decoding alone), `sentences_per_second`, `generated_tokens`.

    Raises:
        FileNotFoundError: no such model or data.
        ValueError: an unknown metric, strategy, option, argument or column; malformed data.
    """
    if len(set(strategies)) < len(strategies) or not strategies:
        raise ValueError(f"strategies {list(strategies)}: name at least one, and each once.")
    # Everything that can be wrong in the call is found before the first sentence is decoded.
    check_metrics(metrics)
    table = {name: strategy_arguments(name, **generation_arguments) for name in strategies}
    data_name = "a dataset in memory" if isinstance(data, Dataset | IterableDataset) else str(data)
    pairs = with_settings(
        read_pairs(data), data_name, source_lang=source_lang, target_lang=target_lang, source_prefix=source_prefix
    )
    if isinstance(pairs, IterableDataset):
        pairs = Dataset.from_list(list(pairs))
    if references_column not in pairs.column_names:
        raise ValueError(f"{data_name} has no column {references_column!r}: it has {', '.join(pairs.column_names)}.")
    sources, references = pairs["source"][:], pairs[references_column][:]
    rows: dict[str, Any] = {name: pairs[name][:] for name in SETTING_COLUMNS if name in pairs.column_names}
    loaded, processing_class = load(model, device, dtype, revision)
    for arguments in table.values():
        check_generation_arguments(loaded, arguments)
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)

    report: dict[str, Any] = {
        "model": str(model),
        "revision": revision,
        "data": data_name,
        "rows": len(sources),
        "settings": {
            "metrics": list(metrics),
            "references_column": references_column,
            "batch_size": batch_size,
            "seed": seed,
            "device": str(loaded.device),
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "parameters": loaded.num_parameters(),
            "generation_config": loaded.generation_config.to_diff_dict(),
        },
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        "strategies": {},
    }
    devices = [loaded.device] if loaded.device.type == "cuda" else []
    # The first call of anything is slower: keep that out of the first strategy's seconds.
    first = {name: values[:batch_size] for name, values in rows.items()}
    with torch.random.fork_rng(devices=devices):
        translate(
            loaded,
            processing_class,
            sources[:batch_size],
            **first,
            batch_size=batch_size,
            max_new_tokens=2,
            scores=False,
        )
    for name, arguments in table.items():
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            start = time.perf_counter()
            outputs = translate(
                loaded,
                processing_class,
                sources,
                **rows,
                batch_size=batch_size,
                scores=False,
                progress=progress,
                **arguments,
            )
            seconds = time.perf_counter() - start
        # Not part of the seconds: decoding needs no scores.
        of_source = {name: values for name, values in rows.items() if name != "target_lang"}
        score_hypotheses(
            loaded,
            processing_class,
            sources,
            outputs,
            **of_source,
            batch_size=batch_size,
            length_penalty=arguments.get("length_penalty"),
        )
        predictions = [best for best, *_ in outputs]
        file_name = f"predictions.{re.sub(r'[^A-Za-z0-9._-]+', '_', name)}"
        with (out_dir / f"{file_name}.txt").open("w", encoding="utf-8") as file:
            file.writelines(re.sub(r"[\r\n]", " ", best.text) + "\n" for best in predictions)
        with (out_dir / f"{file_name}.jsonl").open("w", encoding="utf-8") as file:
            for source, target, best in zip(sources, references, predictions, strict=True):
                row = {
                    "source": source,
                    "target": target,
                    "prediction": best.text,
                    "score": best.score,
                    "log_probability": best.log_probability,
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        scores = compute_scores([best.text for best in predictions], references, metrics)
        report["strategies"][name] = {
            "arguments": arguments,
            "scores": scores,
            "headline": headline(scores),
            "seconds": round(seconds, 3),
            "sentences_per_second": round(len(sources) / seconds, 2),
            "generated_tokens": sum(len(best.token_ids) for best in predictions),
        }
    text = json.dumps(report, ensure_ascii=False, indent=2, default=str)
    (out_dir / "scores.json").write_text(text + "\n", encoding="utf-8")
    return report


def comparison_table(report: dict[str, Any]) -> Table:
    """The figures of a report of `evaluate_model`, one row per strategy; print it with `rich.print`.

    BLEU, chrF and TER run from 0 to 100, everything else from 0 to 1.
    """
    table = Table(title=f"{report['rows']} sentences of {report['data']}", box=box.SIMPLE_HEAD, pad_edge=False)
    results = report["strategies"]
    figures = list(next(iter(results.values()))["headline"])
    table.add_column("strategy", overflow="fold", min_width=11)
    for column in (*figures, "seconds"):
        table.add_column(column.replace("_", "\n"), justify="right", no_wrap=True)
    for name, result in results.items():
        values = [
            f"{result['headline'][key]:.{2 if key.split(':')[0] in ('bleu', 'chrf', 'ter') else 3}f}" for key in figures
        ]
        table.add_row(name, *values, f"{result['seconds']:.1f}")
    return table
