"""The dense numbers that the papers print, from the closed form and from torch's counter."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    CLIPConfig,
    CLIPModel,
)

from comp.models.blip_nlvr import BlipForNLVR
from comp.reference_cost import (
    DenseCost,
    blip_caption_cost,
    blip_image_cost,
    blip_nlvr_cost,
    blip_retrieval_cost,
    blip_retrieval_training_cost,
    blip_vqa_mock_cost,
    clip_cost,
    clip_training_cost,
    linear_cost,
    llava_prefill_cost,
)

GIGA = 1e9


def counted_by_torch(model_class: Any, config: Any, **inputs: Any) -> int:
    """Half of what torch counts on the real model, without its weights."""
    with torch.device("meta"):
        model: nn.Module = model_class(config).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    return int(counter.get_total_flops()) // 2


def words(count: int) -> torch.Tensor:
    return torch.ones(1, count, dtype=torch.long, device="meta")


def images(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, device="meta")


def base_config() -> BlipConfig:
    return BlipConfig(text_config={"vocab_size": 30524}, vision_config={"image_size": 384})


def test_blips_image_encoder() -> None:
    assert blip_image_cost().body / GIGA == 55.483582464


def test_nlvr_as_upop_and_madtp_print_it() -> None:
    assert blip_nlvr_cost(36).body / GIGA == pytest.approx(132.4248, abs=1e-4)
    assert blip_nlvr_cost(36).published / GIGA == pytest.approx(132.5407, abs=1e-4)


@pytest.mark.parametrize(
    ("length", "expected"), [(30, 131.68), (35, 132.40), (36, 132.54), (38, 132.83), (40, 133.11)]
)
def test_nlvr_by_length_of_the_statement(length: int, expected: float) -> None:
    assert blip_nlvr_cost(length).published / GIGA == pytest.approx(expected, abs=5e-3)


def test_captioning() -> None:
    assert blip_caption_cost(15).body / GIGA == pytest.approx(65.662, abs=1e-3)
    assert blip_caption_cost(15).published / GIGA == pytest.approx(65.720, abs=1e-3)


def test_retrieval_in_training() -> None:
    cost = blip_retrieval_training_cost(35)
    assert cost.body / GIGA == pytest.approx(153.051, abs=1e-3)
    assert cost.published / GIGA == pytest.approx(153.184, abs=1e-3)


def test_retrieval_without_momentum() -> None:
    cost = blip_retrieval_cost(35, matches=3)
    assert cost.body / GIGA == pytest.approx(94.57, abs=5e-3)
    assert cost.published / GIGA == pytest.approx(94.65, abs=5e-3)


def test_clip_once_and_in_training() -> None:
    projections = linear_cost(1, 1024, 768) + linear_cost(1, 768, 768)
    assert (clip_cost().body - projections.body) / GIGA == pytest.approx(197.608, abs=1e-3)
    assert clip_cost().body / GIGA == pytest.approx(197.61, abs=5e-3)
    assert clip_cost().published / GIGA == pytest.approx(197.76, abs=5e-3)
    assert clip_training_cost(queue=0).published / GIGA == pytest.approx(395.524, abs=1e-3)
    assert clip_training_cost().published / GIGA == pytest.approx(395.701, abs=1e-3)


def test_vqa_by_the_mock_batch_that_the_papers_count() -> None:
    assert blip_vqa_mock_cost().published / GIGA == pytest.approx(186.121, abs=1e-3)


def test_torch_counts_the_same_on_the_mock_batch_without_copies() -> None:
    config = base_config()
    config.vision_config.image_size = 480
    with torch.device("meta"):
        model: Any = BlipForQuestionAnswering(config).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        rows = model.vision_model(images(1, 3, 480, 480)).last_hidden_state
        states = model.text_encoder(
            input_ids=words(14).expand(2, -1), encoder_hidden_states=rows.expand(2, -1, -1)
        ).last_hidden_state[:1]
        model.text_decoder(
            input_ids=words(5).expand(3, -1),
            encoder_hidden_states=states.expand(3, -1, -1),
            use_cache=False,
        )
    layer = 2 * 768 * 768  # torch computes keys and values of every copy
    copies = 12 * layer * (901 + 2 * 14)
    counted = int(counter.get_total_flops()) // 2
    assert counted - copies == blip_vqa_mock_cost(questions=2, answers=3).body


def test_llavas_prefill_of_the_image_tokens() -> None:
    assert llava_prefill_cost(576).body / 1e12 == pytest.approx(3.817, abs=1e-3)


def test_torch_counts_the_same_on_the_real_nlvr_model() -> None:
    counted = counted_by_torch(
        BlipForNLVR, base_config(), pixel_values=images(1, 2, 3, 384, 384), input_ids=words(36)
    )
    assert counted == blip_nlvr_cost(36).body


def test_torch_counts_the_same_on_the_real_captioner() -> None:
    counted = counted_by_torch(
        BlipForConditionalGeneration,
        base_config(),
        pixel_values=images(1, 3, 384, 384),
        input_ids=words(15),
    )
    assert counted == blip_caption_cost(15).body


def test_torch_counts_the_same_on_the_real_retrieval_model() -> None:
    counted = counted_by_torch(
        BlipForImageTextRetrieval,
        base_config(),
        pixel_values=images(1, 3, 384, 384),
        input_ids=words(35),
        use_itm_head=False,
    )
    similarity = 256
    assert counted - similarity == blip_retrieval_cost(35, matches=0).body


def test_torch_counts_the_same_on_the_real_clip() -> None:
    config = CLIPConfig(
        text_config={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_attention_heads": 12,
            "num_hidden_layers": 12,
            "attn_implementation": "eager",
        },
        vision_config={
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "image_size": 336,
            "patch_size": 14,
        },
        projection_dim=768,
    )
    config._attn_implementation = "eager"
    counted = counted_by_torch(
        CLIPModel, config, pixel_values=images(1, 3, 336, 336), input_ids=words(77)
    )
    similarity = 768
    assert counted - similarity == clip_cost().body


def test_costs_add_and_scale() -> None:
    cost = 3 * (DenseCost(10, 2) + DenseCost(1, 1))
    assert cost == DenseCost(33, 9)
    assert cost.published == 33 + 5 * 9
