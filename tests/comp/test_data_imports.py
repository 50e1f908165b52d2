import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from comp.config import PruningConfig
from comp.data.imports import ImportReport, import_data
from comp.data.layout import DataSet
from comp.evaluation import evaluate
from comp.models import attach
from comp.models.blip_build import BlipShape, build_blip
from comp.models.clip_build import build_clip
from comp.models.tokenizer import as_pretrained
from comp.pruner import prune
from comp.tasks import build_task
from comp.tasks.text import tokenizer_from_texts
from tests.comp.test_tasks_instruct import tiny_model as tiny_llava
from tests.comp.test_tasks_nlvr import tiny_model as tiny_nlvr
from tests.comp.test_tasks_vqa import tiny_model as tiny_vqa
from tests.official_layouts import SENTENCE, WRITERS, karpathy, llava, nlvr2, picture, vqav2

SMALL = BlipShape(width=16, heads=2, vision_layers=2, text_layers=2, image_size=64, patch_size=16)


def imported(name: str, tmp_path: Path, **options: Any) -> tuple[ImportReport, Path]:
    sources = WRITERS[name](tmp_path / "in")
    out = tmp_path / "out"
    return import_data(name, sources, out, images=tmp_path / "in", **options), out


def tokenizer() -> Any:
    words = ["is this a cat? what yes no left of the dog."]
    return as_pretrained(tokenizer_from_texts(words, whole=["yes", "no"]))


def two_steps(model: nn.Module, task: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = [p.detach().clone() for p in model.parameters()]
    for batch in islice(task.train_batches(batch_size=4, seed=0), 2):
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "splits"),
    [
        ("nlvr2", {"train": 6, "val": 4, "test": 2}),
        ("karpathy", {"train": 6, "val": 3, "test": 3}),
        ("vqav2", {"train": 38, "val": 2, "test": 4, "server": 4}),
        ("llava", {"train": 22, "val": 1, "test": 1}),
    ],
)
def test_every_format_gives_its_splits_and_keeps_any_script(
    name: str, splits: dict[str, int], tmp_path: Path
) -> None:
    report, out = imported(name, tmp_path)
    rows = DataSet(out).splits
    assert report.splits == splits == {split: len(found) for split, found in rows.items()}
    assert any("γάτα" in text for row in rows["train"].fetch(range(6)) for text in row.texts)
    assert json.loads((out / "report.json").read_text())["skipped"] == []
    assert not list(tmp_path.glob(".out*"))


def test_nlvr2_in_folders_by_split_gives_the_same_rows_as_flat(tmp_path: Path) -> None:
    options = {"images": tmp_path / "in"}
    import_data("nlvr2", nlvr2(tmp_path / "in", flat=False), tmp_path / "deep", **options)
    import_data("nlvr2", nlvr2(tmp_path / "flat"), tmp_path / "out")
    splits = [DataSet(tmp_path / name).splits["train"] for name in ("deep", "out")]
    assert splits[0].fetch(range(6)) == splits[1].fetch(range(6))


def test_captions_of_an_image_stay_together(tmp_path: Path) -> None:
    _, out = imported("karpathy", tmp_path)
    row = DataSet(out).splits["test"].fetch([0])[0]
    number = row.attributes["image_id"]
    assert row.texts == tuple(f"{SENTENCE} {number} {i}" for i in range(len(row.texts)))
    assert len(row.texts) == 5 + int(number) % 3


def test_linked_images_are_read_from_where_they_lie(tmp_path: Path) -> None:
    _, out = imported("nlvr2", tmp_path, link=True)
    linked = build_task("nlvr2", tokenizer=tokenizer(), image_size=64, data=out)
    row = DataSet(out).splits["val"].fetch([0])[0]
    assert row.images[0].data is None
    again = import_data("nlvr2", nlvr2(tmp_path / "in"), tmp_path / "embedded")
    embedded = build_task(
        "nlvr2", tokenizer=tokenizer(), image_size=64, data=tmp_path / "embedded"
    )
    batches = [next(task.batches("val", batch_size=4)) for task in (linked, embedded)]
    assert again.splits["val"] == 4
    assert all(torch.equal(batches[0][key], batches[1][key]) for key in batches[0])


def test_nlvr2_trains_and_a_model_that_says_true_is_right_on_the_true_half(
    tmp_path: Path,
) -> None:
    _, out = imported("nlvr2", tmp_path)
    task = build_task("nlvr2", tokenizer=tokenizer(), image_size=64, data=out)
    model = tiny_nlvr(tokenizer())
    attach(model)
    two_steps(model, task)
    head = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 2][-1]
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([0.0, 1.0]))
    # Of four rows of val, number 0 and 3 are false.
    assert evaluate(model, task, "val")[0].metric == 50.0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nlvr2", "nlvr2"),
        ("karpathy", "retrieval"),
        ("karpathy", "captioning"),
        ("vqav2", "vqa"),
        ("llava", "instruct"),
    ],
)
def test_workers_share_the_training_batches_of_an_imported_set(
    name: str, kind: str, tmp_path: Path
) -> None:
    _, out = imported(name, tmp_path)
    task: Any = build_task(kind, tokenizer=tokenizer(), image_size=64, data=out)
    order = {"batch_size": 2, "seed": 3, "start": 1}
    alone = list(islice(task.train_batches(**order), 4))
    workers = [task.train_batches(**order, shard=(rank, 2)) for rank in range(2)]
    together = [next(workers[step % 2]) for step in range(4)]
    assert all(
        torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key]))
        for one, other in zip(alone, together, strict=True)
        for key in one
        if isinstance(one[key], torch.Tensor)
    )


def test_vqav2_trains_and_scores_as_ten_people_say(tmp_path: Path) -> None:
    _, out = imported("vqav2", tmp_path)
    words = tokenizer()
    task: Any = build_task("vqa", tokenizer=words, image_size=64, data=out)
    assert task.answers == ("no", "yes")
    model = tiny_vqa(words)
    attach(model)
    two_steps(model, task)
    with torch.no_grad():
        predictions = model.text_decoder.cls.predictions
        predictions.decoder.weight.zero_()
        predictions.decoder.bias.zero_()
        predictions.decoder.bias[words.convert_tokens_to_ids("yes")] = 5.0
    # yes by 10, 3, 1, 0 of ten: 1, (3 * 2/3 + 7 * 1) / 10 = 0.9, 9 * 1/3 / 10 = 0.3, 0.
    result = evaluate(model, task, "test")[0]
    assert result.metric == pytest.approx(100 * (1 + 0.9 + 0.3 + 0) / 4, abs=1e-4)
    batches = task.batches("server", batch_size=3)
    model.eval()
    with torch.no_grad():
        answers = task.submission(model, batches)
    assert sorted(one["question_id"] for one in answers) == [8000, 8001, 8002, 8003]
    assert {one["answer"] for one in answers} == {"yes"}
    with pytest.raises(ValueError, match=r"have no answers .* --submission"):
        evaluate(model, task, "server")


def test_a_model_that_finds_all_images_alike_finds_nothing_by_luck(tmp_path: Path) -> None:
    _, out = imported("karpathy", tmp_path)
    words = tokenizer()
    task = build_task("retrieval", tokenizer=words, image_size=64, data=out)
    model = build_clip(SMALL, words)
    attach(model)
    two_steps(model, task)
    torch.nn.init.zeros_(model.visual_projection.weight)
    # All similarities are 0: of equal ones the wrong stand first, so nothing is found by luck.
    counts = [len(row.texts) for row in DataSet(out).splits["test"].fetch(range(3))]
    assert sorted(counts) == [5, 6, 7]
    result = evaluate(model, task, "test", batch_size=2, final=True)[0]
    assert result.metric == 0.0
    assert result.details["i2t_r10"] == 0.0  # 18 captions, 11 to 13 of them wrong
    assert result.details["t2i_r5"] == 100.0  # there are but three images


def test_captions_are_judged_by_all_references(tmp_path: Path) -> None:
    sources = karpathy(tmp_path / "in")
    yes = {"raw": "yes " * 20}
    edit(sources[0], lambda content: content["images"][-1]["sentences"].__setitem__(0, yes))
    import_data("karpathy", sources, tmp_path / "out")
    words = tokenizer()
    task = build_task("captioning", tokenizer=words, image_size=64, data=tmp_path / "out")
    model: Any = build_blip("captioning", SMALL, words)
    attach(model)
    two_steps(model, task)
    head = model.text_decoder.cls.predictions.decoder
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
        head.bias[words.convert_tokens_to_ids("yes")] = 5.0
    # "yes" twenty times is one reference of the seven of one image of three, and equals it:
    # CIDEr-D is 10 for that reference and 0 for the others.
    result = evaluate(model, task, "test", batch_size=2)[0]
    assert result.metric == pytest.approx(100 * (10 / 7) / 3, abs=1e-4)


def test_an_answer_weighs_the_share_of_people_who_gave_it(tmp_path: Path) -> None:
    _, out = imported("vqav2", tmp_path)
    task: Any = build_task("vqa", tokenizer=tokenizer(), image_size=64, data=out)
    batch = next(task.batches("train", batch_size=38))
    rows = DataSet(out).splits["train"].fetch(range(38))
    assert any(len(row.counts) > 1 for row in rows)
    for weights, row in zip(batch["answer_weights"], rows, strict=True):
        shares = sorted(count / 10 for count in row.counts)
        assert sorted(weights[weights > 0].tolist()) == pytest.approx(shares)


def test_questions_about_a_validation_image_are_not_in_training(tmp_path: Path) -> None:
    _, out = imported("vqav2", tmp_path, holdout=0.25)
    splits = DataSet(out).splits
    images = {
        split: {row.images[0].data for row in splits[split].fetch(range(len(splits[split])))}
        for split in ("train", "val")
    }
    assert len(images["val"]) == 5
    assert not images["train"] & images["val"]


def test_llava_trains_on_rows_with_and_without_images(tmp_path: Path) -> None:
    _, out = imported("llava", tmp_path)
    words = tokenizer()
    task = build_task("instruct", tokenizer=words, image_size=64, data=out)
    model = tiny_llava(words)
    attach(model)
    two_steps(model, task)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    # All tokens are equally likely, and the first of them is no word.
    result = evaluate(model, task, "train", batch_size=5)[0]
    assert result.metric == 0.0
    assert result.loss == pytest.approx(math.log(len(words) + 1), rel=1e-4)


def test_a_text_only_row_scores_alone_as_in_a_batch(tmp_path: Path) -> None:
    _, out = imported("llava", tmp_path)
    task = build_task("instruct", tokenizer=tokenizer(), image_size=64, data=out)
    model = tiny_llava(tokenizer()).eval()
    with torch.no_grad():
        together = task.score(model, next(task.batches("train", batch_size=8)))[1]
        alone = [
            task.score(model, batch)[1]
            for batch in task.batches("train", batch_size=1, num_samples=8)
        ]
    torch.testing.assert_close(torch.cat(alone), together, rtol=1e-4, atol=1e-4)


def test_missing_and_truncated_images_are_left_out_and_listed(tmp_path: Path) -> None:
    sources = nlvr2(tmp_path / "in")
    (tmp_path / "in" / "train-1-0-img0.png").unlink()
    broken = tmp_path / "in" / "train-2-0-img1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    report = import_data("nlvr2", sources, tmp_path / "out", on_bad="skip")
    assert report.splits == {"train": 4, "val": 4, "test": 2}
    listed = json.loads((tmp_path / "out" / "report.json").read_text())["skipped"]
    assert {one["id"] for one in listed} == {"train-1-0-1", "train-2-0-1"}
    assert "2 left out" in str(report)


@pytest.mark.parametrize("on_bad", ["skip", "fail"])
def test_half_of_the_images_missing_is_refused(on_bad: str, tmp_path: Path) -> None:
    sources = nlvr2(tmp_path / "in")
    for number in range(3):
        (tmp_path / "in" / f"train-{number}-0-img0.png").unlink()
    with pytest.raises(ValueError, match=r"3 of (6|12) rows .*cannot be used with the images in"):
        import_data("nlvr2", sources, tmp_path / "out", on_bad=on_bad)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_truncated_image_fails_without_a_directory(tmp_path: Path) -> None:
    sources = nlvr2(tmp_path / "in")
    (tmp_path / "in" / "dev-2-0-img1.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"dev\.json, row 3: image dev-2-0-img1\.png: 4 bytes"):
        import_data("nlvr2", sources, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def test_a_label_that_is_neither_true_nor_false_is_named(tmp_path: Path) -> None:
    sources = nlvr2(tmp_path / "in")
    sources[0].write_text(sources[0].read_text().replace('"False"', '"maybe"', 1))
    with pytest.raises(ValueError, match=r"train\.json, row 1: field 'label' .* got 'maybe'"):
        import_data("nlvr2", sources, tmp_path / "out")


def test_a_split_that_does_not_exist_is_named(tmp_path: Path) -> None:
    sources = karpathy(tmp_path / "in")
    edit(sources[0], lambda content: content["images"][2].update(split="dev"))
    with pytest.raises(ValueError, match=r"row 3: field 'split' must be one of .* got 'dev'"):
        import_data("karpathy", sources, tmp_path / "out")


@pytest.mark.parametrize("path", ["../secret.jpg", "/etc/secret.jpg"])
def test_a_path_that_climbs_out_is_refused_even_when_skipping(path: str, tmp_path: Path) -> None:
    sources = llava(tmp_path / "in")
    edit(sources[0], lambda content: content[1].update(image=path))
    with pytest.raises(ValueError, match=rf"row 2: image path '{path}' leaves the image root"):
        import_data("llava", sources, tmp_path / "out", on_bad="skip")
    assert not (tmp_path / "out").exists()


def test_a_link_that_leads_out_of_the_root_is_refused(tmp_path: Path) -> None:
    sources = llava(tmp_path / "in")
    picture(tmp_path / "secret.jpg", 9)
    (tmp_path / "in" / "coco" / "1.jpg").unlink()
    (tmp_path / "in" / "coco" / "1.jpg").symlink_to(tmp_path / "secret.jpg")
    with pytest.raises(ValueError, match=r"leaves the image root .* by a link"):
        import_data("llava", sources, tmp_path / "out")


def test_files_too_small_to_leave_a_training_split_are_refused(tmp_path: Path) -> None:
    sources = llava(tmp_path / "in")
    edit(sources[0], lambda content: content.__delitem__(slice(2, None)))
    with pytest.raises(ValueError, match=r"split train would be empty: .* about 2 images"):
        import_data("llava", sources, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_name_too_long_for_any_file_is_a_missing_image(tmp_path: Path) -> None:
    sources = llava(tmp_path / "in")
    edit(sources[0], lambda content: content[1].update(image="x" * 400))
    report = import_data("llava", sources, tmp_path / "out", on_bad="skip")
    assert [(one.where, one.id) for one in report.skipped] == [("llava.json, row 2", "row-1")]


def test_answers_to_other_questions_are_refused(tmp_path: Path) -> None:
    sources = vqav2(tmp_path / "in")
    annotations = next(path for path in sources if path.name == "val2014_annotations.json")
    edit(annotations, lambda content: content["annotations"][0].update(question_id=7))
    with pytest.raises(ValueError, match=r"question_id 4000 is not in val2014_annotations\.json"):
        import_data("vqav2", sources, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda rows: rows[1].update(image_id=77),
            r"questions\.json, row 2: question_id 4001 is about image 0, .* about image 77; pass",
        ),
        (
            lambda rows: rows.append(rows[0]),
            r"annotations\.json, row 5: question_id 4000 was answered before; a question",
        ),
    ],
)
def test_answers_that_do_not_fit_their_questions_are_refused(
    change: Callable[[Any], Any], words: str, tmp_path: Path
) -> None:
    sources = vqav2(tmp_path / "in")
    annotations = next(path for path in sources if path.name == "val2014_annotations.json")
    edit(annotations, lambda content: change(content["annotations"]))
    with pytest.raises(ValueError, match=words):
        import_data("vqav2", sources, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_questions_without_their_answers_are_refused(tmp_path: Path) -> None:
    sources = [path for path in vqav2(tmp_path / "in") if "val2014_a" not in path.name]
    with pytest.raises(ValueError, match=r"val2014_questions\.json needs its annotations"):
        import_data("vqav2", sources, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("nlvr2", "{]", "row 1 is no JSON"),
        ("nlvr2", "[" * 5000, "row 1 is no JSON"),
        ("karpathy", "[" * 5000, "is no JSON"),
        ("karpathy", "{}", "field 'images' is missing among no fields;"),
        ("nlvr2", '{"sentence": "x"}', "row 1: field 'identifier' is missing among sentence"),
        ("nlvr2", "", "holds no rows"),
        ("karpathy", "[]", "field 'images' is missing among list"),
        ("karpathy", '{"images": []}', "holds no rows"),
        (
            "karpathy",
            '{"images": [{"split": "val", "filename": "a.jpg", "filepath": 7}]}',
            "row 1: field 'filepath' must be text, but got 7",
        ),
        ("vqav2", '{"data_subtype": "x"}', "'data_subtype' must be one of .* 'x'"),
        ("vqav2", '{"data_subtype": "train2014", "questions": 3}', "'questions' must be a list"),
        ("llava", "{}", "must hold a list of conversations, but is dict"),
        ("llava", '[{"conversations": [{"from": "bot"}]}]', "'from' must be human or gpt"),
    ],
)
def test_another_shape_is_named(name: str, content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "source.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"source\.json.*{words}"):
        import_data(name, [path], tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"holdout": 0.7}, r"holdout must be in \(0, 0.5\), but got 0.7"),
        ({"on_bad": "stop"}, "on_bad must be skip or fail, but got 'stop'"),
    ],
)
def test_options_out_of_bounds_are_named(
    options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    sources: Sequence[Path] = nlvr2(tmp_path / "in")
    with pytest.raises(ValueError, match=words):
        import_data("nlvr2", sources, tmp_path / "out", **options)


def test_a_directory_that_exists_is_not_touched(tmp_path: Path) -> None:
    sources = nlvr2(tmp_path / "in")
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="out exists; remove it or name another"):
        import_data("nlvr2", sources, tmp_path / "out")


def test_a_conversation_out_of_turn_is_a_bad_row(tmp_path: Path) -> None:
    sources = llava(tmp_path / "in")
    edit(sources[0], lambda content: content[1]["conversations"].pop())
    report = import_data("llava", sources, tmp_path / "out", on_bad="skip")
    assert [one.id for one in report.skipped] == ["row-1"]
    assert "must be human and gpt by turns" in report.skipped[0].reason


def test_a_data_set_for_another_task_is_refused(tmp_path: Path) -> None:
    _, out = imported("karpathy", tmp_path)
    with pytest.raises(ValueError, match=r"holds captions, which task 'vqa' does not read"):
        build_task("vqa", tokenizer=tokenizer(), image_size=64, data=out)


@pytest.mark.parametrize(
    ("name", "kind", "split", "rest"),
    [
        ("nlvr2", "nlvr2", "test", "test1.json"),
        ("nlvr2", "nlvr2", "val", "dev.json"),
        ("karpathy", "retrieval", "test", "dataset_coco.json"),
        ("karpathy", "captioning", "test", "dataset_coco.json"),
        ("vqav2", "vqa", "test", "val2014"),
        ("vqav2", "vqa", "server", "test2015"),
    ],
)
def test_a_split_alone_gives_the_batches_it_gives_beside_the_others(
    name: str, kind: str, split: str, rest: str, tmp_path: Path
) -> None:
    sources = WRITERS[name](tmp_path / "in")
    import_data(name, sources, tmp_path / "whole", images=tmp_path / "in")
    if name == "karpathy":
        edit(sources[0], lambda told: told.update(images=told["images"][-3:]))
    alone = [path for path in sources if path.name.startswith(rest)]
    import_data(name, alone, tmp_path / "alone", images=tmp_path / "in")
    given = {"answers": ["no", "yes"]} if kind == "vqa" else {}
    build = partial(build_task, kind, tokenizer=tokenizer(), image_size=64)
    whole: Any = build(data=tmp_path / "whole")
    task: Any = build(data=tmp_path / "alone", **given)
    assert list(task.samples) == [split]
    batches = [next(one.batches(split, batch_size=4)) for one in (whole, task)]
    assert all(torch.equal(batches[0][key], batches[1][key]) for key in batches[0])
    with pytest.raises(ValueError, match=rf"'{kind}' needs a split train, but .* only {split};"):
        task.train_batches(batch_size=2, seed=0)


def test_pruning_on_a_set_without_training_rows_says_so(tmp_path: Path) -> None:
    sources = [path for path in nlvr2(tmp_path / "in") if path.name != "train.json"]
    import_data("nlvr2", sources, tmp_path / "out")
    task = build_task("nlvr2", tokenizer=tokenizer(), image_size=64, data=tmp_path / "out")
    with pytest.raises(ValueError, match=r"must be one of val, test, but got 'train'; name"):
        prune(tiny_nlvr(tokenizer()), task, PruningConfig(ratios=(0.2,), num_stages=2))
