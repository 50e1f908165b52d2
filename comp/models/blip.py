"""BLIP: retrieval, captioning, VQA on the stock classes, and NLVR2 on ``BlipForNLVR``."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
)
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
)

from comp import cost
from comp.blocks import run_blocks
from comp.errors import UnsupportedModelError
from comp.handle import PruningHandle, Structure, stock_forward, swap_forward
from comp.models.base import counted_linear
from comp.models.blip_nlvr import BlipForNLVR, TwinCrossAttention
from comp.modes import PruningMode, Stream
from comp.sites import AttentionSite, Block, CrossAttention, FeedForwardSite, LinearRef, SubLayer
from comp.token_state import TokenState, real_rows

VISION = frozenset({Stream.VISION})
TEXT = frozenset({Stream.TEXT})


class BlipAdapter:
    """The BLIP family."""

    name = "blip"
    classes: dict[str, type[nn.Module]] = {  # noqa: RUF012 (a Protocol attribute)
        "BlipForNLVR": BlipForNLVR,
        "BlipForQuestionAnswering": BlipForQuestionAnswering,
        "BlipForImageTextRetrieval": BlipForImageTextRetrieval,
        "BlipForConditionalGeneration": BlipForConditionalGeneration,
    }
    tasks: dict[str, str] = {  # noqa: RUF012
        "BlipForNLVR": "nlvr2",
        "BlipForQuestionAnswering": "vqa",
        "BlipForImageTextRetrieval": "retrieval",
        "BlipForConditionalGeneration": "captioning",
    }

    def structure(self, model: Any) -> Structure:
        """Returns the blocks of a BLIP model."""
        encoders = {"vision": _vision_blocks(model)}
        if isinstance(model, BlipForConditionalGeneration):
            encoders["decoder"] = _text_blocks(
                model.text_decoder.bert.encoder, "decoder", "text_decoder.bert.encoder", VISION
            )
            return Structure(self.name, encoders)
        encoders["text"] = _text_blocks(
            model.text_encoder.encoder, "text", "text_encoder.encoder", VISION
        )
        if isinstance(model, BlipForQuestionAnswering):
            encoders["decoder"] = _text_blocks(
                model.text_decoder.bert.encoder, "decoder", "text_decoder.bert.encoder", TEXT
            )
        return Structure(self.name, encoders)

    def swap_forwards(self, handle: PruningHandle) -> None:
        """Swaps the forwards of the encoders, of the norm behind the image, and of the heads."""
        model: Any = handle.model
        swap_forward(handle, model.vision_model.encoder, _vision_forward)
        swap_forward(handle, model.vision_model.post_layernorm, _norm_forward)
        if "text" in handle.structure.encoders:
            swap_forward(handle, model.text_encoder.encoder, _text_forward)
        if "decoder" in handle.structure.encoders:
            swap_forward(handle, model.text_decoder.bert.encoder, _decoder_forward)
        for head in _heads(model):
            swap_forward(handle, head, counted_linear)


def _heads(model: Any) -> list[nn.Module]:
    """Linears behind the encoders that see one row a sample; no mode prunes them."""
    if isinstance(model, BlipForNLVR):
        return [model.cls_head[0], model.cls_head[2]]
    if isinstance(model, BlipForImageTextRetrieval):
        return [model.vision_proj, model.text_proj, model.itm_head]
    return []


def _vision_blocks(model: Any) -> list[Block]:
    blocks = []
    for i, layer in enumerate(model.vision_model.encoder.layers):
        path = f"vision_model.encoder.layers.{i}"
        attention = layer.self_attn
        blocks.append(
            Block(
                encoder="vision",
                stream=Stream.VISION,
                layer=i,
                attention=AttentionSite(
                    name=f"{path}.self_attn",
                    mode=PruningMode.VISION_PARAMS,
                    layer=i,
                    inputs=(LinearRef(attention, "qkv"),),
                    out=LinearRef(attention, "projection"),
                    head_dim=attention.head_dim,
                    scale=attention.scale,
                    dropout=attention.dropout.p,
                    token_streams=VISION,
                ),
                attention_wrap=SubLayer(before=layer.layer_norm1),
                feed_forward=FeedForwardSite(
                    name=f"{path}.mlp",
                    mode=PruningMode.VISION_PARAMS,
                    layer=i,
                    inputs=(LinearRef(layer.mlp, "fc1"),),
                    out=LinearRef(layer.mlp, "fc2"),
                    activation=layer.mlp.activation_fn,
                    token_streams=VISION,
                ),
                feed_forward_wrap=SubLayer(before=layer.layer_norm2),
            )
        )
    return blocks


def _text_blocks(
    encoder: Any, name: str, path: str, context_streams: frozenset[Stream]
) -> list[Block]:
    """Blocks of a text encoder, or of a decoder, which drops no tokens.

    Raises:
        UnsupportedModelError: If the layers have no cross-attention.
    """
    if not hasattr(encoder.layer[0], "crossattention"):
        raise UnsupportedModelError(
            f"the {name} layers of this BLIP have no cross-attention, because is_decoder is False "
            "in the text config; set it to True"
        )
    drops = name == "text"
    own = TEXT if drops else frozenset()
    return [
        Block(
            encoder=name,
            stream=Stream.TEXT,
            layer=i,
            attention=_text_attention(
                layer.attention.self,
                LinearRef(layer.attention.output, "dense"),
                f"{path}.layer.{i}.attention",
                PruningMode.LANGUAGE_PARAMS,
                i,
                own,
            ),
            attention_wrap=SubLayer(
                after=layer.attention.output.LayerNorm, dropout=layer.attention.output.dropout
            ),
            feed_forward=FeedForwardSite(
                name=f"{path}.layer.{i}.mlp",
                mode=PruningMode.LANGUAGE_PARAMS,
                layer=i,
                inputs=(LinearRef(layer.intermediate, "dense"),),
                out=LinearRef(layer.output, "dense"),
                activation=layer.intermediate.intermediate_act_fn,
                token_streams=own,
            ),
            feed_forward_wrap=SubLayer(after=layer.output.LayerNorm, dropout=layer.output.dropout),
            cross=_cross_attention(
                layer.crossattention, f"{path}.layer.{i}.crossattention", i, own | context_streams
            ),
            drops_tokens=drops,
        )
        for i, layer in enumerate(encoder.layer)
    ]


def _text_attention(
    attention: Any,
    out: LinearRef,
    name: str,
    mode: PruningMode,
    layer: int,
    streams: frozenset[Stream],
) -> AttentionSite:
    return AttentionSite(
        name=name,
        mode=mode,
        layer=layer,
        inputs=tuple(LinearRef(attention, part) for part in ("query", "key", "value")),
        out=out,
        head_dim=attention.attention_head_size,
        scale=attention.attention_head_size**-0.5,
        dropout=attention.dropout.p,
        token_streams=streams,
    )


def _cross_attention(
    module: Any, path: str, layer: int, streams: frozenset[Stream]
) -> CrossAttention:
    mode = PruningMode.CROSS_PARAMS
    if not isinstance(module, TwinCrossAttention):
        out = LinearRef(module.output, "dense")
        return CrossAttention(
            sites=(_text_attention(module.self, out, path, mode, layer, streams),),
            wrap=SubLayer(after=module.output.LayerNorm, dropout=module.output.dropout),
        )
    sites = (
        _text_attention(
            module.self0, LinearRef(module, "dense0"), f"{path}.0", mode, layer, streams
        ),
        _text_attention(
            module.self1, LinearRef(module, "dense1"), f"{path}.1", mode, layer, streams
        ),
    )
    merge = module.merge_layer
    return CrossAttention(
        sites=sites,
        wrap=SubLayer(after=module.LayerNorm, dropout=module.dropout),
        combine=module.combine,
        combine_macs=0 if merge is None else merge.in_features * merge.out_features,
    )


def _first_token(hidden: Tensor) -> Tensor:
    first = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    first[:, 0] = True
    return first


def _vision_forward(self: Any, inputs_embeds: Tensor, **kwargs: Any) -> BaseModelOutput:
    handle: PruningHandle = self.pruning
    if handle.idle:
        output: BaseModelOutput = stock_forward(self, inputs_embeds, **kwargs)
        return output
    first = _first_token(inputs_embeds)
    if handle.meter is not None and not handle.meter.paused:
        handle.meter.add_fixed(inputs_embeds.shape[0] * _image_macs(handle.model, inputs_embeds))
    state = TokenState(inputs_embeds, pooled=first, protected=first)
    state = run_blocks(handle, handle.structure.encoders["vision"], state)
    return BaseModelOutput(last_hidden_state=state.hidden)


def _norm_forward(self: Any, rows: Tensor) -> Tensor:
    """LayerNorm that leaves padded (zero) rows at zero."""
    output: Tensor = stock_forward(self, rows)
    if self.pruning.thresholds.get(Stream.VISION, 0.0) <= 0:
        return output
    return output * real_rows(rows).unsqueeze(-1).to(output.dtype)


def _text_forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Any = None,
    encoder_attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> BaseModelOutputWithPastAndCrossAttentions:
    """Bidirectional text encoder; drops tokens and masks padded image rows."""
    handle: PruningHandle = self.pruning
    if handle.idle:
        stock: BaseModelOutputWithPastAndCrossAttentions = stock_forward(
            self,
            hidden_states,
            attention_mask=attention_mask,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            **kwargs,
        )
        return stock
    contexts = _as_contexts(encoder_hidden_states)
    first = _first_token(hidden_states)
    state = TokenState(
        hidden_states,
        valid=None if attention_mask is None else _visible(attention_mask)[:, 0, 0],
        pooled=first,
        protected=first,
    )
    state = run_blocks(handle, handle.structure.encoders["text"], state, contexts)
    return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=state.hidden)


def _decoder_forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = None,
    **kwargs: Any,
) -> BaseModelOutputWithPastAndCrossAttentions:
    """Causal decoder; drops no tokens but honours padded context rows and the cache."""
    handle: PruningHandle = self.pruning
    if handle.idle:
        stock: BaseModelOutputWithPastAndCrossAttentions = stock_forward(
            self,
            hidden_states,
            attention_mask=attention_mask,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        return stock
    if use_cache and not isinstance(past_key_values, EncoderDecoderCache):
        own = past_key_values if past_key_values is not None else DynamicCache()
        past_key_values = EncoderDecoderCache(own, DynamicCache())
    valid = None
    if attention_mask is not None:
        valid = _visible(attention_mask)[:, 0, -1, -hidden_states.shape[1] :]
        valid = valid.expand(hidden_states.shape[0], -1)
    if handle.meter is not None and not handle.meter.paused:
        tokens = int(cost.token_counts(valid, hidden_states).sum())
        handle.meter.add_fixed(tokens * _word_macs(handle.model))
    state = TokenState(hidden_states, valid=valid, bias=attention_mask, cache=past_key_values)
    blocks = handle.structure.encoders["decoder"]
    state = run_blocks(handle, blocks, state, _as_contexts(encoder_hidden_states))
    return BaseModelOutputWithPastAndCrossAttentions(
        last_hidden_state=state.hidden, past_key_values=past_key_values
    )


def _as_contexts(encoder_hidden_states: Any) -> tuple[Tensor, ...]:
    if encoder_hidden_states is None:
        return ()
    if isinstance(encoder_hidden_states, Tensor):
        return (encoder_hidden_states,)
    return tuple(encoder_hidden_states)


def _visible(mask: Tensor) -> Tensor:
    """Turns an additive or bool attention mask into a bool one."""
    return mask if mask.dtype == torch.bool else mask == 0


def _image_macs(model: Any, embeddings: Tensor) -> int:
    """Multiply-adds of one image's patches."""
    vision = model.config.vision_config
    return cost.patch_macs(embeddings.shape[1] - 1, vision.patch_size, vision.hidden_size)


def _word_macs(model: Any) -> int:
    """Multiply-adds of one decoded token outside the blocks: the language-model head."""
    head = model.text_decoder.cls.predictions
    dense = head.transform.dense
    return int(
        dense.in_features * dense.out_features
        + head.decoder.in_features * head.decoder.out_features
    )
