"""A pruned model behind MLflow's generic interface, ``mlflow.pyfunc``.

MLflow imports this module by the name in the model's ``MLmodel`` file and hands it the directory;
``comp.load_pruned`` reads that, so nothing in it is executed. This file knows no MLflow.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import nn


class ServedModel:
    """A pruned model that takes and gives arrays.

    Attributes:
        model: The module itself, in eval mode on the CPU.
    """

    def __init__(self, directory: str | Path) -> None:
        from comp.checkpoint import load_pruned

        self.model: nn.Module = load_pruned(directory)

    def predict(
        self, model_input: dict[str, NDArray[Any]], params: dict[str, Any] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Runs one forward pass.

        Args:
            model_input: What the model's ``forward`` takes, by name, for example ``pixel_values``
                ``(B, 3, H, W)`` and ``input_ids`` ``(B, N)``.
            params: Further arguments of ``forward``.

        Returns:
            Every tensor of its output, by name.
        """
        import torch

        tensors = {name: torch.as_tensor(np.asarray(v)) for name, v in model_input.items()}
        with torch.no_grad():
            output = self.model(**tensors, **(params or {}), return_dict=True)
        found = {name: value for name, value in output.items() if isinstance(value, torch.Tensor)}
        return {name: value.numpy() for name, value in found.items()}

    def get_raw_model(self) -> "nn.Module":
        """Returns the module; MLflow's ``PyFuncModel.get_raw_model`` asks for it."""
        return self.model


def _load_pyfunc(data_path: str) -> ServedModel:
    return ServedModel(data_path)
