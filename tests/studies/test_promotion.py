"""A promoted model is the one on disk, for whoever loads it by its registered name."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from comp.handle import handle_of
from comp.modes import Stream
from comp.shrink import shrink_
from orchestration.job import Job, Record
from orchestration.store import RunDirectory
from studies.cli import cli
from studies.errors import SpecError
from studies.folder import StudyFolder
from studies.promotion import promote
from studies.session import conduct_study
from tests.studies.synthetic import make_point, make_spec

BATCH = """
import torch

def batch():
    generator = torch.Generator().manual_seed(3)
    return {
        "pixel_values": torch.randn(2, 3, 64, 64, generator=generator),
        "input_ids": torch.randint(5, 90, (2, 6), generator=generator),
        "decoder_input_ids": torch.randint(5, 90, (2, 3), generator=generator),
    }
"""
LOAD = (
    BATCH
    + """
import sys
import mlflow
import comp

served = mlflow.pyfunc.load_model(sys.argv[1])
given = {name: value.numpy() for name, value in batch().items()}
logits = served.predict(given)["DECODER_LOGITS"]
with torch.no_grad():
    own = comp.load_pruned(sys.argv[2])(**batch(), return_dict=True)
print(sum(p.numel() for p in served.get_raw_model().parameters()))
print(logits.shape, float(abs(torch.from_numpy(logits) - own["DECODER_LOGITS"]).max()))
""".replace("DECODER_LOGITS", "last_hidden_state")
)


def save_pruned_blip(target: Path) -> None:
    """The small BLIP with half of its heads and some patches gone."""
    from comp.models import attach, load_model

    loaded = load_model("blip-tiny-vqa")
    attach(loaded.model)
    handle = handle_of(loaded.model)
    handle.thresholds = {Stream.VISION: 0.5, Stream.TEXT: 0.2}
    for name, group in handle.groups.items():
        handle.masks[name] = (torch.arange(group.num_units) % 2 == 0).float()
    shrink_(handle)
    loaded.model.save_pretrained(target, tokenizer=loaded.tokenizer)


def prune(job: Job, directory: RunDirectory) -> Iterator[Record]:
    """A run whose points are made up and whose models are real."""
    config = job.pruning_config
    yield directory.append(make_point(config, 0.0, method="dense"))
    for ratio in config.ratios if job.kind == "prune" else ():
        models = {f"ratio-{ratio * 1000:03.0f}": save_pruned_blip}
        yield directory.append(make_point(config, ratio), models=models)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    root = tmp_path_factory.mktemp("promotion")
    spec = make_spec(root, "n_trials=2")
    conduct_study(spec, inline=True, runner="tests.studies.test_promotion:prune")
    return StudyFolder.of(spec)


@pytest.mark.slow
def test_the_registered_model_gives_the_logits_of_the_saved_one(folder: StudyFolder) -> None:
    words = ["study", "promote", "s", "--trial", "0", "--ratio", "0.5", "--name", "small-blip"]
    done = CliRunner().invoke(cli, [*words, "--root", folder.root, "--json"])
    assert done.exit_code == 0, done.output
    made = json.loads(done.stdout.splitlines()[-1])
    assert (made["uri"], made["run"]) == ("models:/small-blip/1", "s-0000")
    saved = f"{folder.run('s-0000')}/model/ratio-500"
    store = {"MLFLOW_TRACKING_URI": f"sqlite:///{folder.root}/mlflow.db"}
    fresh = subprocess.run(
        [sys.executable, "-c", LOAD, made["uri"], saved],
        env=os.environ | store,
        capture_output=True,
        text=True,
        check=False,
    )
    assert fresh.returncode == 0, fresh.stderr
    parameters, compared = fresh.stdout.splitlines()[-2:]
    assert int(parameters) < 1_400_000  # the dense model has 1.54 M
    assert compared.endswith(" 0.0")


def test_the_best_trial_and_the_largest_ratio_are_the_default(folder: StudyFolder) -> None:
    first = promote(folder)
    assert (first.name, first.ratio) == ("s", 0.8)
    assert promote(folder) == first  # not a second version of the same model


def test_a_ratio_that_was_not_asked_for_names_those_that_were(folder: StudyFolder) -> None:
    with pytest.raises(SpecError, match=r"trial 0 has no model at ratio 0\.6; it has 0\.5, 0\.8"):
        promote(folder, trial=0, ratio=0.6)


def test_a_trial_that_does_not_exist_is_refused(folder: StudyFolder) -> None:
    with pytest.raises(SpecError, match="study 's' has no trial 7 with runs"):
        promote(folder, trial=7)
