"""Words that a person typed, and the known ones that they may have meant."""

import difflib


def nearest(word: str, known: list[str]) -> str:
    """Returns ``"; did you mean 'x'?"`` for the known word closest to ``word``, or nothing."""
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""
