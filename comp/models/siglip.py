"""SigLIP: two bidirectional encoders, one pooled by an attention head, one at its last token.

Vision has no class token, so no patch is pooled or protected, and the head must not attend to
padded rows. Text is pooled at its last position, padding or not: that token alone is protected.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import SiglipModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from comp import cost
from comp.blocks import run_blocks
from comp.handle import PruningHandle, Structure, stock_forward, swap_forward
from comp.models.base import counted_linear
from comp.models.clip import encoder_blocks, pooled_rows, run_text
from comp.modes import Stream
from comp.token_state import TokenState


class SiglipAdapter:
    """The SigLIP family."""

    name = "siglip"
    classes: dict[str, type[nn.Module]] = {  # noqa: RUF012 (a Protocol attribute)
        "SiglipModel": SiglipModel,
    }
    tasks: dict[str, str] = {  # noqa: RUF012
        "SiglipModel": "retrieval",
    }

    def structure(self, model: Any) -> Structure:
        """Returns the blocks of a SigLIP model."""
        encoders = {
            "vision": encoder_blocks(model.vision_model.encoder, Stream.VISION),
            "text": encoder_blocks(model.text_model.encoder, Stream.TEXT),
        }
        return Structure(self.name, encoders)

    def swap_forwards(self, handle: PruningHandle) -> None:
        """Swaps the forwards of both towers, which pool, and of the text's head."""
        model: Any = handle.model
        swap_forward(handle, model.vision_model, _vision_forward)
        swap_forward(handle, model.text_model, _text_forward)
        swap_forward(handle, model.text_model.head, counted_linear)


def _vision_forward(
    self: Any, pixel_values: Tensor, interpolate_pos_encoding: bool = False, **kwargs: Any
) -> BaseModelOutputWithPooling:
    handle: PruningHandle = self.pruning
    if handle.idle:
        output: BaseModelOutputWithPooling = stock_forward(
            self, pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs
        )
        return output
    rows = self.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
    state = run_blocks(handle, handle.structure.encoders["vision"], TokenState(rows))
    if handle.meter is not None and not handle.meter.paused:
        config, keys = self.config, cost.token_counts(state.valid, state.hidden)
        width, one = config.hidden_size, torch.ones_like(keys)
        head = cost.cross_attention_macs(one, keys, width, width, width)
        head = head + cost.feed_forward_macs(one, width, config.intermediate_size)
        patches = cost.patch_macs(rows.shape[1], config.patch_size, width, config.num_channels)
        handle.meter.add_fixed(int(head.sum()) + rows.shape[0] * patches)
    hidden = self.post_layernorm(state.hidden)
    return BaseModelOutputWithPooling(
        last_hidden_state=hidden, pooler_output=_attend_to_real_rows(self.head, hidden, state)
    )


def _attend_to_real_rows(head: Any, hidden: Tensor, state: TokenState) -> Tensor:
    """The pooling head of the stock code, blind to padded rows."""
    probe = head.probe.repeat(hidden.shape[0], 1, 1)
    padding = None if state.valid is None else ~state.valid
    pooled = head.attention(probe, hidden, hidden, key_padding_mask=padding)[0]
    pooled = pooled + head.mlp(head.layernorm(pooled))
    first: Tensor = pooled[:, 0]
    return first


def _text_forward(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> BaseModelOutputWithPooling:
    handle: PruningHandle = self.pruning
    if handle.idle or input_ids is None:
        output: BaseModelOutputWithPooling = stock_forward(
            self,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **kwargs,
        )
        return output
    last = torch.zeros_like(input_ids, dtype=torch.bool)
    last[:, -1] = True
    state = run_text(self, input_ids, attention_mask, position_ids, pooled=last, protected=last)
    return BaseModelOutputWithPooling(
        last_hidden_state=state.hidden, pooler_output=self.head(pooled_rows(state))
    )
