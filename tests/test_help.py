"""The help of every command as it stands in a terminal of 80 columns, compared with the files in tests/help.

`python tests/test_help.py` writes the files anew. Read what it changed: that is how users will see it.
"""

import itertools
import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from toy.cli import help_text
from toy.cli.main import cli

FOLDER = Path(__file__).parent / "help"
WIDTH = 80


def commands(command=cli, path=()):
    """(words that call it, the command) of every command and group, `toy` itself first."""
    yield path, command
    for name, sub in sorted(getattr(command, "commands", {}).items()):
        yield from commands(sub, (*path, name))


def help_of(path):
    result = CliRunner().invoke(cli, [*path, "--help"], prog_name="toy", terminal_width=WIDTH - 2)  # click's margin
    assert result.exit_code == 0, result.output
    return result.output


def file_of(path):
    return FOLDER / f"{'_'.join(('toy', *path))}.txt"


PATHS = [path for path, _ in commands()]
every_command = pytest.mark.parametrize("path", PATHS, ids=[" ".join(("toy", *path)) for path in PATHS])


@every_command
def test_the_help_is_as_it_was_read(path):
    expected = file_of(path).read_text(encoding="utf-8") if file_of(path).exists() else "(no file)"
    assert help_of(path) == expected, "the help changed: python tests/test_help.py writes it anew, then read it"


def test_no_file_is_left_of_a_command_that_is_gone():
    assert {file.name for file in FOLDER.iterdir()} == {file_of(path).name for path in PATHS}


@every_command
def test_the_help_breaks_well(path):
    lines = help_of(path).splitlines()
    assert max(map(len, lines)) < WIDTH
    for line, following in itertools.pairwise(lines):
        assert not line.endswith("-"), line  # a word or a flag taken apart at its hyphen
        assert not re.search(r"(^|\s)toy$|toy [a-z-]+-$", line), (
            line
        )  # a command that begins on one line and goes on below
        opened = line.rfind("[") > line.rfind("]") and "[" in line
        room = WIDTH - 2 - (len(following) - len(following.lstrip()))
        closed = f"{line[line.rfind('[') :]} {following.strip()}"
        assert not opened or len(closed[: closed.find("]") + 1]) > room, line  # a default that would have fitted below


@every_command
def test_a_list_of_commands_says_what_each_does_to_the_end(path):
    command = dict(commands())[path]
    text = " ".join(help_of(path).split())
    for name, sub in getattr(command, "commands", {}).items():
        assert f"{name} {help_text.first_sentence(sub.help)}" in text
        assert sub.help.startswith(help_text.first_sentence(sub.help).split("\n")[0][:10])


def test_what_belongs_together_stays_on_a_line():
    assert help_text.wrapped("Of a run: which of its checkpoints.  [default: last]", 45) == [
        "Of a run: which of its checkpoints.",
        "[default: last]",
    ]
    assert (
        help_text.wrapped("Steps between them. [default: (as --eval-every)]", 40)[1] == "[default: (as --eval-every)]"
    )
    assert help_text.wrapped("a name out of `toy list`.", 20) == ["a name out of", "`toy list`."]
    assert help_text.wrapped("the run of toy train vit-tiny, or", 24) == ["the run of", "toy train vit-tiny, or"]
    long = "[default: " + "much " * 10 + "text]"
    assert " ".join(help_text.wrapped(long, 30)) == long and max(map(len, help_text.wrapped(long, 30))) <= 30
    assert help_text.wrapped("", 30) == []


def test_a_long_option_does_not_push_the_others_to_the_right():
    formatter = help_text.Formatter(width=60)
    formatter.write_dl(
        [("--a", "one"), ("--schedule-of-the-rate [constant|cosine]", "two"), ("--bcd INTEGER RANGE", "")]
    )
    assert formatter.getvalue().splitlines() == [
        "--a            one",
        "--schedule-of-the-rate [constant|cosine]",
        "               two",
        "--bcd INTEGER",
    ]


def test_lines_to_be_left_as_they_are():
    formatter = help_text.Formatter(width=30)
    formatter.write_text("First words of a paragraph\nthat goes on.\n\n\b\ntoy a    one\ntoy bc   two")
    assert formatter.getvalue() == "First words of a paragraph\nthat goes on.\n\ntoy a    one\ntoy bc   two\n"
    assert help_text.first_sentence("Reads llama.cpp files. And more.\n\nSecond.") == "Reads llama.cpp files"
    assert isinstance(cli.make_context("toy", [], resilient_parsing=True), click.Context)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.txt"):
        old.unlink()
    for path in PATHS:
        file_of(path).write_text(help_of(path), encoding="utf-8", newline="\n")
