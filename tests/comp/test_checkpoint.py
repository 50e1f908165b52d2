"""Saved models come back the same in another process, and misfits are refused in a sentence."""

import dataclasses
import json
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from comp.checkpoint import load_pruned, save_pruned
from comp.errors import CheckpointMismatch, UnsupportedModelError
from comp.handle import handle_of
from comp.methods import METHODS
from comp.models import attach
from comp.modes import Stream
from comp.shrink import shrink_
from tests.tiny import FAMILIES, SIGLIP, TinyFamily, measured, random_masks

ROOT = Path(__file__).parents[2]

IN_ANOTHER_PROCESS = """
import sys
from pathlib import Path
import torch
from comp.checkpoint import load_pruned
from comp.models import attach
from tests.tiny import FAMILIES, SIGLIP, measured
torch.set_num_threads(1)
for directory in Path(sys.argv[1]).iterdir():
    family = {**FAMILIES, SIGLIP.name: SIGLIP}[directory.name]
    model = load_pruned(directory)
    outputs, recorder = measured(attach(model), family, family.batch(4, 0))
    torch.save((outputs, recorder.counts), directory / "outputs.pt")
"""


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> TinyFamily:
    return FAMILIES[request.param]


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def pruned(family: TinyFamily, *, merge: str = "auto") -> torch.nn.Module:
    handle = attach(family.build(0), merge=merge)  # type: ignore[arg-type]
    handle.masks = random_masks(handle)
    shrink_(handle)
    handle.thresholds = {Stream.VISION: 0.8, Stream.TEXT: 0.7}
    return handle.model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A pruned NLVR2 model on disk."""
    save_pruned(pruned(FAMILIES["blip-nlvr"]), tmp_path / "model")
    return tmp_path / "model"


def test_a_fresh_process_loads_the_same_models(tmp_path: Path) -> None:
    expected = {}
    for family in (*FAMILIES.values(), SIGLIP):
        model = pruned(family)
        save_pruned(model, tmp_path / family.name)
        expected[family.name] = measured(handle_of(model), family, family.batch(4, 0))
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS, str(tmp_path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for name, (outputs, recorder) in expected.items():
        loaded, counts = torch.load(tmp_path / name / "outputs.pt", weights_only=True)
        assert torch.equal(loaded, outputs), name
        assert counts == recorder.counts, name


def test_a_dense_model_comes_back_unattached(family: TinyFamily, tmp_path: Path) -> None:
    model, batch = family.build(0), family.batch(2, 0)
    save_pruned(model, tmp_path)
    loaded = load_pruned(tmp_path)
    assert not hasattr(loaded, "pruning")
    assert not loaded.training
    assert torch.equal(family.outputs(loaded, batch), family.outputs(model, batch))


def test_the_options_come_back(family: TinyFamily, tmp_path: Path) -> None:
    model = pruned(family, merge="drop")
    handle = handle_of(model)
    handle.min_tokens = {Stream.VISION: 6, Stream.TEXT: 3}
    save_pruned(model, tmp_path)
    again = handle_of(load_pruned(tmp_path))
    assert again.plan() == handle.plan()
    assert again.min_tokens == handle.min_tokens


def test_an_attached_model_saves_itself_by_the_stock_name(tmp_path: Path) -> None:
    family = FAMILIES["blip-nlvr"]
    model, batch = pruned(family), family.batch(2, 0)
    model.save_pretrained(tmp_path)
    assert torch.equal(family.outputs(load_pruned(tmp_path), batch), family.outputs(model, batch))


def test_a_model_can_be_saved_loaded_pruned_and_saved_again(tmp_path: Path) -> None:
    family, batch = FAMILIES["blip-vqa"], FAMILIES["blip-vqa"].batch(2, 0)
    save_pruned(pruned(family), tmp_path / "once")
    model = load_pruned(tmp_path / "once")
    handle = handle_of(model)
    name = "vision_model.encoder.layers.0.mlp"
    keep = torch.ones(handle.groups[name].num_units)
    keep[:5] = 0
    handle.masks = {name: keep}
    before = family.outputs(model, batch)
    shrink_(handle)
    save_pruned(model, tmp_path / "twice")
    assert (family.outputs(load_pruned(tmp_path / "twice"), batch) - before).abs().max() <= 1e-5


def test_a_dense_model_replaces_a_pruned_one(saved: Path) -> None:
    family = FAMILIES["blip-vqa"]
    save_pruned(family.build(0), saved)
    assert not hasattr(load_pruned(saved), "pruning")


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    model = pruned(FAMILIES["blip-caption"])
    save_pruned(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert sum("word_embeddings" in n or "predictions.decoder.weight" in n for n in stored) == 1
    decoder = load_pruned(tmp_path).text_decoder
    words = decoder.bert.embeddings.word_embeddings.weight
    assert decoder.cls.predictions.decoder.weight is words


@pytest.mark.parametrize("name", ["llava", "blip-vqa"])
def test_a_model_loads_in_the_type_it_is_stored_in(tmp_path: Path, name: str) -> None:
    model = pruned(FAMILIES[name])
    save_pruned(model, tmp_path, dtype=torch.bfloat16)
    loaded, batch = load_pruned(tmp_path, dtype="auto"), FAMILIES[name].batch(2, 0)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    exact = FAMILIES[name].outputs(load_pruned(tmp_path), batch)
    assert (FAMILIES[name].outputs(loaded, batch).float() - exact).abs().mean() < 0.05


def test_weights_in_16_bits_leave_rotary_frequencies_whole(tmp_path: Path) -> None:
    save_pruned(pruned(FAMILIES["llava"]), tmp_path)
    loaded = load_pruned(tmp_path, dtype=torch.bfloat16)
    frequencies = loaded.model.language_model.rotary_emb.inv_freq
    exact = load_pruned(tmp_path).model.language_model.rotary_emb.inv_freq
    assert torch.equal(frequencies, exact)


def test_a_dense_directory_loads_in_the_type_it_is_stored_in(tmp_path: Path) -> None:
    FAMILIES["clip"].build(0).to(torch.float16).save_pretrained(tmp_path)
    assert {p.dtype for p in load_pruned(tmp_path, dtype="auto").parameters()} == {torch.float16}
    assert {p.dtype for p in load_pruned(tmp_path).parameters()} == {torch.float32}


def test_half_precision_halves_the_file_and_loads_as_float32(tmp_path: Path) -> None:
    family, batch = FAMILIES["blip-nlvr"], FAMILIES["blip-nlvr"].batch(2, 0)
    model = family.build(0)
    save_pruned(model, tmp_path / "full")
    save_pruned(model, tmp_path / "half", dtype=torch.float16)
    sizes = [(tmp_path / d / "model.safetensors").stat().st_size for d in ("full", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    loaded = load_pruned(tmp_path / "half")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert (family.outputs(loaded, batch) - family.outputs(model, batch)).abs().max() < 0.05


def test_who_may_read_the_config_may_read_the_weights(saved: Path) -> None:
    names = ("config.json", "model.safetensors", "pruning.json")
    assert len({stat.S_IMODE((saved / name).stat().st_mode) for name in names}) == 1


def test_weights_that_are_replaced_keep_their_permissions(saved: Path) -> None:
    weights = saved / "model.safetensors"
    weights.chmod(0o640)
    save_pruned(load_pruned(saved), saved)
    assert stat.S_IMODE(weights.stat().st_mode) == 0o640


def test_masks_in_force_are_not_saved(tmp_path: Path) -> None:
    handle = attach(FAMILIES["blip-nlvr"].build(0))
    handle.masks = {"vision_model.encoder.layers.0.mlp": torch.ones(48)}
    with pytest.raises(ValueError, match="1 masks are in force; shrink the model"):
        save_pruned(handle.model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_directory_without_a_file_is_no_saved_model(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no {name}; it is no saved model"):
        load_pruned(saved)


def test_a_class_without_adapter_is_refused_with_those_known(saved: Path) -> None:
    edit(saved / "config.json", architectures=["BertModel"])
    with pytest.raises(UnsupportedModelError, match=r"holds a BertModel.*BlipForNLVR"):
        load_pruned(saved)


def test_a_plan_for_other_widths_is_refused(saved: Path) -> None:
    plan = json.loads((saved / "pruning.json").read_text())
    plan["dense_units"]["vision_model.encoder.layers.0.mlp"] = 50
    edit(saved / "pruning.json", **plan)
    with pytest.raises(CheckpointMismatch, match="for a blip model of other widths than"):
        load_pruned(saved)


def test_a_plan_that_does_not_fit_the_weights_is_refused(saved: Path) -> None:
    plan = json.loads((saved / "pruning.json").read_text())
    plan["kept"]["vision_model.encoder.layers.0.mlp"] = [0, 1]
    edit(saved / "pruning.json", **plan)
    with pytest.raises(
        CheckpointMismatch, match=r"does not fit the model.*another shape \(vision"
    ):
        load_pruned(saved)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("version", 9, "has version 9, but this comp reads version 1"),
        ("kept", None, "must give 'kept' as dict, but has None; save the model again"),
        ("thresholds", {"sound": 0.5}, "names the stream 'sound', but there are vision, text"),
    ],
)
def test_a_plan_that_comp_did_not_write_is_refused(
    saved: Path, key: str, value: Any, said: str
) -> None:
    edit(saved / "pruning.json", **{key: value})
    with pytest.raises(CheckpointMismatch, match=said):
        load_pruned(saved)


def test_a_plan_that_is_cut_off_is_refused(saved: Path) -> None:
    text = (saved / "pruning.json").read_text()
    (saved / "pruning.json").write_text(text[: len(text) // 2])
    with pytest.raises(
        CheckpointMismatch, match=r"pruning\.json is no JSON .*save the model again"
    ):
        load_pruned(saved)


@pytest.mark.parametrize("counts", [{"vision": [4, 4]}, {"vision": [9, 0, 4]}, {"audio": [3]}])
def test_fixed_token_counts_that_do_not_fit_are_refused(
    saved: Path, counts: dict[str, list[int]]
) -> None:
    edit(saved / "pruning.json", static_tokens=counts)
    with pytest.raises(
        CheckpointMismatch, match=r"fixes the token counts .*, but needs one count"
    ):
        load_pruned(saved)


def test_weights_that_lack_a_tensor_are_refused(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    del weights["cls_head.2.bias"]
    save_file(weights, saved / "model.safetensors")
    with pytest.raises(CheckpointMismatch, match=r"1 missing \(cls_head\.2\.bias\)"):
        load_pruned(saved)


def test_weights_with_a_strange_tensor_are_refused(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    save_file({**weights, "strange": torch.ones(1)}, saved / "model.safetensors")
    with pytest.raises(CheckpointMismatch, match=r"1 unexpected \(strange\)"):
        load_pruned(saved)


def test_a_pruned_model_without_its_plan_is_refused(saved: Path) -> None:
    (saved / "pruning.json").unlink()
    with pytest.raises(CheckpointMismatch, match="does not fit the model"):
        load_pruned(saved)


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_shared_weights_are_pages_of_the_file_and_give_the_same_outputs(saved: Path) -> None:
    family = FAMILIES["blip-nlvr"]
    own, shared = load_pruned(saved), load_pruned(saved, shared=True)
    batch = family.batch(4, 0)
    torch.testing.assert_close(
        family.outputs(shared, batch), family.outputs(own, batch), rtol=0, atol=1e-6
    )
    mapped = f"{saved}/model.safetensors"
    assert mapped in Path("/proc/self/maps").read_text()
    first = next(shared.parameters())
    first.add_(1.0)  # changes a copy of the page, not the file
    assert not torch.equal(next(load_pruned(saved).parameters()), first)


@pytest.mark.parametrize(
    ("family", "switch"),
    [
        ("blip-nlvr", {"token_threshold": "absolute"}),
        ("clip", {"causal_mean": True}),
        ("llava", {"head_reduce": "mean"}),
    ],
)
def test_a_switch_of_token_scores_acts_and_is_saved(
    family: str, switch: dict[str, Any], tmp_path: Path
) -> None:
    chosen = FAMILIES[family]
    batch = chosen.batch(4, 0)
    outputs = []
    for changed in ({}, switch):
        method = dataclasses.replace(METHODS["comp"], **changed)
        handle = attach(chosen.build(0), switches=method)
        handle.thresholds = {Stream.VISION: 0.6, Stream.TEXT: 0.6}
        with torch.no_grad():
            outputs.append(chosen.outputs(handle.model, batch))
    assert not torch.allclose(outputs[0], outputs[1])
    save_pruned(handle.model, tmp_path)
    with torch.no_grad():
        again = chosen.outputs(load_pruned(tmp_path), batch)
    torch.testing.assert_close(again, outputs[1], rtol=0, atol=1e-5)
