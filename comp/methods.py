"""The methods that the paper's tables compare, as names for combinations of switches. No torch."""

from dataclasses import dataclass
from typing import Literal

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
        rank_norm: How scores are made comparable between layers: by standardising over all layers
            of a ``"kind"``, or by dividing by their ``"layer"``'s mean before.
        cost_against: What the loss after a stage is compared with for its mode's cost: that
            ``"before"`` the stage (Eq. 8), or that of a ``"control"``, a copy that trained on the
            same batches without the stage's step, so that training counts for nothing.
        recalibrate: Set all token thresholds again at the end of every stage, so that it removes
            what it was to remove.
        steps_by: Whether every stage trains for ``steps_per_stage`` steps (``"stage"``), or for as
            large a share of them as it is to remove of a quantum (``"quantum"``), so that all ways
            to a ratio train alike.
        history_by: Whether the cost of a stage that a target cuts short counts in Eq. 10 as any
            other's (``"stage"``), or for the share of the step that was left of it
            (``"quantum"``): a cost is the noisier the less was removed.
        fade_exploration: Multiply the probability of exploring by the share of the way to the
            largest ratio that is left.
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
    rank_norm: Literal["kind", "layer"] = "kind"
    cost_against: Literal["before", "control"] = "before"
    recalibrate: bool = False
    steps_by: Literal["stage", "quantum"] = "stage"
    history_by: Literal["stage", "quantum"] = "stage"
    fade_exploration: bool = False


METHODS: dict[str, Method] = {
    "comp": Method(cip=True, cit=True, schedule="mps"),
    "comp_plus": Method(
        cip=True,
        cit=True,
        schedule="mps",
        rank_norm="layer",
        cost_against="control",
        recalibrate=True,
        history_by="quantum",
        fade_exploration=True,
    ),
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


SWITCHES = (
    "cip",
    "cit",
    "schedule",
    "parameter_score",
    "token_score",
    "token_threshold",
    "causal_mean",
    "head_reduce",
    "unit",
    "rank_norm",
    "cost_against",
    "recalibrate",
    "steps_by",
    "history_by",
    "fade_exploration",
)
"""The switches that a config may put over its method's."""


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
