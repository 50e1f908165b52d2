"""Dense models as others saved them: shards, older names of tensors, pickles read as data."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.utils import logging

from comp.errors import CheckpointMismatch, misfit

Dtype = torch.dtype | Literal["auto"]

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""What a directory's weights may be called, the best first."""


def load_dense(model_class: Any, directory: Path, dtype: Dtype = torch.float32) -> nn.Module:
    """Builds a stock model of a directory, strictly.

    Args:
        model_class: A class of ``transformers``, or one that is built on it.
        directory: Holds ``config.json`` and weights. Pickles are read with ``weights_only``.
        dtype: Of the weights; ``"auto"`` is what they are stored in.

    Raises:
        CheckpointMismatch: If weights are missing, unexpected, of another shape or broken.
    """
    try:
        with _quietly():
            model, found = model_class.from_pretrained(
                directory,
                output_loading_info=True,
                dtype=dtype,
                local_files_only=True,
                weights_only=True,
                ignore_mismatched_sizes=True,
            )
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointMismatch(
            f"the weights in {directory} cannot be read as data ({reason}); save them again as "
            "safetensors"
        ) from error
    missing, unexpected = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    wrong = sorted(key[0] for key in found["mismatched_keys"])
    if missing or unexpected or wrong:
        raise CheckpointMismatch(
            f"{directory} {misfit(model_class.__name__, missing, unexpected, wrong)}"
        )
    loaded: nn.Module = model
    return loaded


@contextmanager
def _quietly() -> Iterator[None]:
    """Keeps bars and reports of the library away; what is wrong is said in a sentence here."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
