"""What a pruning run is asked to do: plain frozen dataclasses, checked when they are made.

This module imports no torch, so that a driver can validate a study in milliseconds.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from comp.config_checks import check_config, tuple_of_ratios
from comp.methods import METHODS, SWITCHES, Method, Schedule
from comp.words import nearest


@dataclass(frozen=True)
class PruningConfig:
    """Everything that decides a pruning run besides the model, the task and the data.

    Defaults are the paper's where it gives one (Section 4 and the supplement), else those that
    docs/algorithm.md explains.

    Attributes:
        ratios: FLOPs ratios to reach, ascending, each in (0, 1). One run passes through all of
            them and each gives one point of the accuracy-versus-ratio curve.
        method: One of ``METHODS``; sets the switches below that are left ``None``.
        num_stages: Planned number of stages on the way to the largest ratio (paper: S_n).
        steps_per_stage: Optimizer steps per stage (I).
        exploration: Probability of exploring instead of taking the cheapest mode (rho).
        temperature: Temperature of the exploration softmax over idle time (tau, Eq. 9).
        history: Weight of the old cost one stage later (lambda_0, Eq. 10).
        horizon: Stages after which the old cost is forgotten (I_max, Eq. 10).
        init: Where the modes' first costs come from: a ``"sweep"`` of one stage each, or trials of
            all modes on copies before the first stage, which is not the paper's: a ``"probe"``
            does not train, a ``"rehearsal"`` trains as a stage does.
        refresh_after: Stages after which the cost of a mode that did not run is measured again, by
            a trial on a copy without training; ``None`` never does. Not the paper's.
        lookahead_steps: Training steps of every trial of the ``lookahead`` schedule, which is not
            the paper's: it tries all live modes from one snapshot and keeps the cheapest.
        stage_quantum: Share of the dense FLOPs that a stage removes; ``None`` means the largest
            ratio divided by ``num_stages``.
        last_quantum: The last stage's quantum as a share of the first one's, between which quanta
            shrink geometrically; ``num_stages`` of them make up the way all the same.
        quantum_cap: Largest share of a mode's own FLOPs that one stage may remove (kappa).
        min_quantum: Share of the dense FLOPs below which a raise counts as exhausted (eps_F).
        tolerance: Accepted overshoot above the FLOPs target, as a share of the dense FLOPs.
        max_stages: Hard stop; ``None`` means three times ``num_stages``.
        decay_share: Share of a stage's steps during which new masks fade to zero.
        cip: Overrides the method's switch.
        cit: Overrides the method's switch.
        schedule: Overrides the method's switch.
        parameter_score: Overrides the method's switch.
        token_score: Overrides the method's switch.
        token_threshold: Overrides the method's switch.
        causal_mean: Overrides the method's switch.
        head_reduce: Overrides the method's switch.
        unit: Overrides the method's switch.
        rank_norm: Overrides the method's switch.
        cost_against: Overrides the method's switch.
        recalibrate: Overrides the method's switch.
        steps_by: Overrides the method's switch.
        history_by: Overrides the method's switch.
        fade_exploration: Overrides the method's switch.
        rank_by: Rank units by their score, or by their score divided by the FLOPs that go with
            them (``comp.masks.rank_scores``).
        one_ranking: Where the schedule chooses a mode, let parameters of all modalities be one,
            with one ranking as in the joint schedules. Not the paper's.
        regrow: Choose among all units of a mode at every stage, those that earlier stages pruned
            among them, so that a unit may come back. Needs ``shrink="end"``.
        modes: Restricts the run to these modes; ``None`` means all the family has.
        mask_site: ``"qkv"`` multiplies head masks into q, k and v (Eq. 2), ``"context"`` into
            the attention output.
        merge: ``"summary"`` merges dropped tokens into one, ``"drop"`` discards them, ``"auto"``
            is what the family says.
        min_heads: Heads kept in every attention, or dimensions of its heads where these are units.
        min_channels: Channels kept in every feed-forward layer.
        min_vision_tokens: Unprotected image tokens kept in every layer.
        min_text_tokens: Unprotected text tokens kept in every layer.
        learning_rate: Constant AdamW learning rate while pruning.
        weight_decay: AdamW weight decay.
        batch_size: Samples behind one optimizer step.
        accumulate: Parts of equal size into which a batch is split, one forward and backward pass
            after the other, to save memory. A loss that compares the samples of a batch compares
            those of a part.
        gradient_checkpointing: Keep only each layer's input for the backward pass and compute the
            rest again, to save memory.
        drop_path: Probability with which the last image layer's two sub-layers are left out for a
            sample while training, growing linearly from 0 in the first layer (BLIP: 0.1 for NLVR2
            and VQA, else 0). Not for LLaVA, whose image tower is not pruned.
        max_grad_norm: Gradient norm above which gradients are clipped.
        fine_tune_steps: Steps of fine-tuning after the shrink, for every ratio.
        fine_tune_checks: Validations spread over the fine-tuning, of which the best is kept.
        fine_tune_learning_rate: Peak of the cosine; ``None`` means ``learning_rate``.
        distillation: Weight of a loss term in fine-tuning that pulls the model towards the dense
            one's predictions (``comp.distillation``); 0 leaves it out.
        distillation_temperature: Temperature of both predictions in it.
        distill_stages: Add the term to the training of stages, too.
        val_metric: What a mode's cost is measured in: the task's metric or minus its loss.
        cost: What a mode's accuracy loss is divided by: the FLOPs it removed (the paper's), or,
            for people who deploy, parameters or measured milliseconds.
        eval_samples: Validation samples behind every stage's cost (fixed through the run).
        test_samples: Test samples read once per finished ratio; ``None`` means all.
        eval_batch_size: Batch size of evaluations.
        calibration_samples: Training samples behind parameter scores.
        probe_samples: Training samples behind the search for a token threshold.
        shrink: When masked units are physically removed: after every ``"stage"`` or at the
            ``"end"``.
        seed: Seed of data order, exploration and dropout.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ...
        autocast: Run training and evaluation in bfloat16 autocast.
    """

    ratios: tuple[float, ...] = (0.8,)
    method: str = "comp"
    num_stages: int = 40
    steps_per_stage: int = 100
    exploration: float = 0.2
    temperature: float = 5.0
    history: float = 0.4
    horizon: int = 5
    refresh_after: int | None = None
    init: Literal["sweep", "probe", "rehearsal"] = "sweep"
    lookahead_steps: int = 10
    stage_quantum: float | None = None
    last_quantum: float = 1.0
    quantum_cap: float = 0.15
    min_quantum: float = 0.001
    tolerance: float = 0.0025
    max_stages: int | None = None
    decay_share: float = 0.75
    cip: bool | None = None
    cit: bool | None = None
    schedule: Schedule | None = None
    parameter_score: Literal["wanda", "gradient"] | None = None
    token_score: Literal["attention", "madtp"] | None = None
    token_threshold: Literal["relative", "absolute"] | None = None
    causal_mean: bool | None = None
    head_reduce: Literal["max", "mean"] | None = None
    unit: Literal["head", "head_dim"] | None = None
    rank_norm: Literal["kind", "layer"] | None = None
    cost_against: Literal["before", "control"] | None = None
    recalibrate: bool | None = None
    steps_by: Literal["stage", "quantum"] | None = None
    history_by: Literal["stage", "quantum"] | None = None
    fade_exploration: bool | None = None
    rank_by: Literal["score", "score_per_flop"] = "score"
    one_ranking: bool = False
    regrow: bool = False
    modes: tuple[str, ...] | None = None
    mask_site: Literal["qkv", "context"] = "qkv"
    merge: Literal["auto", "summary", "drop"] = "auto"
    min_heads: int = 1
    min_channels: int = 16
    min_vision_tokens: int = 4
    min_text_tokens: int = 2
    learning_rate: float = 3e-5
    weight_decay: float = 0.05
    batch_size: int = 32
    accumulate: int = 1
    gradient_checkpointing: bool = False
    drop_path: float = 0.0
    max_grad_norm: float = 1.0
    fine_tune_steps: int = 1000
    fine_tune_checks: int = 4
    fine_tune_learning_rate: float | None = None
    distillation: float = 0.0
    distillation_temperature: float = 2.0
    distill_stages: bool = False
    val_metric: Literal["metric", "neg_loss"] = "neg_loss"
    cost: Literal["macs", "params", "latency"] = "macs"
    eval_samples: int = 1000
    test_samples: int | None = None
    eval_batch_size: int = 64
    calibration_samples: int = 256
    probe_samples: int = 128
    shrink: Literal["stage", "end"] = "stage"
    seed: int = 0
    device: str = "auto"
    autocast: bool = False

    version: int = dataclasses.field(default=1, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratios", tuple_of_ratios(self.ratios))
        if self.modes is not None:
            object.__setattr__(self, "modes", tuple(str(mode) for mode in self.modes))
        check_config(self)

    @property
    def switches(self) -> Method:
        """The method with this config's own switches put over it."""
        method = METHODS[self.method]
        own = {name: getattr(self, name) for name in SWITCHES if getattr(self, name) is not None}
        return dataclasses.replace(method, **own)

    @property
    def part_size(self) -> int:
        """Samples of one forward pass while training."""
        return self.batch_size // self.accumulate

    def shared_by(self, num_workers: int) -> Self:
        """Returns a config whose batches have a whole number of parts for each of some workers.

        Raises:
            ValueError: If a batch cannot be split so.
        """
        parts = math.lcm(self.accumulate, num_workers)
        if self.batch_size % parts:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be shared by {num_workers} workers in "
                f"{parts} equal parts; make it a multiple of {parts}"
            )
        return dataclasses.replace(self, accumulate=parts)

    @property
    def quantum(self) -> float:
        """Share of the dense FLOPs that one stage is to remove (dF of docs/algorithm.md)."""
        return self.stage_quantum or self.ratios[-1] / self.num_stages

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values; ``from_dict`` is the inverse."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Builds a config from ``to_dict``'s output.

        Raises:
            ValueError: If a key is unknown or a value is out of bounds.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise ValueError(f"unknown key {key!r} in a pruning config{nearest(key, known)}")
        return cls(**values)
