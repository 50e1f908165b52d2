"""comp: collaborative multi-mode pruning of vision-language models (CoMP, arXiv 2604.02956)."""

from typing import TYPE_CHECKING, Any

from comp.lazy import resolve

if TYPE_CHECKING:
    from comp.checkpoint import load_pruned, save_pruned
    from comp.config import PruningConfig
    from comp.measure import compare_latency
    from comp.models import attach, load_model
    from comp.pruner import Pruner, prune
    from comp.results import CurvePoint, PruningResult, StageRecord
    from comp.strategy import MultiModeStrategy
    from comp.tasks import build_task
    from comp.workers import Workers

__version__ = "0.1.0"

_HOMES = {
    "CurvePoint": "comp.results",
    "MultiModeStrategy": "comp.strategy",
    "Pruner": "comp.pruner",
    "PruningConfig": "comp.config",
    "PruningResult": "comp.results",
    "StageRecord": "comp.results",
    "Workers": "comp.workers",
    "attach": "comp.models",
    "build_task": "comp.tasks",
    "compare_latency": "comp.measure",
    "load_model": "comp.models",
    "load_pruned": "comp.checkpoint",
    "prune": "comp.pruner",
    "save_pruned": "comp.checkpoint",
}

__all__ = [
    "CurvePoint",
    "MultiModeStrategy",
    "Pruner",
    "PruningConfig",
    "PruningResult",
    "StageRecord",
    "Workers",
    "attach",
    "build_task",
    "compare_latency",
    "load_model",
    "load_pruned",
    "prune",
    "save_pruned",
]


def __getattr__(name: str) -> Any:
    return resolve(__name__, name, _HOMES)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
