"""Distillation: a loss term that pulls a pruned model towards the dense one's predictions.

In plain text, with z and y the logits of the pruned and of the dense model for one row (a class,
a word of an answer, the texts that an image is compared with), c the row's weight in the task's
own loss, and t the temperature:

    L = L_task + weight * t^2 * sum_rows c * KL(softmax(y / t) || softmax(z / t))

The dense model reads every training batch once more, in eval mode and without gradients: a step
takes the time of one dense forward longer, and its weights take memory beside the pruned one's.
Nothing of it counts as FLOPs of the pruned model, which runs alone once it is trained.

Source: Hinton et al. (arXiv 1503.02531), section 2; t^2 keeps the size of the gradient.
"""

import gc

import torch
from torch import Tensor, nn
from torch.nn import functional

from comp.config import PruningConfig
from comp.models import attach
from comp.parking import bytes_of, give_back, sharing_copy
from comp.tasks.base import Batch, PredictingTask, Prediction, PreparingTask, Task


def check_predicts(task: Task) -> PredictingTask:
    """Returns a task that can be distilled.

    Raises:
        ValueError: If it gives no predictions to hold against each other.
    """
    if not isinstance(task, PredictingTask):
        raise ValueError(
            f"distillation holds predictions against the dense model's, but task {task.name!r} "
            "gives none; set distillation to 0, or give the task the methods of "
            "comp.tasks.base.PredictingTask"
        )
    return task


def divergence(student: Prediction, teacher: Prediction, temperature: float) -> Tensor:
    """Returns the distillation term of a batch without its weight, a scalar.

    Args:
        student: Of the pruned model.
        teacher: Of the dense model, for the same rows.
        temperature: Divides both logits (t of the module docstring).
    """
    ours = functional.log_softmax(student.logits.float() / temperature, dim=1)
    theirs = functional.log_softmax(teacher.logits.float() / temperature, dim=1)
    rows = functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=1)
    return temperature**2 * (student.weights * rows).sum()


class Teacher:
    """The dense model beside a pruned one that is trained.

    Args:
        dense: The dense model, on the device of the pruned one; stays as it is, and its weights
            are not copied.
        task: Gives the predictions.
        config: Weight and temperature.

    Raises:
        ValueError: If the task gives no predictions.
    """

    def __init__(self, dense: nn.Module, task: Task, config: PruningConfig) -> None:
        self._task = check_predicts(task)
        self._weight, self._temperature = config.distillation, config.distillation_temperature
        self._model = sharing_copy(dense)
        attach(self._model).stock_when_idle = False
        if isinstance(task, PreparingTask):
            task.prepare_(self._model)
        self._model.requires_grad_(False).eval()

    def dismiss(self) -> None:
        """Frees the memory at once: a model and its handle hold each other until a sweep."""
        freed = bytes_of(self._model.parameters())
        del self._model
        gc.collect()
        give_back(freed)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Returns the task's loss of a model in training plus the weighted term, a scalar."""
        loss, own = self._task.loss_and_prediction(model, batch)
        with torch.no_grad():
            target = self._task.predict(self._model, batch)
        return loss + self._weight * divergence(own, target, self._temperature)
