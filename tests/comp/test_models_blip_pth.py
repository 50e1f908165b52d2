"""The BLIP authors' checkpoints: the whole key map, the same logits, and what is refused."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BlipConfig

import comp
from comp.errors import CheckpointMismatch, UnsupportedModelError
from comp.models.blip_nlvr import BlipForNLVR
from comp.models.blip_pth import convert_blip, infer_config, interpolate_positions, rename
from comp.tasks import build_task
from tests.comp.naive_blip_nlvr import logits, random_state, shapes
from tests.tiny import FAMILIES

SIZES: dict[str, int] = {
    "width": 128,
    "text_width": 64,
    "blocks": 2,
    "text_layers": 4,
    "patch": 8,
    "side": 4,
    "words": 64,
    "positions": 24,
}


def write(folder: Path, state: dict[str, Tensor], name: str = "model_tiny_nlvr.pth") -> Path:
    torch.save({"model": state, "epoch": 3, "config": {"image_size": 32}}, folder / name)
    return folder / name


def vocabulary(folder: Path, size: int = 62) -> str:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = ["the", "left", "image", "shows", "a", "cat", "##s", "dog", "is", "true", ","]
    filler = [f"word{i}" for i in range(size - len(special) - len(words))]
    (folder / "vocab.txt").write_text("\n".join([*special, *words, *filler]) + "\n")
    return str(folder / "vocab.txt")


def inputs(size: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(3, 2, 3, size, size, generator=generator)
    ids = torch.randint(5, 64, (3, 9), generator=generator)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, 5:] = 0
    mask[2, 8:] = 0
    return pixels, ids, mask


def test_a_converted_model_has_the_logits_of_the_original(tmp_path: Path) -> None:
    state = random_state(**SIZES)
    convert_blip("blip-nlvr", write(tmp_path, state), tmp_path / "out", tokenizer=None)
    model = comp.load_model(tmp_path / "out").model
    pixels, ids, mask = inputs()
    with torch.no_grad():
        ours = model(pixel_values=pixels, input_ids=ids, attention_mask=mask).logits
    theirs = logits(state, pixels[:, 0], pixels[:, 1], ids, mask)
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_every_key_of_the_base_model_has_its_place() -> None:
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in shapes().items()}
        config = infer_config(state, "model_base_nlvr.pth")
        model = BlipForNLVR(config)
    mapped, left_out = rename(state, model, patches=24 * 24)
    assert {name: tensor.shape for name, tensor in mapped.items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }
    assert left_out == ()
    vision: Any = config.vision_config
    text: Any = config.text_config
    assert (vision.image_size, vision.num_attention_heads, text.num_attention_heads) == (
        384,
        12,
        12,
    )


def test_one_cross_attention_stands_for_both_images(tmp_path: Path) -> None:
    single = random_state(**SIZES, twins=False)
    extra = {"text_decoder.bert.x": torch.zeros(1), "itm_head.weight": torch.zeros(2, 64)}
    queue = {"visual_encoder_m.norm.weight": torch.zeros(1), "temp": torch.tensor(0.05)}
    done = convert_blip(
        "blip-nlvr",
        write(tmp_path, {**single, **extra, **queue}),
        tmp_path / "out",
        tokenizer=None,
    )
    assert done.left_out == ("text_decoder", "itm_head", "visual_encoder_m", "temp")
    assert "cls_head.0.weight" in done.new
    model: Any = comp.load_model(tmp_path / "out").model
    twin = dict(single)
    for name, tensor in single.items():
        for part in ("crossattention.self", "crossattention.output.dense"):
            if f".{part}." in name:
                twin |= {name.replace(part, f"{part}{i}"): tensor for i in (0, 1)}
    twin |= {f"cls_head.{k}": v for k, v in model.cls_head.state_dict().items()}
    pixels, ids, mask = inputs()
    with torch.no_grad():
        ours = model(pixel_values=pixels, input_ids=ids, attention_mask=mask).logits
    theirs = logits(twin, pixels[:, 0], pixels[:, 1], ids, mask)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def cubic(distance: float) -> float:
    """The weight of a sample in cubic convolution with A = -0.75, as torch has it."""
    a, x = -0.75, abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def cubic_matrix(old: int, new: int) -> Tensor:
    matrix = torch.zeros(new, old)
    for row in range(new):
        centre = (row + 0.5) * old / new - 0.5
        first = int(centre // 1) - 1
        for sample in range(first, first + 4):
            matrix[row, min(max(sample, 0), old - 1)] += cubic(centre - sample)
    return matrix


def test_positions_are_interpolated_by_cubic_convolution() -> None:
    positions = torch.randn(1, 1 + 16, 5)
    resized = interpolate_positions(positions, 36)
    matrix = cubic_matrix(4, 6)
    grid = positions[0, 1:].view(4, 4, 5)
    expected = torch.einsum("ai,bj,ijd->abd", matrix, matrix, grid).reshape(36, 5)
    torch.testing.assert_close(resized[0, 1:], expected, atol=1e-5, rtol=0)
    assert torch.equal(resized[:, :1], positions[:, :1])


def test_another_image_size_interpolates_the_positions(tmp_path: Path) -> None:
    state = random_state(**SIZES)
    file = write(tmp_path, state)
    done = convert_blip("blip-nlvr", file, tmp_path / "out", image_size=48, tokenizer=None)
    loaded = comp.load_model(tmp_path / "out")
    assert (done.image_size, loaded.image_size) == (48, 48)
    pixels, ids, mask = inputs(48)
    with torch.no_grad():
        ours = loaded.model(pixel_values=pixels, input_ids=ids, attention_mask=mask).logits
    wider = {
        **state,
        "visual_encoder.pos_embed": interpolate_positions(state["visual_encoder.pos_embed"], 36),
    }
    theirs = logits(wider, pixels[:, 0], pixels[:, 1], ids, mask)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_the_tokenizer_begins_a_statement_as_blip_does(tmp_path: Path) -> None:
    file = write(tmp_path, random_state(**SIZES))
    words_file = vocabulary(tmp_path)
    convert_blip("blip-nlvr", file, tmp_path / "out", image_size=64, tokenizer=words_file)
    loaded = comp.load_model(tmp_path / "out")
    words = loaded.tokenizer
    ids = words("The left image shows cats, é")["input_ids"]
    assert words.convert_ids_to_tokens(ids) == [
        "[ENC]", "the", "left", "image", "shows", "cat", "##s", ",", "[UNK]", "[SEP]",
    ]  # fmt: skip
    assert words.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [62, 63]
    assert (loaded.task, loaded.image_size) == ("nlvr2", 64)
    task = build_task("nlvr2", tokenizer=words, image_size=64, num_train=40)
    with torch.no_grad():
        value, _ = task.score(loaded.model, next(iter(task.batches("val", batch_size=4))))
    assert value.shape == (4,)


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        ("blip-vqa", "blip-vqa"),
        ("blip-caption", "blip-caption"),
        ("blip-retrieval", "blip-retrieval"),
    ],
)
def test_the_other_checkpoints_are_converted_too(kind: str, family: str, tmp_path: Path) -> None:
    vision, text = {"hidden_size": 64, "num_attention_heads": 1}, {}
    text = {**vision, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 40}
    vision |= {"intermediate_size": 128, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8}
    config = BlipConfig(
        text_config=text,
        vision_config={**vision, "layer_norm_eps": 1e-6},
        image_text_hidden_size=24,
    )
    torch.manual_seed(0)
    source: Any = type(FAMILIES[family].build(0))(config).eval()
    state = {}
    for name, tensor in source.state_dict().items():
        for old, new in (
            ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
            ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
            ("vision_model.embeddings.patch_embedding", "visual_encoder.patch_embed.proj"),
            ("vision_model.encoder.layers", "visual_encoder.blocks"),
            ("vision_model.post_layernorm", "visual_encoder.norm"),
            ("layer_norm", "norm"),
            ("self_attn.projection", "attn.proj"),
            ("self_attn.qkv", "attn.qkv"),
        ):
            name = name.replace(old, new)
        state[name] = tensor
    state |= {"temp": torch.tensor(0.07), "text_queue": torch.zeros(3)}
    state |= {"text_encoder_m.embeddings.word_embeddings.weight": torch.zeros(1)}
    done = convert_blip(kind, write(tmp_path, state), tmp_path / "out", tokenizer=None)
    assert set(done.left_out) == {"temp", "text_queue", "text_encoder_m"}
    loaded = comp.load_model(tmp_path / "out")
    assert loaded.card["temperature"] == pytest.approx(0.07)
    assert all(
        torch.equal(tensor, source.state_dict()[name])
        for name, tensor in loaded.model.state_dict().items()
    )


def pruned(mark: str) -> dict[str, Tensor]:
    state = random_state(**SIZES)
    if mark == "alpha":
        state["visual_encoder.blocks.0.attn.alpha"] = torch.ones(1, 1, 1, 1, 64)
    if mark == "space_dict":
        state["space_dict"] = torch.zeros(100, 64)
    if mark == "qkv":
        for leaf in ("weight", "bias"):
            name = f"visual_encoder.blocks.1.attn.qkv.{leaf}"
            state[name] = state[name][:192]
    if mark == "fc1":
        name = "visual_encoder.blocks.1.mlp.fc1.weight"
        state[name] = state[name][:300]
    return state


@pytest.mark.parametrize("mark", ["alpha", "space_dict", "qkv", "fc1"])
def test_a_checkpoint_that_others_pruned_is_refused_with_the_reason(
    mark: str, tmp_path: Path
) -> None:
    with pytest.raises(
        UnsupportedModelError, match=rf"pruned already, by UPop.*{mark}.*convert the dense"
    ):
        convert_blip("blip-nlvr", write(tmp_path, pruned(mark)), tmp_path / "out", tokenizer=None)
    assert not (tmp_path / "out").exists()


def test_missing_and_unexpected_keys_are_listed(tmp_path: Path) -> None:
    state = random_state(**SIZES)
    state["text_encoder.pooler.weight"] = state.pop("visual_encoder.norm.bias")
    with pytest.raises(
        CheckpointMismatch,
        match=r"1 keys are missing \(vision_model\.post_layernorm\.bias\) and 1 unexpected "
        r"\(text_encoder\.pooler\.weight\)",
    ):
        convert_blip("blip-nlvr", write(tmp_path, state), tmp_path / "out", tokenizer=None)
    assert [path.name for path in tmp_path.iterdir()] == ["model_tiny_nlvr.pth"]


def test_a_checkpoint_of_another_kind_is_named(tmp_path: Path) -> None:
    file = write(tmp_path, random_state(**SIZES))
    with pytest.raises(CheckpointMismatch, match=r"does not make a BlipForQuestionAnswering"):
        convert_blip("blip-vqa", file, tmp_path / "out", tokenizer=None)


class Sly:
    """Makes a pickle that would create a file when it is run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_nothing_in_a_checkpoint_is_executed(tmp_path: Path) -> None:
    torch.save({"model": {}, "sly": Sly(tmp_path / "was-run")}, tmp_path / "sly.pth")
    with pytest.raises(ValueError, match=r"without running code .* nothing in it was executed"):
        convert_blip("blip-nlvr", tmp_path / "sly.pth", tmp_path / "out", tokenizer=None)
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no checkpoint", "no checkpoint that can be read|no PyTorch checkpoint"),
        (b"", "no PyTorch checkpoint|no checkpoint that can be read"),
        (
            pickle.dumps(3, protocol=2),
            "no checkpoint that can be read|no PyTorch checkpoint|under 'model'",
        ),
    ],
)
def test_a_file_that_is_no_checkpoint_is_named(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(ValueError, match=rf"x\.pth .*({words})"):
        convert_blip("blip-nlvr", tmp_path / "x.pth", tmp_path / "out", tokenizer=None)


def test_a_checkpoint_needs_its_state_under_model(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"state dict under 'model'.* but has state_dict"):
        convert_blip("blip-nlvr", tmp_path / "x.pth", tmp_path / "out", tokenizer=None)


def test_a_vocabulary_of_another_size_is_named(tmp_path: Path) -> None:
    file = write(tmp_path, random_state(**SIZES))
    words = vocabulary(tmp_path, 50)
    with pytest.raises(ValueError, match=r"has 52 tokens .* the model has 64"):
        convert_blip("blip-nlvr", file, tmp_path / "out", tokenizer=words)


def test_an_image_size_must_fit_the_patches(tmp_path: Path) -> None:
    file = write(tmp_path, random_state(**SIZES))
    with pytest.raises(ValueError, match="multiple of the patch side 8, but got 50"):
        convert_blip("blip-nlvr", file, tmp_path / "out", image_size=50, tokenizer=None)
