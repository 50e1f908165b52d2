"""The section of a spec that says what one run asks of a machine or a cluster."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, PlainValidator, model_validator

from studies.domains import Number, Section


def _read_gpus(gpus: Any) -> Literal["auto"] | float:
    if gpus == "auto":
        return "auto"
    is_number = isinstance(gpus, (int, float)) and not isinstance(gpus, bool)
    if not is_number or not (0 <= gpus <= 1 or (gpus > 1 and gpus == round(gpus))):
        raise ValueError(f"gpus must be auto, a share of one or a whole number, but got {gpus!r}")
    return float(gpus)


class ResourcesSection(Section):
    """What one run at a time asks of the machine or the cluster.

    Attributes:
        cpus: CPU cores.
        gpus: GPUs, or a share of one; ``"auto"`` shares what the cluster has among the runs that
            go on at a time, and asks for none where there is none.
        threads: CPU threads of torch.
        workers: Processes that share the samples of one run, each with the amounts above and the
            whole model; Ray finds room for all of them at once.
        shard: Whether each of them keeps only its share of weights, gradients and moments.
    """

    cpus: Annotated[Number, Field(gt=0)] = 1.0
    gpus: Annotated[Literal["auto"] | float, PlainValidator(_read_gpus)] = "auto"
    threads: Annotated[int, Field(strict=True, ge=1, le=1024)] = 1
    workers: Annotated[int, Field(strict=True, ge=1, le=1024)] = 1
    shard: Annotated[bool, Field(strict=True)] = False

    @model_validator(mode="after")
    def _check_shard(self) -> Self:
        if self.shard and self.workers == 1:
            raise ValueError("shard needs workers to share with; set workers to 2 or more")
        return self
