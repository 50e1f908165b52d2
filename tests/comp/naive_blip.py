"""BLIP once more, one sample at a time and at full length, straight from the paper's equations.

Nothing is gathered: a dropped token stays where it is and is merely attended to no more. Slow,
but independent of ``comp.blocks``: the modules are found by their stock names, scores are summed
by loops, and the only thing shared is the names of the unit groups.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from comp.models.blip_nlvr import TwinCrossAttention
from comp.modes import Stream


@dataclass
class Rows:
    """The tokens of one sample, dropped ones included.

    Attributes:
        hidden: ``(N, D)``.
        alive: Which rows are left, ``(N,)``.
    """

    hidden: Tensor
    alive: Tensor

    @property
    def left(self) -> Tensor:
        return self.hidden[self.alive]


@dataclass
class NaiveBlip:
    """A BLIP model in double precision under masks and thresholds.

    Attributes:
        model: A dense model; its double-precision copy is used.
        masks: Soft masks by group name.
        thresholds: Relative thresholds by stream.
        min_tokens: Unprotected tokens left at least, by stream.
        merge: Whether dropped tokens are merged into one.
        cit: Whether Eq. 7 acts.
        cip: Whether Eq. 4 acts.
        site: ``qkv`` or ``context``.
        counts: Tokens that left each layer, one entry per pass, by ``encoder.layer``.
        sums: Weighted squared activations, by group.
    """

    model: Any
    masks: dict[str, Tensor] = field(default_factory=dict)
    thresholds: dict[Stream, float] = field(default_factory=dict)
    min_tokens: dict[Stream, int] = field(
        default_factory=lambda: {Stream.VISION: 4, Stream.TEXT: 2}
    )
    merge: bool = True
    cit: bool = True
    cip: bool = True
    site: str = "qkv"
    counts: dict[str, list[int]] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model = copy.deepcopy(self.model).double().eval()

    # --- encoders --------------------------------------------------------------------------

    def vision(self, pixels: Tensor) -> Rows:
        """Encodes one image, ``(3, H, W)``."""
        tower = self.model.vision_model
        hidden = tower.embeddings(pixels[None].double())[0]
        rows = Rows(hidden, torch.ones(len(hidden), dtype=torch.bool))
        held: tuple[str, Tensor] | None = None
        for i, layer in enumerate(tower.encoder.layers):
            path = f"vision_model.encoder.layers.{i}"
            entered = layer.layer_norm1(rows.hidden)
            queries, keys, values = layer.self_attn.qkv(entered).chunk(3, dim=-1)
            context, attention = self._attend(
                f"{path}.self_attn", queries, keys, values, rows.alive, layer.self_attn.num_heads
            )
            scores = self._token_scores(attention, f"{path}.self_attn", rows.alive)
            self._collect(f"{path}.self_attn", context, rows.alive, scores)
            if held is not None:
                self._collect(*held, rows.alive, scores)
            rows.hidden = rows.hidden + layer.self_attn.projection(context)
            rows, scores = self._drop(rows, scores, Stream.VISION, f"vision.{i}")
            inner = layer.mlp.fc1(layer.layer_norm2(rows.hidden))
            inner = layer.mlp.activation_fn(self._times(inner, f"{path}.mlp"))
            rows.hidden = rows.hidden + layer.mlp.fc2(inner)
            held = (f"{path}.mlp", inner)
        assert held is not None
        self._collect(*held, rows.alive, scores)
        return Rows(tower.post_layernorm(rows.hidden), rows.alive)

    def text(self, ids: Tensor, contexts: Sequence[Tensor] = ()) -> Rows:
        """Encodes one text, ``(N,)``, that attends to the rows of ``contexts``."""
        hidden = self.model.text_encoder.embeddings(input_ids=ids[None])[0]
        rows = Rows(hidden, torch.ones(len(hidden), dtype=torch.bool))
        held: tuple[str, Tensor] | None = None
        for i, layer in enumerate(self.model.text_encoder.encoder.layer):
            path = f"text_encoder.encoder.layer.{i}"
            context, attention = self._text_attention(
                layer.attention.self, f"{path}.attention", rows.hidden, rows.hidden, rows.alive
            )
            scores = self._token_scores(attention, f"{path}.attention", rows.alive)
            self._collect(f"{path}.attention", context, rows.alive, scores)
            if held is not None:
                self._collect(*held, rows.alive, scores)
            rows.hidden = layer.attention.output(context, rows.hidden)
            rows, scores = self._drop(rows, scores, Stream.TEXT, f"text.{i}")
            if contexts:
                self._cross(layer.crossattention, f"{path}.crossattention", rows, contexts, scores)
            held = (f"{path}.mlp", self._feed_forward(layer, f"{path}.mlp", rows))
        assert held is not None
        self._collect(*held, rows.alive, scores)
        return rows

    def decoder(self, ids: Tensor, context: Tensor) -> Tensor:
        """Decodes one text under the causal mask; returns the logits, ``(N, V)``."""
        stack = self.model.text_decoder.bert
        hidden = stack.embeddings(input_ids=ids[None])[0]
        rows = Rows(hidden, torch.ones(len(hidden), dtype=torch.bool))
        for i, layer in enumerate(stack.encoder.layer):
            path = f"text_decoder.bert.encoder.layer.{i}"
            mixed, _ = self._text_attention(
                layer.attention.self,
                f"{path}.attention",
                rows.hidden,
                rows.hidden,
                rows.alive,
                causal=True,
            )
            self._collect(f"{path}.attention", mixed, rows.alive, None)
            rows.hidden = layer.attention.output(mixed, rows.hidden)
            self._cross(layer.crossattention, f"{path}.crossattention", rows, [context], None)
            inner = self._feed_forward(layer, f"{path}.mlp", rows)
            self._collect(f"{path}.mlp", inner, rows.alive, None)
        logits: Tensor = self.model.text_decoder.cls(rows.hidden[None])[0]
        return logits

    # --- sub-layers ------------------------------------------------------------------------

    def _times(self, values: Tensor, name: str) -> Tensor:
        return values * self.masks[name].double() if name in self.masks else values

    def _attend(
        self,
        name: str,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        alive: Tensor,
        heads: int,
        *,
        causal: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Returns contexts side by side ``(Nq, H * d)`` and attention ``(H, Nq, Nk)``."""
        mask = self.masks.get(name, torch.ones(heads)).double()
        contexts, attentions = [], []
        for h in range(heads):
            width = queries.shape[1] // heads
            part = slice(h * width, (h + 1) * width)
            factor = mask[h] if self.site == "qkv" else 1.0
            query, key, value = (factor * rows[:, part] for rows in (queries, keys, values))
            logits = query @ key.T / width**0.5
            logits[:, ~alive] = -torch.inf
            if causal:
                logits[torch.ones_like(logits, dtype=torch.bool).triu(1)] = -torch.inf
            attention = logits.softmax(dim=-1)
            context = attention @ value
            contexts.append(context if self.site == "qkv" else mask[h] * context)
            attentions.append(attention)
        return torch.cat(contexts, dim=1), torch.stack(attentions)

    def _text_attention(
        self,
        module: Any,
        name: str,
        rows: Tensor,
        context: Tensor,
        alive: Tensor,
        *,
        causal: bool = False,
    ) -> tuple[Tensor, Tensor]:
        return self._attend(
            name,
            module.query(rows),
            module.key(context),
            module.value(context),
            alive,
            module.num_attention_heads,
            causal=causal,
        )

    def _cross(
        self,
        module: nn.Module,
        name: str,
        rows: Rows,
        contexts: Sequence[Tensor],
        scores: Tensor | None,
    ) -> None:
        mixed = []
        for i, context in enumerate(contexts):
            twin = isinstance(module, TwinCrossAttention)
            attention: Any = getattr(module, f"self{i}" if twin else "self")
            site = f"{name}.{i}" if twin else name
            every = torch.ones(len(context), dtype=torch.bool)
            one, _ = self._text_attention(attention, site, rows.hidden, context, every)
            self._collect(site, one, rows.alive, scores)
            mixed.append(one)
        if isinstance(module, TwinCrossAttention):
            joined = module.combine([module.dense0(mixed[0]), module.dense1(mixed[1])])
            rows.hidden = module.LayerNorm(joined + rows.hidden)
        else:
            output: Any = module.output
            rows.hidden = output(mixed[0], rows.hidden)

    def _feed_forward(self, layer: Any, name: str, rows: Rows) -> Tensor:
        inner = self._times(layer.intermediate.dense(rows.hidden), name)
        activation: Tensor = layer.intermediate.intermediate_act_fn(inner)
        rows.hidden = layer.output(activation, rows.hidden)
        return activation

    # --- the paper's equations -------------------------------------------------------------

    def _token_scores(self, attention: Tensor, name: str, alive: Tensor) -> Tensor:
        """Eq. 6 and 7 without the first token, which is pooled."""
        heads, tokens, _ = attention.shape
        mask = self.masks.get(name, torch.ones(heads)) if self.cit else torch.ones(heads)
        corrected = attention * mask.double()[:, None, None]
        scores = torch.zeros(tokens, dtype=torch.float64)
        counted = [i for i in range(1, tokens) if alive[i]]
        for i in counted:
            scores[i] = sum(corrected[:, n, i].max() for n in counted)
        return scores / scores.sum()

    def _drop(self, rows: Rows, scores: Tensor, stream: Stream, layer: str) -> tuple[Rows, Tensor]:
        """Eq. 1 for tokens; returns the rows and their scores."""
        theta = self.thresholds.get(stream, 0.0)
        counted = [i for i in range(1, len(scores)) if rows.alive[i]]
        best = sorted(counted, key=lambda i: -float(scores[i]))[: self.min_tokens[stream]]
        kept = [i for i in counted if theta <= 0 or len(counted) * scores[i] > theta or i in best]
        dropped = [i for i in counted if i not in kept]
        alive = rows.alive.clone()
        alive[dropped] = False
        hidden = rows.hidden
        if dropped and self.merge:
            share = scores[dropped] / scores[dropped].sum()
            summary = (share[:, None] * hidden[dropped]).sum(dim=0)
            hidden = torch.cat([hidden, summary[None]])
            alive = torch.cat([alive, torch.ones(1, dtype=torch.bool)])
            scores = torch.cat([scores, scores[dropped].sum()[None]])
        scores = scores * alive
        self.counts.setdefault(layer, []).append(int(alive.sum()))
        return Rows(hidden, alive), scores

    def _collect(
        self, name: str, activation: Tensor, alive: Tensor, scores: Tensor | None
    ) -> None:
        """Adds the sums of Eq. 4 (or 3) over the rows that are left."""
        left = [n for n in range(len(alive)) if alive[n]]
        if not self.cip:
            weights = dict.fromkeys(left, 1.0)
        elif scores is None:
            weights = dict.fromkeys(left, 1.0 / len(left))
        else:
            total = float(sum(scores[n] for n in left if n > 0))
            weights = {n: 1.0 if n == 0 else float(scores[n]) / total for n in left}
        squares = sum(weight * activation[n].square() for n, weight in weights.items())
        assert isinstance(squares, Tensor)
        self.sums[name] = self.sums.get(name, 0.0) + squares.detach()
