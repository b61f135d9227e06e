"""The commands as click knows them: what `--help` says, command by command."""

import os

import click

WIDTH = 88


def pages():
    """{path: Markdown} of the page of the command line."""
    from toy.cli.main import cli

    lines = ["# The command line", "", "What each command says with `--help`.", ""]
    for words, text in commands("toy", cli):
        lines += [
            "#" * (2 + min(words.count(" "), 1)) + f" `{words}`",
            "",
            "```text",
            text,
            "```",
            "",
        ]
    return {"command_line.md": "\n".join(lines)}


def commands(name, command, parent=None):
    """(words to type, what --help says) of a command and everything below it."""
    width = {"terminal_width": WIDTH, "max_content_width": WIDTH}
    with click.Context(command, parent, info_name=name, **width, **command.context_settings) as context:
        yield context.command_path, command.get_help(context).replace(os.path.expanduser("~"), "~").rstrip()
        if isinstance(command, click.Group):
            for below in command.list_commands(context):
                yield from commands(below, command.get_command(context, below), context)
