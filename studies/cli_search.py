"""``comp study enqueue``, ``watch`` and ``proxy``: a study that runs, from another terminal."""

import click

from studies.cli_base import (
    Interrupted,
    answer,
    common,
    example,
    find_folder,
    mistakes,
    root_option,
    say,
)


@click.command(epilog=example("comp study enqueue demo-vqa num_stages=12 exploration=0.1"))
@click.argument("name")
@click.argument("settings", nargs=-1, required=True, metavar="KEY=VALUE...")
@root_option
@common
def enqueue(name: str, settings: tuple[str, ...], root: str | None, as_json: bool) -> None:
    """Have a study try settings next; keys that are left out are the sampler's.

    It may be running: its driver takes them up when it asks for the next trial.
    """
    from studies.requests import Requests
    from studies.space import check_labels
    from studies.specfile import override
    from studies.summary import summarize

    with mistakes():
        folder = find_folder(name, root)
        spec = folder.read_spec()
        wrong = next((setting for setting in settings if "=" not in setting), None)
        if wrong is not None:
            raise ValueError(
                f"a setting must be KEY=VALUE, for example num_stages=12, but got {wrong!r}"
            )
        labels = check_labels(spec.space, override({}, settings))
        if spec.sampler.kind == "grid":
            raise ValueError(f"study {name!r} walks a grid, which takes no other settings")
    Requests(folder).add(labels)
    summary = summarize(folder, spec)
    if summary.is_finished:
        more = f"comp study resume {name} --set n_trials={summary.num_ended + 1}"
        say(f"the study has its {spec.n_trials} trials; {more!r} runs this one")
    shown = ", ".join(f"{key} {value}" for key, value in labels.items())
    answer(as_json, {"study": name, "enqueued": labels}, f"next: {shown}")


@click.command(epilog=example("comp study proxy postgresql://team@db.example.org/optuna"))
@click.argument("database")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", default=13000, show_default=True, type=click.IntRange(1, 65535))
@common
def proxy(database: str, host: str, port: int, as_json: bool) -> None:
    """Serve a database to drivers that cannot reach it, as storage grpc://HOST:PORT.

    It asks for no password: whoever reaches the port may change every study. Ctrl-C ends it.
    """
    from studies.spec import refuse_password
    from studies.storages import serve_proxy

    with mistakes():
        if not database.startswith(("postgresql", "sqlite")):
            raise ValueError(
                f"database must be a URL such as postgresql://host/name, but got {database!r}"
            )
        refuse_password("database", database, "PGPASSWORD")
    say(f"serving at grpc://{host}:{port}; Ctrl-C ends it")
    try:
        serve_proxy(database, host, port)
    except KeyboardInterrupt:
        raise Interrupted("the proxy has ended") from None


@click.command(epilog=example("comp study watch demo-vqa"))
@click.argument("name")
@click.option(
    "--interval",
    default=2.0,
    show_default=True,
    type=click.FloatRange(0.1),
    help="Seconds between two looks.",
)
@root_option
@common
def watch(name: str, interval: float, root: str | None, as_json: bool) -> None:
    """Watch a study that runs elsewhere: trials, stages, the best so far, time left.

    It reads files (and the study's database, if it has one) and ends when the study does. Where
    output is no terminal, everything that happens is a line. Ctrl-C ends the watching alone.
    """
    from rich.console import Console

    from studies.overview import Watcher
    from studies.report import trial_dict
    from studies.watch_screen import watch as show

    with mistakes():
        folder = find_folder(name, root)
    console = Console(stderr=as_json, highlight=False)
    lines = say if as_json else click.echo
    try:
        view = show(Watcher(folder), interval, console, lines)
    except KeyboardInterrupt:
        return
    if as_json:
        front = [trial_dict(trial) for trial in view.summary.front]
        counts = view.summary.counts
        answer(True, {"study": name, "counts": counts, "front": front}, "")
