"""CLIP: an image encoder and a causal text encoder whose pooled features are compared.

Vision: the class token is pooled and protected; dropped patches become a summary token. Text: the
end-of-text token is pooled and takes the class token's role; it and the start token are
protected. The stream is causal, so dropped words are discarded and the order of the rest is kept.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling

from comp import cost
from comp.blocks import run_blocks
from comp.handle import PruningHandle, Structure, stock_forward, swap_forward
from comp.models.base import counted_linear
from comp.modes import PruningMode, Stream
from comp.sites import AttentionSite, Block, FeedForwardSite, LinearRef, SubLayer
from comp.token_state import TokenState


class ClipAdapter:
    """The CLIP family: both encoders, or one of them with its projection."""

    name = "clip"
    classes: dict[str, type[nn.Module]] = {  # noqa: RUF012 (a Protocol attribute)
        "CLIPModel": CLIPModel,
        "CLIPTextModelWithProjection": CLIPTextModelWithProjection,
        "CLIPVisionModelWithProjection": CLIPVisionModelWithProjection,
    }
    tasks: dict[str, str] = {  # noqa: RUF012
        "CLIPModel": "retrieval",
    }

    def structure(self, model: Any) -> Structure:
        """Returns the blocks of a CLIP model."""
        encoders = {}
        if hasattr(model, "vision_model"):
            encoders["vision"] = encoder_blocks(model.vision_model.encoder, Stream.VISION)
        if hasattr(model, "text_model"):
            encoders["text"] = encoder_blocks(model.text_model.encoder, Stream.TEXT)
        return Structure(self.name, encoders, merges=frozenset({Stream.VISION}))

    def swap_forwards(self, handle: PruningHandle) -> None:
        """Swaps the vision encoder's forward, the text model's, which pools, and projections."""
        model: Any = handle.model
        if "vision" in handle.structure.encoders:
            swap_forward(handle, model.vision_model.encoder, _vision_forward)
            swap_forward(handle, model.visual_projection, counted_linear)
        if "text" in handle.structure.encoders:
            swap_forward(handle, model.text_model, _text_forward)
            swap_forward(handle, model.text_projection, counted_linear)


def encoder_blocks(encoder: Any, stream: Stream) -> list[Block]:
    """Returns the blocks of a pre-norm encoder whose layers are named as CLIP's.

    Args:
        encoder: Holds ``layers`` with ``self_attn``, ``mlp`` and two norms.
        stream: What runs through it; ``vision_model`` or ``text_model`` is its parent.
    """
    is_vision = stream is Stream.VISION
    mode = PruningMode.VISION_PARAMS if is_vision else PruningMode.LANGUAGE_PARAMS
    streams = frozenset({stream})
    name = "vision" if is_vision else "text"
    blocks = []
    for i, layer in enumerate(encoder.layers):
        path = f"{name}_model.encoder.layers.{i}"
        attention = layer.self_attn
        blocks.append(
            Block(
                encoder=name,
                stream=stream,
                layer=i,
                attention=AttentionSite(
                    name=f"{path}.self_attn",
                    mode=mode,
                    layer=i,
                    inputs=tuple(
                        LinearRef(attention, part) for part in ("q_proj", "k_proj", "v_proj")
                    ),
                    out=LinearRef(attention, "out_proj"),
                    head_dim=attention.head_dim,
                    scale=attention.scale,
                    dropout=attention.dropout,
                    token_streams=streams,
                ),
                attention_wrap=SubLayer(before=layer.layer_norm1),
                feed_forward=FeedForwardSite(
                    name=f"{path}.mlp",
                    mode=mode,
                    layer=i,
                    inputs=(LinearRef(layer.mlp, "fc1"),),
                    out=LinearRef(layer.mlp, "fc2"),
                    activation=layer.mlp.activation_fn,
                    token_streams=streams,
                ),
                feed_forward_wrap=SubLayer(before=layer.layer_norm2),
            )
        )
    return blocks


def pooled_rows(state: TokenState) -> Tensor:
    """Returns the one pooled row of every sample where it stands now, ``(B, D)``."""
    assert state.pooled is not None
    rows = torch.arange(state.hidden.shape[0], device=state.hidden.device)
    return state.hidden[rows, state.pooled.int().argmax(dim=1)]


def _vision_forward(self: Any, inputs_embeds: Tensor, **kwargs: Any) -> BaseModelOutput:
    handle: PruningHandle = self.pruning
    if handle.idle:
        output: BaseModelOutput = stock_forward(self, inputs_embeds, **kwargs)
        return output
    if handle.meter is not None and not handle.meter.paused:
        model: Any = handle.model
        config = model.vision_model.config
        batch, tokens, width = inputs_embeds.shape
        macs = cost.patch_macs(tokens - 1, config.patch_size, width, config.num_channels)
        handle.meter.add_fixed(batch * macs)
    first = torch.zeros_like(inputs_embeds[..., 0], dtype=torch.bool)
    first[:, 0] = True
    state = TokenState(inputs_embeds, pooled=first, protected=first)
    state = run_blocks(handle, handle.structure.encoders["vision"], state)
    return BaseModelOutput(last_hidden_state=state.hidden)


def _text_forward(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> BaseModelOutputWithPooling:
    """The text model, which reads the pooled feature at the end-of-text token's new row."""
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
    length = input_ids.shape[-1]
    causal = torch.ones(1, 1, length, length, dtype=torch.bool, device=input_ids.device).tril()
    pooled = F.one_hot(_end_of_text(self, input_ids), length).bool()
    protected = pooled.clone()
    protected[:, 0] = True
    state = run_text(self, input_ids, attention_mask, position_ids, pooled, protected, causal)
    return BaseModelOutputWithPooling(
        last_hidden_state=state.hidden, pooler_output=pooled_rows(state)
    )


def run_text(
    text_model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    pooled: Tensor,
    protected: Tensor,
    visible: Tensor | None = None,
) -> TokenState:
    """Runs a text model whose parts are named as CLIP's, from ids to the last norm.

    Args:
        text_model: The stock module.
        input_ids: Token ids, ``(B, N)``.
        attention_mask: 1 for real tokens, ``(B, N)``; ``None`` means all.
        position_ids: See the stock code.
        pooled: The token that stands for its text, ``(B, N)`` bool.
        protected: Tokens that are never dropped, ``(B, N)`` bool.
        visible: Which keys a query sees besides padding, ``(1, 1, N, N)`` bool; ``None``: all.

    Returns:
        The tokens that are left.
    """
    hidden = text_model.embeddings(input_ids=input_ids, position_ids=position_ids)
    state = TokenState(hidden, pooled=pooled, protected=protected, bias=visible)
    if attention_mask is not None:
        real = attention_mask.bool()
        keys = real[:, None, None, :]
        state.bias = keys if visible is None else visible & keys
        state.valid = real | pooled  # the stock code pools it even from padding
    handle: PruningHandle = text_model.pruning
    state = run_blocks(handle, handle.structure.encoders["text"], state)
    state.hidden = text_model.final_layer_norm(state.hidden)
    return state


def _end_of_text(text_model: Any, input_ids: Tensor) -> Tensor:
    """Position of the token that is pooled, ``(B,)``, found as the stock code finds it."""
    if text_model.eos_token_id == 2:  # configs from before the id was mended: the largest id
        return input_ids.int().argmax(dim=-1)
    is_end: Tensor = input_ids == text_model.eos_token_id
    return is_end.int().argmax(dim=-1)
