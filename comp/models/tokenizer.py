"""The tokenizer class that models are saved with."""

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast


def as_pretrained(tokenizer: Tokenizer, *, max_length: int = 64) -> PreTrainedTokenizerFast:
    """Wraps a tokenizer that has BLIP's special tokens, so that it saves and loads with a model.

    Args:
        tokenizer: Knows ``[PAD] [UNK] [CLS] [SEP] [MASK] [DEC] [ENC]``.
        max_length: Tokens after which a text is cut.

    Returns:
        The tokenizer; its ``bos_token`` is ``[DEC]``, which begins an answer.
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        bos_token="[DEC]",
        additional_special_tokens=["[ENC]"],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
