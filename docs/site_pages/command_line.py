"""The commands as click knows them: what `--help` says, command by command."""

import os

import click

WIDTH = 88


def pages():
    """{path: Markdown} of the page of the command line."""
    from toy.cli.main import cli

    lines = ["# The command line", "", "What each command says with `--help`.", ""]
    for words, command in commands("toy", cli):
        lines += [
            "#" * (2 + min(words.count(" "), 1)) + f" `{words}`",
            "",
            "```text",
            help_text(words, command),
            "```",
            "",
        ]
    return {"command_line.md": "\n".join(lines)}


def commands(words, command):
    """(words to type, command) of a command and everything below it."""
    yield words, command
    if isinstance(command, click.Group):
        with click.Context(command, info_name=words) as context:
            for name in command.list_commands(context):
                yield from commands(f"{words} {name}", command.get_command(context, name))


def help_text(words, command):
    home = os.path.expanduser("~")
    with click.Context(command, info_name=words, terminal_width=WIDTH, max_content_width=WIDTH) as context:
        return command.get_help(context).replace(home, "~").rstrip()
