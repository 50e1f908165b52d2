"""LLaVA: what its adapter claims beyond what holds for every family."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaForConditionalGeneration, StaticCache
from transformers.cache_utils import DynamicCache

from comp import cost
from comp.checkpoint import load_pruned, save_pruned
from comp.config import PruningConfig
from comp.errors import UnsupportedModelError
from comp.handle import PruningHandle
from comp.methods import Method
from comp.models import attach, detach
from comp.models.llava import token_boundaries
from comp.modes import PruningMode, Stream
from comp.pruner import Pruner
from comp.shrink import shrink_
from comp.tasks.base import Batch
from tests.comp.naive_llava import NaiveLlava
from tests.tiny import (
    BOS,
    FAMILIES,
    IMAGE_SIZE,
    IMAGE_TOKEN,
    ONE_SEQUENCE,
    PAD,
    TinyTask,
    llava_config,
    measured,
    random_masks,
    randomise_,
    sample_of,
)

FAMILY = FAMILIES["llava"]
THRESHOLDS = {Stream.VISION: 0.4, Stream.TEXT: 0.3}
GENERATION: dict[str, Any] = {
    "max_new_tokens": 5,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": PAD,
    "suppress_tokens": [IMAGE_TOKEN],
}
BEAMS = pytest.mark.parametrize("beams", [1, 3])


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def build(groups: int = 2, layers: int = 4, seed: int = 0) -> Any:
    config = llava_config(layers, groups)
    return randomise_(LlavaForConditionalGeneration(config), seed)


def pruned(*, soft: bool = False, masks: bool = True, **options: Any) -> PruningHandle:
    """A model under masks and thresholds, everything at once."""
    handle = attach(build(), **options)
    handle.masks = random_masks(handle, soft=soft) if masks else {}
    handle.thresholds = dict(THRESHOLDS)
    return handle


def left_padded(batch: Batch) -> Batch:
    """The same samples with their padding in front."""
    moved = dict(batch)
    for name in ("input_ids", "attention_mask"):
        shifts = (batch["attention_mask"] == 0).sum(dim=1).tolist()
        rows = [row.roll(shift) for row, shift in zip(batch[name], shifts, strict=True)]
        moved[name] = torch.stack(rows)
    return moved


def kept(logits: Tensor) -> Tensor:
    """Columns that were left behind the last layer, ``(B, N)``."""
    return (logits != 0).any(dim=-1)


def kinds_of(ids: Tensor) -> dict[Stream, Tensor]:
    """Columns that each stream may drop in a prompt of ``tests.tiny``, ``(N,)``."""
    columns = torch.arange(len(ids))
    image = ids == IMAGE_TOKEN
    return {Stream.VISION: image, Stream.TEXT: ~image & (columns > 17) & (columns < len(ids) - 1)}


def flops_of(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return int(counter.get_total_flops())


def metered(handle: PruningHandle, run: Callable[[], object], samples: int = 1) -> int:
    with handle.metering() as meter:
        run()
    meter.num_samples = samples
    return meter.measurement(handle.groups.values(), handle.alive()).total_macs


# --- structure ---------------------------------------------------------------------------------


def test_it_has_three_modes_and_leaves_the_vision_tower_alone() -> None:
    structure = attach(build()).structure
    assert tuple(structure.modes()) == ONE_SEQUENCE
    assert all(".language_model.layers." in group.name for group in structure.groups())


def test_a_unit_is_a_key_value_head_with_all_its_queries() -> None:
    handle = attach(build(groups=2))
    handle.masks = {"model.language_model.layers.0.self_attn": torch.tensor([0.0, 1.0])}
    shrink_(handle)
    model: Any = handle.model
    attention = model.model.language_model.layers[0].self_attn
    sizes = [attention.q_proj.out_features, attention.k_proj.out_features]
    assert [*sizes, attention.v_proj.out_features, attention.o_proj.in_features] == [16, 8, 8, 16]


@pytest.mark.parametrize(
    ("layers", "expected"), [(32, [8, 16, 24]), (4, [1, 2, 3]), (3, [1, 2]), (2, [1]), (1, [])]
)
def test_tokens_drop_behind_every_quarter_of_the_layers(layers: int, expected: list[int]) -> None:
    assert token_boundaries(llava_config(), layers) == expected


def test_other_boundaries_can_stand_in_the_config() -> None:
    model = build()
    model.config.token_boundaries = [2]
    handle = attach(model)
    assert [block.boundary for block in handle.structure.encoders["language"]] == [0, 1, 0, 0]


@pytest.mark.parametrize("boundaries", [[0, 2], [2, 4], [3, 1], [2, 2]])
def test_boundaries_outside_the_layers_are_refused(boundaries: list[int]) -> None:
    model = build()
    model.config.token_boundaries = boundaries
    with pytest.raises(ValueError, match=r"ascend within 1\.\.3, but got \["):
        attach(model)


def test_another_backbone_is_refused() -> None:
    model = build()
    model.model.language_model = nn.Identity()
    with pytest.raises(UnsupportedModelError, match="over a Identity has no adapter"):
        attach(model)


# --- against the naive model -------------------------------------------------------------------


def naive_logits(naive: NaiveLlava, batch: Batch) -> list[Tensor]:
    logits = []
    for row in range(len(batch["input_ids"])):
        sample = sample_of(batch, row)
        ids = sample["input_ids"][0]
        own = naive.logits(ids, sample["pixel_values"][0], len(ids) - 1, kinds_of(ids))
        logits.append(own)
    return logits


@pytest.mark.equations("Eq. 2", "Eq. 6", "Eq. 7")
@pytest.mark.parametrize("site", ["qkv", "context"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_dropping_tokens_equals_masking_them_at_full_length(groups: int, site: Any) -> None:
    batch = FAMILY.batch(3, 0)
    model = build(groups)
    handle = attach(copy.deepcopy(model), mask_site=site)
    handle.masks = random_masks(handle, soft=True)
    handle.thresholds = dict(THRESHOLDS)
    logits = FAMILY.outputs(handle.model, batch)
    naive = NaiveLlava(model, handle.masks, THRESHOLDS, site=site)
    for own, expected in zip(logits, naive_logits(naive, batch), strict=True):
        torch.testing.assert_close(own[: len(expected)].double(), expected, rtol=0, atol=5e-5)


@pytest.mark.equations("Eq. 7")
def test_without_cit_other_tokens_are_kept() -> None:
    batch = FAMILY.batch(3, 0)
    handle = pruned(soft=True)
    naive = NaiveLlava(build(), handle.masks, THRESHOLDS, cit=False)
    expected = naive_logits(naive, batch)
    own = kept(FAMILY.outputs(handle.model, batch))
    assert any(not torch.equal(o[: len(e)], kept(e)) for o, e in zip(own, expected, strict=True))
    handle.switches = Method(cip=True, cit=False, schedule="mps")
    own = kept(FAMILY.outputs(handle.model, batch))
    assert all(torch.equal(o[: len(e)], kept(e)) for o, e in zip(own, expected, strict=True))


@pytest.mark.equations("Eq. 4", "Eq. 5")
@pytest.mark.parametrize("thresholds", [{}, THRESHOLDS], ids=["all tokens", "dropping"])
def test_statistics_weigh_rows_by_the_scores_of_the_right_layer(
    thresholds: dict[Stream, float],
) -> None:
    """Without a class token the weights sum to 1; a dropped token does not vouch for a channel."""
    batch = FAMILY.batch(3, 0)
    handle = pruned(soft=True)
    handle.thresholds = thresholds
    with handle.collecting() as statistics:
        FAMILY.outputs(handle.model, batch)
    naive = NaiveLlava(build(), handle.masks, thresholds)
    naive_logits(naive, batch)
    assert statistics.sums.keys() == naive.sums.keys() == handle.groups.keys()
    for name, sums in statistics.sums.items():
        torch.testing.assert_close(sums.double(), naive.sums[name], rtol=1e-4, atol=1e-6)


def test_a_prompt_with_nothing_to_drop_counts_every_token_alike() -> None:
    handle = attach(build())
    batch = {"input_ids": torch.tensor([[BOS, 5]])}
    wider = {
        "input_ids": torch.tensor([[BOS, 5, PAD]]),
        "attention_mask": torch.tensor([[1, 1, 0]]),
    }
    sums = []
    for own in (batch, wider):
        with handle.collecting() as statistics:
            handle.model(**own)
        sums.append(statistics.sums)
    for name in sums[0]:
        assert float(sums[0][name].sum()) > 0
        torch.testing.assert_close(sums[0][name], sums[1][name])


# --- which tokens go ---------------------------------------------------------------------------


def counts_of(handle: PruningHandle, batch: Batch) -> dict[str, list[int]]:
    return measured(handle, FAMILY, batch)[1].counts


@pytest.mark.parametrize("theta", [0.0, 0.1, 0.3, 0.5, 0.7])
def test_a_boundary_keeps_its_share_of_the_original_tokens(theta: float) -> None:
    handle = attach(build())
    handle.min_tokens = {Stream.VISION: 1, Stream.TEXT: 1}
    handle.thresholds = {Stream.VISION: theta}
    counts = counts_of(handle, FAMILY.batch(1, 0))
    shares = [max(1, int(16 * (1 - theta) ** s + 0.5)) for s in (1, 2, 3, 3)]
    assert [counts[f"language_vision.{i}"][0] for i in range(4)] == shares


def test_more_theta_never_keeps_more_tokens_and_each_stream_has_its_own() -> None:
    handle, batch = attach(build()), FAMILY.batch(3, 0)
    for stream, other in (("vision", "text"), ("text", "vision")):
        last = None
        for theta in torch.linspace(0, 1.2, 13).tolist():
            handle.thresholds = {Stream(stream): theta}
            counts = counts_of(handle, batch)
            assert len(set(map(tuple, [counts[f"language_{other}.{i}"] for i in range(4)]))) == 1
            now = [counts[f"language_{stream}.{i}"] for i in range(4)]
            if last is not None:
                pairs = zip(now, last, strict=True)
                assert all(a <= b for own, old in pairs for a, b in zip(own, old, strict=True))
            last = now


@pytest.mark.parametrize("theta", [1.0, 5.0, float("inf")])
def test_thetas_beyond_1_leave_the_minima(theta: float) -> None:
    handle = attach(build())
    handle.thresholds = {Stream.VISION: theta, Stream.TEXT: theta}
    handle.min_tokens = {Stream.VISION: 5, Stream.TEXT: 3}
    counts = counts_of(handle, FAMILY.batch(4, 0))
    assert set(counts["language_vision.0"]) == {5}
    assert set(counts["language_text.0"]) == {3}


def test_system_prompt_first_token_and_last_instruction_token_stay() -> None:
    handle = pruned()
    handle.thresholds = {Stream.VISION: 1.0, Stream.TEXT: 1.0}
    batch = FAMILY.batch(4, 0)
    left = kept(FAMILY.outputs(handle.model, batch))
    last = batch["attention_mask"].sum(dim=1) - 1
    assert left[:, :2].all()
    assert left[torch.arange(4), last].all()
    assert left.sum(dim=1).tolist() == [2 + 4 + 2 + 1] * 4


def test_a_text_only_row_keeps_its_first_and_last_token() -> None:
    handle = pruned()
    handle.min_tokens = {Stream.VISION: 4, Stream.TEXT: 2}
    handle.thresholds = {Stream.VISION: 1.0, Stream.TEXT: 1.0}
    ids = torch.tensor([[BOS, 5, 6, 7, 8, 9, 10, 11]])
    left = kept(handle.model(input_ids=ids).logits)[0]
    assert bool(left[0])
    assert bool(left[-1])
    assert int(left.sum()) == 4


def test_a_text_only_row_may_share_a_batch_with_images() -> None:
    handle, batch = pruned(), FAMILY.batch(3, 0)
    ids = torch.tensor([BOS, 5, 6, 7, 8, 9, 10, 11])
    rows = nn.functional.pad(ids, (0, batch["input_ids"].shape[1] - 8), value=PAD)[None]
    mixed = {
        "pixel_values": batch["pixel_values"],
        "input_ids": torch.cat([rows, batch["input_ids"]]),
        "attention_mask": torch.cat([(rows != PAD).long(), batch["attention_mask"]]),
    }
    together = FAMILY.outputs(handle.model, mixed)
    alone = handle.model(input_ids=ids[None]).logits
    torch.testing.assert_close(together[:1, :8], alone, rtol=0, atol=2e-5)
    torch.testing.assert_close(
        together[1:], FAMILY.outputs(handle.model, batch), rtol=0, atol=2e-5
    )


def test_two_images_in_one_prompt_share_the_image_tokens_to_drop() -> None:
    handle = attach(build())
    handle.thresholds = {Stream.VISION: 0.5}
    image = [IMAGE_TOKEN] * 16
    ids = torch.tensor([[BOS, *image, 5, 6, *image, 7, 8]])
    batch = {"input_ids": ids, "pixel_values": torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)}
    assert counts_of(handle, {**batch, "attention_mask": torch.ones_like(ids)})[
        "language_vision.3"
    ] == [4]


def test_labelled_tokens_stay_and_the_token_before_them_votes() -> None:
    """A labelled answer changes neither the ranking nor what happens before it."""
    handle = pruned()
    prompt = sample_of(FAMILY.batch(1, 0), 0)
    length = prompt["input_ids"].shape[1]
    answer = torch.tensor([[7, 8, 9, 10]])
    ids = torch.cat([prompt["input_ids"], answer], dim=1)
    labels = torch.cat([torch.full_like(prompt["input_ids"], -100), answer], dim=1)
    whole = handle.model(input_ids=ids, pixel_values=prompt["pixel_values"], labels=labels)
    alone = handle.model(**prompt).logits
    assert kept(whole.logits)[0, length - 1 :].all()
    torch.testing.assert_close(whole.logits[:, :length], alone, rtol=0, atol=1e-5)
    rows = whole.logits[0, length - 1 : -1]
    torch.testing.assert_close(whole.loss, nn.functional.cross_entropy(rows, answer[0]))


def test_every_labelled_answer_of_a_conversation_has_its_own_vote() -> None:
    handle = attach(build())
    handle.thresholds = {Stream.VISION: 1.0, Stream.TEXT: 1.0}
    ids = torch.tensor([[BOS, 5, *[IMAGE_TOKEN] * 16, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]])
    labels = torch.full_like(ids, -100)
    labels[0, 20:22] = ids[0, 20:22]
    labels[0, 26:] = ids[0, 26:]
    pixels = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    left = kept(handle.model(input_ids=ids, pixel_values=pixels, labels=labels).logits)[0]
    assert left[[0, 1, 19, 20, 21, 25, 26, 27]].all()
    assert int(left.sum()) == 8 + 4 + 2


def test_an_image_given_as_embeddings_is_recognised() -> None:
    handle, batch = pruned(), FAMILY.batch(2, 0)
    expected = FAMILY.outputs(handle.model, batch)
    model: Any = handle.model
    embeddings = model.get_input_embeddings()(batch.pop("input_ids"))
    own = model(**batch, inputs_embeds=embeddings).logits * batch["attention_mask"][..., None]
    torch.testing.assert_close(own, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("masks", [False, True])
def test_padding_in_front_gives_what_padding_behind_gives(masks: bool) -> None:
    handle, batch = pruned(masks=masks), FAMILY.batch(4, 0)
    behind = FAMILY.outputs(handle.model, batch)
    front = FAMILY.outputs(handle.model, left_padded(batch))
    for row, words in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
        torch.testing.assert_close(front[row, -words:], behind[row, :words], rtol=0, atol=5e-5)
    own = metered(handle, lambda: handle.model(**left_padded(batch)), 4)
    assert own == metered(handle, lambda: handle.model(**batch), 4)


# --- generation --------------------------------------------------------------------------------


def generated(model: Any, batch: Batch, **options: Any) -> Tensor:
    ids: Tensor = model.generate(**batch, **{**GENERATION, **options})
    return ids[:, batch["input_ids"].shape[1] :]


def test_an_idle_model_generates_what_the_stock_model_does() -> None:
    model, batch = build(), left_padded(FAMILY.batch(3, 0))
    stock = generated(model, batch)
    attach(model)
    assert torch.equal(generated(model, batch), stock)


@BEAMS
def test_generating_with_a_cache_gives_what_it_gives_without(beams: int) -> None:
    handle, batch = pruned(soft=True), left_padded(FAMILY.batch(4, 0))
    with_cache = generated(handle.model, batch, num_beams=beams)
    without = generated(handle.model, batch, num_beams=beams, use_cache=False)
    assert torch.equal(with_cache, without)
    handle.thresholds = {}
    assert not torch.equal(generated(handle.model, batch, num_beams=beams), with_cache)


@BEAMS
def test_generating_in_a_batch_gives_what_it_gives_alone(beams: int) -> None:
    handle, batch = pruned(), FAMILY.batch(4, 0)
    together = generated(handle.model, left_padded(batch), num_beams=beams)
    for row in range(4):
        alone = generated(handle.model, sample_of(batch, row), num_beams=beams)
        assert torch.equal(together[row : row + 1], alone)


def test_every_generated_token_is_the_likeliest_of_an_uncached_pass() -> None:
    handle, batch = pruned(), sample_of(FAMILY.batch(1, 0), 0)
    answer = generated(handle.model, batch, return_dict_in_generate=False)
    length = batch["input_ids"].shape[1]
    ids = torch.cat([batch["input_ids"], answer], dim=1)
    labels = torch.cat([torch.full_like(batch["input_ids"], -100), answer], dim=1)
    logits = handle.model(input_ids=ids, pixel_values=batch["pixel_values"], labels=labels).logits[
        :, length - 1 : -1
    ]
    logits[..., IMAGE_TOKEN] = -torch.inf
    assert torch.equal(logits.argmax(dim=-1), answer)


def test_cached_steps_give_the_logits_of_an_uncached_pass() -> None:
    """Two steps, of three tokens and of one; position ids go on from the original count."""
    handle, batch = pruned(), FAMILY.batch(3, 0)
    front = left_padded(batch)
    answer = torch.tensor([[7, 8, 9, 10]]).expand(3, -1)
    mask = nn.functional.pad(front["attention_mask"], (0, 4), value=1)
    cache = DynamicCache()
    model: Any = handle.model
    model(**front, past_key_values=cache)
    width = front["input_ids"].shape[1]
    steps = [
        model(input_ids=answer[:, a:b], attention_mask=mask[:, : width + b], past_key_values=cache)
        for a, b in ((0, 3), (3, 4))
    ]
    whole = model(
        input_ids=torch.cat([front["input_ids"], answer], dim=1),
        attention_mask=mask,
        pixel_values=front["pixel_values"],
        prompt_length=width,
    ).logits[:, width:]
    cached = torch.cat([step.logits for step in steps], dim=1)
    torch.testing.assert_close(cached, whole, rtol=0, atol=5e-5)


def test_every_layers_cache_holds_its_own_number_of_tokens() -> None:
    handle, batch = attach(build()), sample_of(FAMILY.batch(1, 0), 0)
    handle.thresholds = {Stream.VISION: 0.5}
    cache = handle.model(**batch).past_key_values
    words = batch["input_ids"].shape[1] - 16
    held = [cache.get_seq_length(layer) for layer in range(4)]
    assert held == [words + 16, words + 8, words + 4, words + 4]


def test_a_static_cache_is_refused() -> None:
    handle, batch = pruned(), sample_of(FAMILY.batch(1, 0), 0)
    config: Any = handle.model.config
    cache = StaticCache(config=config.get_text_config(), max_cache_len=64)
    with pytest.raises(ValueError, match="StaticCache holds equally many tokens"):
        handle.model(**batch, past_key_values=cache)


def test_a_mask_that_is_not_flat_is_refused() -> None:
    handle, batch = pruned(), sample_of(FAMILY.batch(1, 0), 0)
    batch["attention_mask"] = batch["attention_mask"][:, None, None, :]
    with pytest.raises(ValueError, match=r"must be \(batch, tokens\), but got \(1, 1, 1, "):
        handle.model(**batch)


def test_a_prompt_in_chunks_is_refused() -> None:
    handle = pruned()
    ids = torch.arange(1, 12)[None]
    with pytest.raises(ValueError, match="prompt of 11 tokens comes in a chunk of 4"):
        generated(handle.model, {"input_ids": ids}, prefill_chunk_size=4)


# --- FLOPs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("groups", [1, 4])
def test_the_closed_form_of_a_prefill_is_exact(groups: int, seed: int) -> None:
    handle = attach(build(groups))
    handle.masks = random_masks(handle, seed)
    handle.thresholds = {Stream.VISION: 0.2 * seed, Stream.TEXT: 0.4}
    batch = sample_of(FAMILY.batch(1, seed), 0)
    before = metered(handle, lambda: handle.model(**batch))
    shrink_(handle)
    assert metered(handle, lambda: handle.model(**batch)) == before
    assert flops_of(lambda: handle.model(**batch)) == 2 * before


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([5, 7])])
def test_only_logits_that_are_asked_for_are_counted(keep: Any) -> None:
    handle, batch = attach(build()), sample_of(FAMILY.batch(1, 0), 0)
    handle.thresholds = dict(THRESHOLDS)
    run = partial(handle.model, **batch, logits_to_keep=keep)
    assert flops_of(run) == 2 * metered(handle, run)


def test_the_closed_form_of_generating_is_exact() -> None:
    handle, batch = pruned(), sample_of(FAMILY.batch(1, 0), 0)
    shrink_(handle)
    run = partial(generated, handle.model, batch)
    assert flops_of(run) == 2 * metered(handle, run)


def test_generating_costs_every_sample_what_it_costs_alone() -> None:
    handle, batch = pruned(), FAMILY.batch(3, 0)
    together = metered(handle, lambda: generated(handle.model, left_padded(batch)), 3)
    samples = [sample_of(batch, row) for row in range(3)]
    alone = [metered(handle, partial(generated, handle.model, sample)) for sample in samples]
    assert together == sum(alone)


def test_the_published_cost_of_7b_and_its_pyramid() -> None:
    """576 image tokens alone: 3.82 T dense, 1.78 T with half of them dropped at each boundary."""

    def macs(tokens: list[int]) -> int:
        return sum(
            8 * cost.self_attention_macs(n, n, 4096, 4096)
            + 8 * cost.feed_forward_macs(n, 4096, 11008, 3)
            for n in tokens
        )

    assert round(macs([576] * 4) / 1e12, 3) == 3.817
    assert round(macs([576, 288, 144, 72]) / 1e12, 3) == 1.777


def test_each_token_mode_owns_its_tokens_share_of_the_cost() -> None:
    handle, batch = attach(build()), sample_of(FAMILY.batch(1, 0), 0)
    with handle.metering() as meter:
        handle.model(**batch)
    meter.num_samples = 1
    found = meter.measurement(handle.groups.values(), handle.alive())
    groups = list(handle.groups.values())
    whole = found.mode_macs(groups, PruningMode.LANGUAGE_PARAMS)
    words = batch["input_ids"].shape[1]
    vision, text = (found.mode_macs(groups, mode) for mode in ONE_SEQUENCE[1:])
    assert vision == pytest.approx(whole * 16 / words)
    assert text == pytest.approx(whole * (words - 16 - 3) / words)


# --- shrinking, saving, training ---------------------------------------------------------------


@BEAMS
def test_the_shrunk_model_generates_what_the_masked_one_does(beams: int) -> None:
    handle, batch = pruned(), left_padded(FAMILY.batch(3, 0))
    masked = generated(handle.model, batch, num_beams=beams)
    shrink_(handle)
    assert torch.equal(generated(handle.model, batch, num_beams=beams), masked)


def test_detaching_restores_the_stock_model() -> None:
    model, batch = build(), left_padded(FAMILY.batch(3, 0))
    stock = generated(model, batch)
    attach(model).thresholds = dict(THRESHOLDS)
    assert not torch.equal(generated(model, batch), stock)
    detach(model)
    assert torch.equal(generated(model, batch), stock)
    swapped = {"pruning", "forward", "generate", "get_image_features"}
    assert not [m for m in model.modules() if swapped & set(m.__dict__)]


def test_a_copy_goes_its_own_way() -> None:
    handle, batch = pruned(), FAMILY.batch(2, 0)
    before = FAMILY.outputs(handle.model, batch)
    twin: Any = copy.deepcopy(handle.model)
    twin.pruning.thresholds = {}
    twin.lm_head.weight.zero_()
    FAMILY.outputs(twin, batch)
    assert torch.equal(FAMILY.outputs(handle.model, batch), before)


def test_a_saved_model_generates_what_it_did(tmp_path: Path) -> None:
    model = build()
    model.config.token_boundaries = [1, 3]
    handle = attach(model)
    handle.masks = random_masks(handle)
    handle.thresholds = dict(THRESHOLDS)
    shrink_(handle)
    batch = FAMILY.batch(4, 0)
    before = FAMILY.outputs(model, batch)
    words = generated(model, left_padded(batch), num_beams=2)
    save_pruned(model, tmp_path)
    again = load_pruned(tmp_path)
    logits = FAMILY.outputs(again, batch)
    read = generated(again, left_padded(batch), num_beams=2)
    torch.testing.assert_close(logits, before, rtol=0, atol=1e-5)
    assert torch.equal(kept(logits), kept(before))
    assert torch.equal(words, read)


def test_gradients_reach_every_parameter_through_dropped_tokens_layers() -> None:
    handle = pruned(soft=True)
    batch = FAMILY.batch(3, 0)
    labels = torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)
    labels[:, :20] = -100
    handle.model.train()
    with torch.enable_grad():
        handle.model(**batch, labels=labels).loss.backward()
    model: Any = handle.model
    for name, parameter in model.model.language_model.layers.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        assert float(parameter.grad.abs().sum()) > 0, name


def test_a_pruning_run_uses_all_three_modes() -> None:
    config = PruningConfig(
        ratios=(0.3,),
        num_stages=6,
        steps_per_stage=2,
        fine_tune_steps=2,
        min_channels=4,
        batch_size=4,
        eval_samples=16,
        calibration_samples=16,
        probe_samples=16,
        learning_rate=1e-4,
        quantum_cap=0.4,
        device="cpu",
    )
    with torch.enable_grad():
        pruner = Pruner(build(), TinyTask(FAMILY, samples=16), config)
        list(pruner.run())
    assert {stage.mode for stage in pruner.stages} == {mode.value for mode in ONE_SEQUENCE}
    assert pruner.points[-1].ratio_reached == pytest.approx(0.3, abs=0.03)
