"""What retrieval asks of a model: features of images and texts, and whether two belong together.

Dual encoders give ``get_image_features`` and ``get_text_features`` (CLIP, SigLIP); BLIP has towers
with projections instead and a head that judges a text read together with the image's rows.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from comp.handle import TEMPERATURE

MAX_SCALE = 100.0
"""CLIP's bound on the learned factor on similarities (arXiv 2103.00020)."""
FIRST_TEMPERATURE = 0.07
"""What BLIP's learned temperature starts from, unless the model's config says."""
TEMPERATURES = (0.001, 0.5)
"""BLIP's bounds on its learned temperature (arXiv 2201.12086)."""


@dataclass(frozen=True)
class Encoded:
    """Images as a model sees them.

    Attributes:
        features: Of length 1, ``(B, D)``, float32.
        rows: What texts attend to, ``(B, N, D')``; ``None`` for dual encoders.
    """

    features: Tensor
    rows: Tensor | None = None


def matches(model: nn.Module) -> bool:
    """Whether a model judges pairs besides comparing features."""
    return hasattr(model, "itm_head")


def encode_images(model: nn.Module, pixel_values: Tensor) -> Encoded:
    """Encodes normalised images ``(B, 3, H, W)``."""
    parts: Any = model
    if not matches(model):
        return Encoded(_unit(parts.get_image_features(pixel_values=pixel_values).pooler_output))
    rows = parts.vision_model(pixel_values=pixel_values).last_hidden_state
    return Encoded(_unit(parts.vision_proj(rows[:, 0])), rows)


def encode_texts(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Returns features of length 1 of token ids ``(B, N)``, ``(B, D)`` float32."""
    parts: Any = model
    if not matches(model):
        found = parts.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
        return _unit(found)
    hidden = parts.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    return _unit(parts.text_proj(hidden[:, 0]))


def match_logits(model: nn.Module, rows: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Returns how much every text fits its image, ``(B, 2)`` float32: no, yes.

    Args:
        model: A model that ``matches``.
        rows: ``Encoded.rows`` of the images, ``(B, N_v, D)``.
        ids: Texts, ``(B, N)``.
        mask: 1 where they are no padding, ``(B, N)``.
    """
    parts: Any = model
    hidden = parts.text_encoder(
        input_ids=ids, attention_mask=mask, encoder_hidden_states=rows
    ).last_hidden_state
    logits: Tensor = parts.itm_head(hidden[:, 0]).float()
    return logits


def similarity_factor(model: nn.Module) -> Tensor:
    """Returns the learned factor on similarities, a scalar; training keeps it in its bounds."""
    learned = _learned(model)
    bounds = TEMPERATURES if matches(model) else (None, math.log(MAX_SCALE))
    if model.training:  # in place, or a value beyond a bound would get no gradient back
        with torch.no_grad():
            learned.clamp_(*bounds)
    bounded: Tensor = learned.float().clamp(*bounds)
    return bounded.reciprocal() if matches(model) else bounded.exp()


def _learned(model: Any) -> Tensor:
    if matches(model) and not hasattr(model, TEMPERATURE):
        return _first_temperature(model)
    learned: Tensor = getattr(model, TEMPERATURE if matches(model) else "logit_scale")
    return learned


def add_temperature_(model: nn.Module) -> None:
    """Gives a model that matches the learned temperature that its stock class lacks, in place."""
    if matches(model) and not hasattr(model, TEMPERATURE):
        model.register_parameter(TEMPERATURE, nn.Parameter(_first_temperature(model)))


def _first_temperature(model: Any) -> Tensor:
    first = getattr(model.config, TEMPERATURE, FIRST_TEMPERATURE)
    return torch.tensor(float(first), device=next(model.parameters()).device)


def _unit(features: Tensor) -> Tensor:
    return functional.normalize(features.float(), dim=-1)
