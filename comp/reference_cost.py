"""Dense cost of the published models in closed form, to check reports against the papers.

The body is what this package counts everywhere: multiply-adds of linear layers, matrix products
and convolutions (see ``comp.cost``). Published dense numbers add fvcore's five operations per
LayerNorm element. Both are per sample; nothing here runs a model.

With N tokens, L words, widths D and channels 4 D, and every formula per sample:

    BLIP NLVR2      2 vision(577) + 12 text(L) with two cross-attentions each + 6 merges + head
    BLIP caption    vision(577) + decoder(L) + L (D^2 + D V)
    BLIP retrieval  vision(577) + text(35) + text(35) with cross-attention + projections
    CLIP L/14@336   vision(577) + text(77) + projections
    BLIP VQA        vision(901) + 32 text(14) with cross-attention + 47 decoder(5): a mock batch
    LLaVA-1.5-7B    32 layers (4 n d^2 + 2 n^2 d + 3 n d m)
"""

from dataclasses import dataclass
from itertools import pairwise

from comp.cost import (
    LAYERNORM_FLOPS,
    cross_attention_macs,
    feed_forward_macs,
    patch_macs,
    self_attention_macs,
)

BLIP_WIDTH = 768
BLIP_LAYERS = 12
BLIP_VOCABULARY = 30524
BLIP_PROJECTION = 256


@dataclass(frozen=True)
class DenseCost:
    """What one pass costs.

    Attributes:
        body: Multiply-adds of linear layers, matrix products and convolutions.
        norm_elements: Elements that LayerNorms normalise.
    """

    body: int
    norm_elements: int = 0

    @property
    def published(self) -> int:
        """The body with the LayerNorms, as fvcore counts and the papers print."""
        return self.body + LAYERNORM_FLOPS * self.norm_elements

    def __add__(self, other: "DenseCost") -> "DenseCost":
        return DenseCost(self.body + other.body, self.norm_elements + other.norm_elements)

    def __rmul__(self, times: int) -> "DenseCost":
        return DenseCost(times * self.body, times * self.norm_elements)


def linear_cost(rows: int, *widths: int) -> DenseCost:
    """Cost of a chain of Linears on ``rows`` rows, through ``widths``."""
    return DenseCost(rows * sum(before * after for before, after in pairwise(widths)))


def vision_cost(image_size: int, patch_size: int, width: int, layers: int) -> DenseCost:
    """Cost of a pre-norm vision transformer with a class token and a norm behind it."""
    patches = (image_size // patch_size) ** 2
    tokens = patches + 1
    layer = self_attention_macs(tokens, tokens, width, width)
    layer += feed_forward_macs(tokens, width, 4 * width)
    return DenseCost(
        patch_macs(patches, patch_size, width) + layers * layer, (2 * layers + 1) * tokens * width
    )


def text_cost(
    words: int, width: int, layers: int, *, context: int = 0, contexts: int = 0
) -> DenseCost:
    """Cost of a text transformer, post-norm with a norm behind its embeddings.

    Args:
        words: Tokens of the text.
        width: Hidden width.
        layers: Number of layers.
        context: Tokens that cross-attention attends to, of the same width.
        contexts: Cross-attentions per layer; they share one norm.
    """
    layer = self_attention_macs(words, words, width, width)
    layer += feed_forward_macs(words, width, 4 * width)
    layer += contexts * cross_attention_macs(words, context, width, width, width)
    norms = 1 + layers * (2 + bool(contexts))
    return DenseCost(layers * layer, norms * words * width)


def blip_image_cost(image_size: int = 384) -> DenseCost:
    """Cost of BLIP's ViT-B/16 on one image."""
    return vision_cost(image_size, 16, BLIP_WIDTH, BLIP_LAYERS)


def _blip_text(words: int, contexts: int = 0, context: int = 577) -> DenseCost:
    return text_cost(words, BLIP_WIDTH, BLIP_LAYERS, context=context, contexts=contexts)


def blip_nlvr_cost(words: int) -> DenseCost:
    """Cost of BLIP-NLVR on one pair of images at 384 px and one statement."""
    merges = 6 * linear_cost(words, 2 * BLIP_WIDTH, BLIP_WIDTH)
    head = linear_cost(1, BLIP_WIDTH, BLIP_WIDTH, 2)
    return 2 * blip_image_cost() + _blip_text(words, contexts=2) + merges + head


def blip_caption_cost(words: int) -> DenseCost:
    """Cost of BLIP's captioner on one image and one caption, teacher-forced."""
    head = DenseCost(0, words * BLIP_WIDTH) + linear_cost(
        words, BLIP_WIDTH, BLIP_WIDTH, BLIP_VOCABULARY
    )
    return blip_image_cost() + _blip_text(words, contexts=1) + head


def blip_retrieval_cost(words: int, *, matches: int = 1) -> DenseCost:
    """Cost of BLIP's retrieval model on one image and one text.

    Args:
        words: Tokens of the text.
        matches: Passes of the text with the image: 1 at inference without re-ranking, 3 in
            training (one positive and two hard negatives).
    """
    projections = 2 * linear_cost(1, BLIP_WIDTH, BLIP_PROJECTION)
    return blip_image_cost() + _blip_text(words) + matches * _blip_text(words, 1) + projections


def blip_retrieval_training_cost(words: int) -> DenseCost:
    """Cost of BLIP's retrieval training forward, momentum encoders included, queue left out."""
    momentum = blip_retrieval_cost(words, matches=0)
    return blip_retrieval_cost(words, matches=3) + momentum


def clip_cost() -> DenseCost:
    """Cost of CLIP ViT-L/14 at 336 px on one image and one text of 77 tokens."""
    image = vision_cost(336, 14, 1024, 24) + DenseCost(0, 1024)  # norm of the pooled token
    text = text_cost(77, 768, 12)
    return image + text + linear_cost(1, 1024, 768) + linear_cost(1, 768, 768)


def clip_training_cost(queue: int = 57_600) -> DenseCost:
    """Cost of the training forward: momentum encoders and the products with both queues."""
    return 2 * clip_cost() + 4 * linear_cost(queue, 768, 1)


def blip_vqa_mock_cost(*, questions: int = 32, answers: int = 47) -> DenseCost:
    """Cost of the mock batch behind the published 186.1 of BLIP's VQA model; of no sample.

    One image of 480 px, questions of 14 tokens, answers of 5. Image and question states have no
    copy for each text that attends to them, so their keys and values are computed once.

    Args:
        questions: Texts that read the image.
        answers: Texts that read a question.
    """
    vocabulary = linear_cost(5, BLIP_WIDTH, BLIP_WIDTH, BLIP_VOCABULARY)
    answer = _blip_text(5, 1, 14) + DenseCost(0, 5 * BLIP_WIDTH) + vocabulary
    copies = (questions - 1) * _keys_and_values(901) + (answers - 1) * _keys_and_values(14)
    texts = questions * _blip_text(14, 1, 901) + answers * answer
    return blip_image_cost(480) + texts + -1 * copies


def _keys_and_values(tokens: int) -> DenseCost:
    """Cost of the keys and values that BLIP's cross-attentions make of one context."""
    return BLIP_LAYERS * 2 * linear_cost(tokens, BLIP_WIDTH, BLIP_WIDTH)


def llava_prefill_cost(tokens: int, width: int = 4096, channels: int = 11008) -> DenseCost:
    """Cost of LLaVA-1.5-7B's language model on a prompt, without tower, projector and head."""
    layer = self_attention_macs(tokens, tokens, width, width)
    return DenseCost(32 * (layer + feed_forward_macs(tokens, width, channels, matrices=3)))
