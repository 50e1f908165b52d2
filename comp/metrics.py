"""Scores of generated captions against several references: CIDEr-D and BLEU-4. No torch in here.

Words are what is left of a lower-cased text without punctuation. The published numbers use
Stanford's tokenizer, a Java program, which splits some words further ("don't" into two); on
ordinary captions the two agree.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

MAX_N = 4
SIGMA = 6.0
"""Width of CIDEr-D's penalty on unequal lengths, in words."""

_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")
_NGrams = Counter[tuple[str, ...]]


def words(text: str) -> list[str]:
    """Returns the words of a text in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def cider(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Scores captions by their tf-idf weighted n-grams in common with the references.

    Args:
        candidates: One caption of each image.
        references: The references of each image, at least one.

    Returns:
        CIDEr-D of each image, from 0 to 10; the mean is what papers report, times 100. Document
        frequencies come from the references given, so a score depends on all of them, and is 0
        for a single image.

    Raises:
        ValueError: If the lengths differ or an image has no reference.

    Source: Vedantam et al., CIDEr (arXiv 1411.5726), Section 8 (CIDEr-D).
    """
    _check(candidates, references)
    told = [[_ngrams(words(text)) for text in texts] for texts in references]
    documents: Counter[tuple[str, ...]] = Counter(
        gram for texts in told for gram in {gram for one in texts for gram in one}
    )
    log_images = math.log(len(candidates)) if candidates else 0.0
    scores = []
    for candidate, own in zip(candidates, told, strict=True):
        mine = _TfIdf(_ngrams(words(candidate)), documents, log_images)
        each = [mine.similarity(_TfIdf(grams, documents, log_images)) for grams in own]
        scores.append(10.0 * sum(each) / len(each))
    return scores


def bleu(candidates: Sequence[str], references: Sequence[Sequence[str]], max_n: int = 4) -> float:
    """Scores captions by the precision of their n-grams over the whole corpus.

    Args:
        candidates: One caption of each image.
        references: The references of each image, at least one.
        max_n: Longest n-gram; 4 gives BLEU-4.

    Returns:
        BLEU in [0, 1], with the brevity penalty of the closest reference lengths.

    Raises:
        ValueError: If the lengths differ or an image has no reference.

    Source: Papineni et al., BLEU (ACL 2002).
    """
    _check(candidates, references)
    matched, possible = [0] * max_n, [0] * max_n
    length, reference_length = 0, 0
    for candidate, texts in zip(candidates, references, strict=True):
        tokens, told = words(candidate), [words(text) for text in texts]
        length += len(tokens)
        reference_length += min((abs(len(t) - len(tokens)), len(t)) for t in told)[1]
        for n in range(1, max_n + 1):
            own = _count(tokens, n)
            most: _NGrams = Counter()
            for one in told:
                most |= _count(one, n)
            matched[n - 1] += sum((own & most).values())
            possible[n - 1] += max(len(tokens) - n + 1, 0)
    if min(matched) == 0:
        return 0.0
    precision = sum(math.log(m / p) for m, p in zip(matched, possible, strict=True)) / max_n
    return math.exp(min(0.0, 1 - reference_length / length) + precision)


class _TfIdf:
    """A caption's n-grams with their weights, one vector per n."""

    def __init__(
        self, grams: _NGrams, documents: Counter[tuple[str, ...]], log_images: float
    ) -> None:
        self.vectors: list[dict[tuple[str, ...], float]] = [{} for _ in range(MAX_N)]
        for gram, count in grams.items():
            idf = log_images - math.log(max(documents[gram], 1))
            self.vectors[len(gram) - 1][gram] = count * idf
        self.norms = [math.sqrt(sum(v * v for v in vector.values())) for vector in self.vectors]
        self.length = sum(count for gram, count in grams.items() if len(gram) == 1)

    def similarity(self, reference: "_TfIdf") -> float:
        """Mean over n of the clipped cosine, damped by the difference in length."""
        penalty = math.exp(-((self.length - reference.length) ** 2) / (2 * SIGMA**2))
        total = 0.0
        for mine, other, own_norm, other_norm in zip(
            self.vectors, reference.vectors, self.norms, reference.norms, strict=True
        ):
            if own_norm > 0 and other_norm > 0:
                shared = sum(min(v, other[g]) * other[g] for g, v in mine.items() if g in other)
                total += penalty * shared / (own_norm * other_norm)
        return total / MAX_N


def _count(tokens: Sequence[str], n: int) -> _NGrams:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def _ngrams(tokens: Sequence[str]) -> _NGrams:
    counts: _NGrams = Counter()
    for n in range(1, MAX_N + 1):
        counts.update(_count(tokens, n))
    return counts


def _check(candidates: Sequence[str], references: Iterable[Sequence[str]]) -> None:
    numbers = [len(texts) for texts in references]
    if len(numbers) != len(candidates) or 0 in numbers:
        raise ValueError(
            "every caption needs at least one reference, but got "
            f"{len(candidates)} captions and {len(numbers)} lists of references"
            + (f", of which {numbers.count(0)} are empty" if 0 in numbers else "")
        )
