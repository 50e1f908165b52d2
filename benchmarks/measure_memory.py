"""Peak memory of pruning beside fine-tuning: BLIP-base NLVR2 at 224 px, batch 2, fresh processes.

Fine-tuning: two AdamW steps of the stock model and an evaluation pass. Pruning: the same on the
attached model with fading masks, after a calibration pass, with the dense copy that a ``Pruner``
keeps for its latencies. On a CPU the peak is the process's resident set, on an accelerator what
torch allocated there. Rows go to benchmarks/results/memory-<machine>.parquet and .md.
"""

import copy
import json
import resource
import subprocess
import sys
from typing import Any

import torch
from speed_models import blip_inputs, blip_nlvr
from summary import Row, replace_rows, show
from timing import Table, device

from comp.config import PruningConfig
from comp.finetune import make_optimizer
from comp.models import attach

STEPS, BATCH, SIZE = 2, 2, 224
GOAL = 1.15


def run(kind: str) -> None:
    """One of the two kinds; prints its peak in MiB."""
    torch.set_num_threads(1)
    model: Any = blip_nlvr(SIZE).to(device())
    inputs = {name: value.to(device()) for name, value in blip_inputs(BATCH, SIZE).items()}
    labels = torch.zeros(BATCH, dtype=torch.int64, device=device())
    dense = copy.deepcopy(model).cpu() if kind == "pruning" else None
    if kind == "pruning":
        handle = attach(model)
        handle.stock_when_idle = False
        with torch.no_grad(), handle.metering(), handle.collecting():
            model(**inputs)
        for name, group in handle.groups.items():
            handle.masks[name] = torch.full((group.num_units,), 0.5, device=device())
    optimizer = make_optimizer(model, PruningConfig())
    model.train()
    for _ in range(STEPS):
        optimizer.zero_grad(set_to_none=True)
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        model(**inputs)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if device().type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    print(json.dumps({"kind": kind, "peak_mib": peak, "dense_copy": dense is not None}))


def main() -> None:
    if len(sys.argv) > 1:
        run(sys.argv[1])
        return
    table = Table("memory", ("kind",), ("kind", "peak_mib", "dense_copy"))
    peaks = {}
    for kind in ("fine-tuning", "pruning"):
        command = [sys.executable, __file__, kind]
        result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(result.stdout.splitlines()[-1])
        table.add(found)
        peaks[kind] = found["peak_mib"]
    row = Row(
        figure="memory: peak of pruning over fine-tuning",
        value=round(peaks["pruning"] / peaks["fine-tuning"], 4),
        goal=GOAL,
        at_least=False,
        unit="x",
        how=(
            f"BLIP-base NLVR2, {SIZE} px, batch {BATCH}, {STEPS} AdamW steps, fresh processes, "
            f"{peaks['pruning']:.0f} over {peaks['fine-tuning']:.0f} MiB with the dense copy for "
            f"latencies, on {device().type}; benchmarks/measure_memory.py"
        ),
    )
    replace_rows([row])
    print(show([row]))


if __name__ == "__main__":
    main()
