"""
Transformers' own test-suite, run on classes that live outside its repository.

`scripts/install.sh` unpacks the tests of the pinned version into `.venv`; nothing of them is copied into this
repository. This module makes a package of that folder, so that its relative imports resolve, and stands in for the
modules that the source distribution leaves out.
"""

import multiprocessing
import os
import sys
import types
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import transformers
from torch.multiprocessing import start_processes
from transformers.models.auto import modeling_auto

import dragoman  # noqa: F401  (registers the classes in every process)


ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".venv" / f"transformers-{transformers.__version__}" / "tests"

__path__ = [str(FOLDER)]


def stand_in(name: str, **contents):
    """A module of this package that holds `contents`; its parents are made on the way."""
    module = types.ModuleType(f"{__name__}.{name}")
    module.__dict__.update(contents)
    sys.modules[module.__name__] = module
    if "." in name:
        stand_in(name.rpartition(".")[0], __path__=[], **{name.rpartition(".")[2]: module})


# Tests that are not in the distribution. Those of generation are our own, in tests/models/test_shared_generation.py.
class GenerationTesterMixin:
    pass


class ExportTesterMixin:
    pass


# What every configuration of the library takes, with values that are not the defaults.
COMMON_SETTINGS = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "is_encoder_decoder": True,
    "chunk_size_feed_forward": 3,
    "architectures": ["SomeModel"],
    "finetuning_task": "translation",
    "id2label": {0: "zero"},
    "label2id": {"zero": 0},
    "tokenizer_class": "SomeTokenizer",
    "bos_token_id": 4,
    "pad_token_id": 5,
    "eos_token_id": 6,
    "sep_token_id": 7,
    "decoder_start_token_id": 8,
    "task_specific_params": {"translation": "some"},
    "problem_type": "regression",
}


def join_and_run(rank: int, world_size: int, port: int, function, args: tuple):
    dist.init_process_group("gloo", store=dist.TCPStore("localhost", port), rank=rank, world_size=world_size)
    function(rank, *args)
    dist.destroy_process_group()


def start_ranks(function, args: tuple, nprocs: int):
    """
    `function(rank, *args)` in CPU processes of their own. They are forked from a server that has imported everything
    and run nothing, which takes a tenth of the time of fresh interpreters.
    """
    multiprocessing.set_forkserver_preload([__name__])
    settings = {"PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with mock.patch.dict(os.environ, settings):
        start_processes(function, args=args, nprocs=nprocs, daemon=True, start_method="forkserver")


def run_distributed(world_size: int):
    def prepare(function):
        def start(*args):
            store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
            start_ranks(join_and_run, (world_size, store.port, function, args), world_size)

        return start

    return prepare


def give_the_decoder_an_input(model, args: tuple, kwargs: dict):
    """The tests for tensor parallelism call `model(input_ids)`, as for a decoder alone."""
    if kwargs.keys().isdisjoint({"labels", "decoder_input_ids"}):
        kwargs = {**kwargs, "decoder_input_ids": args[0].roll(1, dims=1)}
    return args, kwargs


if FOLDER.is_dir():
    stand_in("generation.test_utils", GenerationTesterMixin=GenerationTesterMixin)
    stand_in("exporters.test_export", ExportTesterMixin=ExportTesterMixin)
    stand_in("utils.test_configuration_utils", config_common_kwargs=COMMON_SETTINGS)
    stand_in(
        "distributed_testing_utils",
        run_distributed=run_distributed,
        _start_rank_processes=start_ranks,
        _get_distributed_backend=lambda: "gloo",
        _get_distributed_device_type=lambda: "cpu",
        _get_rank_device=lambda rank: torch.device("cpu"),
        _set_rank_device=lambda rank: None,
    )
    # The suite knows by these tables which class is the model without a head, and which one takes labels.
    modeling_auto.MODEL_MAPPING_NAMES.update(
        dragoman=("DragomanModel", "DragomanEncoderModel"), dragoman_rnn="DragomanRnnModel"
    )
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.update(
        dragoman="DragomanForConditionalGeneration", dragoman_rnn="DragomanRnnForConditionalGeneration"
    )

    with mock.patch("transformers.utils.direct_transformers_import", return_value=transformers):
        from conformance.suite import test_configuration_common  # noqa: F401
    from conformance.suite import test_fsdp_mixin, test_tensor_parallel_mixin

    # The tests across processes name the model types they run on, and expect a decoder alone.
    test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
    load_two_models = test_tensor_parallel_mixin._load_tp_and_reference_models

    def load_two_models_that_take_source_ids(*args):
        parallel, reference, device = load_two_models(*args)
        for model in (parallel, reference):
            model.register_forward_pre_hook(give_the_decoder_an_input, with_kwargs=True)
        return parallel, reference, device

    test_tensor_parallel_mixin._load_tp_and_reference_models = load_two_models_that_take_source_ids
    test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None
    test_fsdp_mixin.AutoModelForCausalLM = transformers.AutoModelForSeq2SeqLM
    # Processes of gloo share a core if they must.
    test_fsdp_mixin._get_available_fsdp_workers = lambda: 8
