import os
import signal
import threading

import pytest

from studies.stopping import StopSwitch, stop_on_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_interrupts(number: signal.Signals) -> None:
    switch, said = StopSwitch(), list[str]()
    with stop_on_signals(switch, said.append):
        os.kill(os.getpid(), number)
        assert switch.is_pressed()
        assert len(said) == 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)


def test_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_on_signals(StopSwitch(), print):
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before


def test_another_thread_takes_no_signals() -> None:
    before = signal.getsignal(signal.SIGINT)
    inside = []

    def work() -> None:
        with stop_on_signals(StopSwitch(), print):
            inside.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [before]
