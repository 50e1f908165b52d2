"""BERT's vocabulary with BLIP's two tokens, as a tokenizer that saves and loads with a model."""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing

from comp.models.hub import find_repository, is_repository
from comp.models.tokenizer import as_pretrained

_EXTRA = ("[DEC]", "[ENC]")  # in this order: BLIP adds them behind the vocabulary
_SEEING = ("BlipForNLVR", "BlipForQuestionAnswering")  # texts that see an image begin with [ENC]


def bert_tokenizer(source: str, *, first_token: str, max_length: int, vocab_size: int) -> Any:
    """Builds BLIP's tokenizer of BERT's uncased vocabulary.

    Args:
        source: A ``vocab.txt``, a directory with one, or a repository of the hub.
        first_token: What a text begins with: ``[ENC]`` for an encoder that sees an image too,
            ``[CLS]`` for one that does not.
        max_length: Tokens after which a text is cut.
        vocab_size: Rows of the model's word embeddings, which must be as many as tokens.

    Raises:
        ValueError: If there is no vocabulary or it is of another size.
    """
    path = _vocabulary(source)
    words = [line.rstrip("\n") for line in path.open(encoding="utf-8")]
    model = WordPiece(
        {word: index for index, word in enumerate(words)},
        unk_token="[UNK]",
        max_input_chars_per_word=100,
    )
    return blip_tokenizer(
        Tokenizer(model),
        str(path),
        first_token=first_token,
        max_length=max_length,
        vocab_size=vocab_size,
    )


def blip_tokenizer(
    tokenizer: Tokenizer, name: str, *, first_token: str, max_length: int, vocab_size: int
) -> Any:
    """Makes BLIP's tokenizer of a WordPiece model; see ``bert_tokenizer``."""
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    missing = [token for token in special if tokenizer.token_to_id(token) is None]
    if missing:
        raise ValueError(
            f"{name} lacks {', '.join(missing)}; pass BERT's uncased vocabulary with --tokenizer"
        )
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in _EXTRA])
    size = tokenizer.get_vocab_size()
    if size != vocab_size:
        raise ValueError(
            f"{name} has {size} tokens with {' and '.join(_EXTRA)}, but the model has "
            f"{vocab_size}; pass the vocabulary that it was trained with"
        )
    ends = [(token, tokenizer.token_to_id(token)) for token in (first_token, "[SEP]")]
    tokenizer.post_processor = TemplateProcessing(
        single=f"{first_token} $A [SEP]",
        pair=f"{first_token} $A [SEP] $B:1 [SEP]:1",
        special_tokens=ends,
    )
    return as_pretrained(tokenizer, max_length=max_length)


def with_blip_tokens(tokenizer: Any, model: Any) -> Any:
    """Gives a plain BERT tokenizer, which the hub's BLIP models come with, BLIP's two tokens.

    A tokenizer that has a token to begin an answer with is one already and stays as it is, and so
    does one that is not the model's.

    Args:
        tokenizer: What was saved with the model.
        model: A BLIP model.
    """
    text = model.config.text_config
    words = tokenizer.get_vocab()
    plain = {word: index for word, index in words.items() if word not in _EXTRA}
    if tokenizer.bos_token is not None or len(plain) + len(_EXTRA) != text.vocab_size:
        return tokenizer
    first = "[ENC]" if type(model).__name__ in _SEEING else "[CLS]"
    return blip_tokenizer(
        Tokenizer(WordPiece(plain, unk_token="[UNK]", max_input_chars_per_word=100)),
        "the model's tokenizer",
        first_token=first,
        max_length=text.max_position_embeddings,
        vocab_size=text.vocab_size,
    )


def _vocabulary(source: str) -> Path:
    path = Path(source)
    if path.is_dir():
        path = path / "vocab.txt"
    elif is_repository(source):
        path = find_repository(source, files=("vocab.txt",)) / "vocab.txt"
    if not path.is_file():
        raise ValueError(
            f"there is no vocabulary at {source}; pass --tokenizer a vocab.txt of "
            "bert-base-uncased or a directory with one"
        )
    return path
