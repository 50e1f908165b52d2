"""A pruned LLaVA as a model of lmms-eval, which runs the public benchmarks.

lmms-eval finds ``manifest`` by the entry point ``lmms_eval.models`` of this package. Nothing here
is imported, and lmms-eval is not needed, before somebody runs lmms-eval.
"""

from typing import Any

MODEL_ID = "comp_llava"


def manifest() -> Any:
    """Returns what lmms-eval (0.7) registers: the model's id and where its class is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL_ID, simple_class_path="comp.lmms.model.CompLlava")
