"""LLaVA with a Llama backbone: image tokens and prompt tokens in one causal sequence.

Only the language model is pruned: its attention (a unit is a key/value head with all its query
heads) and its gated feed-forward channels. The vision tower and the projector stay as they are.

Tokens drop behind layers, by default behind 1/4, 2/4 and 3/4 of them (``config.token_boundaries``
overrides this): behind boundary s, ``(1 - theta)^s`` of the original image tokens go on, and as
much of the prunable prompt with its own theta. Dropped tokens are discarded, kept ones keep their
position ids.

Tokens are ranked by the attention of the last instruction token in the layer below the boundary
(Eq. 6 with that one query, Eq. 7's head masks included), not in the layer above it as in
PyramidDrop. Queries and keys of the layer below are at hand, so that ranking costs one row of
logits instead of projecting all tokens once more, and the scores are the ones that CIP uses for
that layer (Eq. 5). In a conversation with several labelled answers every answer's instruction
votes.

Never dropped: everything before the first image, the first token, instruction tokens that vote,
and every token that carries a label or is generated. Tokens drop only while a prompt is read into
an empty cache. Later tokens attend to what each layer's cache holds, and their position ids go on
from the original count; so the stock ``generate`` gives what a pass over the whole sequence would
give if only its prompt was pruned.

Source: CoMP (arXiv 2604.02956); the pyramid is PyramidDrop's (arXiv 2410.17247).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaModel, LlavaForConditionalGeneration, LlavaModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast

from comp import cost
from comp.blocks import run_blocks
from comp.errors import UnsupportedModelError
from comp.handle import PruningHandle, Structure, stock_forward, swap_forward
from comp.mixture import Mixture, causal_mask
from comp.modes import PruningMode, Stream
from comp.sites import AttentionSite, Block, FeedForwardSite, LinearRef, SubLayer
from comp.token_state import TokenState

STREAMS = frozenset({Stream.VISION, Stream.TEXT})
_IGNORED = -100  # a label that the loss leaves out


class LlavaAdapter:
    """The LLaVA family."""

    name = "llava"
    classes: dict[str, type[nn.Module]] = {  # noqa: RUF012 (a Protocol attribute)
        "LlavaForConditionalGeneration": LlavaForConditionalGeneration,
    }
    tasks: dict[str, str] = {  # noqa: RUF012
        "LlavaForConditionalGeneration": "instruct",
    }

    def structure(self, model: Any) -> Structure:
        """Returns the blocks of the language model.

        Raises:
            UnsupportedModelError: If the backbone is not a Llama.
            ValueError: If ``config.token_boundaries`` does not fit the layers.
        """
        backbone = model.model.language_model
        if not isinstance(backbone, LlamaModel):
            raise UnsupportedModelError(
                f"LLaVA over a {type(backbone).__name__} has no adapter; the backbone known is "
                "LlamaModel"
            )
        boundaries = token_boundaries(model.config, len(backbone.layers))
        blocks = [_block(layer, i, boundaries) for i, layer in enumerate(backbone.layers)]
        return Structure(self.name, {"language": blocks}, merges=frozenset())

    def swap_forwards(self, handle: PruningHandle) -> None:
        """Swaps the forwards of the model and its backbone, and what ``generate`` needs."""
        model: Any = handle.model
        swap_forward(handle, model, _forward)
        swap_forward(handle, model, _generate, name="generate")
        swap_forward(handle, model.model, _image_features, name="get_image_features")
        swap_forward(handle, model.model.language_model, _language_forward)


def token_boundaries(config: Any, num_layers: int) -> list[int]:
    """Numbers of layers behind which tokens drop.

    Args:
        config: The model's config; its ``token_boundaries``, if set, is used.
        num_layers: Layers of the language model.

    Raises:
        ValueError: If the config's boundaries do not ascend within 1..num_layers - 1.
    """
    own: Sequence[int] | None = getattr(config, "token_boundaries", None)
    if own is None:
        quarters = {num_layers * quarter // 4 for quarter in (1, 2, 3)}
        return sorted(quarters - {0})
    boundaries = list(own)
    inside = all(0 < boundary < num_layers for boundary in boundaries)
    if not inside or boundaries != sorted(set(boundaries)):
        raise ValueError(
            f"token_boundaries must ascend within 1..{num_layers - 1}, but got {boundaries}; "
            "delete it from the config for the default"
        )
    return boundaries


def _block(layer: Any, index: int, boundaries: list[int]) -> Block:
    path = f"model.language_model.layers.{index}"
    attention, mlp = layer.self_attn, layer.mlp
    return Block(
        encoder="language",
        stream=Stream.TEXT,
        layer=index,
        attention=AttentionSite(
            name=f"{path}.self_attn",
            mode=PruningMode.LANGUAGE_PARAMS,
            layer=index,
            inputs=tuple(LinearRef(attention, part) for part in ("q_proj", "k_proj", "v_proj")),
            out=LinearRef(attention, "o_proj"),
            head_dim=attention.head_dim,
            scale=attention.scaling,
            queries_per_unit=attention.num_key_value_groups,
            dropout=attention.attention_dropout,
            token_streams=STREAMS,
            rotate=apply_rotary_pos_emb,
        ),
        attention_wrap=SubLayer(before=layer.input_layernorm),
        feed_forward=FeedForwardSite(
            name=f"{path}.mlp",
            mode=PruningMode.LANGUAGE_PARAMS,
            layer=index,
            inputs=(LinearRef(mlp, "gate_proj"), LinearRef(mlp, "up_proj")),
            out=LinearRef(mlp, "down_proj"),
            activation=mlp.act_fn,
            token_streams=STREAMS,
        ),
        feed_forward_wrap=SubLayer(before=layer.post_attention_layernorm),
        boundary=boundaries.index(index + 1) + 1 if index + 1 in boundaries else 0,
        mixed=STREAMS,
    )


@dataclass(frozen=True)
class _Roles:
    """What the tokens of a prompt are: image or text, voting, droppable; each ``(B, N)`` bool."""

    image: Tensor
    voters: Tensor
    droppable: Tensor

    def mixture(self) -> Mixture:
        droppable = {
            Stream.VISION: self.droppable & self.image,
            Stream.TEXT: self.droppable & ~self.image,
        }
        original = {stream: rows.sum(dim=1) for stream, rows in droppable.items()}
        columns = torch.arange(self.image.shape[1], device=self.image.device)
        return Mixture(droppable, original, self.voters, columns.expand_as(self.image))


def _roles(image: Tensor, valid: Tensor, answers: Tensor) -> _Roles:
    """Finds who votes and who may be dropped.

    Args:
        image: Image tokens, ``(B, N)`` bool.
        valid: Real tokens, ``(B, N)`` bool.
        answers: Tokens that carry a label or were generated, ``(B, N)`` bool.
    """
    count = image.shape[1]
    columns = torch.arange(count, device=image.device).expand_as(image)
    answers = answers & valid
    own = torch.where(valid, columns, count)
    following = F.pad(own, (0, 1), value=count).flip(1).cummin(dim=1).values.flip(1)[:, 1:]
    before_answer = valid & ~answers & F.pad(answers, (0, 1)).gather(1, following)
    last = valid & (following == count)
    voters = torch.where(answers.any(dim=1, keepdim=True), before_answer, last)
    first_image = torch.where(image & valid, columns, count).amin(dim=1, keepdim=True)
    system = (columns < first_image) & (first_image < count)
    first = columns == own.amin(dim=1, keepdim=True)
    return _Roles(image, voters, valid & ~(voters | answers | system | first))


def _forward(
    self: Any,
    input_ids: Tensor | None = None,
    pixel_values: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    labels: Tensor | None = None,
    logits_to_keep: int | Tensor = 0,
    prompt_length: int | None = None,
    **kwargs: Any,
) -> LlavaCausalLMOutputWithPast:
    """The stock forward, which tells the backbone what the tokens are.

    Logits at dropped tokens are those of a zero row. Tokens from column ``prompt_length`` on, if
    given, were generated.
    """
    handle: PruningHandle = self.pruning
    if not handle.idle:
        valid = _valid_tokens(input_ids, inputs_embeds, attention_mask)
        if handle.meter is not None and not handle.meter.paused:
            handle.meter.add_fixed(_head_macs(self.lm_head, valid, logits_to_keep))
        if _cached_tokens(past_key_values) == 0:
            image = _image_tokens(self, input_ids, inputs_embeds)
            answers = _answers(valid, labels, prompt_length)
            kwargs["roles"] = _roles(image, valid, answers)
    output: LlavaCausalLMOutputWithPast = stock_forward(
        self,
        input_ids=input_ids,
        pixel_values=pixel_values,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        inputs_embeds=inputs_embeds,
        labels=labels,
        logits_to_keep=logits_to_keep,
        **kwargs,
    )
    return output


def _valid_tokens(
    input_ids: Tensor | None, inputs_embeds: Tensor | None, attention_mask: Tensor | None
) -> Tensor:
    """Real tokens among those given now, ``(B, N)``."""
    given = input_ids if input_ids is not None else inputs_embeds
    if given is None:
        raise ValueError("pass input_ids or inputs_embeds, but got neither")
    if attention_mask is None:
        return torch.ones(given.shape[:2], dtype=torch.bool, device=given.device)
    if attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask must be (batch, tokens), but got {tuple(attention_mask.shape)}; a "
            "static cache, which asks for another one, does not fit layers of different lengths"
        )
    return attention_mask[:, -given.shape[1] :].bool()


def _image_tokens(model: Any, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """Where images stand, found as the stock code finds it, ``(B, N)``."""
    token = model.config.image_token_id
    if input_ids is not None:
        return torch.eq(input_ids, token)
    assert inputs_embeds is not None
    embedding = model.get_input_embeddings()(torch.tensor(token, device=inputs_embeds.device))
    return torch.eq(inputs_embeds, embedding).all(dim=-1)


def _answers(valid: Tensor, labels: Tensor | None, prompt_length: int | None) -> Tensor:
    """Tokens that carry a label or were generated, ``(B, N)``."""
    answers = torch.zeros_like(valid) if labels is None else labels != _IGNORED
    if prompt_length is None:
        return answers
    count = valid.shape[1]
    if count < prompt_length:
        raise ValueError(
            f"the prompt of {prompt_length} tokens comes in a chunk of {count}, which cannot be "
            "ranked without its last token; set prefill_chunk_size=None"
        )
    return answers | (torch.arange(count, device=valid.device) >= prompt_length)


def _generate(self: Any, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
    """The stock ``generate``; without a cache, too, only the prompt's tokens are dropped."""
    prompts = (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), inputs)
    prompt = next((prompt for prompt in prompts if prompt is not None), None)
    if prompt is not None:
        kwargs.setdefault("prompt_length", prompt.shape[1])
    return type(self).generate(self, inputs, *args, **kwargs)


@functools.wraps(LlavaModel.get_image_features)  # ``generate`` reads the signature
def _image_features(self: Any, *args: Any, **kwargs: Any) -> Any:
    meter = self.pruning.meter
    output = type(self).get_image_features(self, *args, **kwargs)
    if meter is not None and not meter.paused:
        pixels = args[0] if args else kwargs["pixel_values"]
        meter.add_fixed(_image_macs(self, pixels, output))
    return output


def _language_forward(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    roles: _Roles | None = None,
    **kwargs: Any,
) -> BaseModelOutputWithPast:
    """The backbone; builds its own masks, as every layer's cache has a length of its own.

    Rows of dropped tokens come back as zeros.
    """
    handle: PruningHandle = self.pruning
    if handle.idle:
        stock: BaseModelOutputWithPast = stock_forward(
            self,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        return stock
    hidden: Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
    batch, count = hidden.shape[:2]
    valid = None
    if attention_mask is not None:
        valid = _valid_tokens(None, hidden, attention_mask)
    past = _cached_tokens(past_key_values)
    if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
        past_key_values = DynamicCache(config=self.config)
    if position_ids is None:
        position_ids = torch.arange(past, past + count, device=hidden.device).unsqueeze(0)
    cosines, sines = self.rotary_emb(hidden, position_ids=position_ids)
    real = 1.0 if valid is None else valid.unsqueeze(-1).to(hidden.dtype)
    shape = (batch, count, cosines.shape[-1])
    state = TokenState(
        hidden,
        valid=valid,
        bias=causal_mask(count, valid, hidden.device),
        cache=past_key_values,
        rotary=((cosines * real).expand(shape), (sines * real).expand(shape)),
        mixture=None if roles is None else roles.mixture(),
    )
    state = run_blocks(handle, handle.structure.encoders["language"], state)
    rows = self.norm(state.hidden)
    if state.mixture is not None:
        rows = state.mixture.restore(rows, count)
    return BaseModelOutputWithPast(last_hidden_state=rows, past_key_values=past_key_values)


def _cached_tokens(cache: Any) -> int:
    """Tokens read so far, dropped ones included: the first layer's cache holds all of them.

    Raises:
        ValueError: If the cache cannot hold another number of tokens in every layer.
    """
    if cache is None:
        return 0
    if cache.is_compileable:
        raise ValueError(
            f"a {type(cache).__name__} holds equally many tokens in every layer, but a pruned "
            "model's layers keep different numbers; use the default cache_implementation"
        )
    return int(cache.get_seq_length())


def _head_macs(head: nn.Linear, valid: Tensor, logits_to_keep: int | Tensor) -> int:
    """Multiply-adds of the language-model head on the real tokens whose logits are asked for."""
    if isinstance(logits_to_keep, int):
        asked = valid[:, -logits_to_keep:] if logits_to_keep else valid
    else:
        asked = valid[:, logits_to_keep]
    return int(asked.sum()) * head.in_features * head.out_features


def _image_macs(model: Any, pixels: Tensor, output: Any) -> int:
    """Multiply-adds of the vision tower and the projector; all layers of the tower run.

    A tower's pooling head, which LLaVA does not read, is not counted.
    """
    tower, projector = model.vision_tower, model.multi_modal_projector
    config = tower.config
    images, tokens = output.last_hidden_state.shape[:2]
    patches = (pixels.shape[-2] // config.patch_size) * (pixels.shape[-1] // config.patch_size)
    macs = cost.patch_macs(patches, config.patch_size, config.hidden_size, pixels.shape[1])
    for name, module in tower.named_modules():
        if isinstance(module, nn.Linear) and "head" not in name.split("."):
            macs += tokens * module.in_features * module.out_features
    macs += config.num_hidden_layers * 2 * tokens**2 * config.hidden_size
    features = sum(image.shape[0] for image in output.pooler_output)
    linears = (projector.linear_1, projector.linear_2)
    per_feature = sum(linear.in_features * linear.out_features for linear in linears)
    return int(images * macs + features * per_feature)
