"""
Greedy and beam search over the ONNX graphs of `dragoman export --format onnx`, with onnxruntime and numpy alone. A copy
of this file lies beside the graphs.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime


# Shapes: B sources, S source length, n beams, C candidates for the next beams, t tokens so far, V target vocabulary.


class OnnxModel:
    """
    Args:
        folder: as `dragoman export` wrote it.
        threads: of each operator; None leaves it to onnxruntime.
    """

    def __init__(self, folder: str | Path, threads: int | None = None):
        folder = Path(folder)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads

        # A recurrent model takes a prompt step by step, and has no graph for it.
        self.graphs = {
            path.stem: onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            for path in folder.glob("*.onnx")
        }
        self.settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))

    def generate(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        decoder_input_ids: Any = None,
        num_beams: int | None = None,
        num_return_sequences: int = 1,
        max_new_tokens: int | None = None,
        length_penalty: float | None = None,
        early_stopping: bool | str | None = None,
    ) -> np.ndarray:
        """
        What `model.generate` of Transformers gives for the same arguments; what is left out is as the model was saved.

        Args:
            input_ids, attention_mask (B, S): the sources, 0 in the mask for padding; no mask if there is none.
            decoder_input_ids (B, P): what the outputs begin with, instead of the model's start token.
            num_beams: 1 is greedy search.
            num_return_sequences: of each source, the best first.

        Returns:
            ids (B * num_return_sequences, t), with the start token, padded at the end.

        Raises:
            ValueError: more sequences than beams; a prompt as long as outputs may become.
        """
        given = {"num_beams": num_beams, "length_penalty": length_penalty, "early_stopping": early_stopping}
        given |= {"max_new_tokens": max_new_tokens}
        settings = {**self.settings, **{name: value for name, value in given.items() if value is not None}}
        num_beams = settings["num_beams"]
        if num_return_sequences > num_beams:
            raise ValueError(f"num_return_sequences={num_return_sequences} needs as many num_beams, got {num_beams}.")
        ids = np.asarray(input_ids, dtype=np.int64)
        mask = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask, dtype=np.int64)
        start = self.settings["decoder_start_token_id"]
        prompt = np.full((len(ids), 1), start) if decoder_input_ids is None else np.asarray(decoder_input_ids)
        prompt = prompt.astype(np.int64)
        if (prompt[:, 0] != start).all():  # as Transformers does
            prompt = np.insert(prompt, 0, start, axis=1)
        if settings["max_new_tokens"] is None:
            settings["max_new_tokens"] = settings["max_length"] - prompt.shape[1]
        if settings["max_new_tokens"] < 1:
            raise ValueError(
                f"decoder_input_ids have {prompt.shape[1]} tokens, and the model was saved with max_length="
                f"{settings['max_length']}: give max_new_tokens."
            )
        source = {"attention_mask": mask, **self.run("encoder", input_ids=ids, attention_mask=mask)}
        if "decoder_prefill" in self.graphs:
            source |= self.run("decoder_prefill", decoder_input_ids=prompt, **source)
        # What belongs to the rows of a source, (L, B, n, ...), one of them at first.
        names = [output.name for output in self.graphs["decoder_step"].get_outputs()[1:]]
        past = {name: source.pop(name.removeprefix("next_"))[:, :, None] for name in names}
        place = 0

        def follow(tokens: np.ndarray, parents: np.ndarray) -> np.ndarray:
            """Tokens (B, n), and for each the number of the row that it continues -> logits (B, n, V)"""
            nonlocal past, place
            for name, part in past.items():
                rows = parents.reshape(1, *parents.shape, *[1] * (part.ndim - 3))
                source[name.removeprefix("next_")] = np.take_along_axis(part, rows, axis=2)
            past = self.run("decoder_step", decoder_input_ids=tokens, place=np.array(place), **source)
            place += 1
            return past.pop("logits")

        if "decoder_prefill" in self.graphs:
            logits = source.pop("logits")
        else:
            for token in prompt.T:
                logits = follow(token[:, None], np.zeros((len(ids), 1), dtype=np.int64))[:, 0]
        if num_beams == 1:
            return self._greedy(prompt, logits, follow, settings)
        return self._beams(prompt, logits[:, None], follow, settings, num_return_sequences)

    @staticmethod
    def _adjust(scores: np.ndarray, at_start: bool, at_end: bool, settings: dict[str, Any]) -> np.ndarray:
        """Scores (..., V) of a token, the first one or the last one there is room for -> what the settings allow"""
        forced = settings["forced_bos_token_id"] if at_start else settings["forced_eos_token_id"] if at_end else None
        bad = [token for (token,) in settings.get("bad_words_ids", []) if token not in settings["eos_token_id"]]
        scores = scores.copy()
        scores[..., settings["suppress_tokens"] + bad] = -np.inf
        if forced is not None:
            scores[...] = -np.inf
            scores[..., forced] = 0
        return log_softmax(scores) if settings["renormalize_logits"] else scores

    def run(self, graph: str, **values: np.ndarray) -> dict[str, np.ndarray]:
        """The outputs of a graph by name; of the values it takes what it knows."""
        session = self.graphs[graph]
        inputs = {one.name: values[one.name] for one in session.get_inputs()}
        outputs = [one.name for one in session.get_outputs()]
        return dict(zip(outputs, session.run(outputs, inputs), strict=True))

    def _greedy(self, ids, logits, follow, settings: dict[str, Any]) -> np.ndarray:
        ends, pad = settings["eos_token_id"], settings["pad_token_id"]
        unfinished = np.ones(len(ids), dtype=bool)
        for left in reversed(range(settings["max_new_tokens"])):
            tokens = self._adjust(logits, ids.shape[1] == 1, left == 0, settings).argmax(axis=-1)
            tokens = np.where(unfinished, tokens, pad) if ends else tokens
            ids = np.concatenate((ids, tokens[:, None]), axis=1)
            unfinished = unfinished & ~np.isin(tokens, ends)
            if not left or not unfinished.any():
                break
            logits = follow(tokens[:, None], np.zeros((len(ids), 1), dtype=np.int64))[:, 0]
        return ids

    def _beams(self, prompt, logits, follow, settings: dict[str, Any], returned: int) -> np.ndarray:
        """As in the host library: scores are sums of log-probabilities / new tokens ** length_penalty."""
        n, limit, length_penalty = settings["num_beams"], settings["max_new_tokens"], settings["length_penalty"]
        ends, pad = settings["eos_token_id"], settings["pad_token_id"]
        fill = (pad or ends[0]) if ends else -1
        running = sequences = np.repeat(prompt[:, None], n, axis=1)  # (B, n, t)
        best = np.full(running.shape[:2], -np.inf, dtype=np.float32)
        lengths = np.zeros(running.shape[:2], dtype=np.int64)
        scores = np.zeros((len(prompt), 1), dtype=np.float32)  # at first there is one row
        is_open = np.ones(len(prompt), dtype=bool)
        for length in range(1, limit + 1):
            allowed = self._adjust(log_softmax(logits), running.shape[2] == 1, length == limit, settings)
            totals = allowed + scores[:, :, None]  # (B, n, V)
            vocabulary = totals.shape[-1]
            totals = totals.reshape(len(prompt), -1)
            order = np.argsort(-totals, axis=1, kind="stable")[:, : max(2, 1 + len(ends)) * n]  # (B, C)
            top, parents, tokens = take(totals, order), order // vocabulary, order % vocabulary
            longer = np.concatenate((take(running, parents), tokens[:, :, None]), axis=2)
            stops = np.isin(tokens, ends) | (length == limit)

            kept = stops & (np.arange(order.shape[1]) < n) & is_open[:, None]
            final = np.where(kept, top / np.float32(length**length_penalty), -np.inf)
            sequences = np.pad(sequences, ((0, 0), (0, 0), (0, 1)), constant_values=fill)
            best = np.concatenate((best, final), axis=1)
            order = np.argsort(-best, axis=1, kind="stable")[:, :n]
            best = take(best, order)
            sequences = take(np.concatenate((sequences, longer), axis=1), order)
            lengths = take(np.concatenate((lengths, np.full_like(tokens, length)), axis=1), order)

            goes_on = ~stops & np.isfinite(top)
            order = np.argsort(~goes_on, axis=1, kind="stable")[:, :n]
            running, parents = take(longer, order), take(parents, order)
            scores = np.where(take(goes_on, order), take(top, order), -np.inf)
            full = np.isfinite(best).all(axis=1)
            reach = limit if settings["early_stopping"] == "never" and length_penalty > 0 else length
            hope = scores.max(axis=1) / reach**length_penalty
            is_open &= hope > np.where(full, best[:, -1], -np.inf)
            if settings["early_stopping"] is True:
                is_open &= ~full
            if not is_open.any():
                break
            logits = follow(running[:, :, -1], parents)
        longest = lengths[:, :returned].max() + prompt.shape[1]
        return sequences[:, :returned, :longest].reshape(len(prompt) * returned, -1)


def take(rows: np.ndarray, places: np.ndarray) -> np.ndarray:
    """(B, n) or (B, n, t), places (B, C) -> (B, C) or (B, C, t)"""
    return np.take_along_axis(rows, places if rows.ndim == 2 else places[:, :, None], axis=1)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
