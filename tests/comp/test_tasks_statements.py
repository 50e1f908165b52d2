from collections import Counter, defaultdict

import pytest

from comp.data.openmoji import OpenMoji
from comp.tasks.statements import Statement, make_statements

NUMBERS = {"train": 6000, "val": 2000, "test": 2000}


@pytest.fixture(scope="module")
def statements(openmoji: OpenMoji) -> dict[str, list[Statement]]:
    return {
        split: make_statements(openmoji.drawings, split, num_statements=number)
        for split, number in NUMBERS.items()
    }


def surplus(counts: dict[object, Counter[bool]]) -> int:
    return sum(abs(labels[True] - labels[False]) for labels in counts.values())


def test_statements_are_of_their_own_split(
    statements: dict[str, list[Statement]], openmoji: OpenMoji
) -> None:
    for split, made in statements.items():
        shown = {openmoji.drawings[image].split for one in made for image in one.images}
        assert shown == {split}


@pytest.mark.parametrize("split", NUMBERS)
def test_words_alone_do_not_tell(statements: dict[str, list[Statement]], split: str) -> None:
    counts: dict[object, Counter[bool]] = defaultdict(Counter)
    for one in statements[split]:
        counts[one.text][one.label] += 1
    assert surplus(counts) == 0


@pytest.mark.parametrize("split", NUMBERS)
def test_pictures_alone_do_not_tell(statements: dict[str, list[Statement]], split: str) -> None:
    counts: dict[object, Counter[bool]] = defaultdict(Counter)
    for one in statements[split]:
        counts[one.images][one.label] += 1
    assert surplus(counts) == 0


def test_a_bag_of_words_learnt_in_training_is_right_half_of_the_time(
    statements: dict[str, list[Statement]],
) -> None:
    votes: Counter[str] = Counter()
    for one in statements["train"]:
        votes.update({word: 1 if one.label else -1 for word in one.text.split()})
    guesses = [sum(votes[w] for w in one.text.split()) >= 0 for one in statements["val"]]
    right = [g == one.label for g, one in zip(guesses, statements["val"], strict=True)]
    assert sum(right) / len(right) == 0.5


@pytest.mark.parametrize("attribute", ["skin_tone", "gender"])
def test_false_pairs_differ_from_a_true_pair_in_one_attribute(
    statements: dict[str, list[Statement]], openmoji: OpenMoji, attribute: str
) -> None:
    known = ("group", "kind", "skin_tone", "gender", "role", "activity")
    made = [one for one in statements["train"] if one.family == f"both {attribute}"]
    true_pairs = defaultdict(list)
    for one in made:
        if one.label:
            true_pairs[one.text].append(one.images)

    def differences(pair: tuple[int, int], other: tuple[int, int]) -> set[str]:
        sides = [(openmoji.drawings[a], openmoji.drawings[b]) for a, b in zip(pair, other)]  # noqa: B905
        return {name for a, b in sides for name in known if getattr(a, name) != getattr(b, name)}

    for one in made:
        if not one.label:
            closest = min(len(differences(one.images, pair)) for pair in true_pairs[one.text])
            assert closest == 1


def test_left_and_right_statements_tell_the_order(
    statements: dict[str, list[Statement]], openmoji: OpenMoji
) -> None:
    sides = [one for one in statements["val"] if one.family == "sides colour"]
    for one in sides:
        left, right = (openmoji.drawings[image].colour for image in one.images)
        told = [word for word in one.text.split() if word in (left, right)]
        assert (told == [left, right]) == one.label


def test_statements_have_five_to_twenty_words(statements: dict[str, list[Statement]]) -> None:
    lengths = {len(one.text.split()) for made in statements.values() for one in made}
    assert min(lengths) >= 5
    assert max(lengths) <= 20


def test_all_forms_of_statement_occur(statements: dict[str, list[Statement]]) -> None:
    forms = {one.family.split()[0] for one in statements["test"]}
    assert forms == {"both", "one", "any", "neither", "sides", "same", "different"}


def test_the_same_seed_gives_the_same_statements(openmoji: OpenMoji) -> None:
    def made(seed: int) -> list[Statement]:
        return make_statements(openmoji.drawings, "val", num_statements=40, seed=seed)

    assert made(3) == made(3)
    assert made(3) != made(4)


def test_an_odd_number_is_refused(openmoji: OpenMoji) -> None:
    with pytest.raises(ValueError, match="multiple of 4, but got 10"):
        make_statements(openmoji.drawings, "val", num_statements=10)


def test_more_statements_than_there_are_is_an_error(openmoji: OpenMoji) -> None:
    few = [one for one in openmoji.drawings if one.kind in ("heart", "bird")]
    with pytest.raises(ValueError, match=r"only \d+ distinct .* num_statements is 8000"):
        make_statements(few, "test", num_statements=8_000)
