"""scripts/scoreboard.py on a few embedded pairs: all systems alike, and every ablation does what it says."""

import dataclasses
import json
import re
import sys
from functools import partial

import pytest
import torch
from datasets import Dataset
from transformers import TrainerControl, TrainerState, set_seed

from commands import load_script
from dragoman.data.reading import read_pairs


@pytest.fixture(scope="module")
def script():
    return load_script("scoreboard")


@pytest.fixture(scope="module")
def listed(script):
    """The module with the tasks, systems and ablations."""
    return sys.modules["scoreboard_systems"]


@pytest.fixture(scope="module")
def task(script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    for split in ("train", "validation", "test"):
        read_pairs(f"embedded:tiny_en_it/{split}").select(range(60)).to_json(folder / f"{split}.jsonl")
    return dataclasses.replace(
        script.TASKS["tiny_en_it"], data=str(folder / "{split}.jsonl"), parameters=300_000, max_new_tokens=6,
        tokenizer={"kind": "bpe", "vocab_size": 270}, batch_size=8,
    )  # fmt: skip


@pytest.fixture(scope="module")
def board(script, task):
    return script.Board(task, 7)


@pytest.fixture
def tiny(script, task, monkeypatch):
    monkeypatch.setitem(script.TASKS, "tiny", task)
    return "tiny"


def build(script, config, **changes):
    set_seed(0)
    return script.build(config(width=16, vocab_size=270, **changes)).eval()


def test_all_systems_are_trained_alike_and_reported(script, tiny, tmp_path, capsys):
    (tmp_path / "history.md").write_text("# By hand\n\n## Figures\n\nold\n")
    run = partial(script.systems, tiny, updates=2, test_size=7, num_beams=2, folder=tmp_path)
    run()
    runs = json.loads((tmp_path / "systems_tiny.json").read_text())["runs"]
    assert list(runs) == [f"{name}/1" for name in script.SYSTEMS]
    for result in runs.values():
        assert 291_000 <= result["parameters"] <= 309_000
        assert result["updates"] == 2
        assert result["tokens_per_second"] > 0
        assert set(result["scores"]) == {"BLEU", "chrF"}
        assert sum(bucket["rows"] for bucket in result["by_length"]) == 7

    capsys.readouterr()
    run(seeds=2, only=["gru_2014", "edm_asks"])  # one of these is there already
    assert re.findall(r"\w+, seed \d", capsys.readouterr().out) == [
        "edm_asks, seed 1", "gru_2014, seed 2", "edm_asks, seed 2"
    ]  # fmt: skip
    script.peaks(tiny, peak=[1e-3, 4e-3], updates=2, test_size=7, folder=tmp_path, only=["lstm_dot", "modern"])
    tried = json.loads((tmp_path / "peaks_tiny.json").read_text())["runs"]
    best = min((tried[f"modern/{peak}"]["forced_loss"], float(peak)) for peak in ("0.001", "0.004"))[1]
    run(seeds=2, only=["modern"])
    runs = json.loads((tmp_path / "systems_tiny.json").read_text())["runs"]
    assert (runs["modern/1"]["peak"], runs["modern/2"]["peak"]) == (script.SYSTEMS["modern"].peak, best)
    with pytest.raises(ValueError, match=r"systems_tiny.json holds results of other settings: .*'updates': 2"):
        script.systems(tiny, updates=3, test_size=7, num_beams=2, folder=tmp_path)

    script.steps(tiny, longest=16, batch_size=2, repeats=1, folder=tmp_path)
    script.report(tmp_path)
    text = (tmp_path / "history.md").read_text()
    assert text.startswith("# By hand\n\n## Figures\n\n### Learning rates on tiny\n\nLoss a token ")
    assert "### Systems on tiny\n\nTraining budget of each: 2 updates, " in text
    assert "old" not in text
    assert "| system | 0.001 | 0.004 |" in text
    assert "| system | to 2 (2) | longer (5) |" in text
    assert text.count("modern Transformer") == 4
    assert text.count("AttentionEDM, teacher forcing 1.0") == 5  # the changed ones are compared with it
    assert re.search(r"\| GRU, no attention \(Cho 2014\) \| \d{3},\d{3} \| .* ± .* \| 2 \|\n", text)
    assert (tmp_path / "lengths_tiny.png").stat().st_size > 10_000
    assert (tmp_path / "steps_tiny.png").stat().st_size > 10_000


def test_ablations_run_and_are_reported(script, tiny, tmp_path):
    only = ["no_look_ahead_mask", "no_source", "forcing_linear"]
    script.ablations(tiny, updates=2, forcing_updates=3, test_size=7, folder=tmp_path, only=only)
    runs = json.loads((tmp_path / "ablations_tiny.json").read_text())["runs"]
    assert [result["updates"] for result in runs.values()] == [2, 2, 3]
    script.report(tmp_path)
    assert "LSTM, teacher forcing 1.0 to 0.0, linear | 3 |" in (tmp_path / "history.md").read_text()


def test_the_budget_sets_the_learning_rate_and_the_end(script):
    now = 7.0
    budget = script.Budget(lambda: now, minutes=2)
    control = TrainerControl()
    budget.on_train_begin(None, None, control)
    factors = []
    for now in (7.0, 10.0, 13.0, 70.0, 126.9, 127.5):  # noqa: B007
        budget.on_step_end(None, TrainerState(), control)
        factors.append(budget.learning_rate_factor())
    assert factors == pytest.approx([0, 0.5, 1, (1 - 63 / 120) / 0.95, 0.1 / 120 / 0.95, 0], abs=1e-9)
    assert control.should_training_stop
    budget.on_train_begin(None, None, control)
    budget.on_step_end(None, TrainerState(), control)
    assert not control.should_training_stop


def test_a_size_out_of_reach_is_refused(script):
    with pytest.raises(ValueError, match="no width comes within 5 % of 900 parameters: the nearest, 16, has"):
        script.fit(script.SYSTEMS["modern"].config, 270, 900)


def test_a_changed_edm_is_the_library_s_but_for_the_change(script, listed, board):
    base = script.EDM_VARIANTS["edm_adds"].config(width=16, vocab_size=270)
    batch = board.collator(script.build(base))([board.test[row] for row in range(4)])
    models = [script.build(base, recurrence).eval() for recurrence in (None, listed.KeptState, listed.Adding)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    with torch.no_grad():
        ours, kept, adding = (model(**batch).logits for model in models)
    torch.testing.assert_close(kept, ours)
    assert not adding.isclose(ours).all(dim=-1).any()  # h from the encoder is added from the first step on

    repeated = {**batch, "decoder_input_ids": torch.full((4, 2), 5), "labels": None}
    for name, same in (("edm_adds", True), ("edm_asks", False), ("edm_asks_adds", False)):
        model = script.build(base, script.EDM_VARIANTS[name].recurrence).eval()
        with torch.no_grad():
            (weights, *_) = model(**repeated, output_attentions=True).cross_attentions
        # A token looks at the same letters wherever it stands, unless it is the state that asks.
        assert torch.allclose(weights[:, :, 0], weights[:, :, 1]) == same


def test_the_decoder_only_model_learns_the_target_alone(listed, board):
    config = listed.decoder_only(width=16, vocab_size=270)
    row, encoded = board.rows(config, board.test)[0], board.test[0]
    assert row["input_ids"] == [*encoded["input_ids"], 0, *encoded["labels"]]
    assert encoded["input_ids"][-1] == 2
    learned = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert learned == encoded["labels"]


def test_the_decoder_only_model_decodes_a_batch_as_it_decodes_one(script, listed, board):
    model = build(script, listed.decoder_only)
    one_by_one = [board.decode(model, [source], num_beams=2)[0] for source in board.sources]
    assert len(set(map(len, board.tokenizer(board.sources).input_ids))) > 1
    assert board.decode(model, board.sources, num_beams=2) == one_by_one


@pytest.mark.parametrize("name", ["lstm_2014", "decoder_only"])
def test_errors_under_the_true_prefix(script, board, name):
    model = build(script, script.SYSTEMS[name].config)
    losses, wrong, count = [], 0, 0
    for row in board.test:
        labels = torch.tensor([row["labels"]])
        with torch.no_grad():
            if name == "decoder_only":
                ids = torch.tensor([[*row["input_ids"], 0, *row["labels"]]])
                logits = model(input_ids=ids).logits[:, -labels.shape[1] - 1 : -1]
            else:
                logits = model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).logits
        losses.append(torch.nn.functional.cross_entropy(logits[0], labels[0], reduction="sum"))
        wrong, count = wrong + int((logits.argmax(-1) != labels).sum()), count + labels.numel()
    found = script.forced(board, model)
    assert found["forced_loss"] == pytest.approx(float(sum(losses)) / count, rel=1e-5)
    assert found["forced_errors"] == pytest.approx(100 * wrong / count)


def test_without_the_look_ahead_mask_the_next_token_is_seen(script, listed, board):
    model = build(script, listed.heads)
    batch = board.collator(model)([board.test[row] for row in range(2)])
    changed = {**batch, "decoder_input_ids": batch["decoder_input_ids"].clone()}
    changed["decoder_input_ids"][:, 2] = 50
    for change, same in ((lambda batch: batch, True), (script.see_everything, False)):
        with torch.no_grad():
            before, after = (model(**change(given)).logits[:, 1] for given in (batch, changed))
        assert torch.equal(before, after) == same


def test_unscaled_scores_start_from_the_same_queries(script, listed):
    scaled, unscaled = (build(script, listed.heads, **changes) for changes in ({}, {"attention_scaling": 1.0}))
    queries = [model.model.encoder.layers[1].self_attn.q_proj.weight.data for model in (scaled, unscaled)]
    assert queries[1].std() < 0.8 * queries[0].std()  # heads of 2 dimensions: times 2 ** -0.5
    unscaled.apply(script.enlarge_queries)
    assert float(queries[1].std()) == pytest.approx(float(queries[0].std()), rel=0.15)


def test_the_first_pronunciation_and_the_variants_count(script):
    pairs = Dataset.from_list([{"target": "R EH D", "variants": ["R IY D"]}, {"target": "AH", "variants": None}])
    assert script.references(pairs) == [["R EH D", "R IY D"], ["AH"]]
    assert script.references(pairs.remove_columns("variants")) == [["R EH D"], ["AH"]]
