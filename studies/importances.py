"""Which settings mattered in a study: Optuna's importances of its parameters."""

import warnings

import optuna
from optuna.study import StudyDirection
from optuna.trial import TrialState

from studies.folder import StudyFolder
from studies.storages import JOURNAL, explaining, open_storage
from studies.summary import quiet


def parameter_importances(folder: StudyFolder) -> dict[str, float]:
    """Returns how much each parameter matters for the first objective, the largest first.

    Args:
        folder: A study that was started.

    Returns:
        Importances that sum to 1; empty while fewer than two complete trials differ in their
        value.

    Raises:
        StorageUnreachable: If the study's storage cannot be read.
    """
    spec = folder.read_spec()
    quiet()
    if spec.storage == "journal" and not folder.storage.exists(JOURNAL):
        return {}
    opened = open_storage(spec)
    with explaining(spec.storage):
        try:
            study = optuna.load_study(study_name=spec.name, storage=opened.optuna)
        except KeyError:
            return {}
        done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len({trial.values[0] for trial in done}) < 2:
        return {}
    if len(study.directions) == 1:
        return optuna.importance.get_param_importances(study)
    # Told a target, PED-ANOVA asks what makes it low, whatever the study's direction, and warns.
    sign = -1.0 if study.directions[0] == StudyDirection.MAXIMIZE else 1.0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "PedAnova.*low `target` values")
        return optuna.importance.get_param_importances(study, target=lambda t: sign * t.values[0])
