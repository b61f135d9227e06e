"""The command toy chat: a conversation with a model in the terminal."""

import contextlib
import importlib
import json
import sys
from pathlib import Path

import click

from toy.cli.base import ADAPTER, BACKEND, CHECKPOINT, DEVICE, MODEL, PRECISION, Phase, command, note, tell_checkpoint
from toy.cli.progress import printable

chats = click.Group()
HELP = """\
/undo        take back the last message and its answer
/save FILE   write the conversation as a line of JSON, which toy train takes as a corpus
/clear       begin anew, with the same system message
/quit        leave (Ctrl-D does, too)
Ctrl-C       end an answer, not the program
A line that ends with \\ goes on in the next one."""


@command(chats, "chat")
@MODEL
@ADAPTER
@click.option("--system", metavar="TEXT", help="System message. [default: the template's own]")
@click.option("--tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Longest answer.")
@click.option(
    "--temperature", type=float, default=0.8, show_default=True, help="Below 1: safer, 0: always the likeliest."
)
@click.option("--top-k", type=int, help="Draw from the k likeliest tokens only.")
@click.option("--top-p", type=float, help="Draw from the fewest tokens whose probability reaches p.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of the draws.")
@CHECKPOINT
@BACKEND
@DEVICE
@PRECISION
def chat(
    model, adapter, system, tokens, temperature, top_k, top_p, seed, checkpoint, backend, device, precision, debug
):
    """Talk to a model that has a chat template.

    MODEL is as in toy generate. In the conversation, /help shows what can be done besides. Without a terminal, every line of
    the standard input is a message.
    """
    from toy.trained import load as trained
    from toy.trained.chat import Chat
    from toy.trained.generator import check_generator, generator

    with Phase(2, debug):
        check_generator(backend, device, precision)
        loaded = trained.load_trained(model, adapter, backend, checkpoint)
        writer = generator(loaded.model, backend, device, precision)
        conversation = Chat(
            writer.model, loaded.tokenizer, system, tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
        )
    tell_checkpoint(model, loaded.step, checkpoint)
    if writer.notice:
        note(writer.notice)
    with Phase(1, debug):
        return Terminal(conversation, writer.how).talk()


class Terminal:
    """The conversation on stdin and stdout."""

    def __init__(self, conversation, how=""):
        self.conversation, self.how, self.is_terminal = conversation, how, sys.stdin.isatty()
        self.commands = {"/help": self.help, "/undo": self.undo, "/save": self.save, "/clear": self.clear}

    def talk(self):
        """Until the end of the input, or /quit. -> the exit code: 2 when a message of a script was refused."""
        if self.is_terminal:
            self._editing()
            click.echo(click.style("/help shows what can be done, Ctrl-D leaves", dim=True))
            if self.how:
                click.echo(click.style(f"computed by: {self.how}", dim=True))
        failed = False
        while (line := self._line()) is not None:
            name, _, rest = line.strip().partition(" ")
            if name in ("/quit", "/exit"):
                break
            if name in self.commands:
                failed |= self.commands[name](rest.strip()) is False
            elif name.startswith("/") and name[1:].isalpha():
                failed |= self._say(f"there is no {name}; /help shows what there is") is False
            elif line.strip():
                failed |= self.answer(line) is False
        return 2 if failed and not self.is_terminal else 0

    def answer(self, message):
        shown = printable if sys.stdout.isatty() else str
        try:
            pieces = self.conversation.answer(message)
        except ValueError as error:
            return self._say(str(error))
        if n := self.conversation.forgotten:
            note(f"the context is full; the oldest {n} messages are left out")
        try:
            for piece in pieces:
                click.echo(shown(piece), nl=False)
        except KeyboardInterrupt:
            pieces.close()
        click.echo()
        return True

    def help(self, _):
        click.echo(HELP)

    def undo(self, _):
        if not self.conversation.undo():
            return self._say("there is nothing to take back")
        return self._say("taken back", good=True)

    def clear(self, _):
        self.conversation.clear()
        return self._say("a new conversation", good=True)

    def save(self, name):
        if not name:
            return self._say("/save needs the name of a file")
        if not self.conversation.messages:
            return self._say("there is nothing to save yet")
        try:
            with open(Path(name).expanduser(), "a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps({"messages": self.conversation.messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            return self._say(f"{name} cannot be written: {error.strerror}")
        return self._say(f"appended to {name}", good=True)

    def _say(self, text, good=False):
        click.echo(click.style(text, dim=True) if self.is_terminal else text, err=True)
        return good

    def _line(self):
        """One message, which may be several lines; None at the end of the input."""
        lines: list[str] = []
        while True:
            try:
                line = input(("> " if not lines else ". ") if self.is_terminal else "")
            except EOFError:
                if self.is_terminal:
                    click.echo()
                return "\n".join(lines) if lines else None
            except KeyboardInterrupt:  # at the prompt: the line is given up
                click.echo()
                lines = []
                continue
            if line.endswith("\\"):
                lines.append(line[:-1])
                continue
            return "\n".join([*lines, line])

    @staticmethod
    def _editing():
        """Arrow keys and the earlier messages, where Python has readline."""
        with contextlib.suppress(ImportError):
            importlib.import_module("readline")
