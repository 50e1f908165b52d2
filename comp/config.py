"""What a pruning run is asked to do: plain frozen dataclasses, checked when they are made.

This module imports no torch, so that a driver can validate a study in milliseconds.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from comp.modes import PruningMode

Schedule = Literal[
    "mps", "cas_re", "cas", "lookahead", "joint", "tokens_first", "params_first", "sine"
]


@dataclass(frozen=True)
class Method:
    """A named combination of the switches that the paper's tables compare.

    Attributes:
        cip: Weigh tokens by their importance in parameter scores (Eq. 4, 5).
        cit: Let fading heads count less in token scores (Eq. 7).
        schedule: How the mode of a stage is chosen; ``"sine"`` is UPop's search instead, which
            selects units anew after every stage (``comp.upop_search``).
        parameters: Whether parameters are pruned at all.
        tokens: Whether tokens are pruned at all.
        parameter_score: ``"wanda"`` scores units by Eq. 3 or 4, ``"gradient"`` as UPop does
            (``comp.upop``).
        token_score: ``"attention"`` scores tokens by Eq. 6 or 7, ``"madtp"`` as MADTP does, with
            its learnable thresholds (``comp.madtp``).
        token_threshold: What an encoder's token threshold multiplies a score by before it
            compares: the number of scored tokens of the layer, ``"relative"``, or of the first
            layer, ``"absolute"``, so that a threshold drops less where tokens are fewer.
        causal_mean: Divide the attention that a token of a causal encoder receives by the number
            of tokens that can see it; Eq. 6 as it stands favours early ones.
        head_reduce: How heads become one where streams share a sequence (LLaVA): the ``"max"`` of
            Eq. 6, or PyramidDrop's ``"mean"``.
        unit: What a unit of an attention is: a ``"head"``, or ``"head_dim"``, one dimension of
            all heads of a module (UPop's). Eq. 7 then changes nothing; models with rotary
            positions or shared keys cannot have it, nor can ``mask_site="context"``.
    """

    cip: bool
    cit: bool
    schedule: Schedule
    parameters: bool = True
    tokens: bool = True
    parameter_score: Literal["wanda", "gradient"] = "wanda"
    token_score: Literal["attention", "madtp"] = "attention"
    token_threshold: Literal["relative", "absolute"] = "relative"
    causal_mean: bool = False
    head_reduce: Literal["max", "mean"] = "max"
    unit: Literal["head", "head_dim"] = "head"


METHODS: dict[str, Method] = {
    "comp": Method(cip=True, cit=True, schedule="mps"),
    "cim": Method(cip=True, cit=True, schedule="joint"),
    "cas": Method(cip=True, cit=True, schedule="cas"),
    "cas_re": Method(cip=True, cit=True, schedule="cas_re"),
    "lookahead": Method(cip=True, cit=True, schedule="lookahead"),
    "upop": Method(
        cip=False, cit=False, schedule="joint", tokens=False, parameter_score="gradient"
    ),
    "upop_sine": Method(
        cip=False,
        cit=False,
        schedule="sine",
        tokens=False,
        parameter_score="gradient",
        unit="head_dim",
    ),
    "param": Method(cip=False, cit=False, schedule="joint", tokens=False),
    "token": Method(cip=False, cit=False, schedule="joint", parameters=False),
    "madtp": Method(cip=False, cit=False, schedule="joint", parameters=False, token_score="madtp"),
    "sjp": Method(cip=False, cit=False, schedule="joint"),
    "sjp_tp": Method(cip=False, cit=False, schedule="tokens_first"),
    "sjp_pt": Method(cip=False, cit=False, schedule="params_first"),
}


def nearest(word: str, known: list[str]) -> str:
    """Returns ``"; did you mean 'x'?"`` for the known word closest to ``word``, or nothing."""
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


def check_site(unit: str, mask_site: str) -> None:
    """Refuses masks on the context for dimensions: there, queries and keys would keep them.

    Raises:
        ValueError: If the two cannot go together.
    """
    if unit == "head_dim" and mask_site == "context":
        raise ValueError(
            "mask_site 'context' cannot go with unit 'head_dim', whose removal changes the "
            "products of queries and keys as well; use 'qkv'"
        )


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
        init: Where the modes' first costs come from: a ``"sweep"`` of one stage each, or a
            ``"probe"`` before the first stage, which tries each mode on a copy without training.
        lookahead_steps: Training steps of every trial of the ``lookahead`` schedule, which is not
            the paper's: it tries all live modes from one snapshot and keeps the cheapest.
        stage_quantum: Share of the dense FLOPs that a stage removes; ``None`` means the largest
            ratio divided by ``num_stages``.
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
        rank_norm: ``"kind"`` standardises scores over all layers; ``"layer"`` divides them by
            their layer's mean before.
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
    init: Literal["sweep", "probe"] = "sweep"
    lookahead_steps: int = 10
    stage_quantum: float | None = None
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
    rank_norm: Literal["kind", "layer"] = "kind"
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
        object.__setattr__(self, "ratios", _tuple_of_ratios(self.ratios))
        if self.modes is not None:
            object.__setattr__(self, "modes", tuple(str(mode) for mode in self.modes))
        self._check_ratios()
        self._check_choices()
        for name, low, high in _BOUNDS:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name} must be in [{low}, {high}], but got {value}")
        check_site(self.switches.unit, self.mask_site)
        self._check_search()
        if self.init == "probe" and self.switches.schedule not in ("mps", "cas", "cas_re"):
            raise ValueError(
                f"init 'probe' gives first costs to the schedules mps, cas and cas_re, but method "
                f"{self.method!r} has {self.switches.schedule!r}; use 'sweep'"
            )
        self._check_regrow()
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate must divide batch_size ({self.batch_size}), but got {self.accumulate}"
            )

    def _check_ratios(self) -> None:
        if not self.ratios:
            raise ValueError("ratios must name at least one ratio in (0, 1), but got ()")
        for ratio in self.ratios:
            if not 0.0 < ratio < 1.0:
                hint = f"; pass {ratio / 100:g} for {ratio:g} %" if 1 < ratio < 100 else ""
                raise ValueError(f"ratios must lie in (0, 1), but got {ratio}{hint}")
        if list(self.ratios) != sorted(set(self.ratios)):
            raise ValueError(f"ratios must ascend without repeats, but got {self.ratios}")

    def _check_search(self) -> None:
        switches = self.switches
        if switches.schedule != "sine":
            return
        if switches.tokens or switches.parameter_score != "gradient":
            raise ValueError(
                "schedule 'sine' is UPop's search by gradients, which drops no tokens, but got "
                f"it with method {self.method!r} and parameter_score "
                f"{switches.parameter_score!r}; use method 'upop_sine'"
            )
        if len(self.ratios) > 1:
            raise ValueError(
                f"schedule 'sine' searches for one ratio, but ratios is {self.ratios}; "
                "start a run for each"
            )

    def _check_regrow(self) -> None:
        if self.regrow and self.shrink != "end":
            raise ValueError(
                f"regrow brings masked units back, but shrink {self.shrink!r} removes them after "
                "their stage; use shrink 'end'"
            )
        if self.regrow and self.switches.schedule == "sine":
            raise ValueError(
                "regrow is for stages of their own, but schedule 'sine' chooses among all units "
                "at every stage anyway; leave regrow out"
            )

    def _check_choices(self) -> None:
        if self.method not in METHODS:
            raise ValueError(
                f"method must be one of {', '.join(METHODS)}, but got {self.method!r}"
                + nearest(self.method, list(METHODS))
            )
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                shown = ", ".join(str(choice) for choice in choices if choice is not None)
                raise ValueError(f"{name} must be one of {shown}, but got {value!r}")
        known = [mode.value for mode in PruningMode]
        for mode in self.modes or ():
            if mode not in known:
                raise ValueError(
                    f"modes must be among {', '.join(known)}, but got {mode!r}"
                    + nearest(mode, known)
                )

    @property
    def switches(self) -> Method:
        """The method with this config's own switches put over it."""
        method = METHODS[self.method]
        own = {name: getattr(self, name) for name in _SWITCHES if getattr(self, name) is not None}
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


def _tuple_of_ratios(ratios: Any) -> tuple[float, ...]:
    if not isinstance(ratios, list | tuple) or not all(
        isinstance(ratio, int | float) and not isinstance(ratio, bool) for ratio in ratios
    ):
        raise ValueError(f"ratios must be a list of numbers in (0, 1), but got {ratios!r}")
    return tuple(ratios)


_SWITCHES = (
    "cip",
    "cit",
    "schedule",
    "parameter_score",
    "token_score",
    "token_threshold",
    "causal_mean",
    "head_reduce",
    "unit",
)

_CHOICES: dict[str, tuple[Any, ...]] = {
    "schedule": (
        None,
        "mps",
        "cas_re",
        "cas",
        "lookahead",
        "joint",
        "tokens_first",
        "params_first",
        "sine",
    ),
    "parameter_score": (None, "wanda", "gradient"),
    "token_score": (None, "attention", "madtp"),
    "token_threshold": (None, "relative", "absolute"),
    "head_reduce": (None, "max", "mean"),
    "unit": (None, "head", "head_dim"),
    "init": ("sweep", "probe"),
    "rank_norm": ("kind", "layer"),
    "mask_site": ("qkv", "context"),
    "merge": ("auto", "summary", "drop"),
    "val_metric": ("metric", "neg_loss"),
    "cost": ("macs", "params", "latency"),
    "shrink": ("stage", "end"),
    "version": (1,),
}

_BOUNDS: tuple[tuple[str, float, float], ...] = (
    ("num_stages", 1, 10_000),
    ("steps_per_stage", 1, 10_000_000),
    ("exploration", 0.0, 1.0),
    ("temperature", 1e-6, 1e6),
    ("history", 0.0, 1.0),
    ("horizon", 1, 10_000),
    ("lookahead_steps", 1, 1_000_000),
    ("stage_quantum", 1e-6, 1.0),
    ("quantum_cap", 1e-6, 1.0),
    ("min_quantum", 0.0, 0.1),
    ("tolerance", 0.0, 0.1),
    ("max_stages", 1, 1_000_000),
    ("decay_share", 0.0, 1.0),
    ("min_heads", 1, 1024),
    ("min_channels", 1, 1_000_000),
    ("min_vision_tokens", 1, 100_000),
    ("min_text_tokens", 1, 100_000),
    ("learning_rate", 0.0, 10.0),
    ("weight_decay", 0.0, 10.0),
    ("batch_size", 1, 1_000_000),
    ("accumulate", 1, 1_000_000),
    ("drop_path", 0.0, 0.9),
    ("max_grad_norm", 1e-9, 1e9),
    ("fine_tune_steps", 0, 100_000_000),
    ("fine_tune_checks", 1, 1_000),
    ("fine_tune_learning_rate", 0.0, 10.0),
    ("eval_samples", 1, 100_000_000),
    ("test_samples", 1, 100_000_000),
    ("eval_batch_size", 1, 1_000_000),
    ("calibration_samples", 1, 100_000_000),
    ("probe_samples", 1, 100_000_000),
    ("seed", 0, 2**32 - 1),
)
