"""Every snippet of README.md and docs/ is run, in order, in a folder and with names that its page has for itself.

```python fences are executed; in ```console fences every line must be a ``prunus`` command, and must end with status 0.
A ```text fence right after one of them is what it prints, with ... for what may differ. A fence that cannot be run here
has its reason in a comment above it: ``<!-- not run: it trains for a quarter of an hour -->``.
"""

import contextlib
import doctest
import io
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from scripts.cli import main as prunus

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXECUTED = ("python", "console")
FENCE = re.compile(
    r"(?P<skip><!-- not run: [^>]+ -->\n+)?^```(?P<language>\w*)\n(?P<body>.*?)^```$"
    r"(?:\n+```text\n(?P<output>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Fence:
    """``line`` is the number of the first line of ``body`` in its page; ``output`` is None where none is given."""

    language: str
    body: str
    output: str | None
    line: int
    skip: bool


def fences(text: str) -> Iterator[Fence]:
    for found in FENCE.finditer(text):
        line = text.count("\n", 0, found.start("body")) + 1
        yield Fence(found["language"], found["body"], found["output"], line, found["skip"] is not None)


def run(fence: Fence, page: Path, names: dict[str, object]) -> str:
    """What it prints; lines in tracebacks are those of the page."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        if fence.language == "python":
            code = compile("\n" * (fence.line - 1) + fence.body, str(page), "exec")
            exec(code, names)  # noqa: S102 - our own pages
        else:
            for command in fence.body.replace("\\\n", " ").splitlines():
                prompt, program, *arguments = shlex.split(command)
                assert (prompt, program) == ("$", "prunus"), (
                    f"{page}:{fence.line}: {command!r} needs a 'not run' comment"
                )
                assert prunus(arguments) == 0, f"{page}:{fence.line}: {command!r} failed"
    return printed.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_run_and_print_what_they_say(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    checker = doctest.OutputChecker()
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    for fence in fences(page.read_text(encoding="utf-8")):
        if fence.language not in EXECUTED or fence.skip:
            continue
        printed = run(fence, page, names)
        if fence.output is not None:
            same = checker.check_output(fence.output, printed, options)
            assert same, f"{page}:{fence.line} prints\n{printed}\nand not\n{fence.output}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_link_to_files_that_exist(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_fences_are_found_with_their_line_output_and_reason() -> None:
    page = "a\n```python\nx = 1\n```\n\n```text\n2\n```\n<!-- not run: slow -->\n```console\n$ make\n```\n"
    assert list(fences(page)) == [
        Fence("python", "x = 1\n", "2\n", 3, skip=False),
        Fence("console", "$ make\n", None, 11, skip=True),
    ]
