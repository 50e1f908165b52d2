"""Turns what pydantic found wrong into sentences that name value, rule and remedy."""

from typing import Any

from pydantic import ValidationError

from comp.words import nearest


class SpecError(ValueError):
    """A spec, an override or a study directory that cannot be worked with; a user's mistake."""


def sentences(error: ValueError, values: Any = None, prefix: str = "") -> list[str]:
    """Returns one sentence for every mistake.

    Args:
        error: What was raised; anything but pydantic's error gives its own text.
        values: The raw values that were checked, to tell their keys from pydantic's union tags.
        prefix: Where the values stand, for example ``"space.num_stages"``.
    """
    if not isinstance(error, ValidationError):
        last, text = prefix.rpartition(".")[2], str(error)
        if last and text.startswith(f"{last} "):
            return [prefix + text.removeprefix(last)]
        return [f"{prefix}: {text}" if prefix else text]
    found = []
    for detail in error.errors():
        keys = _keys(detail["loc"], values, is_missing=detail["type"] == "missing")
        place = ".".join([prefix, *keys] if prefix else keys)
        inner = detail.get("ctx", {}).get("error")
        if isinstance(inner, ValueError):
            found += sentences(inner, detail["input"], place)
        else:
            found.append(_sentence(place, detail))
    return found


def _keys(loc: tuple[int | str, ...], values: Any, *, is_missing: bool) -> list[str]:
    """Leaves the tags of discriminated unions out of a location."""
    keys = []
    for part in loc[:-1] if is_missing else loc:
        is_key = isinstance(values, dict) and part in values
        if is_key or (isinstance(values, list) and isinstance(part, int) and part < len(values)):
            values = values[part]
            keys.append(str(part))
    return [*keys, str(loc[-1])] if is_missing else keys


def _sentence(place: str, detail: Any) -> str:
    context, value = detail.get("ctx", {}), detail["input"]
    match detail["type"]:
        case "missing":
            return f"{place} is missing"
        case "union_tag_not_found":
            return f"{place}.kind is missing".lstrip(".")
        case "union_tag_invalid":
            known, got = context["expected_tags"], context["tag"]
            options = [word.strip("' ") for word in known.split(",")]
            field = f"{place}.kind".lstrip(".")
            return f"{field} must be one of {known}, but got {got!r}{nearest(got, options)}"
        case "literal_error":
            known = context["expected"]
            options = known.replace(" or ", ", ").replace("'", "").split(", ")
            return f"{place} must be {known}, but got {value!r}{nearest(str(value), options)}"
        case "string_type":
            return f"{place} must be text, but got {value!r}; quote it"
        case "dict_type" | "model_attributes_type" | "model_type":
            return f"{place} must be a mapping, but got {value!r}"
    rule = detail["msg"].partition(",")[0].replace("Input should be", "must be")
    return f"{place} {rule[0].lower()}{rule[1:]}, but got {value!r}"
