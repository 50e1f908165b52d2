from collections import Counter, defaultdict

import pytest

from comp.data.openmoji import Drawing, OpenMoji
from comp.tasks.phrases import noun
from comp.tasks.questions import Question, all_answers, make_questions


@pytest.fixture(scope="module")
def questions(openmoji: OpenMoji) -> dict[str, list[Question]]:
    numbers = {"train": 6000, "val": 2000, "test": 2000}
    return {s: make_questions(openmoji.drawings, s, num_questions=n) for s, n in numbers.items()}


def is_right(question: Question, drawing: Drawing) -> bool:
    name = question.family.removeprefix("yes/no ")
    value = getattr(drawing, name)
    if question.family == name:
        return bool(question.answer == value)
    return (noun(name, value) in question.text) == (question.answer == "yes")


def test_questions_are_of_their_own_split(
    questions: dict[str, list[Question]], openmoji: OpenMoji
) -> None:
    for split, asked in questions.items():
        assert {openmoji.drawings[one.image].split for one in asked} == {split}


def test_every_answer_is_true_of_the_drawing(
    questions: dict[str, list[Question]], openmoji: OpenMoji
) -> None:
    wrong = [q for q in questions["test"] if not is_right(q, openmoji.drawings[q.image])]
    assert wrong == []


def test_there_are_some_eighty_answers(openmoji: OpenMoji) -> None:
    assert 70 <= len(all_answers(openmoji.drawings)) <= 100


def test_test_answers_were_seen_in_training(questions: dict[str, list[Question]]) -> None:
    seen = {one.answer for one in questions["train"]}
    assert {one.answer for one in questions["test"]} <= seen


def test_yes_and_no_are_equally_right_for_every_wording(
    questions: dict[str, list[Question]],
) -> None:
    for asked in questions.values():
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for one in asked:
            if one.family.startswith("yes/no"):
                counts[one.text][one.answer] += 1
        # Cutting the list to its length may part the very last pair.
        assert sum(abs(c["yes"] - c["no"]) for c in counts.values()) <= 1


def test_no_answer_is_right_for_a_quarter_of_the_questions(
    questions: dict[str, list[Question]],
) -> None:
    for asked in questions.values():
        assert Counter(one.answer for one in asked).most_common(1)[0][1] < 0.25 * len(asked)


def test_questions_have_five_to_twelve_words(questions: dict[str, list[Question]]) -> None:
    lengths = {len(one.text.split()) for asked in questions.values() for one in asked}
    assert min(lengths) >= 5
    assert max(lengths) <= 12


def test_no_question_comes_twice(questions: dict[str, list[Question]]) -> None:
    assert len(set(questions["train"])) == len(questions["train"])


def test_the_same_seed_gives_the_same_questions(openmoji: OpenMoji) -> None:
    def made(seed: int) -> list[Question]:
        return make_questions(openmoji.drawings, "val", num_questions=50, seed=seed)

    assert made(3) == made(3)
    assert made(3) != made(4)


def test_more_questions_than_there_are_is_an_error(openmoji: OpenMoji) -> None:
    few = [one for one in openmoji.drawings if one.kind in ("heart", "bird")]
    with pytest.raises(ValueError, match=r"only \d+ distinct .* num_questions is 5000"):
        make_questions(few, "test", num_questions=5000)
