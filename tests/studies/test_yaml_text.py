import pytest

from studies.yaml_text import read_yaml, write_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("-3E5", -3e5),
        (".5", 0.5),
        ("no", "no"),
        ("on", "on"),
        ("010", 10),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        ("true", True),
        ("~", None),
        ("", None),
    ],
)
def test_scalars_mean_what_they_look_like(text: str, value: object) -> None:
    found = read_yaml(text)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    "text", ["a: b\nc: |\n  x\n", "# x\n\n---\n", " a\nb ", "\ta\n", "\n", "a \nb", "é\u2028\nx"]
)
def test_several_lines_are_read_back(text: str) -> None:
    assert read_yaml(write_yaml({"text": text, "list": [text]})) == {"text": text, "list": [text]}


def test_several_lines_stay_readable() -> None:
    assert write_yaml({"a": "x: 1\ny: 2\n"}) == "a: |\n  x: 1\n  y: 2\n"


def test_what_is_written_is_read_back() -> None:
    values = {"a": "1e-4", "b": "no", "c": "010", "d": [1e-300, None, True], "e": {"f": ""}}
    assert read_yaml(write_yaml(values)) == values


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: 1\na: 2", "line 2: key 'a' is there twice"),
        ("1: a", "line 1: a key must be text, but got 1"),
        ("- &a [1]\n- *a", "line 2: aliases"),
        ("!!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("a: [1", "not readable as YAML at line 1"),
        ("a: \x07", "not readable as YAML"),
    ],
)
def test_what_could_be_misread_is_refused_with_its_line(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as caught:
        read_yaml(text, where="my.yaml")
    assert str(caught.value).startswith("my.yaml")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_spec_is_not_even_parsed() -> None:
    with pytest.raises(ValueError, match="has 1000001 characters"):
        read_yaml("a" * 1_000_001)
