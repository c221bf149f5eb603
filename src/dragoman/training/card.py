"""The model card: what the Hub shows of a model, written from the files of its folder."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open
from transformers import GenerationConfig

from dragoman.data.tokenizers import language_token
from dragoman.settings import parse_mapping
from dragoman.training.checkpoints import EXPERIMENT_FILE, TEST_FILE


MARKER = "<!-- Written by Dragoman. Delete this line to edit the card: `dragoman push` then leaves it as it is. -->"
USAGE = """\
```python
from transformers import AutoModelForSeq2SeqLM, {auto_class}

model = AutoModelForSeq2SeqLM.from_pretrained({name}, trust_remote_code=True)
tokenizer = {auto_class}.from_pretrained({name}, trust_remote_code=True)
inputs = tokenizer([{text}], return_tensors="pt", padding=True)
print(tokenizer.batch_decode(model.generate(**inputs{into}), skip_special_tokens=True))
```

The same with batches, streaming, n-best lists and scores:

```python
from transformers import pipeline

generator = pipeline("seq2seq-generation", model={name}, trust_remote_code=True)
print(generator([{example}]{languages}, batch_size=8, scores=True))
```

`trust_remote_code=True` runs the modeling code that lies beside the weights; with the package installed,
`import dragoman` takes its place.
"""


@dataclass
class Calls:
    """Python for a snippet.

    Attributes:
        auto_class: loads the tokenizer.
        text: the source as the tokenizer takes it, quoted.
        into, languages: what `generate()` and a pipeline are told besides, ", name=value" or nothing.
    """

    auto_class: str
    text: str
    into: str
    languages: str


def write_card(folder: Path, name: str | None = None, example: str | None = None) -> None:
    """Write README.md from what else is in the folder of a model: `experiment.yaml`, the scores, the configurations.

    A card without the line `MARKER` has been edited by hand and stays as it is.

    Args:
        name: what the snippets load, the model's name on the Hub; None takes the folder.
        example: a sentence for the snippets; None takes the one of the card that is there.
    """
    path = folder / "README.md"
    if path.is_file():
        before = ModelCard.load(path)
        if MARKER not in before.content:
            return
        example = example or before.data.get("widget", [{}])[0].get("text")
    example = example or "Hello"
    experiment = _yaml(folder / EXPERIMENT_FILE)
    languages = _languages(folder, experiment)
    task = "translation" if len(languages) > 1 else "text2text-generation"
    results = _results(folder, experiment, task)
    metrics = list(dict.fromkeys(result.metric_type for result in results))
    title = name.rpartition("/")[2] if name else folder.resolve().name
    header = ModelCardData(
        library_name="transformers",
        language=languages or None,
        pipeline_tag="translation" if task == "translation" else None,
        tags=["dragoman", "encoder-decoder", "custom_code"],
        base_model=_base_model(experiment),
        metrics=metrics or None,
        model_name=title if results else None,
        eval_results=results or None,
        widget=[{"text": example}],
    )
    sections = [MARKER, f"# {title}", _description(folder, experiment), "## Use", _usage(folder, name, example)]
    if results:
        sections += ["## Scores", _score_tables(results)]
    if experiment:
        text = (folder / EXPERIMENT_FILE).read_text(encoding="utf-8").strip()
        command = "`dragoman train experiment.yaml` trains it again, where the data is:"
        sections += ["## Training", command, f"```yaml\n{text}\n```"]
    body = "\n\n".join(section.strip() for section in sections)
    ModelCard(f"---\n{header.to_yaml()}\n---\n\n{body}\n").save(path)


def decoding_name(generation_config: GenerationConfig) -> str:
    """How `generate()` decodes with these defaults, in words."""
    mode = generation_config.get_generation_mode().value.replace("_", " ")
    beams = generation_config.num_beams or 1
    return f"{mode}, {beams} beams" if beams > 1 else mode


def data_name(spec: Any) -> str:
    """The data of an experiment as a stranger may see it: not where on this machine it lies."""
    if isinstance(spec, list):
        return " and ".join(map(data_name, spec))
    return Path(spec).name if Path(spec).is_absolute() else str(spec)


def _description(folder: Path, experiment: dict[str, Any]) -> str:
    model_type = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    size = f"An encoder-decoder of type `{model_type}` with {_count_parameters(folder):,} parameters"
    if not experiment:
        return f"{size}."
    base = experiment["model"].get("from_pretrained")
    origin = f"fine-tuned from `{base}`" if base else "trained from scratch"
    return f"{size}, {origin} with Dragoman on `{data_name(experiment['data']['train'])}`."


def calls(folder: Path, pair: Mapping[str, str]) -> Calls:
    """How the source of a pair is translated by the model in a folder.

    Languages that the pair does not name are the first of the model's sources and the last of its targets.
    """
    two = (folder / "target_tokenizer").is_dir()
    source, target = _tokenizer_settings(folder, "source"), _tokenizer_settings(folder, "target")
    text, into, languages = pair.get("source_prefix", source.get("source_prefix", "")) + pair["source"], "", ""
    if codes := source.get("source_languages"):
        code = pair.get("source_lang", codes[0])
        text, languages = language_token(code) + text, f", source_lang={_quoted(code)}"
    if codes := target.get("target_languages"):
        code = pair.get("target_lang", codes[-1])
        tokenizer = "tokenizer.target_tokenizer" if two else "tokenizer"
        into = f", forced_bos_token_id={tokenizer}.convert_tokens_to_ids({_quoted(language_token(code))})"
        languages += f", target_lang={_quoted(code)}"
    return Calls("AutoProcessor" if two else "AutoTokenizer", _quoted(text), into, languages)


def _usage(folder: Path, name: str | None, example: str) -> str:
    call = calls(folder, {"source": example})
    return USAGE.format(name=_quoted(name or str(folder)), example=_quoted(example), **vars(call))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _tokenizer_settings(folder: Path, side: str) -> dict[str, Any]:
    second = folder / "target_tokenizer" / "tokenizer_config.json"
    path = second if side == "target" and second.is_file() else folder / "tokenizer_config.json"
    return _yaml(path)


def _results(folder: Path, experiment: dict[str, Any], task: str) -> list[EvalResult]:
    """The test at the end of training, and what `dragoman evaluate` left in the folder, as the Hub's model-index."""
    results = []

    def add(data: str, figures: dict[str, float], decoding: str) -> None:
        for figure, value in figures.items():
            metric = re.split("[:/]", figure)[0]
            results.append(
                EvalResult(
                    task_type=task,
                    dataset_type=data,
                    dataset_name=data,
                    metric_type=metric,
                    metric_name=f"{figure} ({decoding})",
                    metric_value=round(value, _decimals(metric)),
                )
            )

    tested, evaluated = folder / TEST_FILE, folder / "evaluation" / "scores.json"
    if experiment and experiment["data"].get("test") and tested.is_file():
        decoding = decoding_name(GenerationConfig.from_pretrained(folder))
        add(data_name(experiment["data"]["test"]), json.loads(tested.read_text(encoding="utf-8")), decoding)
    if evaluated.is_file():
        report = json.loads(evaluated.read_text(encoding="utf-8"))
        for strategy, result in report["strategies"].items():
            add(data_name(report["data"]), result["headline"], strategy)
    return results


def _decimals(metric: str) -> int:
    return 2 if metric in ("bleu", "chrf", "ter") else 4  # of 100, and of 1


def _score_tables(results: list[EvalResult]) -> str:
    tables = []
    for data in dict.fromkeys(result.dataset_name for result in results):
        rows = [result for result in results if result.dataset_name == data]
        lines = [f"| {row.metric_name} | {row.metric_value:.{_decimals(row.metric_type)}f} |" for row in rows]
        tables.append("\n".join([f"On `{data}`:\n", "| metric (decoding) | score |", "|---|--:|", *lines]))
    return "\n\n".join(tables)


def _languages(folder: Path, experiment: dict[str, Any]) -> list[str]:
    """ISO 639 codes of what the data section and the tokenizer name: `it` of `it_IT`, `ita` of `ita_Latn`."""
    data = experiment.get("data", {})
    codes = [data.get(f"{side}_lang") for side in ("source", "target")]
    for side in ("source", "target"):
        codes += _tokenizer_settings(folder, side).get(f"{side}_languages", [])
    found = [match[0] for code in codes if code and (match := re.match("[a-z]{2,3}", code))]
    return list(dict.fromkeys(found))


def _base_model(experiment: dict[str, Any]) -> str | list[str] | None:
    """The model that was fine-tuned, by its name on the Hub; of a converted one, the name of what it comes from."""
    base = str(experiment.get("model", {}).get("from_pretrained", ""))
    if base and (Path(base) / "README.md").is_file():
        return ModelCard.load(Path(base) / "README.md").data.base_model
    return base if re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists() else None


def _count_parameters(folder: Path) -> int:
    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - no mapping: it cannot be iterated
                size = 1
                for length in weights.get_slice(name).get_shape():
                    size *= length
                count += size
    return count


def _yaml(path: Path) -> dict[str, Any]:
    return parse_mapping(path.read_text(encoding="utf-8"), str(path)) if path.is_file() else {}
