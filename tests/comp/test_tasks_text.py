from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from comp.data.openmoji import OpenMoji
from comp.tasks import build_tokenizer
from comp.tasks.questions import all_answers
from comp.tasks.text import encode, pad, pad_mask, tokenizer_from_texts, without_marks


def test_vocabulary_is_small(tokenizer: Any) -> None:
    assert 500 <= len(tokenizer) <= 800


def test_every_answer_is_one_token(tokenizer: Any, openmoji: OpenMoji) -> None:
    answers = list(all_answers(openmoji.drawings))
    ids = tokenizer(answers, add_special_tokens=False)["input_ids"]
    assert {len(tokens) for tokens in ids} == {1}
    assert len({tokens[0] for tokens in ids}) == len(answers)


def test_text_begins_with_enc_and_ends_with_sep(tokenizer: Any) -> None:
    ids = tokenizer("Is this a Person?")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == [
        "[ENC]", "is", "this", "a", "person", "?", "[SEP]",
    ]  # fmt: skip


def test_unknown_words_are_spelt(tokenizer: Any) -> None:
    tokens = tokenizer.tokenize("zqx")
    assert tokens == ["z", "##q", "##x"]


def test_answers_begin_with_dec(tokenizer: Any) -> None:
    assert tokenizer.bos_token == "[DEC]"
    assert tokenizer.pad_token_id == 0


def test_the_same_drawings_give_the_same_tokenizer(tokenizer: Any, openmoji: OpenMoji) -> None:
    again = build_tokenizer(drawings=openmoji.drawings)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_saving_and_loading_keeps_every_id(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "which medium-dark xylophone, is it?"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.bos_token_id == tokenizer.bos_token_id
    assert loaded.get_vocab() == tokenizer.get_vocab()


def test_no_texts_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one text, but got none"):
        tokenizer_from_texts([])


def test_equal_texts_share_their_ids(tokenizer: Any) -> None:
    first, second, third = encode(tokenizer, ["a woman", "a man", "a woman"])
    assert first == third != second


def test_padding_reaches_the_longest() -> None:
    assert pad([[5, 6], [7]], 0).tolist() == [[5, 6], [7, 0]]
    assert pad_mask([[5, 6], [7]]).tolist() == [[1, 1], [1, 0]]


@pytest.mark.parametrize(
    ("text", "question", "statement"),
    [
        ('What is "it": a (red) #dog?', "what is it a red dog?", "what is it a red dog?"),
        ("Mr.Smith's; no. 1", "mrsmith's no 1", "mr smith's no 1"),
        ("  plain words, kept  ", "plain words, kept", "plain words, kept"),
    ],
)
def test_marks_that_blip_never_sees_are_taken_out_as_its_code_does(
    text: str, question: str, statement: str
) -> None:
    assert without_marks(text) == question
    assert without_marks(text, between=" ") == statement
