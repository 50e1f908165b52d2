"""A config that names an attention kernel without probabilities still gives scores."""

from typing import Any

import pytest
import torch
from torch import nn

from comp.models import attach
from comp.modes import Stream
from tests.tiny import FAMILIES, SIGLIP, blip_config, measured, random_masks

SWITCHED = {"clip": FAMILIES["clip"], "siglip": SIGLIP, "llava": FAMILIES["llava"]}


def ask_for(model: nn.Module, kernel: str) -> None:
    """Sets what the attentions that are pruned read when they choose a kernel."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if config is not None:
            config._attn_implementation = kernel


@pytest.mark.parametrize("kernel", ["sdpa", "flash_attention_2", "flex_attention"])
@pytest.mark.parametrize("name", SWITCHED)
def test_scores_and_outputs_do_not_depend_on_the_kernel_a_config_names(
    name: str, kernel: str
) -> None:
    family, found = SWITCHED[name], []
    for asked in ("eager", kernel):
        torch.manual_seed(0)  # SigLIP's pooling head has weights of its own
        model: Any = family.build(0)
        # LLaVA's tower is not pruned and runs as it is, so it must have a kernel that it can run.
        ask_for(model.model.language_model if name == "llava" else model, asked)
        handle = attach(model)
        handle.masks = random_masks(handle, soft=True)
        handle.thresholds = {Stream.VISION: 0.8, Stream.TEXT: 0.7}
        found.append(measured(handle, family, family.batch(3, 0)))
    (eager, before), (other, after) = found
    assert before.counts == after.counts
    assert torch.equal(eager, other)


@pytest.mark.parametrize("kernel", ["sdpa", "flash_attention_2"])
def test_blip_has_no_other_kernel_to_switch_from(kernel: str) -> None:
    build: Any = type(FAMILIES["blip-vqa"].build(0))._from_config
    with pytest.raises(ValueError, match="BlipForQuestionAnswering does not support"):
        build(blip_config(32), attn_implementation=kernel)
