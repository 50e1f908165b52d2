"""Finding the family of a model, and loading models by name or directory."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

import comp.models
from comp.checkpoint import save_pruned
from comp.errors import UnsupportedModelError
from comp.models import ADAPTERS, adapter_of, attach, load_model, model_classes
from comp.shrink import shrink_
from tests.tiny import FAMILIES, random_masks


@pytest.mark.parametrize("name", FAMILIES)
def test_every_class_has_one_family(name: str) -> None:
    model = FAMILIES[name].build(0)
    knowing = [a for a in ADAPTERS if type(model) in a.classes.values()]
    assert knowing == [adapter_of(model)]
    assert model_classes()[type(model).__name__] is type(model)


def test_a_subclass_belongs_to_its_parents_family() -> None:
    model = FAMILIES["blip-nlvr"].build(0)
    model.__class__ = type("MyNLVR", (type(model),), {})
    assert adapter_of(model).name == "blip"


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(2, 2),
        BertModel(
            BertConfig(
                hidden_size=8,
                num_hidden_layers=1,
                num_attention_heads=1,
                intermediate_size=8,
                vocab_size=9,
            )
        ),
    ],
)
def test_an_unknown_class_is_refused_with_those_known(model: nn.Module) -> None:
    name = type(model).__name__
    with pytest.raises(UnsupportedModelError, match=f"{name} has no adapter.*BlipForNLVR"):
        attach(model)


def test_a_saved_model_is_loaded_with_what_belongs_to_it(tmp_path: Path) -> None:
    family = FAMILIES["blip-nlvr"]
    model = family.build(0)
    save_pruned(model, tmp_path / "mine", card={"task": "nlvr2", "accuracy": 51.0})
    loaded = load_model(tmp_path / "mine")
    assert (loaded.name, loaded.family, loaded.task) == ("mine", "blip", "nlvr2")
    assert loaded.image_size == 32
    assert loaded.card["accuracy"] == 51.0
    assert loaded.tokenizer is None
    batch = family.batch(2, 0)
    with torch.no_grad():
        assert torch.equal(family.outputs(loaded.model, batch), family.outputs(model, batch))


def test_a_directory_may_be_given_as_text(tmp_path: Path) -> None:
    save_pruned(FAMILIES["blip-caption"].build(0), tmp_path)
    assert load_model(str(tmp_path)).name == tmp_path.name


def test_a_pruned_directory_gives_a_pruned_model(tmp_path: Path) -> None:
    handle = attach(FAMILIES["blip-nlvr"].build(0))
    handle.masks = random_masks(handle)
    shrink_(handle)
    save_pruned(handle.model, tmp_path)
    loaded = load_model(tmp_path).model
    assert comp.models.attach(loaded).kept == handle.kept


def test_a_name_that_is_neither_preset_nor_directory_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'blip-tiny-vqq' is neither a model preset .*did you m"):
        load_model("blip-tiny-vqq")


def test_names_resolve_on_first_use() -> None:
    for name in comp.models.__all__:
        assert getattr(comp.models, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'comp\.models' has no attribute 'atach'"):
        _ = comp.models.atach
