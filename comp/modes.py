"""The five pruning modes of CoMP and the streams of tokens they act on (paper, Section 3)."""

from enum import StrEnum


class Stream(StrEnum):
    """A sequence of tokens that flows through one encoder or decoder."""

    VISION = "vision"
    TEXT = "text"


class PruningMode(StrEnum):
    """One way of making the model cheaper; each owns one threshold.

    A family need not have all five: CLIP has no cross-attention and LLaVA leaves its vision
    tower alone.
    """

    VISION_PARAMS = "vision_params"
    LANGUAGE_PARAMS = "language_params"
    CROSS_PARAMS = "cross_params"
    VISION_TOKENS = "vision_tokens"
    LANGUAGE_TOKENS = "language_tokens"

    @property
    def is_tokens(self) -> bool:
        """Whether the mode drops tokens (otherwise it drops heads and channels)."""
        return self in (PruningMode.VISION_TOKENS, PruningMode.LANGUAGE_TOKENS)

    @property
    def stream(self) -> Stream:
        """The stream whose tokens a token mode drops.

        Raises:
            ValueError: If the mode drops parameters.
        """
        if not self.is_tokens:
            raise ValueError(f"{self.value} drops parameters and has no stream of tokens")
        return Stream.VISION if self is PruningMode.VISION_TOKENS else Stream.TEXT


TOKEN_MODES = (PruningMode.VISION_TOKENS, PruningMode.LANGUAGE_TOKENS)
PARAMETER_MODES = (
    PruningMode.VISION_PARAMS,
    PruningMode.LANGUAGE_PARAMS,
    PruningMode.CROSS_PARAMS,
)


def modes_in(name: str) -> list[PruningMode]:
    """Returns the modes of a stage from their name, joined by ``+`` where several share it."""
    return [PruningMode(part) for part in name.split("+")]
