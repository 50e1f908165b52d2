"""Ctrl-C and SIGTERM: the first asks for a soft stop, the second ends at once."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


class StopSwitch:
    """Whether somebody asked to stop; passed on as ``switch.is_pressed``."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def is_pressed(self) -> bool:
        """Tells whether a stop was asked for."""
        return self._event.is_set()

    def press(self) -> None:
        """Asks for a soft stop."""
        self._event.set()


@contextlib.contextmanager
def stop_on_signals(switch: StopSwitch, say: Callable[[str], None]) -> Iterator[None]:
    """Lets the first SIGINT or SIGTERM press a switch for as long as the context lasts.

    The second one raises ``KeyboardInterrupt``. Outside the main thread, where Python takes no
    signals, nothing happens. Enter it after Ray was started, which takes SIGTERM for itself.

    Args:
        switch: What is pressed.
        say: Told one sentence at the first signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if switch.is_pressed():
            raise KeyboardInterrupt
        switch.press()
        say("stopping after the stages under way; once more to end now (nothing finished is lost)")

    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, stop) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
