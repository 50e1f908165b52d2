"""CIDEr-D and BLEU against values worked out by hand and against the published scorer."""

import math

import pytest

from comp.metrics import bleu, cider, words

CANDIDATES = [
    "a man riding a wave on top of a surfboard",
    "a cat sitting on a table",
    "two dogs play in the snow",
]
REFERENCES = [
    ["a man riding a wave on a surfboard", "a surfer rides a large wave in the ocean"],
    ["a cat is sitting on top of a table", "a cat on a wooden table"],
    ["two dogs playing in the snow", "a pair of dogs run through snow"],
]


def test_cider_equals_the_published_scorer() -> None:
    """Values of ``Cider().compute_score`` of pycocoevalcap 1.2 on the same lists."""
    expected = [3.5181195062169084, 2.620895272544189, 2.4418279162316754]
    assert cider(CANDIDATES, REFERENCES) == pytest.approx(expected, rel=1e-12)


def test_bleu_equals_the_published_scorer() -> None:
    """Values of ``Bleu(4).compute_score`` of pycocoevalcap 1.2, which adds 1e-9 to every count."""
    expected = [0.8636363635971074, 0.7687061147481077, 0.5694517051109179, 0.4543464602444682]
    found = [bleu(CANDIDATES, REFERENCES, n) for n in (1, 2, 3, 4)]
    assert found == pytest.approx(expected, rel=1e-8)


def test_a_caption_equal_to_its_only_reference_scores_ten() -> None:
    texts = ["a red flag on a pole", "the old man sleeps now", "dogs run through fresh snow"]
    assert cider(texts, [[text] for text in texts]) == pytest.approx([10.0] * 3)


def test_cider_by_hand_for_one_word_in_common() -> None:
    """Only "cat" is shared: cos = idf^2 / (|c| |r|) for n = 1, nothing for longer n-grams.

    "cat" is told of one image of two, so idf = ln 2, as is that of "dog"; "a" is told of both and
    weighs nothing. c = (cat), r = (cat, dog): cos = 1 / sqrt 2; lengths 2 and 3.
    """
    score = cider(["a cat", "a bird"], [["a cat dog"], ["a fish"]])[0]
    bigram = 1 / math.sqrt(2)  # "a cat" of ("a cat", "cat dog")
    expected = 10 / 4 * math.exp(-1 / 72) * (1 / math.sqrt(2) + bigram)
    assert score == pytest.approx(expected)


def test_a_caption_without_a_shared_word_scores_nothing() -> None:
    assert cider(["one two", "three"], [["four"], ["three"]])[0] == 0
    assert bleu(["one two three four"], [["five six seven eight"]]) == 0


def test_short_captions_pay_the_brevity_penalty() -> None:
    found = bleu(["a cat sat on"], [["a cat sat on the mat"]])
    assert found == pytest.approx(math.exp(1 - 6 / 4))


def test_words_are_lower_case_and_without_punctuation() -> None:
    assert words("A well-known dog, isn't it?  Ein Mädchen.") == [
        "a",
        "well-known",
        "dog",
        "isn't",
        "it",
        "ein",
        "mädchen",
    ]


def test_lists_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="2 captions and 1 lists"):
        cider(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="of which 1 are empty"):
        bleu(["a", "b"], [["a"], []])
