"""Published files of a data set to a directory in the layout: all of it, or nothing.

The directory holds ``data.parquet`` and ``report.json``: how many rows came in, how many were left
out, and why each of these.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from comp.data.images import decode_image
from comp.data.imports import karpathy, llava, nlvr2, vqav2
from comp.data.imports.draft import Draft
from comp.data.layout import FILE_NAME, EncodedImage, Row, write_rows
from comp.directories import complete_directory, refuse_existing

FORMATS = {"nlvr2": nlvr2, "karpathy": karpathy, "vqav2": vqav2, "llava": llava}
NUM_ANSWERS = 3128
"""Candidate answers that are kept of VQA; BLIP's answer list has as many (arXiv 2201.12086)."""


@dataclass(frozen=True)
class Skipped:
    """A row that was left out, and why.

    Attributes:
        where: File and row.
        id: The row's id.
        reason: A sentence part.
    """

    where: str
    id: str
    reason: str


@dataclass(frozen=True)
class ImportReport:
    """What an import did.

    Attributes:
        format: Which format was read.
        splits: Rows written, by split.
        skipped: Rows left out.
    """

    format: str
    splits: dict[str, int]
    skipped: tuple[Skipped, ...]

    def __str__(self) -> str:
        """Counts in one line, and the first of the rows that were left out."""
        kept = ", ".join(f"{split} {count}" for split, count in self.splits.items())
        text = f"{sum(self.splits.values())} rows ({kept}), {len(self.skipped)} left out"
        lines = [f"  {one.where} ({one.id}): {one.reason}" for one in self.skipped[:5]]
        more = len(self.skipped) - len(lines)
        return "\n".join([text, *lines, *([f"  and {more} more in report.json"] if more else [])])


def import_data(
    format: str,
    sources: Sequence[Path],
    out: Path,
    *,
    images: Path | None = None,
    on_bad: str = "fail",
    link: bool = False,
    holdout: float = 0.02,
) -> ImportReport:
    """Turns published files into a directory in the layout.

    Every image is decoded once, so what is imported can be read. Rows are stored in the order
    of a hash, so the first rows of a split are a fair sample of it.

    Args:
        format: One of ``FORMATS``.
        sources: The published files in any order.
        out: The directory to make; it appears when it is complete.
        images: Folder that images are searched in; the folder of the first source by default.
        on_bad: What to do with rows whose image is missing or broken or whose text is malformed:
            ``fail``, or ``skip`` them as long as fewer than half of a split are bad.
        link: Store the paths of images and not their bytes; the images must stay where they are.
        holdout: Share of training images for each split that the publisher does not provide.

    Raises:
        ValueError: If a file is of another form, rows are bad, or a split would be empty.
        FileNotFoundError: If a source or the image folder does not exist.
        FileExistsError: If ``out`` exists.
    """
    images = _check(format, sources, out, images, on_bad, holdout)
    reader = FORMATS[format]
    drafts = reader.read(sources, holdout=holdout)
    _refuse_repeats(drafts)
    drafts.sort(key=lambda one: hashlib.sha256(one.id.encode()).digest())
    found = {id(draft): _find(draft, images) for draft in drafts}
    skipped = [_skipped(one, one.fault or found[id(one)][1]) for one in drafts]
    bad = [one for one in skipped if one.reason]
    _judge(drafts, bad, on_bad, images)
    good = [d for d, s in zip(drafts, skipped, strict=True) if not s.reason]
    broken: list[Skipped] = []
    facts = {"name": format, "kind": reader.KIND, "source": ", ".join(p.name for p in sources)}
    if reader.KIND == "questions":
        facts["answers"] = json.dumps(_answers(good), ensure_ascii=False)
    if link:
        facts["image_root"] = str(images.resolve())

    def judge() -> None:
        _judge(drafts, [*bad, *broken], on_bad, images)

    paths = {draft.id: found[id(draft)][0] for draft in good}
    rows = _rows(good, paths, images, link=link, broken=broken, judge=judge)
    with complete_directory(out) as part:
        write_rows(part / FILE_NAME, rows, metadata=facts)
        bad += broken
        left = {one.id for one in bad}
        splits = dict(Counter(draft.split for draft in drafts if draft.id not in left))
        report = ImportReport(format, splits, tuple(bad))
        text = json.dumps(dataclasses.asdict(report), indent=1, ensure_ascii=False)
        (part / "report.json").write_text(text + "\n", encoding="utf-8")
    return report


def _check(
    format: str,
    sources: Sequence[Path],
    out: Path,
    images: Path | None,
    on_bad: str,
    holdout: float,
) -> Path:
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, but got {format!r}")
    if on_bad not in ("skip", "fail"):
        raise ValueError(f"on_bad must be skip or fail, but got {on_bad!r}")
    if not 0 < holdout < 0.5:
        raise ValueError(f"holdout must be in (0, 0.5), but got {holdout}")
    if not sources:
        raise ValueError("an import needs at least one source file, but got none")
    refuse_existing(out)
    images = images or sources[0].parent
    if not images.is_dir():
        raise FileNotFoundError(f"there is no image folder {images}; check --images")
    return images


def _find(draft: Draft, root: Path) -> tuple[list[str], str]:
    """Returns the paths of a row's images, and what is wrong if one is not there."""
    paths = []
    for candidates in draft.images:
        for path in candidates:
            if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
                raise ValueError(
                    f"{draft.where}: image path {path!r} leaves the image root {root}; "
                    "paths must lie below it"
                )
        there = [path for path in candidates if _is_file(root / path)]
        if not there:
            return [], f"image {candidates[0]:.200} is missing"
        if not (root / there[0]).resolve().is_relative_to(root.resolve()):
            raise ValueError(
                f"{draft.where}: image path {there[0]!r} leaves the image root {root} by a link; "
                "pass the folder that holds the images themselves"
            )
        paths.append(there[0])
    return paths, ""


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for any file
        return False


def _refuse_repeats(drafts: Sequence[Draft]) -> None:
    seen: dict[str, str] = {}
    for draft in drafts:
        if draft.id in seen:
            raise ValueError(
                f"{draft.where}: id {draft.id!r} is that of {seen[draft.id]} too; "
                "pass every file once"
            )
        seen[draft.id] = draft.where


def _judge(drafts: Sequence[Draft], bad: Sequence[Skipped], on_bad: str, root: Path) -> None:
    """Refuses bad rows, or too many of them."""
    if not bad:
        return
    first = f"{bad[0].where}: {bad[0].reason}"
    if on_bad == "fail":
        raise ValueError(
            f"{len(bad)} of {len(drafts)} rows cannot be used with the images in {root}, the "
            f"first being {first}; mend them or leave them out with --on-bad skip"
        )
    left = {one.id for one in bad}
    totals = Counter(draft.split for draft in drafts)
    lost = Counter(draft.split for draft in drafts if draft.id in left)
    for split, count in lost.items():
        if 2 * count >= totals[split]:
            raise ValueError(
                f"{count} of {totals[split]} rows of split {split} cannot be used with the images "
                f"in {root}, the first being {first}; check --images, as at least half of them "
                "must be good"
            )


def _rows(
    drafts: Sequence[Draft],
    paths: dict[str, list[str]],
    root: Path,
    *,
    link: bool,
    broken: list[Skipped],
    judge: Callable[[], None],
) -> Iterator[Row]:
    """Yields the rows whose images can be decoded; lists the others and has them judged."""
    whole: dict[str, str] = {}  # what is wrong with an image, by path
    for draft in drafts:
        images = []
        for path in paths[draft.id]:
            data = (root / path).read_bytes() if not link or path not in whole else b""
            if path not in whole:
                whole[path] = _verdict(path, data)
            images.append(EncodedImage(path=path) if link else EncodedImage(data=data))
        reason = next((whole[path] for path in paths[draft.id] if whole[path]), "")
        if reason:
            broken.append(_skipped(draft, reason))
            judge()
            continue
        yield Row(
            draft.id,
            draft.split,
            images,
            draft.texts,
            draft.labels,
            draft.counts,
            draft.attributes,
        )


def _verdict(path: str, data: bytes) -> str:
    try:
        decode_image(data)
    except ValueError as error:
        return f"image {path}: {error}"
    return ""


def _answers(drafts: Sequence[Draft]) -> dict[str, int]:
    """Counts for how many training questions each answer was the most frequent one."""
    counts = Counter(one.labels[0] for one in drafts if one.split == "train" and one.labels)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:NUM_ANSWERS])


def _skipped(draft: Draft, reason: str) -> Skipped:
    return Skipped(draft.where, draft.id, reason)
