"""Encoders outside Python: ``torch.export``, ONNX, and the fixed token counts that both need.

Removed heads and channels are gone from the weights, so they ask for nothing. Tokens dropped by a
threshold leave every sample its own number, which no fixed graph can hold: there
``freeze_token_counts`` gives each layer the number that the thresholds keep on average.
"""

from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from comp.cost import Measurement
from comp.evaluation import evaluating, measure_cost
from comp.handle import PruningHandle, handle_of
from comp.models import adapter_of
from comp.sites import Block
from comp.tasks.base import Batch, Task

BESIDE_THE_MINIMUM = 2
"""Rows that no score keeps: protected ones, at most two, or one of them and the summary token."""


def freeze_token_counts(
    model: nn.Module, task: Task, batches: Iterable[Batch]
) -> dict[str, list[int]]:
    """Fixes how many tokens leave every layer, at the mean that the thresholds keep.

    The model then drops the same number in every sample: those with the lowest scores. Saving
    keeps the counts; ``model.pruning.static_tokens = None`` goes back to the thresholds.

    Args:
        model: A pruned model with token thresholds; changed in place.
        task: Runs the forward pass.
        batches: Samples to measure, on the model's device.

    Returns:
        By encoder, the rows that leave each layer, class and summary tokens included: rounded to
        the nearest, never rising from layer to layer, and never under the kept minimum.

    Raises:
        ValueError: If no encoder drops tokens by a threshold.
    """
    handle = handle_of(model)
    if not _dropping(handle):
        raise ValueError(
            f"no encoder of this {handle.structure.family} model drops tokens by a threshold "
            f"(thresholds: {_named(handle)}), so there is no count to fix; export it as it is"
        )
    handle.static_tokens = _mean_counts(handle, lambda: measure_cost(model, task, batches))
    return handle.static_tokens


def export_encoder(
    model: nn.Module,
    encoder: str,
    example: Mapping[str, Tensor],
    *,
    tokens: Literal["learned", "static"] = "learned",
) -> torch.export.ExportedProgram:
    """Exports one encoder of a model, dense or pruned, for any batch size.

    Args:
        model: An instance of a class with an adapter; unchanged.
        encoder: Name of the encoder: ``vision`` or ``text``.
        example: What the encoder is called with, by name, for example ``pixel_values`` as
            ``(B, 3, S, S)``. From B = 2 on the program takes any batch size, else just 1.
        tokens: ``static`` fixes the token counts in the program, at their mean over the example
            unless the model's are fixed already; ``learned`` leaves them as they are.

    Returns:
        The program: its module takes a dict like ``example`` and returns a dict of the encoder's
        tensors, ``last_hidden_state`` and where there is one ``pooler_output``.

    Raises:
        ValueError: If the model has no such encoder, or its tokens drop by a threshold.
    """
    if tokens not in ("learned", "static"):
        raise ValueError(f"tokens must be learned or static, but got {tokens!r}")
    module = EncoderModule(model, encoder)
    handle: PruningHandle | None = getattr(model, "pruning", None)
    before = None if handle is None else handle.static_tokens
    try:
        if handle is not None and tokens == "static" and not before and _dropping(handle):
            handle.static_tokens = _mean_counts(handle, lambda: _cost_of(module, handle, example))
        with evaluating(model):
            return torch.export.export(
                module, (dict(example),), dynamic_shapes=_any_batch(example), strict=False
            )
    finally:
        if handle is not None:
            handle.static_tokens = before


def to_onnx(
    model: nn.Module,
    encoder: str,
    path: str | Path,
    example: Mapping[str, Tensor],
    *,
    tokens: Literal["learned", "static"] = "learned",
) -> Path:
    """Writes one encoder of a model as an ONNX file, its weights inside.

    Args:
        model: See ``export_encoder``, as for the other arguments.
        encoder: Name of the encoder.
        path: The file, replaced if it exists.
        example: What the encoder is called with; the names become those of the ONNX inputs.
        tokens: ``learned`` or ``static``.

    Returns:
        ``path``. The outputs are named as in ``export_encoder``.

    Raises:
        ModuleNotFoundError: If onnx or onnxscript is not installed.
        ValueError: As ``export_encoder``.
    """
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"ONNX files need {' and '.join(missing)}, not installed here; "
            "pip install 'comp-vlm[export]'"
        )
    program = export_encoder(model, encoder, example, tokens=tokens)
    with evaluating(model):
        outputs = EncoderModule(model, encoder)(dict(example))
    torch.onnx.export(
        program,
        (dict(example),),
        path,
        input_names=list(example),
        output_names=list(outputs),
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    return Path(path)


class EncoderModule(nn.Module):
    """One encoder of a model by itself: a dict of tensors in, a dict of tensors out.

    Args:
        model: Shares its modules, and keeps its masks and thresholds.
        encoder: Name of the encoder.

    Raises:
        ValueError: If the model has no such encoder.
    """

    def __init__(self, model: nn.Module, encoder: str) -> None:
        super().__init__()
        attached = hasattr(model, "pruning")
        structure = handle_of(model).structure if attached else adapter_of(model).structure(model)
        if encoder not in structure.encoders:
            raise ValueError(
                f"this {structure.family} model has no encoder {encoder!r}; "
                f"it has {', '.join(structure.encoders)}"
            )
        path = structure.encoders[encoder][0].attention.name
        self.encoder = model.get_submodule(path.split(".")[0])

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the encoder's outputs that are tensors."""
        outputs: Any = self.encoder(**inputs)
        return {name: value for name, value in outputs.items() if isinstance(value, Tensor)}


def _dropping(handle: PruningHandle) -> dict[str, list[Block]]:
    """The encoders in which thresholds decide how many tokens of a sample stay."""
    return {
        name: blocks
        for name, blocks in handle.structure.encoders.items()
        if blocks[0].drops_tokens
        and all(block.boundary is None for block in blocks)
        and handle.thresholds.get(blocks[0].stream, 0.0) > 0
    }


def _named(handle: PruningHandle) -> str:
    named = [f"{stream.value} {theta:g}" for stream, theta in handle.thresholds.items()]
    return ", ".join(named) or "none"


def _mean_counts(
    handle: PruningHandle, measure: Callable[[], Measurement]
) -> dict[str, list[int]]:
    """Rounded mean counts under the thresholds, of the encoders that ``measure`` runs."""
    before, handle.static_tokens = handle.static_tokens, None
    try:
        means = measure().tokens
    finally:
        handle.static_tokens = before
    counts: dict[str, list[int]] = {}
    for name, blocks in _dropping(handle).items():
        if f"{name}.0" not in means:
            continue
        least = handle.min_tokens[blocks[0].stream] + BESIDE_THE_MINIMUM
        rounded = [max(least, int(means[f"{name}.{b.layer}"] + 0.5)) for b in blocks]
        counts[name] = [min(rounded[: i + 1]) for i in range(len(rounded))]
    return counts


def _cost_of(
    module: EncoderModule, handle: PruningHandle, example: Mapping[str, Tensor]
) -> Measurement:
    with evaluating(handle.model), handle.metering() as meter:
        module(dict(example))
        meter.num_samples = len(next(iter(example.values())))
        return meter.measurement(handle.groups.values(), handle.alive())


def _any_batch(example: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Shapes of the inputs whose first dimension, the batch, is left open."""
    sizes = {len(value) for value in example.values()}
    if len(sizes) > 1 or sizes == {1}:
        return None
    batch = torch.export.Dim("batch")
    return {"inputs": {name: {0: batch} for name in example}}
