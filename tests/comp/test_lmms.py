"""The hand-over to lmms-eval: registered under its name, asked as it asks.

Most of it needs lmms-eval's own sources (``pip install --no-deps lmms-eval loguru pytz``), and is
skipped where they are not.
"""

import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from comp.checkpoint import save_pruned
from comp.models import attach, load_model
from comp.shrink import shrink_
from comp.tasks.instruct import Conversation, InstructTask
from tests.hub_models import SIDE, save_hub_model
from tests.tiny import random_masks

ROOT = Path(__file__).parents[2]


@pytest.fixture
def api() -> Any:
    return pytest.importorskip("lmms_eval.api.instance")


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA that lost half of its units, taught two answers, on disk."""
    folder = tmp_path_factory.mktemp("llava")
    save_hub_model("llava-1.5-tiny-hf", folder / "dense")
    loaded = load_model(folder / "dense")
    handle = attach(loaded.model)
    handle.masks = random_masks(handle)
    shrink_(handle)
    pixels = torch.full((1, 3, SIDE, SIDE), 200, dtype=torch.uint8)
    told = [
        Conversation(0, (("is this a cat?", "yes"),)),
        Conversation(None, (("what is left of the dog?", "a cat"),)),
    ]
    task = InstructTask({"train": told}, pixels, loaded.tokenizer, augment=False)
    optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=1e-2)
    batch = next(task.train_batches(batch_size=2, seed=0))
    for _ in range(60):
        optimizer.zero_grad()
        task.loss(loaded.model, batch).backward()
        optimizer.step()
    save_pruned(loaded.model.eval(), folder / "pruned", tokenizer=loaded.tokenizer)
    return folder / "pruned"


def asking(api: Any, pretrained: Path) -> tuple[Any, Any]:
    """The model, and what makes a request about a document as lmms-eval does."""
    model = import_module("comp.lmms.model").CompLlava.create_from_arg_string(
        f"pretrained={pretrained}", {"batch_size": 1, "device": "cpu"}
    )
    picture = Image.new("RGB", (SIDE, SIDE), (200, 200, 200))
    model.task_dict = {"toy": {"test": [{"image": picture}, {"image": None}]}}

    def request(kind: str, question: str, document: int, second: Any) -> Any:
        found = [lambda doc: [doc["image"]] if doc["image"] else [], document, "toy", "test"]
        order = [second, found[0]]
        return api.Instance(
            request_type=kind,
            arguments=(question, *order, *found[1:]),
            idx=0,
            metadata={"task": "toy", "doc_id": document, "repeats": 1},
        )

    return model, request


def test_importing_the_hand_over_needs_no_lmms_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    assert callable(import_module("comp.lmms").manifest)


def test_lmms_eval_finds_the_model_by_its_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = pytest.importorskip("lmms_eval.models.registry_v2").ModelRegistryV2()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    points = project["entry-points"]["lmms_eval.models"]
    info = tmp_path / "declared-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: declared\nVersion: 1\n")
    lines = [f"{name} = {value}" for name, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[lmms_eval.models]", *lines]) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry.load_entrypoint_manifests()
    found = registry.get_model_class("comp_llava")
    assert (found.__module__, found.__name__) == ("comp.lmms.model", "CompLlava")


def test_questions_are_answered_by_the_pruned_model(api: Any, pruned: Path) -> None:
    model, request = asking(api, pruned)
    options = {"max_new_tokens": 12, "until": ["\n"], "temperature": 0}
    requests = [
        request("generate_until", "<image>\nis this a cat?", 0, options),
        request("generate_until", "what is left of the dog?", 1, options),
    ]
    assert [text.replace(" ", "") for text in model.generate_until(requests)] == ["yes", "acat"]


def test_given_answers_are_scored(api: Any, pruned: Path) -> None:
    model, request = asking(api, pruned)
    requests = [
        request("loglikelihood", "is this a cat?", 0, text) for text in ("yes", lambda _: "no")
    ]
    (right, is_greedy), (wrong, is_not) = model.loglikelihood(requests)
    assert (is_greedy, is_not) == (True, False)
    assert wrong < right < 0


def test_an_answer_ends_where_the_benchmark_says(api: Any, pruned: Path) -> None:
    model, request = asking(api, pruned)
    one = request("generate_until", "is this a cat?", 0, {"until": "e", "max_new_tokens": 12})
    assert model.generate_until([one]) == ["y"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"batch_size": 4}, "batch_size must be 1 for comp_llava, but got 4"),
        ({"dtype": "int8"}, "dtype must be float32, bfloat16 or float16, but got 'int8'"),
        ({"chat_template": "x"}, "comp_llava does not know chat_template"),
        ({"pretrained": "blip-tiny-vqa"}, "is a blip model; comp_llava needs a LLaVA"),
    ],
)
def test_arguments_that_do_not_fit_are_named(
    api: Any, pruned: Path, arguments: dict[str, Any], words: str
) -> None:
    made = import_module("comp.lmms.model").CompLlava
    with pytest.raises(ValueError, match=words):
        made(**{"pretrained": str(pruned), "device": "cpu", **arguments})


def test_several_images_are_refused_and_not_dropped(api: Any, pruned: Path) -> None:
    model, _ = asking(api, pruned)
    two = [Image.new("RGB", (8, 8))] * 2
    model.task_dict = {"toy": {"test": [None]}}
    request = SimpleNamespace(args=("which?", {}, lambda doc: two, 0, "toy", "test"))
    with pytest.raises(ValueError, match="takes one image a question, but toy gave 2 Image"):
        model.generate_until([request])
