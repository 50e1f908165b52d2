import json
from pathlib import Path

import pytest

from studies.errors import SpecError
from studies.folder import StudyFolder, write_atomically
from studies.spec import spec_hash
from tests.studies.synthetic import make_spec


def frozen(root: Path) -> StudyFolder:
    folder = StudyFolder.of(make_spec(root))
    folder.freeze(make_spec(root))
    return folder


def test_a_frozen_spec_reads_back_equal(tmp_path: Path) -> None:
    assert frozen(tmp_path).read_spec() == make_spec(tmp_path)


def test_the_manifest_has_the_hash(tmp_path: Path) -> None:
    manifest = json.loads((frozen(tmp_path).path / "study.json").read_text())
    hashed = spec_hash(make_spec(tmp_path))
    assert manifest.pop("uid")
    assert manifest == {"version": 1, "name": "s", "spec_hash": hashed}


def test_a_study_counts_as_started_only_with_its_manifest(tmp_path: Path) -> None:
    folder = frozen(tmp_path)
    (folder.path / "study.json").unlink()
    assert not folder.is_started


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("task=nlvr2", 'task = "vqa", but the spec now has "nlvr2"'),
        ("pruning.ratios=[0.5, 0.9]", r"pruning\.ratios = \[0\.5, 0\.8\], but the spec now has"),
        ("space.history={kind: fixed, value: 0.1}", r"space\.history = nothing, but the spec now"),
        ("objective={val_at: 0.7}", r"objective\.val_at = 0\.8, but the spec now has 0\.7"),
        ("sampler.seed=2", r"sampler\.seed = 1, but the spec now has 2"),
        ("seeds=[1]", r"seeds = \[0\], but the spec now has \[1\]"),
    ],
)
def test_what_results_depend_on_may_not_change(
    tmp_path: Path, change: str, complaint: str
) -> None:
    folder = frozen(tmp_path)
    with pytest.raises(SpecError, match=complaint):
        folder.freeze(make_spec(tmp_path, change))
    assert folder.read_spec() == make_spec(tmp_path)


def test_the_rest_may_change_and_is_kept(tmp_path: Path) -> None:
    folder = frozen(tmp_path)
    folder.freeze(make_spec(tmp_path, "n_trials=9"))
    assert folder.read_spec().n_trials == 9


def test_a_root_may_be_moved(tmp_path: Path) -> None:
    frozen(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    folder = StudyFolder.find(tmp_path / "new", "s")
    assert folder.read_spec().root == str(tmp_path / "new")


def test_a_spec_that_was_changed_by_hand_is_refused(tmp_path: Path) -> None:
    folder = frozen(tmp_path)
    path = folder.path / "spec.yaml"
    path.write_text(path.read_text().replace("n_trials: 6", "n_trails: 6"))
    with pytest.raises(SpecError, match="unknown key 'n_trails'; did you mean 'n_trials'"):
        folder.read_spec()


def test_an_unknown_study_names_the_nearest(tmp_path: Path) -> None:
    frozen(tmp_path)
    with pytest.raises(SpecError, match=r"there is no study 'ss'.*did you mean 's'"):
        StudyFolder.find(tmp_path, "ss")


def test_names_cannot_climb_out_of_the_root(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="study must be 1 to 128 letters"):
        StudyFolder.find(tmp_path, "../s")


def test_studies_of_a_root_are_found_by_name(tmp_path: Path) -> None:
    frozen(tmp_path)
    assert StudyFolder.all_under(tmp_path) == [StudyFolder(str(tmp_path), "s")]
    assert StudyFolder.all_under(tmp_path / "nowhere") == []


def test_a_write_replaces_the_whole_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_atomically(path, "long text")
    write_atomically(path, "short")
    assert path.read_text() == "short"
    assert list(tmp_path.iterdir()) == [path]
