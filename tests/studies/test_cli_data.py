"""From official files and a model's directory to a number by commands; and what is refused."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from comp.checkpoint import save_pruned
from comp.data.layout import DataSet
from comp.models import load_model
from comp.models.load import attach
from comp.tasks import build_task
from comp.tasks.build import read_answers
from studies.yaml_text import write_yaml
from tests.comp.naive_blip_nlvr import random_state
from tests.comp.test_data_imports import tokenizer as words_of_statements
from tests.comp.test_tasks_nlvr import tiny_model as tiny_nlvr
from tests.hub_models import save_hub_model
from tests.official_layouts import WRITERS, karpathy, llava, nlvr2, picture, vqav2
from tests.studies.test_cli import ROOT, invoke, json_of

PRUNING = {
    "ratios": [0.2],
    "num_stages": 2,
    "quantum_cap": 0.6,
    "steps_per_stage": 2,
    "fine_tune_steps": 3,
    "fine_tune_checks": 1,
    "batch_size": 8,
    "eval_samples": 2,
    "test_samples": 4,
    "calibration_samples": 8,
    "probe_samples": 8,
}


def imported(format: str, sources: list[Path], folder: Path, *options: str) -> Path:
    out = folder / "data"
    words = ["data", "import", format, *map(str, sources), "--out", str(out), *options]
    result = invoke(*words)
    assert result.exit_code == 0, result.output
    return out


def evaluated(model: Path, data: Path, *options: str) -> dict[str, Any]:
    result = invoke("evaluate", str(model), "--data", str(data), *options, "--json")
    assert result.exit_code == 0, result.output
    return json_of(result)


def resave(directory: Path, change: Callable[[Any], Any]) -> None:
    """Changes a model's weights in place, on disk."""
    loaded = load_model(directory)
    with torch.no_grad():
        change(loaded.model)
    save_pruned(loaded.model, directory, tokenizer=loaded.tokenizer)


def always(head: Any, token: int) -> None:
    """Makes a text decoder say one token, whatever it sees."""
    head.weight.zero_()
    head.bias.zero_()
    head.bias[token] = 5.0


def test_nlvr2_from_its_files_to_its_accuracy(tmp_path: Path) -> None:
    data = imported("nlvr2", nlvr2(tmp_path / "in", flat=False), tmp_path)
    model: Any = tiny_nlvr(words_of_statements())
    with torch.no_grad():
        model.cls_head[2].weight.zero_()
        model.cls_head[2].bias.copy_(torch.tensor([0.0, 1.0]))
    save_pruned(model, tmp_path / "model", tokenizer=words_of_statements())
    # It says true: of dev's four rows number 0 and 3 are false, of test1's two number 0.
    assert evaluated(tmp_path / "model", data, "--split", "val")["value"] == 50.0
    assert evaluated(tmp_path / "model", data)["value"] == 50.0


def test_karpathy_from_its_file_to_recall_and_cider(tmp_path: Path) -> None:
    sources = karpathy(tmp_path / "in")
    content = json.loads(sources[0].read_text())
    content["images"][-1]["sentences"][0]["raw"] = "yes " * 20
    sources[0].write_text(json.dumps(content))
    data = imported("karpathy", sources, tmp_path)
    save_hub_model("clip-vit-tiny", tmp_path / "clip")
    resave(tmp_path / "clip", lambda model: model.visual_projection.weight.zero_())
    # All similarities are 0, and of equal ones the wrong stand first: no caption of 18 is found
    # among the first ten, but one of three images always is among the first five.
    counts = [len(row.texts) for row in DataSet(data).splits["test"].fetch(range(3))]
    assert sorted(counts) == [5, 6, 7]
    found = evaluated(tmp_path / "clip", data)
    assert found["value"] == 0.0
    assert (found["details"]["i2t_r10"], found["details"]["t2i_r5"]) == (0.0, 100.0)
    save_hub_model("blip-image-captioning-base", tmp_path / "blip")
    yes = load_model(tmp_path / "blip").tokenizer.convert_tokens_to_ids("yes")
    resave(
        tmp_path / "blip",
        lambda model: always(model.text_decoder.cls.predictions.decoder, yes),
    )
    # One of seven references of one of three images is what it says: CIDEr-D 10 for that one.
    told = evaluated(tmp_path / "blip", data)
    assert (told["task"], told["metric"]) == ("captioning", "CIDEr")
    assert told["value"] == pytest.approx(100 * (10 / 7) / 3, abs=1e-4)


def test_vqav2_from_its_files_to_its_accuracy_and_the_servers_file(tmp_path: Path) -> None:
    data = imported("vqav2", vqav2(tmp_path / "in"), tmp_path, "--images", str(tmp_path / "in"))
    save_hub_model("blip-vqa-base", tmp_path / "blip")
    yes = load_model(tmp_path / "blip").tokenizer.convert_tokens_to_ids("yes")
    resave(
        tmp_path / "blip",
        lambda model: always(model.text_decoder.cls.predictions.decoder, yes),
    )
    # Yes by 10, 3, 1 and 0 of ten: 1, (3 * 2/3 + 7) / 10, 9 * 1/3 / 10 and 0.
    found = evaluated(tmp_path / "blip", data)
    assert found["value"] == pytest.approx(100 * (1 + 0.9 + 0.3) / 4, abs=1e-4)
    options = ["--split", "server", "--submission", str(tmp_path / "answers.json")]
    assert evaluated(tmp_path / "blip", data, *options)["answers"] == 4
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert sorted(answers, key=lambda one: int(one["question_id"])) == [
        {"question_id": number, "answer": "yes"} for number in range(8000, 8004)
    ]
    refused = invoke("evaluate", str(tmp_path / "blip"), "--data", str(data), *options[:2])
    assert refused.exit_code == 2
    assert "questions without answers" in refused.stderr


def test_llava_from_its_file_to_exact_match(tmp_path: Path) -> None:
    def told(no: set[str]) -> list[Path]:
        sources = llava(tmp_path / "in")
        rows = json.loads(sources[0].read_text())
        for row in rows:
            row["conversations"][-1]["value"] = "no" if row["id"] in no else "yes"
        sources[0].write_text(json.dumps(rows))
        return sources

    first = imported("llava", told(set()), tmp_path / "first", "--holdout", "0.2")
    held = DataSet(first).splits["test"]
    assert len(held) == 5
    no = {row.id for row in held.fetch([0, 1])}
    data = imported("llava", told(no), tmp_path / "second", "--holdout", "0.2")
    save_hub_model("llava-1.5-tiny-hf", tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    task = build_task("instruct", tokenizer=loaded.tokenizer, image_size=32, data=data)
    attach(loaded.model)
    optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=1e-2)
    loaded.model.train()
    batches = task.train_batches(batch_size=4, seed=0)
    for _ in range(40):
        optimizer.zero_grad()
        task.loss(loaded.model, next(batches)).backward()
        optimizer.step()
    save_pruned(loaded.model, tmp_path / "model", tokenizer=loaded.tokenizer)
    # Every answer that it learnt ends with yes; of five held-out conversations two do not.
    found = evaluated(tmp_path / "model", data)
    assert (found["metric"], found["value"]) == ("exact match", pytest.approx(60.0))


def bad_shape(folder: Path) -> list[str]:
    (folder / "a.json").write_text('{"images": [{"split": "train"}]}')
    return ["karpathy", "a.json"]


def edited(format: str, folder: Path, old: str, new: str, count: int = 1) -> list[str]:
    sources = WRITERS[format](folder)
    for path in sources:
        text = path.read_text(encoding="utf-8")
        if old in text:
            path.write_text(text.replace(old, new, count), encoding="utf-8")
            break
    return [format, *(path.name for path in sources)]


def half_missing(folder: Path) -> list[str]:
    words = [path.name for path in nlvr2(folder)]
    for number in range(3):
        (folder / f"train-{number}-0-img0.png").unlink()
    return ["nlvr2", *words, "--on-bad", "skip"]


def wrong_root(folder: Path) -> list[str]:
    sources = karpathy(folder)
    picture(folder / "flickr" / "1.jpg", 9)
    return ["karpathy", sources[0].name, "--images", "flickr"]


def empty_split(folder: Path) -> list[str]:
    words = [path.name for path in nlvr2(folder)]
    (folder / "dev.json").write_text("")
    return ["nlvr2", *words]


def other_questions(folder: Path) -> list[str]:
    return edited("vqav2", folder, '"question_id": 4001, "answers"', '"question_id": 7, "answers"')


BAD_INPUT: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "shape": (bad_shape, "a.json, row 1: field 'filename' is missing among split"),
    "no-split": (
        lambda folder: edited("karpathy", folder, '"split": "val"', '"split": "dev"'),
        "row 7: field 'split' must be one of train, restval, val, test, but got 'dev'",
    ),
    "half-missing": (half_missing, "3 of 6 rows of split train cannot be used"),
    "wrong-root": (
        wrong_root,
        "12 of 12 rows cannot be used with the images in flickr, the first being dataset_coco",
    ),
    "other-answers": (
        other_questions,
        "val2014_questions.json, row 2: question_id 4001 is not in val2014_annotations.json",
    ),
    "empty-split": (
        empty_split,
        "dev.json holds no rows; check that it is complete",
    ),
    "label": (
        lambda folder: edited("nlvr2", folder, '"label": "True"', '"label": "yes"'),
        "train.json, row 2: field 'label' must be True or False, but got 'yes'",
    ),
    "climbs": (
        lambda folder: edited("llava", folder, "coco/1.jpg", "../secret.jpg"),
        "llava.json, row 2: image path '../secret.jpg' leaves the image root",
    ),
    "no-file": (lambda folder: ["llava", "gone.json"], "there is no file gone.json"),
    "holdout": (
        lambda folder: ["llava", *(p.name for p in llava(folder)), "--holdout", "0.9"],
        "holdout must be in (0, 0.5), but got 0.9",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_sentence_and_leaves_nothing_behind(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make, sentence = BAD_INPUT[name]
    words = make(tmp_path)
    before = sorted(tmp_path.iterdir())
    result = invoke("data", "import", *words, "--out", "out")
    assert result.exit_code == 2, result.output
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_split_that_is_not_there_is_named(tmp_path: Path) -> None:
    train = [path for path in nlvr2(tmp_path / "in") if path.name == "train.json"]
    data = imported("nlvr2", train, tmp_path)
    save_pruned(
        tiny_nlvr(words_of_statements()), tmp_path / "model", tokenizer=words_of_statements()
    )
    result = invoke("evaluate", str(tmp_path / "model"), "--data", str(data))
    assert result.exit_code == 2
    assert "split must be one of train, but got 'test'" in result.stderr


def test_a_run_needs_all_splits_and_says_so_before_it_starts(tmp_path: Path) -> None:
    train = [path for path in nlvr2(tmp_path / "in") if path.name == "train.json"]
    data = imported("nlvr2", train, tmp_path)
    words = ["--set", "model=blip-tiny-nlvr2", "--set", "task=nlvr2", "--set", f"data={data}"]
    result = invoke("prune", "prune-vqa", *words, "--root", str(tmp_path / "runs"))
    assert result.exit_code == 2
    assert "has the splits train, but a run needs val and test too" in result.stderr
    assert not (tmp_path / "runs").exists()


def test_an_imported_set_says_what_it_is(tmp_path: Path) -> None:
    data = imported("karpathy", karpathy(tmp_path / "in"), tmp_path)
    result = invoke("data", "info", str(data), "--json")
    values = json_of(result)
    assert values["splits"] == {"train": 6, "val": 3, "test": 3}
    assert values["tasks"] == ["retrieval", "captioning"]
    assert "γάτα" in invoke("data", "info", str(data)).stdout
    gone = invoke("data", "info", str(tmp_path / "gone"))
    assert gone.exit_code == 2
    assert "there is no data set at" in gone.stderr


def test_broken_images_are_counted_and_listed(tmp_path: Path) -> None:
    sources = nlvr2(tmp_path / "in")
    broken = tmp_path / "in" / "train-2-0-img1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    words = [*map(str, sources), "--out", str(tmp_path / "out"), "--on-bad", "skip"]
    result = invoke("data", "import", "nlvr2", *words)
    assert result.exit_code == 0, result.output
    assert "11 rows (" in result.stdout
    assert "1 left out" in result.stdout
    assert "train.json, row 3 (train-2-0-1): image train-2-0-img1.png: 60 bytes" in result.stdout


def test_a_directory_of_the_hub_is_measured_against_a_dense_one_in_its_own_type(
    tmp_path: Path,
) -> None:
    save_hub_model("clip-vit-tiny", tmp_path)
    words = [
        "measure",
        str(tmp_path),
        "--batch-size",
        "2",
        "--repeats",
        "2",
        "--dtype",
        "bfloat16",
    ]
    alone = invoke(*words)
    assert alone.exit_code == 2
    assert "does not say what it was pruned from; name it with --dense" in alone.stderr
    beside = invoke(*words, "--dense", str(tmp_path), "--json")
    assert beside.exit_code == 0, beside.output
    assert json_of(beside)["dense_ms"] > 0


def test_a_model_of_another_architecture_is_one_sentence(tmp_path: Path) -> None:
    save_hub_model("clip-vit-tiny", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    result = invoke("evaluate", str(tmp_path))
    assert result.exit_code == 2
    assert "holds a BertModel, which has no adapter; the classes known are" in result.stderr
    assert result.stderr.count("\n") == 1


def test_weights_of_another_architecture_are_one_sentence_of_every_command(
    tmp_path: Path,
) -> None:
    save_hub_model("clip-vit-tiny", tmp_path / "clip")
    save_hub_model("blip-vqa-base", tmp_path / "dense")
    shutil.copy(tmp_path / "clip" / "model.safetensors", tmp_path / "dense")
    data = imported("vqav2", vqav2(tmp_path / "in"), tmp_path, "--images", str(tmp_path / "in"))
    dense = str(tmp_path / "dense")
    for words in (
        ["evaluate", dense],
        ["measure", dense, "--dense", dense],
        ["diagnose", dense],
        ["prune", str(spec_of(tmp_path, data, "other"))],
    ):
        result = invoke(*words)
        assert result.exit_code == 2, words
        last = result.stderr.splitlines()[-1]
        assert "does not fit the model, a BlipForQuestionAnswering: of its tensors are" in last
        assert last.endswith("pass weights of that class")


def test_a_set_of_the_evaluated_split_alone_is_measured_and_never_trained_on(
    tmp_path: Path,
) -> None:
    sources = [path for path in vqav2(tmp_path / "in") if path.name.startswith("val2014")]
    data = imported("vqav2", sources, tmp_path, "--images", str(tmp_path / "in"))
    save_hub_model("blip-vqa-base", tmp_path / "dense")
    yes = load_model(tmp_path / "dense").tokenizer.convert_tokens_to_ids("yes")
    resave(tmp_path / "dense", lambda m: always(m.text_decoder.cls.predictions.decoder, yes))
    dense = str(tmp_path / "dense")
    refused = invoke("evaluate", dense, "--data", str(data))
    assert refused.exit_code == 2
    assert (
        "no training questions, whose frequent answers would be the candidates" in refused.stderr
    )
    answers = tmp_path / "answer_list.json"
    answers.write_text('["no", "yes"]')
    given = ["--answers", str(answers)]
    # Yes by 10, 3, 1 and 0 of ten, as with the training files beside them.
    found = evaluated(tmp_path / "dense", data, *given)
    assert found["value"] == pytest.approx(100 * (1 + 0.9 + 0.3) / 4, abs=1e-4)
    beside = ["measure", dense, "--data", str(data), "--dense", dense, "--repeats", "1", *given]
    assert "split must be one of test, but got 'val'" in invoke(*beside).stderr
    assert invoke(*beside, "--split", "test").exit_code == 0
    trained = invoke("prune", str(spec_of(tmp_path, data, "other")))
    assert trained.exit_code == 2
    assert "has the splits test, but a run needs train and val too" in trained.stderr
    assert not (tmp_path / "runs").exists()


def test_candidate_answers_of_another_set_are_taken_and_bad_ones_named(tmp_path: Path) -> None:
    whole = imported("vqav2", vqav2(tmp_path / "in"), tmp_path, "--images", str(tmp_path / "in"))
    assert read_answers(whole) == ["no", "yes"]
    path = tmp_path / "answers.json"
    for content, words in (
        ("{}", "must hold candidate answers"),
        ("[]", "but has none"),
        ('["yes", 3]', "row 2: an answer must be a text that comes once, but got 3"),
        ('["yes", "yes"]', "row 2: an answer must be a text that comes once, but got 'yes'"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=words):
            read_answers(path)
    result = invoke("evaluate", "blip-tiny-nlvr2", "--answers", str(whole))
    assert result.exit_code == 2
    assert "answers are the candidates of task 'vqa' on an imported data set" in result.stderr


def test_a_checkpoint_of_the_authors_becomes_a_model_by_one_command(tmp_path: Path) -> None:
    sizes = {"width": 64, "text_width": 64, "blocks": 1, "text_layers": 2, "patch": 16, "side": 2}
    state = random_state(**sizes, words=40, positions=16)
    torch.save({"model": state}, tmp_path / "nlvr.pth")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join([*special, *(f"w{i}" for i in range(33))]) + "\n")
    words = [str(tmp_path / "nlvr.pth"), "--out", str(tmp_path / "out")]
    done = invoke("models", "convert", "blip-nlvr", *words, "--tokenizer", str(vocabulary))
    assert done.exit_code == 0, done.output
    assert "32 px" in done.stdout
    data = imported("nlvr2", nlvr2(tmp_path / "in"), tmp_path)
    assert evaluated(tmp_path / "out", data)["num_samples"] == 2
    state["text_encoder.extra"] = torch.zeros(1)
    torch.save({"model": state}, tmp_path / "nlvr.pth")
    words[-1] = str(tmp_path / "other")
    result = invoke("models", "convert", "blip-nlvr", *words, "--tokenizer", str(vocabulary))
    assert result.exit_code == 2
    assert "1 unexpected (text_encoder.extra)" in result.stderr
    assert not (tmp_path / "other").exists()


def spec_of(tmp_path: Path, data: Path, name: str) -> Path:
    values = {
        "version": 1,
        "kind": "prune",
        "name": name,
        "model": str(tmp_path / "dense"),
        "task": "vqa",
        "data": str(data),
        "pruning": {**PRUNING, "device": "cpu"},
        "resources": {"cpus": 1, "threads": 1},
        "tracking": {"enabled": False},
        "root": str(tmp_path / "runs"),
    }
    path = tmp_path / f"{name}.yaml"
    path.write_text(write_yaml(values), encoding="utf-8")
    return path


def pruned(spec: Path) -> list[dict[str, Any]]:
    result = invoke("prune", str(spec), "--json")
    assert result.exit_code == 0, result.output
    points: Any = json_of(result)["points"]
    return [
        {key: value for key, value in point.items() if "latency" not in key} for point in points
    ]


def test_a_ratio_that_cannot_be_reached_is_a_mistake_and_names_the_highest(tmp_path: Path) -> None:
    data = imported("vqav2", vqav2(tmp_path / "in"), tmp_path, "--images", str(tmp_path / "in"))
    save_hub_model("blip-vqa-base", tmp_path / "dense")
    spec = spec_of(tmp_path, data, "too-far")
    result = invoke("prune", str(spec), "--set", "pruning.ratios=[0.2, 0.9999]")
    assert result.exit_code == 2
    said = result.stderr.splitlines()[-1]
    assert "ratio 0.9999 cannot be reached: with min_heads=1, min_channels=16, " in said
    assert "reach at most 0." in said
    assert said.endswith("; lower the ratio or the minima")


@pytest.mark.slow
@pytest.mark.chaos
def test_a_dense_directory_is_pruned_killed_resumed_and_evaluated_to_the_last_digit(
    tmp_path: Path,
) -> None:
    data = imported("vqav2", vqav2(tmp_path / "in"), tmp_path, "--images", str(tmp_path / "in"))
    save_hub_model("blip-vqa-base", tmp_path / "dense")
    spec = spec_of(tmp_path, data, "killed")
    second = tmp_path / "runs" / "runs" / "killed" / "records" / "00001.json"
    with subprocess.Popen(
        [sys.executable, "-m", "studies.cli", "prune", str(spec)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        while not second.exists() and process.poll() is None:
            time.sleep(0.02)
        process.kill()
    assert second.exists()
    resumed = pruned(spec)
    whole = pruned(spec_of(tmp_path, data, "whole"))
    for point in [*resumed, *whole]:
        del point["fine_tune_seconds"]
    assert resumed == whole
    command = [sys.executable, "-m", "studies.cli", "evaluate", str(tmp_path / "runs/runs/whole")]
    options = ["--data", str(data), "--samples", "4", "--json"]
    done = subprocess.run(
        [*command, *options], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["value"], found["gmacs"]) == (whole[-1]["test"], whole[-1]["gmacs"])
