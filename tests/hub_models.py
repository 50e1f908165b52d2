"""Models as the hub has them, tiny: weights, tokenizer and processor saved by ``transformers``."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordLevel, WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

WORDS = [
    *("is", "this", "a", "cat", "?", "what", "yes", "no", "left", "of", "the", "dog", "."),
    *("picture", "user", "assistant", ":", "left", "right"),
]
SIDE = 32


def bert_tokenizer() -> PreTrainedTokenizerFast:
    """BERT's, without BLIP's two tokens, as Salesforce's directories have it."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    entries = dict.fromkeys([*special, *WORDS, *letters, *(f"##{one}" for one in letters)])
    model = WordPiece({word: i for i, word in enumerate(entries)}, unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def clip_tokenizer() -> PreTrainedTokenizerFast:
    """With a start and an end, the end being the padding too, as OpenAI's directories have it."""
    entries = ["<unk>", *dict.fromkeys(WORDS), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(entries)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    start, end = len(entries) - 2, len(entries) - 1
    tokenizer.post_processor = TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>",
        special_tokens=[("<|startoftext|>", start), ("<|endoftext|>", end)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=16,
    )


def llava_tokenizer() -> PreTrainedTokenizerFast:
    """Llama's kind: a start, no separator, spaces as part of words, ``<image>`` as one token."""
    letters = sorted({letter for letter in "▁\n:?.," + "".join(WORDS) + "USERASSISTANT"})
    entries = ["<unk>", "<s>", "</s>", *letters, "<image>", "<pad>"]
    tokenizer = Tokenizer(BPE({w: i for i, w in enumerate(entries)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", entries.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )


def _blip_config(words: int) -> BlipConfig:
    shared = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 3}
    return BlipConfig(
        text_config={
            **shared,
            "num_hidden_layers": 2,
            "vocab_size": words + 2,
            "bos_token_id": words,
            "sep_token_id": 3,
            "eos_token_id": 3,
            "max_position_embeddings": 48,
        },
        vision_config={**shared, "num_hidden_layers": 2, "image_size": SIDE, "patch_size": 16},
        projection_dim=16,
        image_text_hidden_size=16,
    )


def _clip_config(words: int) -> CLIPConfig:
    shared = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 3}
    shared |= {"num_hidden_layers": 2}
    text = {**shared, "vocab_size": words, "max_position_embeddings": 64}
    text |= {"bos_token_id": words - 2, "eos_token_id": words - 1}
    vision = {**shared, "image_size": SIDE, "patch_size": 16}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)


def _llava_config(tokenizer: Any) -> LlavaConfig:
    vision = _clip_config(9).vision_config
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        image_seq_length=4,
    )


BLIP_CLASSES: dict[str, Any] = {
    "blip-vqa-base": BlipForQuestionAnswering,
    "blip-image-captioning-base": BlipForConditionalGeneration,
    "blip-itm-base-coco": BlipForImageTextRetrieval,
}
NAMES = (*BLIP_CLASSES, "clip-vit-tiny", "llava-1.5-tiny-hf")


def save_hub_model(name: str, directory: Path, **options: Any) -> Any:
    """Writes one of ``NAMES`` as its owner would, and returns the model.

    Args:
        name: Which.
        directory: Where.
        **options: For ``save_pretrained`` of the model.
    """
    torch.manual_seed(0)
    processor: Any
    tokenizer: Any
    model: Any
    square = {"height": SIDE, "width": SIDE}
    if name in BLIP_CLASSES:
        tokenizer = bert_tokenizer()
        model = BLIP_CLASSES[name](_blip_config(len(tokenizer)))
        processor = BlipImageProcessor(size=square)
    else:
        processor = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=square)
        is_clip = name.startswith("clip")
        tokenizer = clip_tokenizer() if is_clip else llava_tokenizer()
        model = (
            CLIPModel(_clip_config(len(tokenizer)))
            if is_clip
            else LlavaForConditionalGeneration(_llava_config(tokenizer))
        )
    for part in (tokenizer, processor):
        part.save_pretrained(directory)
    model.eval().save_pretrained(directory, **options)
    return model
