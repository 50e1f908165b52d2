"""Model families. The names resolve on first use, so that ``presets`` stays free of torch."""

from typing import TYPE_CHECKING, Any

from comp.lazy import resolve

if TYPE_CHECKING:
    from comp.models.base import Adapter, LoadedModel, detach
    from comp.models.load import ADAPTERS, adapter_of, attach, load_model, model_classes
    from comp.models.presets import MODEL_PRESETS

_HOMES = {
    "ADAPTERS": "comp.models.load",
    "MODEL_PRESETS": "comp.models.presets",
    "Adapter": "comp.models.base",
    "LoadedModel": "comp.models.base",
    "adapter_of": "comp.models.load",
    "attach": "comp.models.load",
    "detach": "comp.models.base",
    "load_model": "comp.models.load",
    "model_classes": "comp.models.load",
}

__all__ = [
    "ADAPTERS",
    "MODEL_PRESETS",
    "Adapter",
    "LoadedModel",
    "adapter_of",
    "attach",
    "detach",
    "load_model",
    "model_classes",
]


def __getattr__(name: str) -> Any:
    return resolve(__name__, name, _HOMES)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
