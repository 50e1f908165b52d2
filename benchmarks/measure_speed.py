"""Realised speed-up: milliseconds of pruned models beside the dense one, over their FLOPs limit.

The dense side is the stock model, unmodified, with the fastest attention that transformers has for
it (sdpa; BLIP's vision tower has only its own). Both sides run in turn in one process. See
``speed_models`` for the models and how they are pruned. Rows go to
benchmarks/results/speed-<machine>.parquet and .md as they are measured; a ratio that is there
already is skipped unless ``--again`` is given. Where a goal is missed, the row says which
operators take the time, and how long it takes to read all weights once, which no pruning of tokens
spares.

ViT-L/14 and BLIP take minutes a ratio at batch size 8: ``--ratios 0.85 --rounds 2``.
"""

import argparse
import gc
import statistics
from functools import partial
from typing import Any

import torch
from speed_models import KINDS, SUBJECTS, Pruner, cost_and_spread
from summary import Row, replace_rows, show
from timing import Table, device, facts, interleaved, milliseconds, profile, ratio_of
from torch import nn

RATIOS = (0.5, 0.7, 0.8, 0.85)
GOALS = {"parameters": 0.85, "mix": 0.75, "tokens": 0.75}
GOAL_ALONE = 0.65  # at batch size 1
SHOWN = (
    "model",
    "kind",
    "batch",
    "ratio",
    "dense_ms",
    "pruned_ms",
    "speed_up",
    "lowest",
    "highest",
    "limit",
    "share",
    "uneven",
    "profile",
)


def measure(
    name: str, batch: int, rounds: int, kinds: list[str], ratios: list[float], table: Table
) -> None:
    subject = SUBJECTS[name]
    dense = subject.build().to(device())
    inputs = _to(subject.inputs(batch))
    few = _to(subject.inputs(min(batch, 2)))
    pruner = Pruner(dense, few)
    pruned = {(kind, r): pruner.prune(kind, r) for kind in kinds for r in ratios}
    whole = pruner.whole  # padding apart, a dense pass costs the same for all samples
    facts_of = {key: cost_and_spread(model.pruning, inputs) for key, model in pruned.items()}
    runs = {"dense": partial(_run, dense, inputs)}
    runs |= {str(key): partial(_run, model, inputs) for key, model in pruned.items()}
    times = interleaved(runs, rounds, warm=batch == 1)
    for key in pruned:
        kind, asked = key
        own = times[str(key)]
        speed_up, lowest, highest = ratio_of(times["dense"], own)
        macs, uneven = facts_of[key]
        limit = whole / macs
        goal = GOAL_ALONE if batch == 1 else GOALS[kind]
        table.add(
            {
                "model": name,
                "kind": kind,
                "batch": batch,
                "asked": asked,
                "ratio": 1 - 1 / limit,
                "dense_ms": sorted(times["dense"])[rounds // 2],
                "pruned_ms": sorted(own)[rounds // 2],
                "speed_up": speed_up,
                "lowest": lowest,
                "highest": highest,
                "limit": limit,
                "share": speed_up / limit,
                "uneven": uneven,
                "rounds": rounds,
                "profile": "" if speed_up / limit >= goal else _profile(pruned[key], inputs, own),
            }
        )


def _profile(model: nn.Module, inputs: dict[str, Any], times: list[float]) -> str:
    """What takes the time of a pass, with the share that reading every weight once takes."""
    reading = [milliseconds(partial(_read_weights, model)) for _ in range(4)][1:]
    share = 100 * statistics.median(reading) / statistics.median(times)
    return f"{profile(partial(_run, model, inputs))}; reading the weights once {share:.0f} %"


def _read_weights(model: nn.Module) -> None:
    """Multiplies every matrix of a model by a vector, which is as fast as memory is."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                torch.mv(module.weight, module.weight[0])


def _to(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(device()) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def _run(model: nn.Module, inputs: dict[str, Any]) -> None:
    with torch.no_grad():
        model(**inputs)


def summarise(table: Table) -> list[Row]:
    """The least share of the limit over the ratios, by model, kind and batch size."""
    rows = []
    for name, kind, batch in dict.fromkeys(
        (row["model"], row["kind"], row["batch"]) for row in table.rows
    ):
        own = [
            row
            for row in table.rows
            if (row["model"], row["kind"], row["batch"]) == (name, kind, batch)
        ]
        worst = min(own, key=lambda row: row["share"])
        told = ", ".join(
            f"{row['ratio']:.3f}: {row['speed_up']:.2f}x of {row['limit']:.2f}x" for row in own
        )
        alone = batch == 1
        goal = GOAL_ALONE if alone else GOALS[kind]
        if kind == "tokens" and not alone:
            goal = None
        rows.append(
            Row(
                figure=f"speed: {name}, {kind}, batch {batch}: speed-up over limit",
                value=round(worst["share"], 4),
                goal=goal,
                at_least=True,
                unit="of limit",
                how=(
                    f"worst of {told}; median of {worst['rounds']} interleaved rounds, CPU time, "
                    f"{worst['device']}, {worst['threads']} thread, load {worst['load']}, "
                    f"torch {worst['torch']}; benchmarks/measure_speed.py"
                ),
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 1])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--ratios", nargs="+", type=float, default=list(RATIOS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--again", action="store_true", help="measure what is there already")
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("speed", ("model", "kind", "batch", "asked"), SHOWN)
    for batch in args.batches:
        for name in args.models:
            ratios = [
                ratio
                for ratio in args.ratios
                if args.again or not table.has(model=name, batch=batch, asked=ratio)
            ]
            if ratios:
                print(f"{name}, batch {batch}, load {facts()['load']}", flush=True)
                measure(name, batch, args.rounds, args.kinds, ratios, table)
                gc.collect()
    rows = summarise(table)
    replace_rows(rows)
    print(show(rows))


if __name__ == "__main__":
    main()
