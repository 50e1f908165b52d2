"""Tensors that wait outside the memory that training needs.

While a copy of the trajectory is fine-tuned, the trajectory's own weights and moments do nothing;
the dense model only has its latency taken; the best weights so far are only gone back to. Tensors
of the CPU wait in a temporary file without a name, which ends with the process however that ends.
They are read back into ordinary memory and not mapped: the pages of a mapping would come on top of
what the C library keeps. Tensors of an accelerator wait in host memory.

What is freed does not leave the process by itself: glibc keeps gradients, moments and weights of a
large model between smaller ones that are still in use, and the next ones do not fit the gaps.
``give_back`` returns the gaps where a run goes from training to something else.
"""

import copy
import ctypes
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def _trim() -> Any:
    """Returns glibc's ``malloc_trim``, or ``None`` with another C library."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None


_TRIM = _trim()
WORTH_A_WALK = 32 * 2**20
"""Bytes; less than this is left to the C library."""


class Parked:
    """Copies of tensors as they are now, bit for bit.

    If the disk cannot take them they stay in memory, with a warning.

    Args:
        tensors: Tensors of one or more devices.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._held: list[Tensor | tuple[int, torch.Size, torch.dtype]] = []
        tensors = list(tensors)
        try:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as this)
            self._held = [self._put(tensor.detach()) for tensor in tensors]
            self._file.flush()
        except OSError as error:
            warnings.warn(
                f"weights that wait cannot be written to {tempfile.gettempdir()} "
                f"({error.strerror}) and take memory instead; point TMPDIR to a disk with room",
                stacklevel=2,
            )
            self._held = [tensor.detach().cpu().clone() for tensor in tensors]

    def _put(self, tensor: Tensor) -> Tensor | tuple[int, torch.Size, torch.dtype]:
        if tensor.device.type != "cpu":
            return tensor.cpu()
        if not tensor.numel() or not tensor.is_contiguous():
            return tensor.clone()
        offset = self._file.tell()
        self._file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return offset, tensor.shape, tensor.dtype

    def read(self) -> Iterator[Tensor]:
        """Yields the tensors on the CPU, those of the file in memory of their own."""
        for held in self._held:
            if isinstance(held, Tensor):
                yield held
                continue
            offset, shape, dtype = held
            tensor = torch.empty(shape, dtype=dtype)
            self._file.seek(offset)
            self._file.readinto(tensor.reshape(-1).view(torch.uint8).numpy().data)
            yield tensor


@contextmanager
def parked(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Lets tensors wait inside, where they have their shapes but no values."""
    waiting, devices = Parked(tensors), [tensor.device for tensor in tensors]
    for tensor in tensors:
        tensor.data = tensor.new_zeros(()).expand(tensor.shape)
    give_back(bytes_of(tensors))
    try:
        yield
    finally:
        for tensor, device, values in zip(tensors, devices, waiting.read(), strict=True):
            tensor.data = values.to(device)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Returns the bytes that tensors take in the memory of the CPU."""
    return sum(t.numel() * t.element_size() for t in tensors if t.device.type == "cpu")


def give_back(freed: int) -> None:
    """Returns freed memory to the system, where the C library can (glibc).

    That walks over all memory, which takes 5 to 600 ms, so nothing is done for a small model.

    Args:
        freed: About how many bytes were.
    """
    if _TRIM is not None and freed >= WORTH_A_WALK:
        _TRIM(0)


class ParkedModel:
    """A copy of a model of which only the structure is in memory.

    Args:
        model: Stays as it is.
    """

    def __init__(self, model: nn.Module) -> None:
        tensors = _tensors_of(model)
        self._weights = Parked(tensors)
        without = [torch.empty_like(tensor, device="meta") for tensor in tensors]
        self._structure = _copy_with(model, without)

    def build(self) -> nn.Module:
        """Returns the model on the CPU; its weights are there until it is dropped."""
        return _copy_with(self._structure, self._weights.read())


def sharing_copy(model: nn.Module) -> nn.Module:
    """Returns a copy of a model whose parameters are its own but hold the model's values.

    Gradients, hooks and attributes of the copy are not the model's; what changes a value in place
    changes both.
    """
    return _copy_with(model, [tensor.detach() for tensor in _tensors_of(model)])


def _tensors_of(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _copy_with(model: nn.Module, others: Iterable[Tensor]) -> nn.Module:
    """Copies a model with other tensors in the place of its own; ties stay ties."""
    pairs = zip(_tensors_of(model), others, strict=True)
    return copy.deepcopy(model, {id(own): _alike(own, other) for own, other in pairs})


def _alike(tensor: Tensor, data: Tensor) -> Tensor:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(data, requires_grad=tensor.requires_grad)
    return data
