"""OpenMoji as visual question answering: questions with one-word answers about one drawing."""

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from comp.data.openmoji import Drawing
from comp.tasks.phrases import noun


@dataclass(frozen=True)
class Question:
    """A question about one image.

    Attributes:
        image: Index of the image.
        text: The question.
        answer: The one right answer.
        family: What it asks for: an attribute, or ``yes/no`` with one.
    """

    image: int
    text: str
    answer: str
    family: str

    @property
    def id(self) -> str:
        """Nothing: no server asks for it."""
        return ""

    @property
    def answers(self) -> tuple[str, ...]:
        """The one answer."""
        return (self.answer,)

    @property
    def counts(self) -> tuple[int, ...]:
        """Nobody counted."""
        return ()


_WEIGHTS = {
    "kind": 0.15,
    "group": 0.10,
    "skin_tone": 0.13,
    "gender": 0.09,
    "colour": 0.09,
    "colour_top": 0.06,
    "colour_middle": 0.06,
    "colour_bottom": 0.06,
    "num_colours": 0.05,
    "outline": 0.06,
    "yes/no kind": 0.04,
    "yes/no group": 0.03,
    "yes/no skin_tone": 0.03,
    "yes/no gender": 0.02,
    "yes/no colour": 0.03,
}
_OPEN = {
    "kind": (
        "what kind of thing does this picture show?",
        "which kind of thing is drawn here?",
        "what sort of thing can you see in this drawing?",
    ),
    "group": (
        "which group of emoji does this drawing belong to?",
        "to which group does the picture belong?",
        "what is the group of this emoji?",
    ),
    "skin_tone": (
        "which skin tone does this drawing have?",
        "what is the skin tone in this picture?",
        "what skin tone can you see here?",
    ),
    "gender": (
        "is this person a woman or a man?",
        "does this picture show a man or a woman?",
        "who is drawn here, a woman or a man?",
    ),
    "colour": (
        "which colour covers most of this drawing?",
        "what is the main colour of this picture?",
        "in which colour is most of this drawn?",
    ),
    "colour_top": (
        "which colour covers most of the upper third?",
        "what is the main colour at the top?",
        "in which colour is the top mostly drawn?",
    ),
    "colour_middle": (
        "which colour covers most of the middle third?",
        "what is the main colour in the middle?",
        "in which colour is the middle mostly drawn?",
    ),
    "colour_bottom": (
        "which colour covers most of the lower third?",
        "what is the main colour at the bottom?",
        "in which colour is the bottom mostly drawn?",
    ),
    "num_colours": (
        "how many colours besides black and white are here?",
        "what is the number of colours in this drawing?",
        "how many colours does this picture have?",
    ),
    "outline": (
        "is this drawing wide, tall or square?",
        "what is the outline of this picture?",
        "which outline does the drawing have?",
    ),
}
_CLOSED = (
    "does this picture show {}?",
    "is there {} in this drawing?",
    "can you see {} in this picture?",
)
# A value with fewer training drawings cannot be learnt and is not asked for.
_MIN_DRAWINGS = {"kind": 8, "group": 5, "colour_top": 3, "colour_middle": 3, "colour_bottom": 3}


def allowed_values(drawings: Sequence[Drawing]) -> dict[str, tuple[str, ...]]:
    """Returns, for each attribute, the values that training shows: the only ones asked for."""
    seen: dict[str, dict[str, set[str]]] = {name: defaultdict(set) for name in _OPEN}
    for drawing in drawings:
        if drawing.split == "train":
            for name, values in seen.items():
                values[getattr(drawing, name)].add(drawing.drawing)
    return {
        name: tuple(
            sorted(
                value
                for value, members in values.items()
                if value and len(members) >= _MIN_DRAWINGS.get(name, 1)
            )
        )
        for name, values in seen.items()
    }


def all_answers(drawings: Sequence[Drawing]) -> tuple[str, ...]:
    """Returns every answer that a question can have, sorted."""
    values = allowed_values(drawings)
    return tuple(sorted({"yes", "no", *(value for known in values.values() for value in known)}))


def make_questions(
    drawings: Sequence[Drawing], split: str, *, num_questions: int, seed: int = 0
) -> list[Question]:
    """Makes distinct questions about the drawings of a split, in random order.

    Every yes/no question is asked of one drawing that has the property and of one that has not,
    so that the words alone do not tell.

    Args:
        drawings: All drawings, of all splits; an image index is a position in them.
        split: ``train``, ``val`` or ``test``.
        num_questions: How many to make.
        seed: Seed of the choice.

    Raises:
        ValueError: If the split has not enough drawings for so many distinct questions.
    """
    rng = random.Random(f"{seed} {split} questions")
    values = allowed_values(drawings)
    pools = {
        family: _pool(drawings, split, family, values[family.removeprefix("yes/no ")])
        for family in _WEIGHTS
    }
    families = [family for family in _WEIGHTS if len(pools[family]) > 1]
    found: dict[Question, None] = {}
    weights = [_WEIGHTS[family] for family in families]
    for _ in range(20 * num_questions):
        if len(found) >= num_questions:
            break
        family = rng.choices(families, weights)[0]
        asked = _ask(rng, drawings, pools[family], family)
        if not any(question in found for question in asked):
            found.update(dict.fromkeys(asked))
    if len(found) < num_questions:
        raise ValueError(
            f"only {len(found)} distinct questions can be asked about the {split} drawings, "
            f"but num_questions is {num_questions}"
        )
    questions = list(found)[:num_questions]
    rng.shuffle(questions)
    return questions


_Pool = Mapping[str, Sequence[Sequence[int]]]  # images by value and drawing


def _pool(
    drawings: Sequence[Drawing], split: str, family: str, values: Sequence[str]
) -> dict[str, list[list[int]]]:
    name = family.removeprefix("yes/no ")
    members: dict[str, dict[str, list[int]]] = {value: {} for value in values}
    for index, drawing in enumerate(drawings):
        value = getattr(drawing, name)
        if drawing.split != split or value not in members:
            continue
        # "a person with dark skin tone" is not asked of a hand; "which skin tone" is.
        if family != "yes/no skin_tone" or drawing.is_person:
            members[value].setdefault(drawing.drawing, []).append(index)
    return {value: list(found.values()) for value, found in members.items() if found}


def _ask(
    rng: random.Random, drawings: Sequence[Drawing], pool: _Pool, family: str
) -> list[Question]:
    name = family.removeprefix("yes/no ")
    value = _value(rng, pool, even=name in ("skin_tone", "gender", "outline"))
    image = _image(rng, pool[value])
    if name == family:
        return [Question(image, rng.choice(_OPEN[name]), value, family)]
    others = [other for other in pool if other != value]
    if name == "kind" and rng.random() < 0.5:  # the harder half: within the same group
        group = drawings[image].group
        near = [v for v in others if drawings[pool[v][0][0]].group == group]
        others = near or others
    other = _image(rng, pool[rng.choice(others)])
    text = rng.choice(_CLOSED).format(noun(name, value))
    return [Question(image, text, "yes", family), Question(other, text, "no", family)]


def _value(rng: random.Random, pool: _Pool, *, even: bool) -> str:
    weights = [1.0 if even else len(members) ** 0.5 for members in pool.values()]
    return rng.choices(list(pool), weights)[0]


def _image(rng: random.Random, members: Sequence[Sequence[int]]) -> int:
    return rng.choice(rng.choice(members))
