"""OpenMoji as NLVR2: statements about two drawings that are true or false.

Statements come in fours: two statements about two pairs of images, each true of one pair only.
The two pairs differ in one image, by one attribute. So every text is as often true as false, and
so is every pair: neither the words alone nor the pictures alone tell.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from comp.data.openmoji import Drawing
from comp.tasks.phrases import noun
from comp.tasks.questions import allowed_values


@dataclass(frozen=True)
class Statement:
    """A statement about a left and a right image.

    Attributes:
        images: Indexes of the left and the right image.
        text: The statement.
        label: Whether it is true.
        family: Form and attribute, ``both skin_tone``.
    """

    images: tuple[int, int]
    text: str
    label: bool
    family: str


_ATTRIBUTES = {"kind": 0.26, "group": 0.14, "skin_tone": 0.24, "gender": 0.14, "colour": 0.22}
BOTH = ("both images show {}", "there is {} in both of the images", "in both images we see {}")
_ONE = (
    "exactly one image shows {}",
    "there is {} in exactly one of the images",
    "only one of the two images shows {}",
)
ANY = (
    "at least one image shows {}",
    "there is {} in at least one of the images",
    "one or both of the images show {}",
)
NEITHER = (
    "neither image shows {}",
    "there is no image of {} here",
    "none of the two images shows {}",
)
_SIDES = (
    "the left image shows {} and the right image {}",
    "on the left is {} and on the right {}",
    "we see {} left and {} right",
)
_SAME = ("the two images show the same {}", "both images have the same {}")
_DIFFERENT = ("the two images show different {}s", "the images do not have the same {}")
_WORDS = {
    "kind": "kind of thing",
    "group": "emoji group",
    "skin_tone": "skin tone",
    "gender": "gender",
    "colour": "main colour",
}
# Kinds too vague to be denied of a picture, and kinds of which a picture may show another.
_VAGUE = ("creature", "emotion", "object", "scenery", "silhouette", "symbol")
_OVERLAPS = (
    {"person", "family", "silhouette", "creature"},
    {"face", "cat", "monkey", "creature"},
    {"mammal", "cat", "monkey"},
    {"flower", "plant", "festival"},
    {"sign", "warning", "button", "letters", "keycap", "symbol"},
)
_ALL = ("group", "kind", "skin_tone", "gender", "role", "activity")


class _Pools:
    """The drawings of one split by attribute and by all attributes but one."""

    def __init__(self, drawings: Sequence[Drawing], split: str) -> None:
        self.drawings = drawings
        self.by_value: dict[str, dict[str, list[int]]] = {}
        self.near: dict[str, dict[tuple[str, ...], list[int]]] = {}
        allowed_of = allowed_values(drawings)
        for name in _ATTRIBUTES:
            allowed = allowed_of[name]
            values: dict[str, list[int]] = defaultdict(list)
            near: dict[tuple[str, ...], list[int]] = defaultdict(list)
            for index, drawing in enumerate(drawings):
                value = getattr(drawing, name)
                if drawing.split != split or value not in allowed:
                    continue
                if name in ("skin_tone", "gender") and not drawing.is_person:
                    continue
                if name == "kind" and value in _VAGUE:
                    continue
                values[value].append(index)
                near[self._rest(drawing, name)].append(index)
            self.by_value[name] = dict(values)
            self.near[name] = dict(near)

    def value(self, index: int, name: str) -> str:
        return str(getattr(self.drawings[index], name))

    def pick(self, rng: random.Random, name: str, value: str) -> int:
        """Returns an image that has the value; skin tones of one drawing share one chance."""
        members: dict[str, list[int]] = defaultdict(list)
        for index in self.by_value[name][value]:
            members[self.drawings[index].drawing].append(index)
        return rng.choice(rng.choice(list(members.values())))

    def negative(self, rng: random.Random, index: int, name: str) -> int | None:
        """Returns an image that differs from ``index`` in the attribute and little else."""
        value = self.value(index, name)
        near = self.near[name][self._rest(self.drawings[index], name)]
        others = [i for i in near if not _overlap(name, value, self.value(i, name))]
        return rng.choice(others) if others else None

    def other(self, rng: random.Random, name: str, value: str) -> int | None:
        """Returns an image that has another value of the attribute."""
        values = [v for v in self.by_value[name] if not _overlap(name, value, v)]
        return self.pick(rng, name, rng.choice(values)) if values else None

    @staticmethod
    def _rest(drawing: Drawing, name: str) -> tuple[str, ...]:
        if name == "group":
            return ()
        if name == "kind":
            return (drawing.group,)
        if name == "colour":
            return (drawing.group, drawing.kind)
        rest = tuple(str(getattr(drawing, other)) for other in _ALL if other != name)
        return (*rest, drawing.drawing) if name == "skin_tone" else (*rest, drawing.subgroup)


def make_statements(
    drawings: Sequence[Drawing], split: str, *, num_statements: int, seed: int = 0
) -> list[Statement]:
    """Makes distinct statements about the drawings of a split, in random order.

    Args:
        drawings: All drawings, of all splits; an image index is a position in them.
        split: ``train``, ``val`` or ``test``.
        num_statements: How many to make, a multiple of four.
        seed: Seed of the choice.

    Raises:
        ValueError: If ``num_statements`` is no multiple of four, or the split has not enough
            drawings for so many distinct statements.
    """
    if num_statements % 4:
        raise ValueError(f"num_statements must be a multiple of 4, but got {num_statements}")
    rng = random.Random(f"{seed} {split} statements")
    pools = _Pools(drawings, split)
    names = [name for name in _ATTRIBUTES if len(pools.by_value[name]) > 1]
    weights = [_ATTRIBUTES[name] for name in names]
    found: dict[Statement, None] = {}
    for _ in range(5 * num_statements):
        if len(found) >= num_statements:
            break
        four = _four(rng, pools, rng.choices(names, weights)[0])
        if four and not any(one in found for one in four) and len(set(four)) == 4:
            found.update(dict.fromkeys(four))
    if len(found) < num_statements:
        raise ValueError(
            f"only {len(found)} distinct statements can be made about the {split} drawings, "
            f"but num_statements is {num_statements}"
        )
    statements = list(found)
    rng.shuffle(statements)
    return statements


def _four(rng: random.Random, pools: _Pools, name: str) -> list[Statement]:
    value = rng.choice(list(pools.by_value[name]))
    image = pools.pick(rng, name, value)
    # A kind differs half the time from one of its own group, half the time from any.
    is_far = name == "kind" and rng.random() < 0.5
    negative = pools.other(rng, name, value) if is_far else pools.negative(rng, image, name)
    if negative is None:
        return []
    form = rng.choice(_FORMS)
    return form(rng, pools, name, image, negative)


def _both_or_one(
    rng: random.Random, pools: _Pools, name: str, image: int, negative: int
) -> list[Statement]:
    value = pools.value(image, name)
    mate = pools.pick(rng, name, value)
    texts = (rng.choice(BOTH), rng.choice(_ONE))
    return _cross(
        rng,
        pairs=((image, mate), (negative, mate)),
        texts=tuple(text.format(noun(name, value)) for text in texts),
        families=(f"both {name}", f"one {name}"),
    )


def _any_or_neither(
    rng: random.Random, pools: _Pools, name: str, image: int, negative: int
) -> list[Statement]:
    value = pools.value(image, name)
    mate = pools.other(rng, name, value)
    if mate is None:
        return []
    texts = (rng.choice(ANY), rng.choice(NEITHER))
    return _cross(
        rng,
        pairs=((image, mate), (negative, mate)),
        texts=tuple(text.format(noun(name, value)) for text in texts),
        families=(f"any {name}", f"neither {name}"),
    )


def _sides(
    rng: random.Random, pools: _Pools, name: str, image: int, negative: int
) -> list[Statement]:
    words = [noun(name, pools.value(index, name)) for index in (image, negative)]
    text = rng.choice(_SIDES)
    return _cross(
        rng,
        pairs=((image, negative), (negative, image)),
        texts=(text.format(*words), text.format(*reversed(words))),
        families=(f"sides {name}", f"sides {name}"),
        keep_order=True,
    )


def _same_or_not(
    rng: random.Random, pools: _Pools, name: str, image: int, negative: int
) -> list[Statement]:
    mate = pools.pick(rng, name, pools.value(image, name))
    different = rng.choice(_DIFFERENT).format(_WORDS[name])
    different = different.replace("kind of things", "kinds of thing")
    return _cross(
        rng,
        pairs=((image, mate), (negative, mate)),
        texts=(rng.choice(_SAME).format(_WORDS[name]), different),
        families=(f"same {name}", f"different {name}"),
    )


_FORMS = (_both_or_one, _any_or_neither, _sides, _same_or_not)


def _cross(
    rng: random.Random,
    *,
    pairs: tuple[tuple[int, int], tuple[int, int]],
    texts: tuple[str, ...],
    families: tuple[str, str],
    keep_order: bool = False,
) -> list[Statement]:
    """Returns both texts about both pairs; text i is true of pair i only."""
    if not keep_order and rng.random() < 0.5:
        pairs = (pairs[0][::-1], pairs[1][::-1])
    return [
        Statement(pair, text, i == j, families[i])
        for i, text in enumerate(texts)
        for j, pair in enumerate(pairs)
    ]


def _overlap(name: str, value: str, other: str) -> bool:
    """Whether a picture with the ``other`` value may be said to have ``value`` too."""
    return value == other or (
        name == "kind" and any(value in kinds and other in kinds for kinds in _OVERLAPS)
    )
