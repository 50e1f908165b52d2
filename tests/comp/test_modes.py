"""The five modes and the streams that they act on."""

import pytest

from comp.modes import PARAMETER_MODES, TOKEN_MODES, PruningMode, Stream


def test_five_modes_fall_into_two_kinds() -> None:
    assert set(PARAMETER_MODES) | set(TOKEN_MODES) == set(PruningMode)
    assert len(PruningMode) == 5
    assert all(mode.is_tokens for mode in TOKEN_MODES)
    assert not any(mode.is_tokens for mode in PARAMETER_MODES)


def test_a_token_mode_has_a_stream() -> None:
    assert PruningMode.VISION_TOKENS.stream is Stream.VISION
    assert PruningMode.LANGUAGE_TOKENS.stream is Stream.TEXT


@pytest.mark.parametrize("mode", PARAMETER_MODES)
def test_a_parameter_mode_has_none(mode: PruningMode) -> None:
    with pytest.raises(ValueError, match=f"{mode.value} drops parameters and has no stream"):
        _ = mode.stream
