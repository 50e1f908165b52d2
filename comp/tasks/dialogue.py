r"""How a conversation is spelled: as the small models here were trained, or as LLaVA 1.5 was.

With a separator in the vocabulary: start token, image, question, ``[SEP]``, answer, ``[SEP]``, and
so on. Without one, as Llama's vocabulary is: ``USER: <image>\nquestion ASSISTANT: answer</s>USER:
question ...``, the prompt of the hub's LLaVA 1.5 (llava-hf/llava-1.5-7b-hf).
"""

from typing import Any, Protocol

from comp.tasks.text import TextTokenizer

MARKER = "<image>"


class Dialogue(Protocol):
    """Spells questions and answers.

    Attributes:
        image_place: Ids of the first question that stand before its image.
    """

    image_place: int

    def question(self, text: str, *, is_first: bool, has_image: bool) -> list[int]:
        """Returns the ids of a question, without those of the image."""
        ...

    def answer(self, text: str) -> list[int]:
        """Returns the ids of an answer with the one that ends it."""
        ...


def dialogue_of(tokenizer: TextTokenizer) -> Dialogue:
    """Returns the way of a tokenizer's model.

    Raises:
        ValueError: If the tokenizer lacks a token that it needs.
    """
    if tokenizer.bos_token_id is None:
        raise ValueError("the tokenizer has no bos_token; a conversation begins with it")
    return LlavaDialogue(tokenizer) if tokenizer.sep_token_id is None else SepDialogue(tokenizer)


class SepDialogue:
    """Questions and answers end with the separator."""

    image_place = 1

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._start = int(tokenizer.bos_token_id)
        self._end = int(tokenizer.sep_token_id)

    def question(self, text: str, *, is_first: bool, has_image: bool) -> list[int]:
        """Returns the ids of a question; see ``Dialogue``."""
        return [*([self._start] if is_first else []), *self.answer(text)]

    def answer(self, text: str) -> list[int]:
        """Returns the ids of an answer; see ``Dialogue``."""
        return [*self._tokenizer(text, add_special_tokens=False)["input_ids"], self._end]


class LlavaDialogue:
    """LLaVA 1.5's prompt, whose image token stands within the first question."""

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has neither sep_token nor eos_token to end an answer")
        self._tokenizer = tokenizer
        self._end = int(tokenizer.eos_token_id)
        self._image = int(tokenizer.convert_tokens_to_ids(MARKER) or 0)
        if self._image == tokenizer.unk_token_id:
            raise ValueError(f"the tokenizer has no token {MARKER!r}, which LLaVA's prompts have")
        self.image_place = self._spell(f"USER: {MARKER}\n", first=True).index(self._image)

    def question(self, text: str, *, is_first: bool, has_image: bool) -> list[int]:
        """Returns the ids of a question; see ``Dialogue``."""
        text = text.replace(MARKER, "")  # one that a person typed is no image
        shown = f"{MARKER}\n" if is_first and has_image else ""
        ids = self._spell(f"USER: {shown}{text} ASSISTANT:", first=is_first)
        return [one for one in ids if one != self._image]

    def answer(self, text: str) -> list[int]:
        """Returns the ids of an answer; see ``Dialogue``."""
        return [*self._spell(text.replace(MARKER, ""), first=False), self._end]

    def _spell(self, text: str, *, first: bool) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=first)["input_ids"]
        return list(ids)
