"""The documentation is true: links lead somewhere, commands exist, examples run as written."""

import functools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("docs", "benchmarks", "examples", "comp", "orchestration", "studies")
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(path for name in FOLDERS for path in (ROOT / name).rglob("*.md"))]
)
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)|<img[^>]* src=\"([^\"]+)\"")
HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)
TARGET = re.compile(r"^([a-z]+):", re.MULTILINE)


def blocks(text: str, *languages: str) -> list[str]:
    return [body for language, body in BLOCK.findall(text) if language in languages]


def prose(text: str) -> str:
    return BLOCK.sub("", text)


def anchors(path: Path) -> set[str]:
    """The fragments that a Markdown page offers, as GitHub makes them from headings."""
    headings = HEADING.findall(prose(path.read_text()))
    return {re.sub(r"[^\w\- ]", "", line.lower()).strip().replace(" ", "-") for line in headings}


def is_broken(page: Path, link: str) -> bool:
    if re.match(r"[a-z]+:", link):
        return False
    name, _, fragment = link.partition("#")
    target = page.parent / name if name else page
    if not target.exists():
        return True
    return bool(fragment) and target.suffix == ".md" and fragment not in anchors(target)


def commands(text: str) -> list[list[str]]:
    """Every shell command of a page, from its blocks and from code within sentences."""
    lines = [
        line
        for body in blocks(text, "sh", "bash", "console", "shell")
        for line in body.replace("\\\n", " ").splitlines()
    ]
    lines += INLINE.findall(prose(text))
    parts = [part for line in lines for part in re.split(r"&&|\|\||[;|]", line)]
    return [words for words in map(split, parts) if words]


def split(part: str) -> list[str]:
    try:
        words = shlex.split(part.removeprefix("$ ").strip(), comments=True)
    except ValueError:  # an apostrophe in a sentence's code, so no command
        return []
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words = words[1:]
    return [words[0].removeprefix(".venv/bin/"), *words[1:]] if words else []


def commands_of(name: str, program: str) -> list[list[str]]:
    found = [words for words in commands((ROOT / name).read_text()) if words[0] == program]
    # The method comp with a switch, such as comp cit=false in a table, is no command.
    return [words for words in found if len(words) > 1 and "=" not in words[1]]


@functools.cache
def help_of(*words: str) -> str:
    program = "import sys; from studies.cli import main; sys.argv[0] = 'comp'; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, *words, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"comp {' '.join(words)} --help: {done.stderr}"
    return done.stdout


def subcommands(text: str) -> set[str]:
    _, _, listed = text.partition("\nCommands:\n")
    return set(re.findall(r"^  ([a-z][\w-]*)", listed, re.MULTILINE))


def unknown_words(words: list[str]) -> list[str]:
    """The commands and options in ``comp ...`` that its help does not know."""
    path: list[str] = []
    arguments = words[1:]
    while (known := subcommands(help_of(*path))) and arguments:
        if arguments[0].startswith("-"):
            break
        if arguments[0] not in known:
            return [arguments[0]]
        path.append(arguments.pop(0))
    options = [word.split("=")[0] for word in arguments if word.startswith("--")]
    return [option for option in options if option not in help_of(*path)]


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_somewhere(name: str) -> None:
    text = prose((ROOT / name).read_text())
    links = [first or second for first, second in LINK.findall(text)]
    assert [link for link in links if is_broken(ROOT / name, link)] == []


@pytest.mark.parametrize("name", NAMES)
def test_every_make_target_named_exists(name: str) -> None:
    known = set(TARGET.findall((ROOT / "Makefile").read_text()))
    named = {
        word
        for words in commands_of(name, "make")
        for word in words[1:]
        if "=" not in word and not word.startswith(("-", "."))
    }
    assert sorted(named - known) == []


@pytest.mark.parametrize("name", NAMES)
def test_every_comp_command_and_option_named_exists(name: str) -> None:
    unknown = [(words, unknown_words(words)) for words in commands_of(name, "comp")]
    assert [(" ".join(words), which) for words, which in unknown if which] == []


@pytest.mark.slow
def test_the_example_of_the_readme_runs_as_written(tmp_path: Path) -> None:
    (example,) = blocks((ROOT / "README.md").read_text(), "python")
    done = subprocess.run(
        [sys.executable, "-c", example],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "speed-up" in done.stdout
    assert (tmp_path / "pruned").is_dir()


def test_the_example_of_the_readme_has_at_most_ten_lines() -> None:
    (example,) = blocks((ROOT / "README.md").read_text(), "python")
    assert len([line for line in example.splitlines() if line]) <= 10


def test_the_readme_says_what_continuous_integration_calls() -> None:
    calls = r"^make (?:-\S+ )*([a-z ]*?)(?: ARGS=\S+)? </dev/null"
    checks, tests = re.findall(calls, (ROOT / ".ci/run").read_text(), re.M)
    sentence = f"(`.ci/run`) calls `make {checks}` and, beside it, `make {tests}`."
    assert sentence in (ROOT / "README.md").read_text()
    assert f"\nci: {checks} {tests}  ##" in (ROOT / "Makefile").read_text()


def test_make_help_explains_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    explained = re.findall(r"^([a-z]+):.*  ## \w", makefile, re.MULTILINE)
    assert sorted(explained) == sorted(phony.split())


def test_the_log_goes_forward_in_time() -> None:
    dates = re.findall(
        r"^## (\d{4}-\d\d-\d\d)\b", (ROOT / "docs/LOG.md").read_text(), re.MULTILINE
    )
    assert dates
    assert dates == sorted(dates)


def test_pictures_are_attributed() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "OpenMoji" in readme
    assert "CC BY-SA 4.0" in readme
