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
def stop_on_signals(say: Callable[[str], None]) -> Iterator[StopSwitch]:
    """Turns the first SIGINT or SIGTERM into a soft stop for as long as the context lasts.

    The second one raises ``KeyboardInterrupt``. Outside the main thread, where Python takes no
    signals, the switch is only pressed by hand.

    Args:
        say: Told one sentence at the first signal.
    """
    switch = StopSwitch()
    if threading.current_thread() is not threading.main_thread():
        yield switch
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if switch.is_pressed():
            raise KeyboardInterrupt
        switch.press()
        say("stopping: finished stages are kept, the same command goes on; once more to end now")

    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, stop) for number in signals}
    try:
        yield switch
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
