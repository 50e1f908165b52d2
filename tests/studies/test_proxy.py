"""Optuna's gRPC proxy as it is used: one process serves a database, drivers elsewhere use it."""

import signal
import socket
from pathlib import Path

from studies.driver import Outcome, run_study
from studies.folder import StudyFolder
from studies.storages import open_url
from studies.summary import summarize
from tests.studies.drivers import start
from tests.studies.synthetic import RUNNER, SlotsExecutor, make_spec


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_study_through_the_proxy_is_in_the_database_and_ctrl_c_ends_the_proxy(
    tmp_path: Path,
) -> None:
    database, port, log = f"sqlite:///{tmp_path}/optuna.db", free_port(), tmp_path / "proxy.log"
    words = ("study", "proxy", database, "--port", str(port))
    proxy = start(RUNNER, *words, log=log)
    try:
        url = f"grpc://127.0.0.1:{port}"
        for _ in range(20):  # a study waits 5 s for a proxy, and this one has just begun
            try:
                open_url(url)
                break
            except RuntimeError:
                assert proxy.poll() is None, log.read_text()
        spec = make_spec(tmp_path, f"storage={url}", "n_trials=4")
        outcome = run_study(spec, lambda: SlotsExecutor(2), runner=RUNNER)
        assert outcome == Outcome("finished", {"complete": 4})
        through = summarize(StudyFolder.of(spec))
    finally:
        proxy.send_signal(signal.SIGINT)
        code = proxy.wait(timeout=60)
    assert code == 130
    text = log.read_text()
    assert f"serving at {url}; Ctrl-C ends it" in text
    assert text.endswith("comp: the proxy has ended\n")
    direct = make_spec(tmp_path, f"storage={database}", "n_trials=4")
    assert summarize(StudyFolder.of(direct), direct).trials == through.trials
