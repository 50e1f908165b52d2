"""``comp measure --peak``: from a spec to the memory that a study's workers ask for."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from studies.cli import cli
from studies.jobs import first_job
from studies.pool import on_ray
from studies.presets import preset_path
from studies.spec import StudySpec
from studies.specfile import read_spec, resolve_places


@pytest.mark.ray
def test_what_a_real_stage_took_is_what_the_workers_ask_for(
    tmp_path: Path, ray_cluster: str
) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(preset_path("smoke").read_text() + f"root: {tmp_path}\n")
    done = CliRunner().invoke(cli, ["measure", str(path), "--peak", "--json"], prog_name="comp")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert 200 < found["host_mib"] < 4000
    spec = resolve_places(read_spec(path))
    assert isinstance(spec, StudySpec)
    with on_ray(spec) as executor:
        asked = executor._size_of(first_job(spec)).memory_mib  # type: ignore[attr-defined]
    assert asked == round(1.1 * found["host_mib"]) + 128
