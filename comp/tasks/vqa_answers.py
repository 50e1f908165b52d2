"""VQA's accuracy: ten people answered, and an answer counts by how many of them gave it.

An answer's accuracy is ``min(k / 3, 1)``, ``k`` of the other nine people having said the same,
averaged over the ten ways to leave one person out; both sides are normalised first (VQA, arXiv
1505.00468, section 3; the rules of normalisation are those of https://visualqa.org/evaluation.html).
"""

import re
from collections import Counter
from collections.abc import Sequence

_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_DIGITS = {**{word: str(i) for i, word in enumerate(_NUMBERS)}, "none": "0"}
_ARTICLES = ("a", "an", "the")
_CONTRACTIONS = [
    "ain't",
    "aren't",
    "can't",
    "could've",
    "couldn't",
    "couldn't've",
    "didn't",
    "doesn't",
    "don't",
    "hadn't",
    "hadn't've",
    "hasn't",
    "haven't",
    "he'd",
    "he'd've",
    "he's",
    "how'd",
    "how'll",
    "how's",
    "isn't",
    "it'd",
    "it'd've",
    "it'll",
    "ma'am",
    "might've",
    "mightn't",
    "mightn't've",
    "must've",
    "mustn't",
    "needn't",
    "o'clock",
    "oughtn't",
    "shan't",
    "she'd've",
    "should've",
    "shouldn't",
    "shouldn't've",
    "somebody'd",
    "somebody'll",
    "somebody's",
    "someone'd",
    "someone'll",
    "someone's",
    "something'd",
    "something'll",
    "that'd",
    "that'd've",
    "that's",
    "there'd",
    "there'd've",
    "there're",
    "there's",
    "they'd",
    "they'd've",
    "they'll",
    "they're",
    "they've",
    "wasn't",
    "we'd've",
    "we've",
    "weren't",
    "what'll",
    "what're",
    "what's",
    "what've",
    "when's",
    "where'd",
    "where's",
    "where've",
    "who'd",
    "who'd've",
    "who'll",
    "who's",
    "who've",
    "why'll",
    "why're",
    "why's",
    "won't",
    "would've",
    "wouldn't",
    "wouldn't've",
    "y'all",
    "you'd",
    "you'd've",
    "you'll",
    "you're",
    "you've",
]
_FULL = {
    spelled: right
    for right in _CONTRACTIONS
    for spelled in (
        right.replace("'", ""),
        right.replace("'", "", 1),
        right[::-1].replace("'", "", 1)[::-1],
    )
    if spelled != right
}
_PERIOD = re.compile(r"(?<!\d)\.|\.(?!\d)")
_COMMA = re.compile(r"(?<=\d),(?=\d)")
_MARKS = re.compile(r"[^\w\s':.]|_")


def normalize_answer(answer: str) -> str:
    """Returns an answer as it is compared.

    Lower case; no articles; number words as digits; punctuation as spaces, but for apostrophes,
    colons and decimal points; contractions with their apostrophe.

    Args:
        answer: In any script.
    """
    text = _COMMA.sub("", answer.strip().lower())
    text = _PERIOD.sub("", _MARKS.sub(" ", text))
    words = (_DIGITS.get(word, word) for word in text.split() if word not in _ARTICLES)
    return " ".join(_FULL.get(word, word) for word in words)


def answer_accuracy(labels: Sequence[str], counts: Sequence[int]) -> dict[str, float]:
    """Returns the accuracy of every answer that somebody gave, normalised; others have 0.

    Args:
        labels: The distinct answers of a question.
        counts: How many people gave each; empty means one each.
    """
    given: Counter[str] = Counter()
    for label, count in zip(labels, counts or [1] * len(labels), strict=True):
        given[normalize_answer(label)] += count
    people = sum(given.values())
    if people == 1:
        return dict.fromkeys(given, 1.0)  # one true answer, not a sample of opinions
    return {
        answer: (k * min((k - 1) / 3, 1) + (people - k) * min(k / 3, 1)) / people
        for answer, k in given.items()
    }
