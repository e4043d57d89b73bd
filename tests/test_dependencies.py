"""Canaries: the parts of Composer, Streaming, transformers and peft that the adapters rely on."""

import inspect

import pytest
import torch
from composer import Callback, DataSpec, Trainer
from composer.core import Event, State
from composer.models import HuggingFaceModel
from streaming import MDSWriter, StreamingDataLoader, StreamingDataset
from streaming.base.dataset import _Iterator
from streaming.base.storage.download import CloudDownloader


def arguments(function) -> set[str]:
    return set(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (
            Trainer,
            "model train_dataloader eval_dataloader eval_interval max_duration optimizers "
            "schedulers algorithms callbacks loggers run_name device precision "
            "device_train_microbatch_size accumulate_train_batch_on_tokens seed save_folder "
            "save_interval save_num_checkpoints_to_keep load_path load_weights_only autoresume "
            "progress_bar log_to_console console_log_interval",
        ),
        (DataSpec, "num_samples get_num_samples_in_batch get_num_tokens_in_batch"),
        (HuggingFaceModel, "model tokenizer metrics eval_metrics"),
        (
            StreamingDataset,
            "local remote split shuffle shuffle_seed batch_size num_canonical_nodes validate_hash",
        ),
        (MDSWriter, "columns out compression hashes size_limit"),
        (StreamingDataset.get_item, "self sample_id retry"),
        (CloudDownloader.download, "remote local timeout"),
    ],
)
def test_arguments(function, names):
    assert set(names.split()) <= arguments(function)


def test_members():
    for name in ("before_dataloader", "after_dataloader", "batch_end", "eval_end", "fit_start"):
        assert callable(getattr(Callback, name))
        assert name in {event.value for event in Event}
    assert callable(State.stop_training)
    assert {"yield_index", "total"} <= vars(_Iterator(__import__("numpy").arange(3))).keys()
    assert hasattr(StreamingDataLoader, "_get_batch_size")


def test_varlen_operator_of_every_torch_that_is_pinned():
    # models/attention.py gives the first ten by place, and only CUDA would tell of a change.
    arguments = torch.ops.aten._flash_attention_forward.default._schema.arguments
    by_place = "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal"
    names = [argument.name for argument in arguments]
    assert names[:10] == [*by_place.split(), "return_debug_mask"]
    assert {"scale", "window_size_left", "window_size_right"} <= set(names[10:])


def test_token_accumulation_is_still_off_by_default():
    # If this changes, so may the meaning of the loss: read training/run.py again.
    default = inspect.signature(Trainer).parameters["accumulate_train_batch_on_tokens"].default
    assert default is False
