"""``comp evaluate``, ``measure`` and ``diagnose``: one model at a time."""

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from studies.cli_base import answer, common, device_option, example, mistakes, trust_option

if TYPE_CHECKING:
    from comp.models import LoadedModel
    from comp.tasks.base import Batch, Task

data_option = click.option(
    "--data", type=click.Path(path_type=Path), help="A data set; the embedded one by default."
)
answers_option = click.option(
    "--answers",
    type=click.Path(path_type=Path),
    help="Candidate answers to VQA questions, a JSON list or a data set with training questions; "
    "those of --data by default.",
)
task_option = click.option("--task", help="A task; what the model was made for by default.")
ratio_option = click.option(
    "--ratio", type=float, help="Which of a run's models; the most pruned one by default."
)


dtype_option = click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16", "auto"]),
    default="float32",
    show_default=True,
    help="Of the weights; auto is what they are stored in.",
)


@click.command(
    epilog=example(
        "comp evaluate blip-tiny-vqa --split test",
        "comp evaluate comp-runs/runs/demo-vqa-0000 --ratio 0.7",
        "comp evaluate my-blip --data vqav2 --split server --submission answers.json",
    )
)
@click.argument("model")
@click.option("--split", default="test", show_default=True, help="train, val, test or server.")
@click.option(
    "--submission",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Do not measure: write the answers to VQA questions as its server takes them.",
)
@click.option("--samples", type=click.IntRange(min=1), help="The first so many; all by default.")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True)
@ratio_option
@task_option
@data_option
@answers_option
@dtype_option
@device_option
@trust_option
@common
def evaluate(
    model: str,
    split: str,
    submission: Path | None,
    samples: int | None,
    batch_size: int,
    ratio: float | None,
    task: str | None,
    data: Path | None,
    answers: Path | None,
    dtype: str,
    device: str,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Measure a model's accuracy, FLOPs and parameters: a preset, a directory or a run."""
    from comp.evaluation import evaluate as run_evaluation
    from comp.evaluation import resolve_device
    from comp.models import attach

    with mistakes():
        loaded, built = _load(model, ratio, task, data, answers, trust_remote_code, dtype)
        target = resolve_device(device)
        if not hasattr(loaded.model, "pruning"):
            attach(loaded.model)
        first = next(iter(built.batches(split, batch_size=1, num_samples=1)))
        _check_answers(built, first, split, submission)
    if submission is not None:
        batches = built.batches(split, batch_size=batch_size, num_samples=samples)
        count = _write_submission(loaded.model.to(target), built, batches, target, submission)
        text = f"{count} answers to {split} questions in {submission}"
        answer(as_json, {"path": str(submission), "answers": count}, text)
        return
    result, cost = run_evaluation(
        loaded.model.to(target),
        built,
        split,
        batch_size=batch_size,
        num_samples=samples,
        device=target,
        final=True,
    )
    params = sum(p.numel() for p in loaded.model.parameters())
    values = {
        "model": str(model),
        "task": built.name,
        "split": split,
        "metric": built.metric_name,
        "value": result.metric,
        "loss": result.loss,
        "num_samples": result.num_samples,
        "gmacs": cost.macs / 1e9,
        "params": params,
        "details": result.details,
    }
    text = (
        f"{built.metric_name} {result.metric:.2f} on {result.num_samples} {split} samples of "
        f"{built.name}, loss {result.loss:.4f}, {cost.macs / 1e9:.4g} GFLOPs (multiply-add = 1), "
        f"{params / 1e6:.3f} M parameters"
    )
    text += "".join(f"\n{name:>16} {value:.4g}" for name, value in result.details.items())
    answer(as_json, values, text)


def _check_answers(task: "Task", first: "Batch", split: str, submission: Path | None) -> None:
    """Refuses a submission of another task, and a measurement without answers."""
    if submission is None and "num_answers" in first and int(first["num_answers"][0]) == 0:
        raise ValueError(
            f"split {split!r} has questions without answers, so there is nothing to measure; "
            "write a file for the server with --submission FILE"
        )
    if submission is None:
        return
    if not hasattr(task, "submission"):
        raise ValueError(f"--submission is for task 'vqa', but the task is {task.name!r}")
    if int(first["question_id"][0]) == 0:
        raise ValueError("--submission needs questions with ids; import VQAv2 and pass --data")
    if not submission.parent.is_dir():
        raise ValueError(f"--submission: there is no directory {submission.parent}; make it first")


def _write_submission(
    model: Any, task: Any, batches: "Iterable[Batch]", device: Any, path: Path
) -> int:
    """Writes answers under a temporary name, renames the file, and returns how many there are."""
    from comp.evaluation import evaluating, to_device

    with evaluating(model):
        answers = task.submission(model, (to_device(batch, device) for batch in batches))
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(answers) + "\n", encoding="utf-8")
    part.replace(path)
    return len(answers)


@click.command(
    epilog=example("comp measure comp-runs/runs/demo-vqa-0000 --batch-size 1 --threads 1")
)
@click.argument("model")
@click.option("--dense", help="What to compare with; the model it was pruned from by default.")
@click.option("--split", default="val", show_default=True, help="Where the batch is from.")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=20, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; all by default.")
@click.option(
    "--peak",
    is_flag=True,
    help="MODEL is a spec: measure how much memory its runs take, for the scheduler.",
)
@ratio_option
@task_option
@data_option
@answers_option
@dtype_option
@device_option
@trust_option
@common
def measure(
    model: str,
    dense: str | None,
    split: str,
    batch_size: int,
    repeats: int,
    threads: int | None,
    peak: bool,
    ratio: float | None,
    task: str | None,
    data: Path | None,
    answers: Path | None,
    dtype: str,
    device: str,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Measure a pruned model's latency beside the dense one, in turn in one process."""
    if peak:
        _measure_peak(model, trust_remote_code, as_json)
        return
    import dataclasses

    import torch

    from comp.evaluation import resolve_device, to_device
    from comp.measure import compare_latency
    from comp.models import load_model

    if threads:
        torch.set_num_threads(threads)
    with mistakes():
        loaded, built = _load(model, ratio, task, data, answers, trust_remote_code, dtype)
        reference = dense or loaded.card.get("dense", {}).get("source")
        if not reference:
            raise ValueError(f"{model} does not say what it was pruned from; name it with --dense")
        kind = dtype_of(dtype)
        original = load_model(reference, trust_remote_code=trust_remote_code, dtype=kind)
        target = resolve_device(device)
        batch = to_device(next(iter(built.batches(split, batch_size=batch_size))), target)
    found = compare_latency(
        original.model.to(target), loaded.model.to(target), built, batch, repeats=repeats
    )
    answer(as_json, {"model": str(model), **dataclasses.asdict(found)}, str(found))


def _measure_peak(source: str, trust_remote_code: bool, as_json: bool) -> None:
    """Measures the memory of a spec's runs and keeps the figure under its root."""
    import dataclasses

    from orchestration.peak import PEAKS, measure_peak, write_peak
    from orchestration.storage import join
    from studies.jobs import first_job
    from studies.specfile import read_spec, resolve_places

    with mistakes():
        spec = resolve_places(read_spec(source))
        job = dataclasses.replace(first_job(spec), trust_remote_code=trust_remote_code)
    found = measure_peak(job)
    write_peak(spec.root, job, found)
    place = join(spec.root, PEAKS)
    values = {"host_mib": found.host_mib, "device_mib": found.device_mib, "path": place}
    text = f"a run takes up to {found}; workers ask for {found.request_mib:,} MiB ({place})"
    answer(as_json, values, text)


@click.command(epilog=example("comp diagnose blip-tiny-vqa --plot interference.png"))
@click.argument("model")
@click.option("--split", default="train", show_default=True, help="train, val or test.")
@click.option("--samples", type=click.IntRange(min=1), default=256, show_default=True)
@click.option(
    "--share",
    type=float,
    default=0.25,
    show_default=True,
    help="Share of the tokens that count as important.",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True)
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also draw it, as this PNG and an SVG beside it.",
)
@ratio_option
@task_option
@data_option
@answers_option
@device_option
@trust_option
@common
def diagnose(
    model: str,
    split: str,
    samples: int,
    share: float,
    batch_size: int,
    plot: Path | None,
    ratio: float | None,
    task: str | None,
    data: Path | None,
    answers: Path | None,
    device: str,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Show how far parameter and token importance disagree, layer by layer."""
    import dataclasses

    from comp.diagnostics import interference
    from comp.evaluation import resolve_device, to_device
    from comp.handle import handle_of
    from comp.models import attach

    with mistakes():
        if not 0 < share < 1:
            raise ValueError(f"--share must be in (0, 1), but got {share}")
        if plot is not None and plot.suffix != ".png":
            raise ValueError(f"--plot must name a .png file, but got {plot}")
        loaded, built = _load(model, ratio, task, data, answers, trust_remote_code)
        target = resolve_device(device)
        if not hasattr(loaded.model, "pruning"):
            attach(loaded.model)
        next(iter(built.batches(split, batch_size=1, num_samples=1)))
    batches = built.batches(split, batch_size=batch_size, num_samples=samples)
    found = interference(
        handle_of(loaded.model.to(target)),
        built,
        (to_device(batch, target) for batch in batches),
        share=share,
    )
    written: list[Path] = []
    if plot is not None:
        from studies.plots import plot_interference

        title = f"{model} on {built.name}: agreement of importance measures"
        written = plot_interference(found, plot.with_suffix(""), title=title)
    values = {
        "model": str(model),
        "task": built.name,
        "split": split,
        "share": share,
        "layers": [dataclasses.asdict(layer) for layer in found],
        "plots": [str(path) for path in written],
    }
    lines = [
        f"{layer.encoder:16} layer {layer.layer + 1:2}: {100 * layer.overlap:5.1f} % of the top "
        f"tokens agree, {100 * layer.expected:.1f} % by chance ({layer.num_samples} samples)"
        for layer in found
    ]
    answer(as_json, values, "\n".join([*lines, *map(str, written)]))


def _load(
    model: str,
    ratio: float | None,
    task: str | None,
    data: Path | None,
    answers: Path | None,
    trust_remote_code: bool,
    dtype: str = "float32",
) -> "tuple[LoadedModel, Task]":
    """Loads a model and the task it is for.

    Raises:
        ValueError: If one is unknown, or the model does not say its task.
    """
    from comp.models import load_model
    from comp.tasks import build_task
    from comp.tasks.build import read_answers

    with at_hand(model) as place:
        directory = find_model(place, ratio)
        loaded = load_model(directory, trust_remote_code=trust_remote_code, dtype=dtype_of(dtype))
    name = task or loaded.task
    if not name:
        raise ValueError(f"{model} does not say its task; name it with --task")
    built = build_task(
        name,
        tokenizer=loaded.tokenizer,
        image_size=loaded.image_size,
        transform=loaded.transform,
        data=data,
        answers=None if answers is None else read_answers(answers),
    )
    return loaded, built


def dtype_of(name: str) -> Any:
    """Returns torch's type of a name; ``"auto"`` stays."""
    import torch

    return name if name == "auto" else getattr(torch, name)


@contextlib.contextmanager
def at_hand(model: str) -> Iterator[str]:
    """Gives a model or a run as something on this disk: itself, or a copy of its models."""
    from orchestration.storage import Storage, is_remote

    if not is_remote(model):
        yield model
        return
    storage = Storage(model)
    if not (storage.exists("model") or storage.exists("config.json")):
        raise ValueError(f"there is neither a run nor a model at {model}")
    with storage.tree() as copy:
        yield str(copy)


def find_model(source: str, ratio: float | None) -> str:
    """Returns the model directory that a preset name, a directory or a run stands for.

    Raises:
        ValueError: If a run has no model of that ratio.
    """
    saved = sorted((Path(source) / "model").glob("ratio-*"))
    if not saved:
        if ratio is not None:
            raise ValueError(f"--ratio chooses among the models of a run, but {source} is no run")
        return source
    if ratio is None:
        return str(saved[-1])
    wanted = Path(source) / "model" / f"ratio-{round(1000 * ratio):03d}"
    if wanted not in saved:
        have = ", ".join(f"{int(path.name.removeprefix('ratio-')) / 1000:g}" for path in saved)
        raise ValueError(f"{source} has models of ratios {have}, but not of {ratio:g}")
    return str(wanted)
