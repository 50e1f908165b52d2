"""Large models with random weights, pruned to a FLOPs ratio without training, for timing.

Stock initial values attend nearly uniformly. Queries and keys are scaled so that attention logits
have a standard deviation of about 2, as in trained models; tokens then differ enough for a
threshold to drop a share of them in every layer. The images are noise of contrasts from 0.2 to 3,
so that samples lose different numbers of tokens.

Ratios are reached by bisection: of the threshold (one for both streams), and of the share of
units. Every module loses its own share of heads and channels, between 0.7 and 1.3 times the
common one, at random, so that widths are as odd as after a real pruning. The mix removes
1 - sqrt(1 - ratio) by tokens and the rest by parameters; heads that are gone change what attention
there is, and with it how many tokens pass, so the threshold is set once more in the end.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BlipConfig,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from comp.cost import Measurement, Meter
from comp.handle import PruningHandle
from comp.models import attach, detach
from comp.models.blip_nlvr import BlipForNLVR
from comp.modes import Stream
from comp.shrink import shrink_
from comp.sites import AttentionSite

KINDS = ("parameters", "tokens", "mix")
LOGIT_DEVIATION = 2.0
TOLERANCE = 0.015


@dataclass(frozen=True)
class Subject:
    """A model to time.

    Attributes:
        build: Makes it, dense, with random weights.
        inputs: Makes a batch of so many samples.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Any]]


def _noise(*shape: int) -> Tensor:
    """Images whose contrast rises from sample to sample."""
    generator = torch.Generator().manual_seed(1)
    contrast = torch.logspace(-0.7, 0.5, shape[0])[torch.randperm(shape[0], generator=generator)]
    return torch.randn(*shape, generator=generator) * contrast.view(-1, *[1] * (len(shape) - 1))


def _words(batch: int, length: int, vocabulary: int = 1000) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(3, vocabulary, (batch, length), generator=generator)


def _sharpen_(model: nn.Module) -> nn.Module:
    """Makes attention as uneven as trained models' is; rows that enter have unit variance."""
    handle = attach(model)
    with torch.no_grad():
        for group in handle.groups.values():
            if not isinstance(group, AttentionSite):
                continue
            weights = [ref.linear.weight for ref in group.inputs]
            deviation = (LOGIT_DEVIATION / weights[0].shape[1]) ** 0.5
            if len(weights) == 1:
                queries_and_keys = weights[0][: 2 * (len(weights[0]) // 3)]
                queries_and_keys *= deviation / queries_and_keys.std()
            else:
                for weight in weights[:2]:
                    weight *= deviation / weight.std()
    detach(model)
    return model.eval()


def blip_nlvr(size: int = 384) -> nn.Module:
    """BLIP-base for NLVR2."""
    torch.manual_seed(0)
    config = BlipConfig(
        text_config={
            "hidden_size": 768,
            "encoder_hidden_size": 768,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
        },
        vision_config={
            "hidden_size": 768,
            "image_size": size,
            "initializer_range": 0.02,
            "intermediate_size": 3072,
            "num_attention_heads": 12,
        },
    )
    return _sharpen_(BlipForNLVR(config))


def blip_inputs(batch: int, size: int = 384) -> dict[str, Any]:
    """Pairs of images and statements of 20 words."""
    words = _words(batch, 20)
    return {
        "pixel_values": _noise(batch, 2, 3, size, size),
        "input_ids": words,
        "attention_mask": torch.ones_like(words),
    }


def _clip(size: int, patch: int, width: int, layers: int) -> nn.Module:
    torch.manual_seed(0)
    text = width if width < 1024 else 768
    text = 512 if width == 768 else text
    config = CLIPConfig(
        text_config={
            "hidden_size": text,
            "intermediate_size": 4 * text,
            "num_attention_heads": text // 64,
            "num_hidden_layers": 12,
            "eos_token_id": 999,
        },
        vision_config={
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_attention_heads": width // 64,
            "num_hidden_layers": layers,
            "image_size": size,
            "patch_size": patch,
        },
    )
    return _sharpen_(CLIPModel(config))


def _clip_inputs(size: int) -> Callable[[int], dict[str, Any]]:
    def inputs(batch: int) -> dict[str, Any]:
        words = _words(batch, 77, 998)
        words[:, -1] = 999
        return {"pixel_values": _noise(batch, 3, size, size), "input_ids": words}

    return inputs


def _llava() -> nn.Module:
    """576 image tokens before 1024-wide layers: the language model has 97 % of the FLOPs."""
    torch.manual_seed(0)
    tower = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_attention_heads=4,
        num_hidden_layers=4,
        image_size=336,
        patch_size=14,
    )
    backbone = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2752,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_hidden_layers=12,
        vocab_size=1024,
    )
    config = LlavaConfig(vision_config=tower, text_config=backbone, image_token_id=1023)
    return _sharpen_(LlavaForConditionalGeneration(config))


def _llava_inputs(batch: int) -> dict[str, Any]:
    words = _words(batch, 48)
    image = torch.full((batch, 576), 1023)
    return {
        "pixel_values": _noise(batch, 3, 336, 336),
        "input_ids": torch.cat([words[:, :8], image, words[:, 8:]], dim=1),
        "attention_mask": torch.ones(batch, 576 + 48, dtype=torch.int64),
        "use_cache": False,
        "logits_to_keep": 1,
    }


SMALL = Subject(lambda: _clip(224, 16, 384, 6), _clip_inputs(224))
"""A CLIP of 6 layers in its vision tower, for benchmarks that train."""

SUBJECTS: dict[str, Subject] = {
    "blip-base-nlvr2": Subject(blip_nlvr, blip_inputs),
    "clip-vit-b16": Subject(lambda: _clip(224, 16, 768, 12), _clip_inputs(224)),
    "clip-vit-l14-336": Subject(lambda: _clip(336, 14, 1024, 24), _clip_inputs(336)),
    "llava-small": Subject(_llava, _llava_inputs),
}


def cost_of(handle: PruningHandle, inputs: dict[str, Any]) -> Measurement:
    """What a pass costs; its ``alive`` are the units that are there now."""
    with torch.no_grad(), handle.metering() as meter:
        handle.model(**inputs)
        meter.num_samples = len(inputs["input_ids"])
        return meter.measurement(handle.groups.values(), handle.alive())


class TokenMeter(Meter):
    """A meter that also keeps how many tokens of every sample leave each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[tuple[str, int], Tensor] = {}

    def add_tokens(self, encoder: str, layer: int, counts: Tensor) -> None:
        super().add_tokens(encoder, layer, counts)
        self.counts[encoder, layer] = counts.double()


def cost_and_spread(handle: PruningHandle, inputs: dict[str, Any]) -> tuple[float, float]:
    """Mean multiply-adds per sample, and how uneven samples are: most over mean rows at the end.

    The rows are those that leave the first encoder.
    """
    handle.meter = meter = TokenMeter()
    with torch.no_grad():
        handle.model(**inputs)
    handle.meter = None
    meter.num_samples = len(inputs["input_ids"])
    first = next(iter(handle.structure.encoders))
    rows = meter.counts[first, handle.last_layer(first)]
    macs = meter.measurement(handle.groups.values(), handle.alive()).macs
    return macs, float(rows.max() / rows.mean())


class Pruner:
    """Prunes copies of one dense model, which share its parameters where they keep all of them.

    Args:
        dense: Stays as it is.
        inputs: Few samples; their costs at some thresholds are measured once and interpolated.
    """

    def __init__(self, dense: nn.Module, inputs: dict[str, Any]) -> None:
        self.dense, self.inputs = dense, inputs
        handle = self.copy()
        self.whole = cost_of(handle, inputs).macs
        self.curve = [(0.0, 0.0)]
        shares = handle.structure.family == "llava"
        for threshold in (0.3, 0.6, 0.95) if shares else (0.4, 0.7, 1.0):
            self._measure(threshold)

    def copy(self) -> PruningHandle:
        """Returns the handle of a new dense copy."""
        shared = {id(parameter): parameter for parameter in self.dense.parameters()}
        return attach(copy.deepcopy(self.dense, shared))

    def prune(self, kind: str, ratio: float) -> nn.Module:
        """Returns a pruned copy; ``kind`` is one of ``KINDS``, ``ratio`` the FLOPs to remove."""
        handle = self.copy()
        by_tokens = {"parameters": 0.0, "tokens": ratio, "mix": 1 - (1 - ratio) ** 0.5}[kind]
        if by_tokens:
            _drop(handle, self._threshold(by_tokens))
        if kind != "tokens":
            self._remove_units(handle, (1 - ratio) * self.whole)
        if kind == "mix":
            self._settle(handle, ratio)
        return handle.model

    def _settle(self, handle: PruningHandle, ratio: float) -> None:
        """Sets the threshold of a model without some of its units so that it is at a ratio."""
        low, high = 0.0, 2 * handle.thresholds[Stream.VISION]
        for _ in range(8):
            found = 1 - cost_of(handle, self.inputs).macs / self.whole
            if abs(found - ratio) <= TOLERANCE / 2:
                break
            before = handle.thresholds[Stream.VISION]
            low, high = (before, high) if found < ratio else (low, before)
            _drop(handle, (low + high) / 2)

    def _threshold(self, ratio: float) -> float:
        for _ in range(7):
            pairs = [pair for pair in pairwise(self.curve) if pair[1][0] >= ratio]
            if not pairs:
                return self.curve[-1][1]
            (low, before), (high, after) = pairs[0]
            if ratio - low < TOLERANCE or high - ratio < TOLERANCE:
                break
            share = (ratio - low) / (high - low)
            self._measure(before + (after - before) * min(max(share, 0.2), 0.8))
        return before if ratio - low < high - ratio else after

    def _measure(self, threshold: float) -> None:
        handle = self.copy()
        _drop(handle, threshold)
        self.curve.append((1 - cost_of(handle, self.inputs).macs / self.whole, threshold))
        self.curve.sort(key=lambda point: point[1])

    def _remove_units(self, handle: PruningHandle, target: float) -> None:
        cost = cost_of(handle, self.inputs)
        low, high = 0.0, 1.4
        for _ in range(20):
            middle = (low + high) / 2
            _mask(handle, middle)
            units = sum(
                count * cost.unit_macs.get(name, 0.0) for name, count in handle.alive().items()
            )
            before = sum(cost.alive[name] * macs for name, macs in cost.unit_macs.items())
            low, high = (middle, high) if cost.macs - before + units > target else (low, middle)
        shrink_(handle)


def _drop(handle: PruningHandle, threshold: float) -> None:
    handle.thresholds = dict.fromkeys((Stream.VISION, Stream.TEXT), threshold)


def _mask(handle: PruningHandle, share: float) -> None:
    generator = torch.Generator().manual_seed(3)
    for name, group in handle.groups.items():
        own = share * (0.7 + 0.6 * float(torch.rand((), generator=generator)))
        units = group.num_units
        least = 1 if group.kind == "head" else 16
        kept = min(units, max(least, round(units * (1 - own))))
        mask = torch.zeros(units, device=group.out.linear.weight.device)
        mask[torch.randperm(units, generator=generator)[:kept]] = 1
        handle.masks[name] = mask
