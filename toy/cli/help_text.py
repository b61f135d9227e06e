"""How the help of a command is laid out: whole words, flags and defaults on lines that fit the terminal.

click wraps a text wherever there is a space or a hyphen. Here a default in brackets, a command in backticks and a flag with
its hyphens stay on one line, the column of explanations stands right of the short options (a long one gets a line of its
own), and a list of commands says what each does in a whole sentence.
"""

import re
import textwrap

import click

_WIDEST_NAME = 28  # columns: a wider option stands on a line of its own, its explanation below it
_GAP = 2  # columns between the name of an option and its explanation

_TOGETHER = re.compile(
    r"\[[^\][]*\]"  # [default: last]
    r"|`[^`]*`"  # `toy list`
    r"|\([^() ]+(?: [^() ]+){0,2}\)"  # (default scale 1)
    r"|\btoy [a-z]+(?: [a-z-]*[A-Z-][\w.-]*)*"  # toy train vit-tiny
    r"|(?<!\S)- \S+"  # - from stdin
)
_HOLD = str.maketrans({" ": "\N{NO-BREAK SPACE}", "-": "\N{NON-BREAKING HYPHEN}"})
_LET_GO = str.maketrans({"\N{NO-BREAK SPACE}": " ", "\N{NON-BREAKING HYPHEN}": "-"})


def wrapped(text: str, width: int) -> list[str]:
    """The lines of one paragraph, none longer than width (but for a word that is)."""

    def hold(match: re.Match[str]) -> str:
        return match[0].translate(_HOLD) if len(match[0]) <= width else match[0]

    held = _TOGETHER.sub(hold, " ".join(text.split()))
    lines = textwrap.wrap(held, width, break_on_hyphens=False, break_long_words=False)
    return [line.translate(_LET_GO) for line in lines]


def first_sentence(text: str) -> str:
    """The first sentence of a command's help, without the full stop."""
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    return re.split(r"\.(?:\s|$)", paragraph, maxsplit=1)[0]


class Formatter(click.HelpFormatter):
    """click's, with this module's lines."""

    def write_text(self, text: str) -> None:
        blocks = []
        for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
            if paragraph.lstrip(" ").startswith("\b"):  # click's sign for lines to be left as they are
                lines = textwrap.dedent("\n".join(paragraph.splitlines()[1:])).splitlines()
            else:
                lines = wrapped(paragraph, self.width - self.current_indent)
            blocks.append("\n".join(f"{'':>{self.current_indent}}{line}" for line in lines))
        self.write("\n\n".join(blocks) + "\n")

    def write_dl(self, rows, col_max: int = _WIDEST_NAME, col_spacing: int = _GAP) -> None:
        # click calls a number with bounds an INTEGER RANGE; the bounds stand in its explanation
        rows = [(name.replace(" RANGE", ""), text) for name, text in rows]
        names = [len(name) for name, _ in rows if len(name) <= col_max]
        column = max(names, default=col_max) + col_spacing  # of the explanations
        indent = " " * self.current_indent
        for name, text in rows:
            lines = wrapped(text or "", max(self.width - self.current_indent - column, 20))
            if len(name) > column - col_spacing:
                self.write(f"{indent}{name}\n")
            else:
                first = lines.pop(0) if lines else ""
                self.write(f"{indent}{name:<{column}}{first}".rstrip() + "\n")
            for line in lines:
                self.write(f"{indent}{'':<{column}}{line}\n")


class Context(click.Context):
    formatter_class = Formatter


class Command(click.Command):
    """A command whose help is laid out by `Formatter`."""

    context_class = Context


class Group(click.Group):
    """A group of commands, likewise: its list has the first sentence of each command's help, whole."""

    context_class = Context

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        named = [(name, self.get_command(context, name)) for name in self.list_commands(context)]
        rows = [(name, first_sentence(command.help or "")) for name, command in named if command and not command.hidden]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)
