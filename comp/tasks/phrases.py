"""How the OpenMoji tasks put an attribute of a drawing into words."""

_NOUNS = {
    "aircraft": "an aircraft",
    "camera": "a camera or light",
    "clothing": "a piece of clothing",
    "craft": "a piece of craft",
    "dishware": "some dishware",
    "food": "some food or drink",
    "household": "a household item",
    "letters": "some letters",
    "luggage": "some luggage",
    "mail": "some mail",
    "math": "a math sign",
    "medicine": "some medicine",
    "money": "some money",
    "music": "some music gear",
    "nature": "an animal or plant",
    "object": "an everyday object",
    "office": "an office item",
    "people": "people or body parts",
    "person": "a person",
    "punctuation": "a punctuation mark",
    "religion": "a religious symbol",
    "scenery": "some scenery",
    "science": "a science tool",
    "sound": "a sound sign",
    "sport": "a piece of sport gear",
    "travel": "a place or vehicle",
    "warning": "a warning sign",
    "weather": "some weather",
}


def noun(attribute: str, value: str) -> str:
    """Returns a noun phrase for a property of a drawing.

    Args:
        attribute: A field of ``Drawing``: ``kind``, ``group``, ``skin_tone``, ``gender`` or
            ``colour``.
        value: The field's value.

    Returns:
        For example ``"a person with dark skin tone"`` or ``"something mostly red"``.
    """
    if attribute == "skin_tone":
        return f"a person with {value} skin tone"
    if attribute == "colour":
        return f"something mostly {value}"
    return _NOUNS.get(value) or f"{'an' if value[0] in 'aeiou' else 'a'} {value}"
