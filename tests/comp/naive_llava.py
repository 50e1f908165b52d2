"""LLaVA's language model once more, one sample at a time and at full length, by the equations.

Nothing is gathered: a dropped token stays where it is and is merely attended to no more. Slow,
but independent of ``comp.blocks`` and of the stock attention, norms and rotary embedding; only
the names of the unit groups are shared.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from comp.models.llava import token_boundaries
from comp.modes import Stream


def norm(module: Any, rows: Tensor) -> Tensor:
    scale = (rows.square().mean(dim=-1, keepdim=True) + module.variance_epsilon).rsqrt()
    scaled: Tensor = module.weight * rows * scale
    return scaled


def rotate(rows: Tensor, base: float) -> Tensor:
    """Turns row n of ``(N, d)`` by its position n."""
    half = rows.shape[1] // 2
    turned = rows.clone()
    for pair in range(half):
        angle = torch.arange(len(rows)).double() * base ** (-pair / half)
        one, two = rows[:, pair], rows[:, pair + half]
        turned[:, pair] = one * angle.cos() - two * angle.sin()
        turned[:, pair + half] = two * angle.cos() + one * angle.sin()
    return turned


@dataclass
class NaiveLlava:
    """A LLaVA in double precision under masks and thresholds.

    Attributes:
        model: A dense model that is not attached.
        masks: Soft masks by group name.
        thresholds: Share of tokens that every boundary drops, by stream.
        cit: Whether Eq. 7 acts.
        site: ``qkv`` or ``context``.
        sums: Weighted squared activations, by group.
        alive: Which tokens were left in the end, per sample, ``(N,)``.
    """

    model: Any
    masks: dict[str, Tensor] = field(default_factory=dict)
    thresholds: dict[Stream, float] = field(default_factory=dict)
    cit: bool = True
    site: str = "qkv"
    sums: dict[str, Tensor] = field(default_factory=dict)
    alive: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = copy.deepcopy(self.model).double()

    def logits(
        self, ids: Tensor, pixels: Tensor, voter: int, kinds: dict[Stream, Tensor]
    ) -> Tensor:
        """Reads one sample.

        Args:
            ids: ``(N,)``.
            pixels: Its image, ``(3, H, W)``.
            voter: The token that ranks the others.
            kinds: Columns that each stream may drop.

        Returns:
            ``(N, V)``, zero where a token was dropped.
        """
        inner = self.model.model
        hidden = inner.language_model.embed_tokens(ids)
        image = inner.get_image_features(pixels[None].double()).pooler_output[0]
        hidden[ids == self.model.config.image_token_id] = image
        alive = torch.ones(len(ids), dtype=torch.bool)
        boundaries = token_boundaries(self.model.config, len(inner.language_model.layers))
        held: tuple[str, Tensor] | None = None
        for index, layer in enumerate(inner.language_model.layers):
            path = f"model.language_model.layers.{index}"
            context, strongest = self._attend(layer.self_attn, path, hidden, layer, alive, voter)
            scores = self._scores(strongest, alive, kinds)
            self._add(f"{path}.self_attn", context, scores)
            if held is not None:
                self._add(*held, scores)
            hidden = hidden + layer.self_attn.o_proj(context)
            rows = norm(layer.post_attention_layernorm, hidden)
            gate = nn.functional.silu(layer.mlp.gate_proj(rows)) * layer.mlp.up_proj(rows)
            gate = gate * self._mask(f"{path}.mlp", gate.shape[1])
            hidden = hidden + layer.mlp.down_proj(gate)
            held = (f"{path}.mlp", gate)
            if index + 1 in boundaries:
                alive = self._drop(alive, scores, kinds, boundaries.index(index + 1) + 1)
        assert held is not None
        self._add(*held, scores)
        self.alive.append(alive)
        left: Tensor = self.model.lm_head(norm(inner.language_model.norm, hidden))
        return left * alive[:, None]

    def _mask(self, name: str, units: int) -> Tensor:
        return self.masks.get(name, torch.ones(units)).double()

    def _attend(
        self, attention: Any, path: str, hidden: Tensor, layer: Any, alive: Tensor, voter: int
    ) -> tuple[Tensor, Tensor]:
        rows = norm(layer.input_layernorm, hidden)
        width, group = attention.head_dim, attention.num_key_value_groups
        queries, keys, values = (
            part(rows).split(width, dim=1)
            for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        base = self.model.config.text_config.rope_parameters["rope_theta"]
        mask = self._mask(f"{path}.self_attn", len(keys))
        visible = torch.ones(len(rows), len(rows), dtype=torch.bool).tril() & alive
        contexts, strongest = [], torch.zeros(len(rows)).double()
        for head, query in enumerate(queries):
            own = mask[head // group]
            before = own if self.site == "qkv" else torch.ones(()).double()
            key, value = keys[head // group] * before, values[head // group] * before
            logits = rotate(query * before, base) @ rotate(key, base).T * width**-0.5
            probabilities = logits.masked_fill(~visible, -torch.inf).softmax(dim=1).nan_to_num()
            contexts.append(probabilities @ value * (1 if self.site == "qkv" else own))
            corrected = own * probabilities[voter] if self.cit else probabilities[voter]
            strongest = torch.maximum(strongest, corrected)
        return torch.cat(contexts, dim=1), strongest

    @staticmethod
    def _scores(strongest: Tensor, alive: Tensor, kinds: dict[Stream, Tensor]) -> Tensor:
        scored = alive & torch.stack(list(kinds.values())).any(dim=0)
        return strongest * scored / (strongest * scored).sum()

    def _drop(
        self, alive: Tensor, scores: Tensor, kinds: dict[Stream, Tensor], boundary: int
    ) -> Tensor:
        alive = alive.clone()
        for stream, least in ((Stream.VISION, 4), (Stream.TEXT, 2)):
            share = (1 - self.thresholds.get(stream, 0.0)) ** boundary
            count = max(int(int(kinds[stream].sum()) * share + 0.5), least)
            columns = sorted(kinds[stream].nonzero().flatten().tolist(), key=lambda i: -scores[i])
            for column in [c for c in columns if alive[c]][count:]:
                alive[column] = False
        return alive

    def _add(self, name: str, activation: Tensor, scores: Tensor) -> None:
        batch = (scores[:, None] * activation.square()).sum(dim=0)
        self.sums[name] = self.sums.get(name, torch.zeros_like(batch)) + batch
