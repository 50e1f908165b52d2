"""Align before fuse: BLIP's contrastive and matching losses on phrases about single images.

A model that has to say whether a statement about two images is true, and has never compared a
word with a picture, stays at chance for thousands of steps, because no word and no picture alone
tells anything. So its training begins here: a phrase ("a person with dark skin tone") is
contrasted with all images of a batch (ITC) and then judged together with one that it fits and
one, hard to tell apart, that it does not fit (ITM). Which images a phrase fits is known from
their attributes, so there are no false negatives.

Then the phrases move into statements that are as true of one image shown twice ("both images
show ...", "neither image shows ..."), while statements about pairs are trained along. Without
the company of these losses the pairs undo in fifty steps what was learned.

Source: BLIP (arXiv 2201.12086), Section 3.2; ALBEF (arXiv 2107.07651), Section 3.2.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comp.data.images import normalize
from comp.data.openmoji import Drawing
from comp.evaluation import to_device
from comp.tasks.base import Batch
from comp.tasks.batching import jitter
from comp.tasks.phrases import noun
from comp.tasks.questions import allowed_values
from comp.tasks.statements import ANY, BOTH, NEITHER
from comp.tasks.text import TextTokenizer, encode, pad, pad_mask

ATTRIBUTES = ("kind", "group", "skin_tone", "gender", "colour")
TEMPLATES = ("{}", *BOTH, *ANY, *NEITHER)
TEMPERATURE = 0.07


class Aligner(nn.Module):
    """The two losses, with projections that are thrown away afterwards.

    Args:
        model: A ``BlipForNLVR``; it sees every image twice.
        width: Its hidden width.
        size: Width of the common space.
    """

    def __init__(self, model: Any, width: int, size: int = 64) -> None:
        super().__init__()
        self.model = model
        self.image_projection = nn.Linear(width, size)
        self.text_projection = nn.Linear(width, size)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        fits: Tensor,
        denied: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Computes both losses.

        Args:
            pixel_values: ``(B, 3, H, W)``.
            input_ids: Phrases; phrase i fits image i, ``(B, N)``.
            attention_mask: ``(B, N)``.
            fits: Whether phrase i fits image j, ``(B, B)`` bool.
            denied: Whether statement i denies its phrase, ``(B,)`` bool.

        Returns:
            Contrastive and matching loss.
        """
        images = self.model.vision_model(pixel_values=pixel_values).last_hidden_state
        texts = self.model.text_encoder(
            input_ids=input_ids, attention_mask=attention_mask
        ).last_hidden_state
        image_features = F.normalize(self.image_projection(images[:, 0]), dim=-1)
        text_features = F.normalize(self.text_projection(texts[:, 0]), dim=-1)
        similarity = text_features @ image_features.T / TEMPERATURE  # (B texts, B images)
        targets = fits.float()
        contrast = _soft_cross_entropy(similarity, targets)
        contrast = contrast + _soft_cross_entropy(similarity.T, targets.T)
        return contrast / 2, self._match(
            images, input_ids, attention_mask, similarity, fits, denied
        )

    def _match(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        similarity: Tensor,
        fits: Tensor,
        denied: Tensor,
    ) -> Tensor:
        """Cross-entropy of own image against a hard one that the phrase does not fit."""
        some = ~fits.all(dim=1)
        weights = F.softmax(similarity.detach(), dim=1).masked_fill(fits, 0.0) + 1e-6 * ~fits
        wrong = torch.multinomial(weights[some], 1)[:, 0]
        rows = torch.cat([images, images[wrong]])
        hidden = self.model.text_encoder(
            input_ids=torch.cat([input_ids, input_ids[some]]),
            attention_mask=torch.cat([attention_mask, attention_mask[some]]),
            encoder_hidden_states=(rows, rows),
        ).last_hidden_state
        labels = torch.cat([~denied, denied[some]]).long()
        return F.cross_entropy(self.model.cls_head(hidden[:, 0]).float(), labels)


def _soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy against targets that are normalised here, ``(B, B)`` each."""
    targets = targets / targets.sum(dim=1, keepdim=True)
    return -(targets * F.log_softmax(logits, dim=1)).sum(dim=1).mean()


def align_(
    model: Any,
    drawings: Sequence[Drawing],
    pixels: Tensor,
    tokenizer: TextTokenizer,
    *,
    steps: int,
    batch_size: int,
    learning_rate: Callable[[int], float],
    templates: Sequence[str] = TEMPLATES,
    pairs: Iterator[Batch] | None = None,
    weight_decay: float = 0.05,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> None:
    """Trains a ``BlipForNLVR`` on the two losses, in place.

    Args:
        model: An attached model on its device.
        drawings: All drawings; those of the training split are used.
        pixels: Their images, ``(U, 3, H, W)``, uint8.
        tokenizer: The model's tokenizer.
        steps: Optimizer steps.
        batch_size: Images per step.
        learning_rate: Learning rate by step.
        templates: Statements in which the phrases stand.
        pairs: Batches of statements about two images, trained along.
        weight_decay: AdamW weight decay.
        seed: Seed of projections, batches and hard negatives.
        on_step: Called with step and loss.
    """
    device = next(model.parameters()).device
    torch.manual_seed(seed)
    aligner = Aligner(model, model.config.text_config.hidden_size).to(device).train()
    optimizer = torch.optim.AdamW(aligner.parameters(), weight_decay=weight_decay)
    allowed = allowed_values(drawings)
    train = [i for i, drawing in enumerate(drawings) if drawing.split == "train"]
    for step in range(steps):
        random = np.random.default_rng((seed, step, 2))
        images, phrases, fits = _draw(drawings, train, allowed, batch_size, random)
        forms = [templates[int(random.integers(len(templates)))] for _ in phrases]
        statements = [form.format(phrase) for form, phrase in zip(forms, phrases, strict=True)]
        texts = encode(tokenizer, statements)
        shown = jitter(pixels[images], seed=seed, step=step, flip=True)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        contrast, match = aligner(
            normalize(shown).to(device),
            pad(texts, int(tokenizer.pad_token_id or 0)).to(device),
            pad_mask(texts).to(device),
            fits.to(device),
            torch.tensor([form in NEITHER for form in forms], device=device),
        )
        loss = contrast + match
        if pairs is not None:
            judged = model(**to_device(next(pairs), device)).loss
            loss = loss + judged
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(aligner.parameters(), 1.0)
        optimizer.step()
        if on_step is not None:
            on_step(step, float((match if pairs is None else judged).detach()))


def _draw(
    drawings: Sequence[Drawing],
    train: Sequence[int],
    allowed: dict[str, tuple[str, ...]],
    batch_size: int,
    random: np.random.Generator,
) -> tuple[list[int], list[str], Tensor]:
    """Draws images, one phrase that fits each, and who fits whom."""
    images: list[int] = []
    asked: list[tuple[str, str]] = []
    while len(images) < batch_size:
        index = train[int(random.integers(len(train)))]
        drawing = drawings[index]
        known = [name for name in ATTRIBUTES if getattr(drawing, name) in allowed[name]]
        if known:
            name = known[int(random.integers(len(known)))]
            images.append(index)
            asked.append((name, getattr(drawing, name)))
    fits = torch.tensor(
        [[getattr(drawings[i], name) == value for i in images] for name, value in asked]
    )
    return images, [noun(name, value) for name, value in asked], fits
