"""Words to token ids: the tokenizer that the OpenMoji tasks share, and padding to a batch."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from tokenizers.pre_tokenizers import Split, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from comp.tasks.base import Prediction

if TYPE_CHECKING:
    from comp.data.openmoji import Drawing

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]")
_MARKS = r"[?,.:;!()/&']"
_UNSEEN = r'[.!"()*#:;~]'


class TextTokenizer(Protocol):
    """What the tasks need of a ``transformers`` tokenizer."""

    @property
    def pad_token_id(self) -> Any:
        """Id that fills a batch."""
        ...

    @property
    def sep_token_id(self) -> Any:
        """Id that ends a sequence."""
        ...

    @property
    def bos_token_id(self) -> Any:
        """Id that begins an answer."""
        ...

    def __call__(self, text: Any, /, **options: Any) -> Any:
        """Returns a mapping with ``input_ids`` of one text or of several."""
        ...


def tokenizer_from_texts(
    texts: Iterable[str], *, whole: Iterable[str] = (), max_words: int = 800
) -> Tokenizer:
    """Makes a WordPiece tokenizer with BLIP's special tokens, the same for the same texts.

    The vocabulary is counted here and not trained: the most frequent words are whole tokens, and
    letters and digits as word pieces spell all other words.

    Args:
        texts: Texts whose words become tokens.
        whole: Words that become one token each whatever their frequency, answers above all.
        max_words: Largest number of whole words.

    Returns:
        A tokenizer whose sequences begin with ``[ENC]`` and end with ``[SEP]``.

    Raises:
        ValueError: If there is no text.
    """
    counts = Counter(word for text in texts for word in _words(text))
    if not counts:
        raise ValueError("a tokenizer needs at least one text, but got none")
    words = dict.fromkeys(sorted(set(whole)))
    for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if len(words) < max_words:
            words[word] = None
    letters = "abcdefghijklmnopqrstuvwxyz0123456789-"
    pieces = [*letters, *(f"##{letter}" for letter in letters), "?", ",", ".", "'"]
    vocabulary = list(dict.fromkeys([*SPECIAL_TOKENS, *words, *pieces]))
    model = WordPiece({token: index for index, token in enumerate(vocabulary)}, unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    # Hyphens stay inside words: "medium-dark" is one answer and one token.
    marks = Split(pattern=Regex(_MARKS), behavior="isolated")
    tokenizer.pre_tokenizer = PreTokenizers([WhitespaceSplit(), marks])
    tokenizer.post_processor = TemplateProcessing(
        single="[ENC] $A [SEP]",
        pair="[ENC] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary.index(token)) for token in ("[ENC]", "[SEP]")],
    )
    return tokenizer


def build_tokenizer(*, drawings: "Sequence[Drawing] | None" = None, seed: int = 0) -> Any:
    """Makes the tokenizer of the embedded tasks from their training texts and answers.

    Args:
        drawings: What the texts speak of; ``None`` means the cached OpenMoji.
        seed: Seed of the training texts.

    Returns:
        A ``PreTrainedTokenizerFast``; its ``bos_token`` is ``[DEC]``, which begins an answer.
    """
    from comp.data.openmoji import load_openmoji
    from comp.models.tokenizer import as_pretrained
    from comp.tasks.questions import all_answers, make_questions
    from comp.tasks.statements import make_statements

    drawings = load_openmoji().drawings if drawings is None else drawings
    texts = [
        *(one.text for one in make_questions(drawings, "train", num_questions=20_000, seed=seed)),
        *(
            one.text
            for one in make_statements(drawings, "train", num_statements=20_000, seed=seed)
        ),
        *(one.caption for one in drawings if one.split == "train"),
    ]
    return as_pretrained(tokenizer_from_texts(texts, whole=all_answers(drawings), max_words=700))


def without_marks(text: str, *, between: str = "") -> str:
    """Lowers a text and takes out the marks that BLIP never sees.

    Args:
        text: As people wrote it.
        between: What stands in a mark's place; BLIP has nothing in questions and a space in
            captions and statements, where it then joins spaces.

    Source: ``pre_question`` and ``pre_caption`` of BLIP's released code.
    """
    bare = re.sub(_UNSEEN, between, text.lower())
    return (re.sub(r"\s{2,}", " ", bare) if between else bare).strip()


def encode(
    tokenizer: TextTokenizer, texts: Sequence[str], *, max_tokens: int | None = None
) -> list[list[int]]:
    """Returns the token ids of each text, special tokens included, without padding.

    Args:
        tokenizer: The tokenizer.
        texts: ``B`` texts.
        max_tokens: Longer texts lose words at their end; ``None`` is the tokenizer's own bound.
    """
    distinct = list(dict.fromkeys(texts))
    ids = tokenizer(distinct, add_special_tokens=True, truncation=True, max_length=max_tokens)[
        "input_ids"
    ]
    table = dict(zip(distinct, ids, strict=True))
    return [table[text] for text in texts]


def pad(sequences: Sequence[Sequence[int]], value: int) -> Tensor:
    """Pads token ids on the right to the longest of them.

    Args:
        sequences: ``B`` lists of ids.
        value: What to pad with.

    Returns:
        Ids, ``(B, N)``, int64.
    """
    longest = max(len(sequence) for sequence in sequences)
    return torch.tensor([[*ids, *([value] * (longest - len(ids)))] for ids in sequences])


def pad_mask(sequences: Sequence[Sequence[int]]) -> Tensor:
    """Returns 1 where ``pad`` keeps an id and 0 where it pads, ``(B, N)``, int64."""
    return pad([[1] * len(ids) for ids in sequences], 0)


def word_prediction(logits: Tensor, words: Tensor, weights: Tensor | None = None) -> Prediction:
    """Returns the rows of logits that predict a word.

    Args:
        logits: Of every next word, ``(K, L, V)``.
        words: Ids of these words, negative where there is none to predict, ``(K, L)``.
        weights: What every word of a text counts in the loss, ``(K,)``; by default the loss is
            the mean over all words.
    """
    known = words >= 0
    shares = known / known.sum() if weights is None else weights[:, None].expand(words.shape)
    return Prediction(logits[known], shares[known])


def _words(text: str) -> list[str]:
    return [
        part for word in text.lower().split() for part in re.split(f"({_MARKS})", word) if part
    ]
