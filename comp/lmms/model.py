"""The model class that lmms-eval drives: questions with an image or none, one at a time.

The interface is that of ``lmms_eval.api.model.lmms``, release 0.7.3.
"""

from collections.abc import Sequence
from typing import Any

import torch
from lmms_eval.api.model import lmms
from PIL import Image
from torch import Tensor

from comp.data.images import normalize
from comp.evaluation import resolve_device
from comp.models import attach, load_model
from comp.tasks.dialogue import MARKER, dialogue_of

_MOST_TOKENS = 128  # where a benchmark does not say


class CompLlava(lmms):  # type: ignore[misc]
    """A LLaVA, dense or pruned, that answers the questions of a benchmark.

    Args:
        pretrained: What ``comp.load_model`` takes: a directory, a run's model, a hub id.
        device: ``auto``, ``cpu``, ``cuda``, ...
        batch_size: Must be 1: questions are answered one at a time.
        dtype: ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        ValueError: If the model is no LLaVA, or an argument is out of bounds.
    """

    def __init__(
        self,
        pretrained: str,
        device: str = "auto",
        batch_size: int = 1,
        dtype: str = "float32",
        **others: Any,
    ) -> None:
        super().__init__()
        unknown = {name for name, value in others.items() if value is not None}
        if unknown - {"max_batch_size"}:
            raise ValueError(f"comp_llava does not know {', '.join(sorted(unknown))}")
        if int(batch_size) != 1:
            raise ValueError(f"batch_size must be 1 for comp_llava, but got {batch_size}")
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be float32, bfloat16 or float16, but got {dtype!r}")
        loaded = load_model(pretrained, dtype=getattr(torch, dtype))
        if loaded.family != "llava":
            raise ValueError(f"{pretrained} is a {loaded.family} model; comp_llava needs a LLaVA")
        if loaded.tokenizer is None:
            raise ValueError(f"{pretrained} has no tokenizer; save it in its directory")
        self.batch_size_per_gpu = 1
        self._device = resolve_device("auto" if device == "cuda" else device)
        self._dtype = getattr(torch, dtype)
        if not hasattr(loaded.model, "pruning"):
            attach(loaded.model)
        self._model: Any = loaded.model.to(self._device).eval()
        self._tokenizer = loaded.tokenizer
        self._dialogue = dialogue_of(loaded.tokenizer)
        self._transform = loaded.transform
        self._end = self._dialogue.answer("")[-1]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers questions.

        Args:
            requests: Each with ``args``: the question, how to generate, what gives the images of
                a document, and the document's number, task and split.
        """
        answers = []
        for request in requests:
            question, options, *place = request.args
            options = dict(options)
            inputs = self._inputs(question, self._images(*place))
            ends = options.get("until") or []
            text = self._generate(inputs, options)
            for end in [ends] if isinstance(ends, str) else ends:
                text = text.split(end)[0] if end else text
            answers.append(text.strip())
            self.cache_hook.add_partial("generate_until", (question, options), answers[-1])
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Scores given answers: their log-likelihood, and whether greedy decoding writes them."""
        return [self._likelihood(*request.args) for request in requests]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Is for benchmarks whose next question depends on the last answer.

        Raises:
            ValueError: Always: choose benchmarks of one question.
        """
        raise ValueError(
            f"comp_llava answers one question at a time, but got {len(requests)} of several "
            "rounds; choose tasks of type generate_until or loglikelihood"
        )

    def _images(self, find: Any, number: Any, task: str, split: str) -> list[Image.Image]:
        images = [
            one for one in find(self.task_dict[task][split][number]) or [] if one is not None
        ]
        if len(images) > 1 or not all(isinstance(one, Image.Image) for one in images):
            raise ValueError(
                f"comp_llava takes one image a question, but {task} gave {len(images)} "
                f"{type(images[0]).__name__}; choose another task"
            )
        return images

    def _inputs(self, question: str, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        text = question.replace(MARKER, "").strip()
        ids = self._dialogue.question(text, is_first=True, has_image=bool(images))
        inputs: dict[str, Tensor] = {}
        if images:
            config, place = self._model.config, self._dialogue.image_place
            shown = [config.image_token_id] * config.image_seq_length
            ids = [*ids[:place], *shown, *ids[place:]]
            pixels = self._transform.restated(self._transform(images[0].convert("RGB"))[None])
            inputs["pixel_values"] = normalize(pixels).to(self._device, self._dtype)
        rows = torch.tensor([ids], device=self._device)
        return {"input_ids": rows, "attention_mask": torch.ones_like(rows), **inputs}

    @torch.no_grad()
    def _generate(self, inputs: dict[str, Tensor], options: dict[str, Any]) -> str:
        temperature = float(options.get("temperature") or 0.0)
        sampling = {"temperature": temperature, "top_p": options.get("top_p")}
        ids = self._model.generate(
            **inputs,
            max_new_tokens=int(options.get("max_new_tokens") or _MOST_TOKENS),
            num_beams=int(options.get("num_beams") or 1),
            do_sample=temperature > 0,
            eos_token_id=self._end,
            pad_token_id=self._end,
            **(sampling if temperature > 0 else {}),
        )
        said = ids[0, inputs["input_ids"].shape[1] :]
        text: str = self._tokenizer.decode(said, skip_special_tokens=True)
        return text

    @torch.no_grad()
    def _likelihood(self, question: str, target: Any, *place: Any) -> tuple[float, bool]:
        _, number, task, split = place
        text = target if isinstance(target, str) else target(self.task_dict[task][split][number])
        inputs = self._inputs(question, self._images(*place))
        answer = torch.tensor([self._dialogue.answer(text.strip())], device=self._device)
        start = inputs["input_ids"].shape[1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        logits = self._model(**inputs, use_cache=False).logits[:, start - 1 : -1]
        logs = logits.float().log_softmax(dim=-1)
        chosen = logs.gather(2, answer[..., None]).sum()
        return float(chosen), bool((logs.argmax(dim=-1) == answer).all())
