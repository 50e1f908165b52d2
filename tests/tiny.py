"""Tiny models of the real classes with random weights, one row of ``FAMILIES`` each.

A test that holds for every family iterates over ``FAMILIES``; a new family adds a row. The
weights are not the stock initialisation, under which all tokens look alike: queries and keys are
large, so that attention is peaky, and biases and norms are random, so that losing one shows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipConfig,
    SiglipModel,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from comp.config import PruningConfig
from comp.cost import Meter
from comp.handle import PruningHandle
from comp.models.blip_nlvr import BlipForNLVR
from comp.modes import PruningMode
from comp.shrink import shrink_
from comp.tasks.base import ALONE, Batch, Shard

PAD, BOS, SEP = 0, 1, 2
VOCABULARY = 40
IMAGE_SIZE = 32
MAX_WORDS = 10
IMAGE_TOKEN = VOCABULARY - 1
SMALL = PruningConfig(
    steps_per_stage=2,
    fine_tune_steps=2,
    learning_rate=1e-3,
    batch_size=4,
    min_channels=4,
    eval_samples=8,
    test_samples=8,
    eval_batch_size=8,
    calibration_samples=8,
    probe_samples=8,
    device="cpu",
)
"""A run of a second or so; each test file adds the ratios it goes to."""

CLOCKS = (
    "seconds",
    "train_seconds",
    "eval_seconds",
    "fine_tune_seconds",
    "latency_ms",
    "dense_latency_ms",
)
"""What a clock says in a record, so that no two runs agree on it."""

ALL_MODES = tuple(PruningMode)
NO_TEXT_TOKENS = tuple(mode for mode in PruningMode if mode is not PruningMode.LANGUAGE_TOKENS)
ONE_SEQUENCE = (
    PruningMode.LANGUAGE_PARAMS,
    PruningMode.VISION_TOKENS,
    PruningMode.LANGUAGE_TOKENS,
)
NO_CROSS = tuple(mode for mode in PruningMode if mode is not PruningMode.CROSS_PARAMS)


@dataclass(frozen=True)
class TinyFamily:
    """One model class with what a test needs to run it.

    Attributes:
        name: Shown in test ids.
        build: Makes the model from a seed, in eval mode.
        batch: Makes samples of different text lengths, padded on the right, from a size and a
            seed.
        outputs: What a user reads, ``(B, ...)``, zero where the text is padding.
        losses: Loss of every sample, ``(B,)``.
        modes: The pruning modes of the model.
        drops_text: Whether its text tokens can be dropped.
    """

    name: str
    build: Callable[[int], nn.Module]
    batch: Callable[[int, int], Batch]
    outputs: Callable[[Any, Batch], Tensor]
    losses: Callable[[Any, Batch], Tensor]
    modes: tuple[PruningMode, ...] = ALL_MODES

    @property
    def drops_text(self) -> bool:
        return PruningMode.LANGUAGE_TOKENS in self.modes


def randomise_(model: nn.Module, seed: int) -> nn.Module:
    """Gives every parameter a value that matters, in place."""
    generator = torch.Generator().manual_seed(seed)

    def noise(parameter: Tensor, scale: float) -> Tensor:
        return scale * torch.randn(parameter.shape, generator=generator)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(noise(module.weight, module.in_features**-0.5))
                if module.bias is not None:
                    module.bias.copy_(noise(module.bias, 0.3))
            elif isinstance(module, nn.Conv2d):
                fan_in = module.weight[0].numel()
                module.weight.copy_(noise(module.weight, fan_in**-0.5))
            elif isinstance(module, nn.LayerNorm):
                module.weight.copy_(1 + noise(module.weight, 0.3))
                module.bias.copy_(noise(module.bias, 0.2))
            elif isinstance(module, LlamaRMSNorm):
                module.weight.copy_(1 + noise(module.weight, 0.3))
            elif isinstance(module, nn.Embedding):
                module.weight.copy_(noise(module.weight, 1.0))
        for name, parameter in model.named_parameters():
            if name.endswith((".query.weight", ".key.weight", ".q_proj.weight", ".k_proj.weight")):
                parameter.mul_(2)
            elif name.endswith(".qkv.weight"):
                parameter[: parameter.shape[0] * 2 // 3].mul_(2)
            elif name.endswith(("class_embedding", "position_embedding")):
                parameter.copy_(noise(parameter, 0.5))
    return model.eval()


def blip_config(text_width: int = 24) -> BlipConfig:
    """A tiny BLIP: 3 vision layers of width 32, 2 text layers, heads of width 8."""
    return BlipConfig(
        text_config={
            "hidden_size": text_width,
            "intermediate_size": 40,
            "num_attention_heads": text_width // 8,
            "num_hidden_layers": 2,
            "encoder_hidden_size": 32,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 32,
            "hidden_dropout_prob": 0.1,
            "attention_probs_dropout_prob": 0.1,
            "label_smoothing": 0.0,
            "pad_token_id": PAD,
            "bos_token_id": BOS,
            "eos_token_id": SEP,
            "sep_token_id": SEP,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "image_size": IMAGE_SIZE,
            "patch_size": 8,
        },
        projection_dim=16,
        image_text_hidden_size=16,
    )


_TINY_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "image_size": IMAGE_SIZE,
    "patch_size": 8,
}
_TINY_TEXT = {
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
}


def clip_config(end: int = VOCABULARY - 1) -> CLIPConfig:
    """A tiny CLIP: 3 vision layers of width 32, 2 text layers of width 24, heads of width 8.

    Args:
        end: Id of the end-of-text token; 2 makes the text pool at the largest id instead.
    """
    text = {**_TINY_TEXT, "hidden_size": 24, "num_attention_heads": 3, "eos_token_id": end}
    return CLIPConfig(text_config=text, vision_config=_TINY_VISION, projection_dim=16)


def siglip_config() -> SiglipConfig:
    """A tiny SigLIP: 3 vision layers and 2 text layers of width 32, heads of width 8."""
    text = {**_TINY_TEXT, "hidden_size": 32, "num_attention_heads": 4, "eos_token_id": SEP}
    return SiglipConfig(text_config={**text, "projection_size": 32}, vision_config=_TINY_VISION)


def llava_config(layers: int = 4, groups: int = 2) -> LlavaConfig:
    """A tiny LLaVA: 16 image tokens, Llama layers of width 32 with 4 query heads of width 8.

    Args:
        layers: Layers of the language model.
        groups: Its key/value heads.
    """
    text = LlamaConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=groups,
        attention_bias=True,
        mlp_bias=True,
        vocab_size=VOCABULARY,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=SEP,
    )
    return LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **_TINY_VISION},
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        image_seq_length=16,
    )


def _builder(model_class: Any, text_width: int) -> Callable[[int], nn.Module]:
    def build(seed: int) -> nn.Module:
        return randomise_(model_class(blip_config(text_width)), seed)

    return build


def _texts(size: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(1000 + seed)
    ids = torch.randint(3, VOCABULARY, (size, MAX_WORDS), generator=generator)
    lengths = torch.randint(6, MAX_WORDS + 1, (size,), generator=generator)
    mask = (torch.arange(MAX_WORDS) < lengths[:, None]).long()
    ids[:, 0] = BOS
    return {"input_ids": ids * mask + PAD * (1 - mask), "attention_mask": mask}


def _images(size: int, seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(2000 + seed)
    return torch.randn(size, *shape, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)


def _pair_batch(size: int, seed: int) -> Batch:
    batch = _texts(size, seed)
    return {
        "pixel_values": _images(size, seed, 2),
        **batch,
        "labels": batch["input_ids"][:, 1] % 2,
    }


def _image_batch(size: int, seed: int) -> Batch:
    return {"pixel_values": _images(size, seed), **_texts(size, seed)}


def _question_batch(size: int, seed: int) -> Batch:
    batch = _image_batch(size, seed)
    answers = torch.stack([batch["input_ids"][:, 1], batch["input_ids"][:, 2]], dim=1)
    return {**batch, "decoder_input_ids": functional.pad(answers, (1, 0), value=BOS)}


def _clip_batch(size: int, seed: int) -> Batch:
    """Texts that end with the last word of the vocabulary, which nowhere else occurs."""
    batch = _image_batch(size, seed)
    ids = batch["input_ids"].clamp(max=VOCABULARY - 2)
    ends = batch["attention_mask"].sum(dim=1, keepdim=True) - 1
    return {**batch, "input_ids": ids.scatter(1, ends, VOCABULARY - 1)}


def _siglip_batch(size: int, seed: int) -> Batch:
    """Texts of full length: SigLIP reads padding as words and pools at the last position."""
    batch = _image_batch(size, seed)
    return {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}


def _features(model: Any, batch: Batch) -> Tensor:
    texts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    image = model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output
    return torch.cat([image, model.get_text_features(**texts).pooler_output], dim=1)


def _feature_losses(model: Any, batch: Batch) -> Tensor:
    image, text = _features(model, batch).chunk(2, dim=1)
    return 1 - functional.cosine_similarity(image, text)


def _nlvr_outputs(model: Any, batch: Batch) -> Tensor:
    logits: Tensor = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    return logits


def _nlvr_losses(model: Any, batch: Batch) -> Tensor:
    logits = _nlvr_outputs(model, batch)
    return functional.cross_entropy(logits, batch["labels"], reduction="none")


def _question_outputs(model: Any, batch: Batch) -> Tensor:
    image = model.vision_model(pixel_values=batch["pixel_values"]).last_hidden_state
    question = model.text_encoder(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        encoder_hidden_states=image,
    ).last_hidden_state
    logits: Tensor = model.text_decoder(
        input_ids=batch["decoder_input_ids"], encoder_hidden_states=question, use_cache=False
    ).logits
    return logits


def _next_word_losses(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    losses = functional.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none")
    return (losses * mask[:, 1:]).sum(dim=1) / mask[:, 1:].sum(dim=1)


def _question_losses(model: Any, batch: Batch) -> Tensor:
    ids = batch["decoder_input_ids"]
    return _next_word_losses(_question_outputs(model, batch), ids, torch.ones_like(ids))


def _matching_outputs(model: Any, batch: Batch) -> Tensor:
    matching = model(**batch, use_itm_head=True).itm_score
    contrast = model(**batch, use_itm_head=False).itm_score
    return torch.cat([matching, contrast.diagonal()[:, None]], dim=1)


def _matching_losses(model: Any, batch: Batch) -> Tensor:
    logits = model(**batch, use_itm_head=True).itm_score
    return functional.cross_entropy(logits, batch["input_ids"][:, 1] % 2, reduction="none")


def _caption_outputs(model: Any, batch: Batch) -> Tensor:
    logits: Tensor = model(**batch).logits
    mask: Tensor = batch["attention_mask"]
    return logits * mask[..., None]


def _caption_losses(model: Any, batch: Batch) -> Tensor:
    logits = _caption_outputs(model, batch)
    return _next_word_losses(logits, batch["input_ids"], batch["attention_mask"])


def _prompt_batch(size: int, seed: int) -> Batch:
    """Prompts with an image behind the second word, padded on the right."""
    batch = _texts(size, seed)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    ids = torch.where(ids == IMAGE_TOKEN, 3, ids)
    image = torch.full((size, 16), IMAGE_TOKEN)
    return {
        "pixel_values": _images(size, seed),
        "input_ids": torch.cat([ids[:, :2], image, ids[:, 2:]], dim=1),
        "attention_mask": torch.cat([mask[:, :2], torch.ones_like(image), mask[:, 2:]], dim=1),
    }


def _prompt_outputs(model: Any, batch: Batch) -> Tensor:
    logits: Tensor = model(**batch).logits
    return logits * batch["attention_mask"][..., None]


def _prompt_losses(model: Any, batch: Batch) -> Tensor:
    """Cross-entropy of the next word behind every prompt, which follows from its first word."""
    logits = _prompt_outputs(model, batch)
    last = batch["attention_mask"].sum(dim=1) - 1
    rows = logits[torch.arange(len(last), device=last.device), last]
    return functional.cross_entropy(rows, batch["input_ids"][:, 1] % 2, reduction="none")


FAMILIES: dict[str, TinyFamily] = {
    family.name: family
    for family in (
        TinyFamily(
            "blip-nlvr", _builder(BlipForNLVR, 24), _pair_batch, _nlvr_outputs, _nlvr_losses
        ),
        TinyFamily(
            "blip-vqa",
            _builder(BlipForQuestionAnswering, 32),
            _question_batch,
            _question_outputs,
            _question_losses,
        ),
        TinyFamily(
            "blip-retrieval",
            _builder(BlipForImageTextRetrieval, 24),
            _image_batch,
            _matching_outputs,
            _matching_losses,
        ),
        TinyFamily(
            "blip-caption",
            _builder(BlipForConditionalGeneration, 24),
            _image_batch,
            _caption_outputs,
            _caption_losses,
            modes=NO_TEXT_TOKENS,
        ),
        TinyFamily(
            "clip",
            lambda seed: randomise_(CLIPModel(clip_config()), seed),
            _clip_batch,
            _features,
            _feature_losses,
            modes=NO_CROSS,
        ),
        TinyFamily(
            "llava",
            lambda seed: randomise_(LlavaForConditionalGeneration(llava_config()), seed),
            _prompt_batch,
            _prompt_outputs,
            _prompt_losses,
            modes=ONE_SEQUENCE,
        ),
    )
}

ENCODER_FAMILIES = [name for name in FAMILIES if name != "llava"]
"""Those with an encoder for every stream, whose tokens drop by a relative threshold."""

# Not a row of the table: padding changes what SigLIP's texts mean, by its stock code.
SIGLIP = TinyFamily(
    "siglip",
    lambda seed: randomise_(SiglipModel(siglip_config()), seed),
    _siglip_batch,
    _features,
    _feature_losses,
    modes=NO_CROSS,
)


def sample_of(batch: Batch, row: int) -> Batch:
    """One sample of a batch by itself, its text without padding."""
    words = int(batch["attention_mask"][row].sum())
    single = {name: value[row : row + 1] for name, value in batch.items()}
    for name in ("input_ids", "attention_mask"):
        single[name] = single[name][:, :words]
    return single


def padded_further(batch: Batch, columns: int) -> Batch:
    """The same batch with more padding behind every text."""
    more = dict(batch)
    for name, value in (("input_ids", PAD), ("attention_mask", 0)):
        more[name] = functional.pad(batch[name], (0, columns), value=value)
    return more


def random_masks(handle: PruningHandle, seed: int = 0, *, soft: bool = False) -> dict[str, Tensor]:
    """Masks of every unit group: about half of the units pruned, one at least whole."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, group in handle.groups.items():
        draw = torch.rand(group.num_units, generator=generator)
        mask = (draw > 0.5).float()
        if soft:
            mask = torch.where(mask == 0, torch.rand(group.num_units, generator=generator), mask)
        mask[int(draw.argmax())] = 1.0
        masks[name] = mask
    return masks


class TokenRecorder(Meter):
    """A meter that also keeps every sample's own token counts.

    Attributes:
        counts: Tokens that left each layer, one entry a sample and pass, by ``encoder.layer``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, list[int]] = {}

    def add_tokens(self, encoder: str, layer: int, counts: Tensor) -> None:
        super().add_tokens(encoder, layer, counts)
        self.counts.setdefault(f"{encoder}.{layer}", []).extend(counts.tolist())


def measured(
    handle: PruningHandle, family: TinyFamily, batch: Batch
) -> tuple[Tensor, TokenRecorder]:
    """Runs a batch and returns its outputs with what the pass cost."""
    recorder = TokenRecorder()
    recorder.num_samples = len(batch["input_ids"])
    handle.meter = recorder
    with torch.no_grad():
        outputs = family.outputs(handle.model, batch)
    handle.meter = None
    return outputs, recorder


def total_macs(handle: PruningHandle, recorder: TokenRecorder) -> int:
    """Multiply-adds of all samples that a recorder saw."""
    return recorder.measurement(handle.groups.values(), handle.alive()).total_macs


def check_shrinking(handle: PruningHandle, family: "TinyFamily") -> None:
    """Asserts that the masked model and its shrunk self agree in outputs, tokens and FLOPs."""
    batch = family.batch(4, 0)
    masked, before = measured(handle, family, batch)
    macs = total_macs(handle, before)
    shrink_(handle)
    shrunk, after = measured(handle, family, batch)
    assert after.counts == before.counts
    torch.testing.assert_close(shrunk, masked, rtol=0, atol=1e-5)
    assert total_macs(handle, after) == macs


class TinyTask:
    """A data set of random samples of one family, whose labels follow from their words.

    The metric is the probability that the model gives to the truth.

    Args:
        family: Whose samples.
        samples: Samples of every split.
    """

    name = "tiny"
    metric_name = "probability"

    def __init__(self, family: TinyFamily, samples: int = 32) -> None:
        self._family = family
        self._splits = {
            split: family.batch(samples, seed)
            for seed, split in enumerate(("train", "val", "test"), start=1)
        }
        self.samples = samples

    def train_batches(
        self, *, batch_size: int, seed: int, start: int = 0, shard: Shard = ALONE
    ) -> Iterator[Batch]:
        step = start + shard[0]
        while True:
            generator = torch.Generator().manual_seed(seed * 100_003 + step)
            yield self._rows(
                "train", torch.randperm(self.samples, generator=generator)[:batch_size]
            )
            step += shard[1]

    def batches(
        self, split: str, *, batch_size: int, num_samples: int | None = None
    ) -> Iterator[Batch]:
        end = min(self.samples, num_samples or self.samples)
        for first in range(0, end, batch_size):
            yield self._rows(split, torch.arange(first, min(first + batch_size, end)))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._family.losses(model, batch).mean()

    def score(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        losses = self._family.losses(model, batch)
        return (-losses).exp(), losses

    def _rows(self, split: str, rows: Tensor) -> Batch:
        return {name: value[rows] for name, value in self._splits[split].items()}


def check_prediction(task: Any, model: nn.Module, batch: Batch, truth: Tensor) -> None:
    """Asserts that a task's predictions are what its loss, without smoothing, is made of.

    Args:
        task: A ``PredictingTask``.
        model: A model in eval mode.
        batch: A batch.
        truth: The right choice of every row of the prediction, ``(R,)``.
    """
    with torch.no_grad():
        loss, said = task.loss_and_prediction(model, batch)
        alone = task.predict(model, batch)
        assert torch.equal(task.loss(model, batch), loss)
    assert torch.equal(said.logits, alone.logits)
    assert torch.equal(said.weights, alone.weights)
    rows = functional.cross_entropy(said.logits.float(), truth, reduction="none")
    torch.testing.assert_close((said.weights * rows).sum(), loss)
