"""Encoders leave Python as they are, and token counts can be fixed where shapes have to be."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import comp.export
from comp.checkpoint import load_pruned, save_pruned
from comp.errors import CheckpointMismatch
from comp.evaluation import measure_cost
from comp.export import EncoderModule, export_encoder, freeze_token_counts, to_onnx
from comp.handle import PruningHandle
from comp.models import attach
from comp.modes import Stream
from comp.shrink import shrink_
from comp.tokens import select_count
from tests.tiny import (
    ENCODER_FAMILIES,
    FAMILIES,
    TinyFamily,
    TinyTask,
    measured,
    random_masks,
    sample_of,
    total_macs,
)

ROOT = Path(__file__).parents[2]
TOWERS = [("blip-vqa", "vision"), ("blip-vqa", "text"), ("clip", "vision"), ("clip", "text")]
COUNTS = {"vision": [12, 9, 9], "text": [5, 4]}


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(params=ENCODER_FAMILIES)
def family(request: pytest.FixtureRequest) -> TinyFamily:
    return FAMILIES[request.param]


def shrunk(family: TinyFamily) -> PruningHandle:
    """A model without some heads and channels, which keeps its tokens."""
    handle = attach(family.build(0))
    handle.masks = random_masks(handle)
    shrink_(handle)
    return handle


def dropping(family: TinyFamily) -> PruningHandle:
    handle = shrunk(family)
    handle.thresholds = {Stream.VISION: 0.8, Stream.TEXT: 0.7}
    return handle


def static(family: TinyFamily) -> PruningHandle:
    handle = shrunk(family)
    handle.static_tokens = {
        name: rows for name, rows in COUNTS.items() if name == "vision" or family.drops_text
    }
    return handle


def inputs_of(name: str, encoder: str, *, size: int = 3, seed: int = 0) -> dict[str, Tensor]:
    batch = FAMILIES[name].batch(size, seed)
    if encoder == "vision":
        return {"pixel_values": batch["pixel_values"]}
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    if name.startswith("blip"):
        inputs["encoder_hidden_states"] = torch.randn(size, 17, 32)
    return inputs


def difference(left: dict[str, Any], right: dict[str, Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((torch.as_tensor(left[k]) - right[k]).abs().max()) for k in right)


@pytest.mark.parametrize(("name", "encoder"), TOWERS)
def test_a_shrunk_encoder_compiles_as_one_graph(name: str, encoder: str) -> None:
    module = EncoderModule(shrunk(FAMILIES[name]).model, encoder)
    inputs = inputs_of(name, encoder)
    torch.compiler.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert difference(compiled(inputs), module(inputs)) <= 1e-5


@pytest.mark.parametrize("make", [shrunk, static])
@pytest.mark.parametrize(("name", "encoder"), TOWERS)
def test_an_exported_encoder_takes_any_batch_size(name: str, encoder: str, make: Any) -> None:
    model = make(FAMILIES[name]).model
    program = export_encoder(model, encoder, inputs_of(name, encoder))
    other = inputs_of(name, encoder, size=5, seed=1)
    expected = EncoderModule(model, encoder)(other)
    assert difference(program.module()(other), expected) <= 1e-5


@pytest.mark.parametrize(("name", "make"), [("blip-vqa", static), ("clip", shrunk)])
def test_an_onnx_file_computes_the_same(name: str, make: Any, tmp_path: Path) -> None:
    model = make(FAMILIES[name]).model
    path = to_onnx(model, "vision", tmp_path / "vision.onnx", inputs_of(name, "vision"))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    other = inputs_of(name, "vision", size=5, seed=1)
    outputs = session.run(None, {"pixel_values": other["pixel_values"].numpy()})
    named = dict(zip([output.name for output in session.get_outputs()], outputs, strict=True))
    assert difference(named, EncoderModule(model, "vision")(other)) <= 1e-4


def test_dropping_by_a_threshold_cannot_be_exported_and_says_what_can() -> None:
    model = dropping(FAMILIES["blip-vqa"]).model
    with pytest.raises(ValueError, match="freeze_token_counts or tokens='static'"):
        export_encoder(model, "vision", inputs_of("blip-vqa", "vision"))


def test_an_export_with_static_tokens_leaves_the_model_as_it_was() -> None:
    handle = dropping(FAMILIES["blip-vqa"])
    inputs = inputs_of("blip-vqa", "vision")
    before = handle.plan()
    program = export_encoder(handle.model, "vision", inputs, tokens="static")
    assert handle.plan() == before
    rows = program.module()(inputs)["last_hidden_state"].shape[1]
    assert 6 <= rows < 17


def test_fixed_counts_hold_in_every_layer_and_sample(family: TinyFamily) -> None:
    _, recorder = measured(static(family), family, family.batch(4, 0))
    for layer, rows in enumerate(COUNTS["vision"]):
        assert set(recorder.counts[f"vision.{layer}"]) == {rows}


def test_samples_with_fixed_counts_do_not_depend_on_their_batch(family: TinyFamily) -> None:
    model, batch = static(family).model, family.batch(4, 0)
    together = family.outputs(model, batch)
    for row in range(4):
        alone = family.outputs(model, sample_of(batch, row))
        same = together[row : row + 1, : alone.shape[1]]
        assert (alone - same).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["blip-vqa", "clip"])
def test_fixed_counts_cost_what_torch_counts(name: str) -> None:
    handle = static(FAMILIES[name])
    module, inputs = EncoderModule(handle.model, "vision"), inputs_of(name, "vision")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(inputs)
    with handle.metering() as meter:
        module(inputs)
    meter.num_samples = 3
    macs = meter.measurement(handle.groups.values(), handle.alive()).total_macs
    assert counter.get_total_flops() == 2 * macs


def test_a_fixed_count_keeps_protected_tokens_then_the_best_in_order() -> None:
    scores = torch.tensor([[0.0, 0.1, 0.4, 0.1, 0.3, 0.1], [0.0, 0.5, 0.5, 0.0, 0.0, 0.0]])
    valid = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    protected = torch.arange(6).expand(2, -1) == 0
    chosen = select_count(4, scores, valid, protected, merge=False)
    assert chosen.index[0].tolist() == [0, 1, 2, 4]
    assert chosen.valid.tolist() == [[True] * 4, [True, True, True, False]]
    merged = select_count(4, scores, valid, protected, merge=True)
    assert merged.index.tolist() == [[0, 2, 4], [0, 1, 2]]
    assert merged.all_valid.tolist() == [[True] * 4, [True, True, True, False]]
    rows = torch.arange(12.0).reshape(2, 6, 1)
    assert merged.gather(rows)[:, :, 0].round(decimals=3).tolist() == [[0, 2, 4, 3], [6, 7, 8, 0]]


def test_counts_are_frozen_at_the_mean_of_the_thresholds(family: TinyFamily) -> None:
    handle, task = dropping(family), TinyTask(family, samples=8)
    batches = list(task.batches("val", batch_size=8))
    means = measure_cost(handle.model, task, batches).tokens
    counts = freeze_token_counts(handle.model, task, batches)
    assert set(counts) == ({"vision", "text"} if family.drops_text else {"vision"})
    for name, rows in counts.items():
        assert rows == sorted(rows, reverse=True)
        least = handle.min_tokens[Stream(name)] + 2
        assert rows[0] == max(least, int(means[f"{name}.0"] + 0.5))
    assert freeze_token_counts(handle.model, task, batches) == counts


def test_fixed_counts_are_saved_and_loaded(family: TinyFamily, tmp_path: Path) -> None:
    handle, batch = static(family), family.batch(4, 0)
    save_pruned(handle.model, tmp_path)
    loaded = attach(load_pruned(tmp_path))
    assert loaded.static_tokens == handle.static_tokens
    (expected, cost), (outputs, again) = (measured(h, family, batch) for h in (handle, loaded))
    assert torch.equal(outputs, expected)
    assert total_macs(loaded, again) == total_macs(handle, cost)


def test_saved_counts_of_another_model_are_refused(tmp_path: Path) -> None:
    handle = static(FAMILIES["blip-vqa"])
    handle.static_tokens = {"vision": [12, 9]}
    save_pruned(handle.model, tmp_path)
    with pytest.raises(CheckpointMismatch, match=r"token counts \[12, 9\] for 'vision'"):
        load_pruned(tmp_path)


def test_without_thresholds_there_is_no_count_to_fix() -> None:
    handle, task = shrunk(FAMILIES["clip"]), TinyTask(FAMILIES["clip"], samples=2)
    with pytest.raises(ValueError, match="thresholds: none"):
        freeze_token_counts(handle.model, task, task.batches("val", batch_size=2))


def test_an_unknown_encoder_is_named_beside_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no encoder 'visual'; it has vision, text"):
        export_encoder(FAMILIES["clip"].build(0), "visual", inputs_of("clip", "vision"))


def test_an_unknown_kind_of_tokens_is_named() -> None:
    model: Any = FAMILIES["clip"].build(0)
    kind: Any = "fixed"
    with pytest.raises(ValueError, match="learned or static, but got 'fixed'"):
        export_encoder(model, "vision", inputs_of("clip", "vision"), tokens=kind)


def test_a_missing_onnx_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(comp.export, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=re.escape("pip install 'comp-vlm[export]'")):
        to_onnx(FAMILIES["clip"].build(0), "vision", tmp_path / "x.onnx", {})


def test_the_examples_of_the_export_page_run_as_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page = (ROOT / "docs" / "export.md").read_text()
    examples = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    family = FAMILIES["blip-vqa"]
    names = {"model": dropping(family).model, "task": TinyTask(family, samples=8)}
    monkeypatch.chdir(tmp_path)
    exec("\n".join(examples), names)
    assert (tmp_path / "vision.onnx").is_file()
