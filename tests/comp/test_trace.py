"""Which patches survive: what the trace says agrees with what the meter counts."""

import itertools
from collections.abc import Iterator

import pytest
import torch

from comp.data.images import denormalize, normalize
from comp.handle import PruningHandle
from comp.models import attach
from comp.modes import Stream
from comp.trace import TokenPass, TokenTrace
from tests.tiny import FAMILIES, measured

WITH_PATCHES = [name for name in FAMILIES if name != "llava"]


def traced(name: str, theta: float) -> tuple[PruningHandle, TokenPass, dict[str, list[int]]]:
    """The first pass of patches through a tiny model, and the tokens that the meter saw."""
    family = FAMILIES[name]
    model = family.build(0).eval()
    handle = attach(model, merge="drop")
    handle.thresholds = {Stream.VISION: theta, Stream.TEXT: theta}
    handle.trace = TokenTrace()
    _, recorder = measured(handle, family, family.batch(3, 1))
    return handle, handle.trace.passes[0], recorder.counts


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", FAMILIES)
def test_without_a_threshold_every_patch_stays(name: str) -> None:
    handle, seen, _ = traced(name, 0.0)
    assert set(seen.kept) == {b.layer for b in handle.structure.encoders[seen.encoder]}
    assert all(bool(kept.all()) for kept in seen.kept.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_patch_that_is_gone_stays_gone(name: str) -> None:
    _, seen, _ = traced(name, 0.5)
    layers = [seen.kept[layer] for layer in sorted(seen.kept)]
    assert not bool(layers[-1].all())
    for before, after in itertools.pairwise(layers):
        assert bool((before | ~after).all())


@pytest.mark.parametrize("name", WITH_PATCHES)
def test_patches_left_are_the_tokens_that_the_meter_counts(name: str) -> None:
    _, seen, counts = traced(name, 0.5)
    prefix = seen.patches.shape[1] - int(seen.patches[0].sum())
    for layer, kept in seen.kept.items():
        rows = kept.sum(dim=1) + prefix
        assert counts[f"vision.{layer}"][: len(rows)] == rows.tolist()


def test_what_is_left_in_a_dense_model_is_its_own_width() -> None:
    family = FAMILIES["blip-nlvr"]
    handle = attach(family.build(0).eval())
    _, recorder = measured(handle, family, family.batch(2, 1))
    left = handle.left_in_layers(recorder.measurement(handle.groups.values(), handle.alive()))
    blocks = [b for blocks in handle.structure.encoders.values() for b in blocks]
    sites = {f"{b.encoder}.{b.layer}.{part}": g for b in blocks for part, g in b.parts().items()}
    assert {key: left[key] for key in sites} == {k: g.num_units for k, g in sites.items()}
    assert {"text.0.cross0", "text.0.cross1", "vision.1.tokens"} <= set(left)


def test_pixels_come_back_from_their_normalised_form() -> None:
    pixels = torch.randint(0, 256, (2, 3, 5, 5), dtype=torch.uint8)
    assert torch.equal(denormalize(normalize(pixels)).to(torch.uint8), pixels)
