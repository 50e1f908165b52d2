"""BLIP for NLVR2, which transformers has no class for, built on its stock modules.

Every text layer attends to both images, each with its own query, key, value and output
projections; the two outputs are averaged in the lower half of the layers and concatenated and
projected in the upper half (BLIP's ``nlvr_encoder``).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BlipConfig
from transformers.models.blip.modeling_blip import BlipPreTrainedModel, BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel, BlipTextSelfAttention
from transformers.utils import ModelOutput


class TwinCrossAttention(nn.Module):
    """Cross-attention to two images.

    Args:
        config: The text config.
        layer: Layer index.
        merge: Concatenate and project instead of averaging.
    """

    def __init__(self, config: Any, layer: int, *, merge: bool) -> None:
        super().__init__()
        width = config.hidden_size
        self.self0 = BlipTextSelfAttention(config, is_cross_attention=True, layer_idx=layer)
        self.self1 = BlipTextSelfAttention(config, is_cross_attention=True, layer_idx=layer)
        self.dense0 = nn.Linear(width, width)
        self.dense1 = nn.Linear(width, width)
        self.merge_layer = nn.Linear(2 * width, width) if merge else None
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def combine(self, outputs: list[Tensor]) -> Tensor:
        """Joins what the two images gave, each ``(B, N, D)``."""
        if self.merge_layer is None:
            return (outputs[0] + outputs[1]) / 2
        joined: Tensor = self.merge_layer(torch.cat(outputs, dim=-1))
        return joined

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: tuple[Tensor, Tensor] | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attends to both images; called by the stock text layer."""
        assert encoder_hidden_states is not None
        outputs = []
        for attention, dense, image in zip(
            (self.self0, self.self1),
            (self.dense0, self.dense1),
            encoder_hidden_states,
            strict=True,
        ):
            mixed, _ = attention(hidden_states, encoder_hidden_states=image)
            outputs.append(dense(mixed))
        output = self.dropout(self.combine(outputs))
        return self.LayerNorm(output + hidden_states), None


@dataclass
class NLVROutput(ModelOutput):
    """Output of ``BlipForNLVR``.

    Attributes:
        loss: Mean cross-entropy, if labels were given.
        logits: False and true, ``(B, 2)``.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None


class BlipForNLVR(BlipPreTrainedModel):
    """Decides whether a statement about two images is true.

    Args:
        config: A stock ``BlipConfig``.
    """

    config_class = BlipConfig

    def __init__(self, config: BlipConfig) -> None:
        super().__init__(config)
        text: Any = config.text_config
        vision: Any = config.vision_config
        self.vision_model = BlipVisionModel(vision)
        self.text_encoder = BlipTextModel(text, add_pooling_layer=False)
        for i, layer in enumerate(self.text_encoder.encoder.layer):
            layer.crossattention = TwinCrossAttention(
                text, i, merge=i >= text.num_hidden_layers // 2
            )
        self.cls_head = nn.Sequential(
            nn.Linear(text.hidden_size, text.hidden_size),
            nn.ReLU(),
            nn.Linear(text.hidden_size, 2),
        )
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        """Returns the word embeddings."""
        embeddings: nn.Module = self.text_encoder.get_input_embeddings()
        return embeddings

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> NLVROutput:
        """Scores statements.

        Args:
            pixel_values: Left and right image, ``(B, 2, 3, H, W)``.
            input_ids: Statement tokens, ``(B, N)``.
            attention_mask: 1 for real tokens, ``(B, N)``.
            labels: 0 for false, 1 for true, ``(B,)``.
        """
        rows = self.vision_model(pixel_values=pixel_values.flatten(0, 1)).last_hidden_state
        images = rows.unflatten(0, (-1, 2))
        hidden = self.text_encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=(images[:, 0], images[:, 1]),
        ).last_hidden_state
        logits = self.cls_head(hidden[:, 0])
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return NLVROutput(loss=loss, logits=logits)
