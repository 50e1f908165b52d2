"""How the time of statistics and of selection grows with tokens and layers, over a 16x range.

Tokens: scores from attention (Eq. 6), which are quadratic as attention is, and the selection that
follows them: threshold, plan and gather of packed rows. Layers: ranking the units of so many
layers. The exponent is the slope of log time over log size; constant costs make it too small,
caches too large. Rows go to benchmarks/results/growth-<machine>.parquet and .md.
"""

import argparse
import gc
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from summary import Row, replace_rows, show
from timing import Table, interleaved
from torch import nn

from comp.importance import ActivationStatistics, normalise_scores, strongest_heads, vote_sums
from comp.masks import choose_units, rank_scores, scores_of
from comp.modes import PruningMode
from comp.sites import FeedForwardSite, LinearRef
from comp.tokens import keep_above, select

TOKENS = (128, 256, 512, 1024, 2048)
LAYERS = (4, 8, 16, 32, 64)
WIDTH, HEADS, CHANNELS = 192, 3, 768


def scoring(length: int) -> Callable[[], object]:
    attention = torch.rand(1, HEADS, length, length).softmax(-1)
    voting = torch.ones(1, length, dtype=torch.bool)

    def run() -> object:
        return normalise_scores(vote_sums(strongest_heads(attention), voting), voting)

    return run


def selecting(length: int) -> Callable[[], object]:
    scores = torch.rand(8, length).softmax(-1)
    valid, protected = torch.ones(8, length, dtype=torch.bool), torch.zeros(8, length).bool()
    rows = torch.randn(8, length, WIDTH)

    def run() -> object:
        keep = keep_above(scores, 0.9, valid, protected, 4)
        selection = select(keep, scores, valid, merge=True)
        assert selection is not None
        return selection.gather_rows(rows, None)

    return run


@dataclass
class _Owner:
    first: nn.Linear
    second: nn.Linear


def ranking(layers: int) -> Callable[[], object]:
    groups, collected = [], ActivationStatistics()
    for layer in range(layers):
        owner: Any = _Owner(nn.Linear(WIDTH, CHANNELS), nn.Linear(CHANNELS, WIDTH))
        site = FeedForwardSite(
            name=f"layer {layer}",
            mode=PruningMode.VISION_PARAMS,
            layer=layer,
            inputs=(LinearRef(owner, "first"),),
            out=LinearRef(owner, "second"),
            activation=torch.relu,
        )
        groups.append(site)
        collected.sums[site.name] = torch.rand(CHANNELS)
    collected.num_samples = 1
    by_name = {group.name: group for group in groups}
    alive = dict.fromkeys(by_name, CHANNELS)
    macs = dict.fromkeys(by_name, 1.0)

    def run() -> object:
        ranked = rank_scores(groups, scores_of(groups, collected), {})
        quantum = layers * CHANNELS / 40
        return choose_units(ranked, by_name, alive, macs, quantum, min_heads=1, min_channels=16)

    return run


PARTS: dict[str, tuple[Callable[[int], Callable[[], object]], tuple[int, ...], float]] = {
    "token scores over tokens": (scoring, TOKENS, 2.1),
    "token selection over tokens": (selecting, TOKENS, 1.15),
    "unit ranking over layers": (ranking, LAYERS, 1.15),
}


def slope(sizes: tuple[int, ...], times: list[float]) -> float:
    """Exponent of growth by least squares."""
    x, y = [math.log(size) for size in sizes], [math.log(taken) for taken in times]
    middle_x, middle_y = statistics.mean(x), statistics.mean(y)
    above = sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - middle_x) ** 2 for a in x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    table = Table("growth", ("part", "size"), ("part", "size", "ms", "exponent"))
    rows = []
    for part, (build, sizes, goal) in PARTS.items():
        gc.collect()
        gc.freeze()  # or passes over all that torch imported fall on one of the sizes by chance
        with torch.no_grad():
            times = interleaved({str(size): build(size) for size in sizes}, rounds)
        medians = [statistics.median(times[str(size)]) for size in sizes]
        exponent = slope(sizes, medians)
        for size, taken in zip(sizes, medians, strict=True):
            table.add({"part": part, "size": size, "ms": taken, "exponent": exponent})
        rows.append(
            Row(
                figure=f"growth: {part}",
                value=round(exponent, 3),
                goal=goal,
                at_least=False,
                unit="exponent",
                how=(
                    f"{sizes[0]} to {sizes[-1]}, median of {rounds} interleaved rounds, CPU time "
                    "of one thread; benchmarks/measure_growth.py"
                ),
            )
        )
    replace_rows(rows)
    print(show(rows))


if __name__ == "__main__":
    main()
