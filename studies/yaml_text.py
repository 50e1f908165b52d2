"""YAML as people mean it: YAML 1.2 scalars, safe types only, a repeated key is an error.

PyYAML follows YAML 1.1, where ``1e-4`` is a string, ``no`` is False, ``010`` is 8 and the second
of two equal keys wins without a word. A spec is hashed and frozen, so it must not be guessed at.
"""

import re
from collections.abc import Hashable
from typing import Any, ClassVar

import yaml

MAX_CHARACTERS = 1_000_000

_SCALARS = (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", "~nN\0"),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|"
        r"\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """A safe loader with the scalars of YAML 1.2 and without silent repeats."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            line = self.peek_event().start_mark.line + 1
            raise ValueError(f"line {line}: aliases (*name) are not read; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                line = key_node.start_mark.line + 1
                raise ValueError(f"line {line}: a key must be text, but got {key!r}; quote it")
            if key in seen:
                line = key_node.start_mark.line + 1
                raise ValueError(f"line {line}: key {key!r} is there twice; remove one of them")
            seen.add(key)
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep=deep)
        return mapping


# libyaml's emitter is ten times as fast, and every run has a spec of its own.
_FastDumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class _Dumper(_FastDumper):  # type: ignore[misc, valid-type]
    """Quotes exactly the strings that ``_Loader`` would read as something else."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _write_text(dumper: Any, text: str) -> Any:
    """Writes several lines as they are, which YAML allows unless one ends in a space."""
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _read_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(node.value)


_Dumper.add_representer(str, _write_text)
_Loader.add_constructor("tag:yaml.org,2002:int", _read_int)
for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            _tag, re.compile(f"^(?:{_pattern})$"), ["" if c == "\0" else c for c in _first]
        )


def read_yaml(text: str, where: str = "the text") -> Any:
    """Reads one YAML document.

    Args:
        text: The document.
        where: What to call it in an error.

    Raises:
        ValueError: If it is no YAML, names a Python type, repeats a key or is longer than
            1,000,000 characters.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(
            f"{where} has {len(text)} characters, but a spec has at most {MAX_CHARACTERS}; "
            "is this the right file?"
        )
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f" at line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{where} is not readable as YAML{line}: {error.problem}") from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{where} is not readable as YAML: {reason}") from None
    except ValueError as error:
        raise ValueError(f"{where}, {error}") from None


def write_yaml(values: Any) -> str:
    """Returns YAML that ``read_yaml`` turns back into equal values, keys in their order."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=95)
    return text
