"""Names of the models that ship with their weights. No torch in here."""

from dataclasses import dataclass
from pathlib import Path

ZOO = Path(__file__).parent.parent / "zoo"


@dataclass(frozen=True)
class ModelPreset:
    """A dense model in the package.

    Attributes:
        description: One line for ``comp models``.
        task: The task it was trained for.
    """

    description: str
    task: str


MODEL_PRESETS: dict[str, ModelPreset] = {
    "blip-tiny-vqa": ModelPreset("BLIP, 4 vision and 3 text layers, 64 px, OpenMoji VQA", "vqa"),
    "blip-small-vqa": ModelPreset("BLIP, 6 and 4 layers, 12 heads, 64 px, OpenMoji VQA", "vqa"),
    "blip-tiny-nlvr2": ModelPreset(
        "BLIP with twin cross-attention, sizes of blip-tiny-vqa, OpenMoji NLVR2", "nlvr2"
    ),
    "blip-small-nlvr2": ModelPreset(
        "BLIP with twin cross-attention, sizes of blip-small-vqa, OpenMoji NLVR2", "nlvr2"
    ),
    "clip-small-retrieval": ModelPreset(
        "CLIP, 6 and 4 layers, 12 heads, 64 px, OpenMoji scenes and captions", "retrieval"
    ),
}


def preset_directory(name: str) -> Path:
    """Returns where a preset's weights lie."""
    return ZOO / name
