"""BLIP for NLVR2 as its authors wrote it, straight from a state dict with their names.

No module of comp or transformers takes part: the layers are written out from the description of
BLIP's ``vit.py`` (timm's pre-norm blocks, one Linear for query, key and value) and
``nlvr_encoder.py`` (BERT's post-norm layers; cross-attention to both images, averaged where a
layer has no ``merge_layer`` and merged where it has one).
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

HEAD_DIM = 64

State = Mapping[str, Tensor]


def logits(state: State, left: Tensor, right: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Scores statements about pairs of images, ``(B, 2)``."""
    images = [vision(state, pixels) for pixels in (left, right)]
    hidden = text(state, ids, mask, images)[:, 0]
    inner = functional.relu(linear(state, "cls_head.0", hidden))
    return linear(state, "cls_head.2", inner)


def vision(state: State, pixels: Tensor) -> Tensor:
    """Encodes images, ``(B, 3, H, W)``."""
    prefix = "visual_encoder"
    weight = state[f"{prefix}.patch_embed.proj.weight"]
    bias = state[f"{prefix}.patch_embed.proj.bias"]
    patches = functional.conv2d(pixels, weight, bias, stride=weight.shape[-1])
    rows = patches.flatten(2).transpose(1, 2)
    first = state[f"{prefix}.cls_token"].expand(len(rows), -1, -1)
    rows = torch.cat([first, rows], dim=1) + state[f"{prefix}.pos_embed"]
    for block in range(layers(state, f"{prefix}.blocks.")):
        name = f"{prefix}.blocks.{block}"
        width = rows.shape[-1]
        fused = linear(state, f"{name}.attn.qkv", norm(state, f"{name}.norm1", rows, 1e-6))
        query, key, value = fused.split(width, dim=-1)
        rows = rows + linear(state, f"{name}.attn.proj", attend(query, key, value))
        entered = norm(state, f"{name}.norm2", rows, 1e-6)
        inner = functional.gelu(linear(state, f"{name}.mlp.fc1", entered))
        rows = rows + linear(state, f"{name}.mlp.fc2", inner)
    return norm(state, f"{prefix}.norm", rows, 1e-6)


def text(state: State, ids: Tensor, mask: Tensor, images: list[Tensor]) -> Tensor:
    """Encodes texts that look at two images."""
    prefix = "text_encoder.embeddings"
    rows = state[f"{prefix}.word_embeddings.weight"][ids]
    rows = rows + state[f"{prefix}.position_embeddings.weight"][: ids.shape[1]]
    rows = norm(state, f"{prefix}.LayerNorm", rows, 1e-12)
    added = (1.0 - mask[:, None, None, :].float()) * -10000.0
    for layer in range(layers(state, "text_encoder.encoder.layer.")):
        name = f"text_encoder.encoder.layer.{layer}"
        told = project(state, f"{name}.attention.self", rows, rows, added)
        told = linear(state, f"{name}.attention.output.dense", told)
        rows = norm(state, f"{name}.attention.output.LayerNorm", told + rows, 1e-12)
        seen = [
            linear(
                state,
                f"{name}.crossattention.output.dense{i}",
                project(state, f"{name}.crossattention.self{i}", rows, image, None),
            )
            for i, image in enumerate(images)
        ]
        merge = f"{name}.crossattention.output.merge_layer"
        if f"{merge}.weight" in state:
            both = linear(state, merge, torch.cat(seen, dim=-1))
        else:
            both = (seen[0] + seen[1]) / 2
        rows = norm(state, f"{name}.crossattention.output.LayerNorm", both + rows, 1e-12)
        inner = functional.gelu(linear(state, f"{name}.intermediate.dense", rows))
        outer = linear(state, f"{name}.output.dense", inner)
        rows = norm(state, f"{name}.output.LayerNorm", outer + rows, 1e-12)
    return rows


def project(state: State, name: str, rows: Tensor, seen: Tensor, added: Tensor | None) -> Tensor:
    query = linear(state, f"{name}.query", rows)
    key, value = (linear(state, f"{name}.{part}", seen) for part in ("key", "value"))
    return attend(query, key, value, added)


def attend(query: Tensor, key: Tensor, value: Tensor, added: Tensor | None = None) -> Tensor:
    """Attention of every head by itself."""
    outputs = []
    for start in range(0, query.shape[-1], HEAD_DIM):
        part = slice(start, start + HEAD_DIM)
        scores = query[..., part] @ key[..., part].transpose(1, 2) / math.sqrt(HEAD_DIM)
        if added is not None:
            scores = scores + added[:, 0]
        outputs.append(scores.softmax(dim=-1) @ value[..., part])
    return torch.cat(outputs, dim=-1)


def linear(state: State, name: str, rows: Tensor) -> Tensor:
    return rows @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(state: State, name: str, rows: Tensor, eps: float) -> Tensor:
    centred = rows - rows.mean(dim=-1, keepdim=True)
    spread = (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    return centred / spread * state[f"{name}.weight"] + state[f"{name}.bias"]


def layers(state: State, prefix: str) -> int:
    return 1 + max(
        int(key[len(prefix) :].split(".")[0]) for key in state if key.startswith(prefix)
    )


def shapes(
    *,
    width: int = 768,
    text_width: int = 768,
    blocks: int = 12,
    text_layers: int = 12,
    patch: int = 16,
    side: int = 24,
    words: int = 30524,
    positions: int = 512,
    twins: bool = True,
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of BLIP's NLVR2 model, by default those of ``model_base_nlvr.pth``.

    ``twins=False`` gives the part of a one-stream checkpoint that NLVR2 starts from.
    """
    found: dict[str, tuple[int, ...]] = {
        "visual_encoder.cls_token": (1, 1, width),
        "visual_encoder.pos_embed": (1, side * side + 1, width),
        "visual_encoder.patch_embed.proj.weight": (width, 3, patch, patch),
        "visual_encoder.patch_embed.proj.bias": (width,),
        "text_encoder.embeddings.position_ids": (1, positions),
        "text_encoder.embeddings.word_embeddings.weight": (words, text_width),
        "text_encoder.embeddings.position_embeddings.weight": (positions, text_width),
    }

    def add(name: str, out: int, entering: int | None = None) -> None:
        found[f"{name}.weight"] = (out,) if entering is None else (out, entering)
        found[f"{name}.bias"] = (out,)

    for block in range(blocks):
        name = f"visual_encoder.blocks.{block}"
        add(f"{name}.norm1", width)
        add(f"{name}.attn.qkv", 3 * width, width)
        add(f"{name}.attn.proj", width, width)
        add(f"{name}.norm2", width)
        add(f"{name}.mlp.fc1", 4 * width, width)
        add(f"{name}.mlp.fc2", width, 4 * width)
    add("visual_encoder.norm", width)
    add("text_encoder.embeddings.LayerNorm", text_width)
    for layer in range(text_layers):
        name = f"text_encoder.encoder.layer.{layer}"
        for part in ("query", "key", "value"):
            add(f"{name}.attention.self.{part}", text_width, text_width)
            for twin in ("0", "1") if twins else ("",):
                entering = text_width if part == "query" else width
                add(f"{name}.crossattention.self{twin}.{part}", text_width, entering)
        add(f"{name}.attention.output.dense", text_width, text_width)
        add(f"{name}.attention.output.LayerNorm", text_width)
        for twin in ("0", "1") if twins else ("",):
            add(f"{name}.crossattention.output.dense{twin}", text_width, text_width)
        if twins and layer >= text_layers // 2:
            add(f"{name}.crossattention.output.merge_layer", text_width, 2 * text_width)
        add(f"{name}.crossattention.output.LayerNorm", text_width)
        add(f"{name}.intermediate.dense", 4 * text_width, text_width)
        add(f"{name}.output.dense", text_width, 4 * text_width)
        add(f"{name}.output.LayerNorm", text_width)
    if twins:
        add("cls_head.0", text_width, text_width)
        add("cls_head.2", 2, text_width)
    return found


def random_state(seed: int = 0, **sizes: int | bool) -> dict[str, Tensor]:
    """A state of those shapes under which every tensor matters."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for name, shape in shapes(**sizes).items():  # type: ignore[arg-type]
        if name.endswith("position_ids"):
            state[name] = torch.arange(shape[1])[None]
            continue
        value = torch.randn(shape, generator=generator)
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else 1
        scale = 0.3 if fan_in == 1 or name.endswith(("pos_embed", "cls_token")) else fan_in**-0.5
        is_norm = len(shape) == 1 and name.endswith("weight")
        state[name] = (1.0 if is_norm else 0.0) + scale * value
    return state
