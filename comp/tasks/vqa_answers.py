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
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't
    mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd somebody'd've somebody'll somebody's someone'd someone'd've
    someone'll someone's something'd something'd've something'll that's there'd there'd've there're
    there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
    why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd
    you'd've you'll you're you've
"""
_FULL = {
    right[:place] + right[place + 1 :]: right
    for right in _CONTRACTIONS.split()
    for place, letter in enumerate(right)
    if letter == "'"
}
"""Contractions that lack one of their apostrophes."""
_STOP = re.compile(r"\.(?!\d)")
_COMMA = re.compile(r"\d,\d")
_MARKS = r""";/[]"{}()=+\_-><@`,?!"""


def normalize_answer(answer: str) -> str:
    """Returns an answer as it is compared where people disagree.

    Lower case; no articles; number words as digits; no full stop but before a digit; marks as
    spaces, or gone without a trace if one stands beside a space or a comma between digits, as in
    ``1,000``; contractions with their apostrophe. All other marks, as ``%`` and ``$``, stay.

    Args:
        answer: In any script.
    """
    text = re.sub(r"[\n\t]", " ", answer).strip()
    has_thousands = _COMMA.search(text) is not None
    plain = text
    for mark in _MARKS:
        is_loose = has_thousands or f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if is_loose else " ")
    words = _STOP.sub("", plain).lower().split()
    digits = (_DIGITS.get(word, word) for word in words)
    return " ".join(_FULL.get(word, word) for word in digits if word not in _ARTICLES)


def answer_accuracy(labels: Sequence[str], counts: Sequence[int]) -> dict[str, float]:
    """Returns the accuracy of every answer that somebody gave; others have 0.

    Answers are normalised where people disagree. Where all say the same, it counts as it stands.

    Args:
        labels: The distinct answers of a question.
        counts: How many people gave each; empty means one each.
    """
    given: Counter[str] = Counter()
    for label, count in zip(labels, counts or [1] * len(labels), strict=True):
        given[normalize_answer(label) if len(labels) > 1 else label.strip()] += count
    people = sum(given.values())
    if people == 1:
        return dict.fromkeys(given, 1.0)  # one true answer, not a sample of opinions
    return {
        answer: (k * min((k - 1) / 3, 1) + (people - k) * min(k / 3, 1)) / people
        for answer, k in given.items()
    }
