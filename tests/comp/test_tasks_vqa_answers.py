import pytest

from comp.tasks.vqa_answers import answer_accuracy, normalize_answer


@pytest.mark.parametrize(
    ("said", "compared"),
    [
        ("A Dog.", "dog"),
        ("Two", "2"),
        ("none", "0"),
        ("1,000", "1000"),
        ("2.5", "2.5"),
        ("10:30", "10:30"),
        ("black/white", "black white"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("the couldn'tve", "couldn't've"),
        ("it's", "it's"),
        ("Γάτα 猫", "γάτα 猫"),
        ("t-shirt", "t shirt"),
        ("black - white!", "black white"),
        ("10,000-20,000", "1000020000"),
        ("50%", "50%"),
        ("$5.", "$5"),
        (".5", ".5"),
        ("yall'd've", "y'all'd've"),
        ("couldntve", "couldntve"),
    ],
)
def test_answers_are_compared_in_normal_form(said: str, compared: str) -> None:
    assert normalize_answer(said) == compared


def test_accuracy_leaves_every_person_out_in_turn() -> None:
    # 4 of 10: the four see 3 others (1), the six see 4 (1). 2 of 10: 2 * 1/3 and 8 * 2/3.
    found = answer_accuracy(["cat", "kitten", "a cat", "dog"], [3, 2, 1, 4])
    assert found == {
        "cat": pytest.approx(1.0),
        "kitten": pytest.approx((2 / 3 + 16 / 3) / 10),
        "dog": pytest.approx(1.0),
    }


def test_one_true_answer_counts_in_full() -> None:
    assert answer_accuracy(["wide"], []) == {"wide": 1.0}


def test_what_all_people_say_counts_as_it_stands() -> None:
    assert answer_accuracy(["two "], [10]) == {"two": 1.0}
    assert answer_accuracy(["two", "2"], [9, 1]) == {"2": 1.0}
