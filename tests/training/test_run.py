import errno
import inspect
import json
import logging
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, GenerationConfig, trainer_utils

from dragoman.data.tokenizers import load_tokenizer, train_tokenizer
from dragoman.inference.loading import load
from dragoman.inference.translate import translate
from dragoman.models import generation, language_model_head
from dragoman.training import run
from dragoman.training.arguments import load_experiment
from dragoman.training.checkpoints import last_complete_checkpoint
from dragoman.training.run import train
from training.experiments import write_experiment, write_pairs


def train_tiny(folder: Path, *overrides: str, resume=False, overwrite=False, **sections) -> Path:
    folder.mkdir(exist_ok=True)
    return train(load_experiment(write_experiment(folder, **sections), overrides), resume=resume, overwrite=overwrite)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return train_tiny(tmp_path_factory.mktemp("finished"))


def interrupt_in_step(monkeypatch, step: int, collator: str = "Seq2SeqCollator") -> None:
    """Press Ctrl-C while the batch of this training step is made."""
    made = 0

    class Interrupting(getattr(run, collator)):
        def __call__(self, features, return_tensors=None):
            nonlocal made
            if self.model.training:
                made += 1
                if made == step:
                    os.kill(os.getpid(), signal.SIGINT)
            return super().__call__(features, return_tensors)

    monkeypatch.setattr(run, collator, Interrupting)


def assert_equal_weights(folder: Path, other: Path) -> None:
    weights, others = (load_file(path / "model.safetensors") for path in (folder, other))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, others[name]), name


def test_a_finished_folder_is_complete(finished):
    names = {path.name for path in finished.iterdir()}
    assert {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "experiment.yaml",
        "modeling_dragoman.py",
        "README.md",
        "test_results.json",
        "trainer_state.json",
        "complete.json",
    } <= names
    assert not list(finished.glob("*.bin"))
    newest = max((path for path in finished.iterdir() if path.is_file()), key=lambda path: path.stat().st_mtime_ns)
    assert newest.name == "complete.json"
    assert json.loads(newest.read_text())["step"] == 6
    scores = json.loads((finished / "test_results.json").read_text())
    assert scores.keys() == {"bleu", "chrf"}
    card = (finished / "README.md").read_text()
    assert f"| chrf (greedy search) | {scores['chrf']:.2f} |" in card
    for checkpoint in finished.glob("checkpoint-*"):
        assert (checkpoint / "complete.json").is_file()
        assert (checkpoint / "experiment.yaml").read_text() == (finished / "experiment.yaml").read_text()


def test_it_loads_and_translates_in_three_lines(finished, capsys):
    model, tokenizer = load(finished)
    exec("\n".join(line.strip() for line in run.usage(finished, {"source": "uno due"}).splitlines()), {})
    best = translate(model, tokenizer, ["uno due"])[0][0]
    assert capsys.readouterr().out == best.text + "\n"


def test_the_best_checkpoint_is_kept(finished):
    state = json.loads((finished / "trainer_state.json").read_text())
    scores = {log["step"]: log["eval_chrf"] for log in state["log_history"] if "eval_chrf" in log}
    assert scores.keys() == {2, 4, 6}
    best = max(scores, key=lambda step: (scores[step], -step))
    assert state["best_metric"] == scores[best]
    assert_equal_weights(finished, finished / f"checkpoint-{best}")


def test_generation_settings_survive_the_evaluations(finished):
    folders = [finished, *finished.glob("checkpoint-*")]
    assert len(folders) == 4
    for folder in folders:
        saved = json.loads((folder / "generation_config.json").read_text())
        del saved["transformers_version"]
        # the longest target has 4 words and </s>: ceil(1.5 * 5) and the start token
        assert saved == {
            "bos_token_id": 0,
            "pad_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 0,
            "max_length": 9,
        }


def test_checkpoints_in_quick_succession_are_no_news(finished):
    warning = "mtime may not be reliable"
    assert warning in inspect.getsource(trainer_utils)  # or there is nothing left to be silenced
    log = logging.getLogger(trainer_utils.__name__)
    said = [bool(log.filter(log.makeRecord(log.name, 30, "", 0, text, (), None))) for text in (warning, "disk full")]
    assert said == [False, True]


def test_generation_settings_of_the_file_are_saved(tmp_path):
    output = train_tiny(tmp_path, "training.max_steps=2", generation={"num_beams": 3, "max_new_tokens": 5})
    config = GenerationConfig.from_pretrained(output)
    assert (config.num_beams, config.max_new_tokens, config.max_length, config.top_k) == (3, 5, None, None)
    assert "beam search, 3 beams" in (output / "README.md").read_text()


@pytest.mark.parametrize("step", [1, 3, 4])
def test_ctrl_c_and_resume_give_the_weights_of_an_uninterrupted_run(tmp_path, monkeypatch, finished, step):
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, step)
        with pytest.raises(KeyboardInterrupt, match=r"saved after step \d; the same command with --resume goes on"):
            train_tiny(tmp_path)
    assert signal.getsignal(signal.SIGINT) is before
    assert not (tmp_path / "run" / "complete.json").exists()
    assert 0 < int(last_complete_checkpoint(tmp_path / "run").name.split("-")[1]) < 6
    output = train_tiny(tmp_path, resume=True)
    assert_equal_weights(output, finished)
    for name in ("test_results.json", "complete.json", "generation_config.json"):
        assert (output / name).read_text() == (finished / name).read_text()
    optimizers = [torch.load(folder / "checkpoint-6" / "optimizer.pt") for folder in (output, finished)]
    for index, moments in optimizers[0]["state"].items():
        assert torch.equal(moments["exp_avg_sq"], optimizers[1]["state"][index]["exp_avg_sq"])


def test_an_unfinished_checkpoint_is_skipped(tmp_path, finished):
    shutil.copytree(finished, tmp_path / "run")
    for name in ("complete.json", "checkpoint-6/complete.json", "checkpoint-6/optimizer.pt"):
        (tmp_path / "run" / name).unlink()
    assert last_complete_checkpoint(tmp_path / "run").name == "checkpoint-4"
    shutil.copy(finished / "checkpoint-2" / "model.safetensors", tmp_path / "run" / "checkpoint-6")
    experiment = load_experiment(finished / "experiment.yaml", [f"training.output_dir={tmp_path / 'run'}"])
    assert_equal_weights(train(experiment, resume=True), finished)


def test_a_finished_run_is_reported_and_left_alone(finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    experiment = load_experiment(finished / "experiment.yaml")
    assert train(experiment, resume=True) == finished
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
    scores = json.loads((finished / "test_results.json").read_text())
    assert capsys.readouterr().out.splitlines() == [
        f"{finished} is finished already, after step 6: nothing is left to do",
        *(f"test {name}: {value:.2f} (greedy search)" for name, value in scores.items()),
    ]


def test_a_finished_run_goes_on_with_more_steps(tmp_path, finished, capsys):
    output = shutil.copytree(finished, tmp_path / "run")
    longer = [f"training.output_dir={output}", "training.max_steps=7", "training.load_best_model_at_end=false"]
    train(load_experiment(finished / "experiment.yaml", longer), resume=True)
    assert json.loads((output / "complete.json").read_text())["step"] == 7
    assert "nothing is left" not in capsys.readouterr().out


def test_resuming_another_experiment_is_refused(finished):
    experiment = load_experiment(finished / "experiment.yaml", ["model.d_model=16", "tokenizer.kind=char"])
    with pytest.raises(ValueError, match=r"was started with another model\.d_model, tokenizer\.kind"):
        train(experiment, resume=True)


def test_resume_without_a_checkpoint_starts_anew(tmp_path, capsys):
    output = train_tiny(tmp_path, "training.max_steps=2", resume=True)
    assert "holds no complete checkpoint: starting anew" in capsys.readouterr().out
    assert (output / "complete.json").is_file()


def test_a_used_folder_is_not_touched_without_a_word(tmp_path):
    train_tiny(tmp_path, "training.max_steps=2")
    with pytest.raises(ValueError, match="run is not empty: --resume goes on with its run, --overwrite deletes it"):
        train_tiny(tmp_path)
    stray = tmp_path / "run" / "checkpoint-9"
    stray.mkdir()
    train_tiny(tmp_path, "training.max_steps=2", overwrite=True)
    assert not stray.exists()


def test_overwrite_deletes_only_what_a_run_made(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty and holds no experiment\.yaml"):
        train_tiny(tmp_path, overwrite=True)
    assert (tmp_path / "run" / "thesis.txt").read_text() == "mine"


def test_overwrite_deletes_nothing_that_the_run_needs(tmp_path, monkeypatch):
    output = tmp_path / "run"
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("mine", "run"):
        (tmp_path / name).mkdir()
        path = write_experiment(tmp_path / name, training={"output_dir": str(output)})
    path.rename(output / "experiment.yaml")
    mine = tmp_path / "mine" / "tiny.yaml"
    for path, override, sentence in (
        (output / "experiment.yaml", "training.seed=1", rf"would delete {output}/experiment.yaml \(the experiment\)"),
        (mine, f"data.train={output}/train.jsonl", r"train.jsonl \(data\.train\), which lies in"),
        (mine, f"data.test=[x.en, {output}/y.it]", r"y.it \(data\.test\[1\]\), which lies in"),
        (mine, "tokenizer.path=~/run", r"~/run \(tokenizer\.path\), which lies in"),
    ):
        with pytest.raises(ValueError, match=sentence):
            train(load_experiment(path, [override]), overwrite=True)
    assert (output / "train.jsonl").is_file()


def test_an_output_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write to .*file/run: Not a directory"):
        train_tiny(tmp_path, f"training.output_dir={tmp_path / 'file' / 'run'}")


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match=r"the disk of .*run is full; make room and go on with --resume"):
        train_tiny(tmp_path)
    assert last_complete_checkpoint(tmp_path / "run") is None


def test_early_stopping(tmp_path):
    output = train_tiny(
        tmp_path, training={"learning_rate": 0.0, "early_stopping_patience": 2, "max_steps": 30, "save_total_limit": 1}
    )
    state = json.loads((output / "trainer_state.json").read_text())
    assert state["global_step"] == 6  # the first evaluation is the best, two more do not better it


def test_two_vocabularies(tmp_path):
    separate = {"tokenizer": {"joint": False}, "model": {"share_embeddings": False}}
    output = train_tiny(tmp_path, "training.max_steps=2", **separate)
    processor = load_tokenizer(output)
    model = AutoModelForSeq2SeqLM.from_pretrained(output)
    assert model.config.vocab_size == len(processor.target_tokenizer)
    assert model.config.source_vocab_size == len(processor.tokenizer)


def test_two_vocabularies_cannot_share_embeddings(tmp_path):
    with pytest.raises(ValueError, match="two vocabularies cannot share embeddings"):
        train_tiny(tmp_path, tokenizer={"joint": False})


def test_dropped_pairs_are_counted(tmp_path, capsys):
    limits = {"max_source_length": 4, "overlong": "drop"}
    write_experiment(tmp_path)
    data = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "validation", "test")}
    train_tiny(tmp_path, "training.max_steps=2", data=data | limits)
    out = capsys.readouterr().out
    assert "train: kept 18 of 23 pairs; dropped 5: 5 with a source longer than 4 tokens" in out
    assert "validation: kept 5 of 5 pairs" in out  # a score counts every pair
    assert "vocabulary: 11 joint" in out
    assert "parameters" in out


def test_overlong_pairs_are_an_error_by_default(tmp_path):
    write_experiment(tmp_path)
    data = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "validation", "test")}
    sentence = (
        r"data\.train: pair 4 .* 5 tokens and max_source_length is 4; set data\.overlong=drop or data\.overlong=tr"
    )
    with pytest.raises(ValueError, match=sentence):
        train_tiny(tmp_path, data={**data, "max_source_length": 4})


def test_an_unknown_metric_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="there is no metric 'blue': did you mean 'bleu'"):
        train_tiny(tmp_path, training={"metrics": ["blue"]})
    with pytest.raises(ValueError, match="metric_for_best_model must be one of loss, bleu, got 'chrf'"):
        train_tiny(tmp_path, training={"metrics": ["bleu"]})
    assert not (tmp_path / "run").exists()


def test_ids_of_the_generation_section_are_those_of_the_tokenizer(tmp_path):
    with pytest.raises(ValueError) as caught:
        train_tiny(tmp_path, "generation.suppress_tokens=[5, 11]")
    assert str(caught.value) == (
        "generation.suppress_tokens has the token id 11, but the target vocabulary has the ids 0 to 10"
    )


def test_long_outputs_are_not_cut(tmp_path):
    """Transformers' own default ends every output after 20 tokens."""
    rows = [{"source": word, "target": " ".join([word] * 33)} for word in ("uno", "due", "tre")]
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = train_tiny(
        tmp_path,
        data={"train": str(path), "validation": str(path), "test": str(path)},
        training={"max_steps": 20, "eval_steps": 10, "save_steps": 10},
    )
    tokenizer, model = load_tokenizer(output), AutoModelForSeq2SeqLM.from_pretrained(output)
    (ids,) = model.generate(**tokenizer("due", return_tensors="pt"))
    assert len(ids) - 1 > 30


def test_outputs_end_before_learned_positions_do(tmp_path):
    experiment = load_experiment(
        write_experiment(tmp_path), ["model.position_embedding_type=learned", "model.max_position_embeddings=9"]
    )
    tokenizer = train_tokenizer(["uno due tre"], "word")
    assert run.build_model(experiment, tokenizer, 5).generation_config.max_length == 9
    assert run.build_model(experiment, tokenizer, 3).generation_config.max_length == 6
    saved = run.build_model(experiment, tokenizer, 7)
    saved.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    on = load_experiment(write_experiment(tmp_path), [f"model.from_pretrained={tmp_path / 'saved'}"])
    assert run.build_model(on, tokenizer, 30).generation_config.max_length == 9


def test_neither_validation_nor_test(tmp_path):
    folder = train_tiny(
        tmp_path, "data.validation=null", "data.test=null", "training.eval_strategy=no", "training.max_steps=2"
    )
    assert json.loads((folder / "test_results.json").read_text()) == {}
    assert (folder / "README.md").is_file()


def test_dropping_the_last_batch_is_for_training_alone(tmp_path):
    output = train_tiny(tmp_path, "training.max_steps=2", training={"dataloader_drop_last": True})
    assert json.loads((output / "test_results.json").read_text()).keys() == {"bleu", "chrf"}  # of 4 pairs, 3 a batch


@pytest.mark.parametrize("changes", [{}, {"predict_with_generate": False, "metric_for_best_model": "loss"}])
def test_evaluations_hold_no_logits_of_all_positions(tmp_path, monkeypatch, changes):
    """And decode by our loops, though the Trainer gives `generate` the labels."""
    loops = []
    monkeypatch.setattr(language_model_head, "next_token_loss", None)
    rule = generation.follows_own_loop
    monkeypatch.setattr(generation, "follows_own_loop", lambda *what: loops.append(rule(*what)) or loops[-1])
    path = write_experiment(tmp_path, training={"max_steps": 2, **changes})
    log = json.loads((train(load_experiment(path)) / "trainer_state.json").read_text())["log_history"]
    assert all(0 < entry["eval_loss"] < 10 for entry in log if "eval_loss" in entry)
    assert loops
    assert all(loops)


UNSAVED = {"save_strategy": "no", "load_best_model_at_end": False, "max_steps": 2}


def test_a_test_that_fails_leaves_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "compute_scores", None)
    with pytest.raises(TypeError):
        train_tiny(tmp_path, training=UNSAVED)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= names
    assert "complete.json" not in names


def test_a_signal_without_a_checkpoint_to_go_on_from(tmp_path, monkeypatch):
    """It comes in the evaluation after the last step, which nothing saves: the run goes on to its end."""
    evaluate = run.LanguagesTrainer.evaluate

    def interrupted(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(run.LanguagesTrainer, "evaluate", interrupted)
    assert (train_tiny(tmp_path, training=UNSAVED) / "complete.json").is_file()


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(run.TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match=r"there are 2 GPUs: start one process on each, with `acc.*launch.*CUDA_V"):
        train_tiny(tmp_path)


def test_tensor_parallelism_needs_a_process_for_each_part(tmp_path):
    path = write_experiment(tmp_path, model={"encoder_ffn_dim": 18, "decoder_ffn_dim": 20})
    sentence = "training.tensor_parallel_size is 2, but there is 1 process: start 2 with `accelerate launch --multi_gp"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        train(load_experiment(path, ["training.tensor_parallel_size=2"]))


def test_a_refused_run_leaves_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        train_tiny(tmp_path, "data.train=nowhere.jsonl", f"training.output_dir={tmp_path}/runs/new")
    assert not (tmp_path / "runs").exists()


def test_a_mistake_leaves_the_output_folder_free(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl does not exist"):
        train_tiny(tmp_path, "data.train=nowhere.jsonl")
    assert (train_tiny(tmp_path, "training.max_steps=2") / "complete.json").is_file()


def test_a_trained_tokenizer_can_be_reused(tmp_path, finished):
    output = train_tiny(tmp_path, "training.max_steps=2", tokenizer={"path": str(finished)})
    assert (output / "tokenizer.json").read_text() == (finished / "tokenizer.json").read_text()


def test_the_same_seed_gives_the_same_model(tmp_path, finished):
    assert_equal_weights(train_tiny(tmp_path / "again"), finished)
    other = load_file(train_tiny(tmp_path / "other", "training.seed=7") / "model.safetensors")
    weights = load_file(finished / "model.safetensors")
    assert not any(torch.equal(weights[name], other[name]) for name in weights if weights[name].dim() == 2)


def test_training_learns(tmp_path):
    write_experiment(tmp_path)
    pairs = write_pairs(tmp_path / "few.jsonl", 4)
    output = train_tiny(
        tmp_path,
        data={"train": pairs, "validation": pairs, "test": pairs},
        model={"preset": "modern", "d_model": 24, "dropout": 0.0, "label_smoothing": 0.0},
        training={"max_steps": 60, "eval_steps": 30, "save_steps": 30},
    )
    assert json.loads((output / "test_results.json").read_text())["chrf"] == pytest.approx(100)
