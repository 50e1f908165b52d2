"""Key/value caches of the stock decoders: a pruned model's layers may hold different lengths."""

from typing import Any

import torch
from torch import Tensor

from comp.token_state import real_rows


def extend(cache: Any, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Appends new keys and values and returns everything the cache holds for the layer."""
    own = getattr(cache, "self_attention_cache", cache)
    key, value = own.update(key, value, layer)
    return key, value


def store_cross(cache: Any, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Puts away the keys and values of a context, which stay for the whole generation."""
    key, value = cache.cross_attention_cache.update(key, value, layer)
    cache.is_updated[layer] = True
    return key, value


def stored_cross(cache: Any, layer: int) -> tuple[Tensor, Tensor] | None:
    """The keys and values that ``store_cross`` put away, or ``None``."""
    if cache is None or not cache.is_updated.get(layer):
        return None
    stored = cache.cross_attention_cache.layers[layer]
    return stored.keys, stored.values


def with_cached(bias: Tensor | None, key: Tensor) -> Tensor | None:
    """Extends a bool mask over new rows by the real ones among the cached keys."""
    if bias is None or bias.dtype != torch.bool or bias.shape[-1] >= key.shape[2]:
        return bias
    past = key[:, :, : key.shape[2] - bias.shape[-1]].transpose(1, 2).flatten(2)
    real = real_rows(past)[:, None, None, :].expand(-1, -1, bias.shape[2], -1)
    return torch.cat([real, bias.expand(real.shape[0], -1, -1, -1)], dim=-1)


def visible_keys(bias: Tensor | None, key: Tensor) -> Tensor:
    """Keys that the last query attends to, ``(B,)`` int64, of keys ``(B, H, Nk, d)``."""
    if bias is None:
        return torch.full((key.shape[0],), key.shape[2], device=key.device)
    last = bias[:, 0, -1]
    visible = last if last.dtype == torch.bool else last == 0
    return visible.sum(dim=1).expand(key.shape[0])
