"""Writing a folder for Ollama: a Modelfile, the model, and the adapter beside it.

Ollama writes conversations by a Go template. A chat template whose conversations are turns, one after the other, each with
something before and after it, is written as one: what stands there is found by rendering, and the form is taken when it gives
the text of the chat template for every conversation that is tried. Any other is left to Ollama, which finds one by what is in
the GGUF file.

Source: https://docs.ollama.com/modelfile
"""

import datetime
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

from toy.data.chat_template import ChatTemplate, ChatTemplateError
from toy.data.gguf_tokenizer import GGUFTokenizer
from toy.files.atomic import StrPath
from toy.files.folders import replacing_folder
from toy.trained.export import KEEP, export_adapter, export_model
from toy.trained.load import Stored

MODELFILE, MODEL, ADAPTER = "Modelfile", "model.gguf", "adapter.gguf"
FILES = (MODELFILE, MODEL, ADAPTER)
_ROLES = ("system", "user", "assistant")
# what is tried, by the first letters of the roles
_TRIED = ("u", "su", "uau", "suau", "uauau", "ua", "sua")
_DATES = (datetime.datetime(2020, 2, 3), datetime.datetime(2031, 11, 12))


class Turns(NamedTuple):
    """How a conversation is written. start: before everything; default: after it when no system message comes; turns: what is
    before and after the content of a role; ask: after the last message, unless the assistant wrote it."""

    start: str
    default: str
    turns: dict[str, tuple[str, str]]
    ask: str

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """The text that the Go template gives."""
        text = self.start + ("" if messages[0]["role"] == "system" else self.default)
        for message in messages:
            before, after = self.turns[message["role"]]
            text += before + message["content"] + after
        return text + ("" if messages[-1]["role"] == "assistant" else self.ask)

    def go(self) -> str:
        """The Go template. All text stands in quoted strings, so that nothing is lost to its trimming of white space."""
        lines = [
            _said(self.start) + "{{- range $i, $_ := .Messages -}}",
            "{{- $last := eq (len (slice $.Messages $i)) 1 -}}",
        ]
        if self.default:
            lines.append('{{- if and (eq $i 0) (ne .Role "system") -}}' + _said(self.default) + "{{- end -}}")
        for n, (role, (before, after)) in enumerate(self.turns.items()):
            condition = f'{{{{- {"else " if n else ""}if eq .Role "{role}" -}}}}'
            lines.append(condition + _said(before) + "{{ .Content }}" + _said(after))
        lines.append("{{- end -}}")
        lines.append('{{- if and $last (ne .Role "assistant") -}}' + _said(self.ask) + "{{- end -}}")
        return "\n".join([*lines, "{{- end -}}"])


def export_ollama(stored: Stored, path: StrPath, type: str | None = None, merge: bool = False) -> tuple[str, ...]:
    """Write the folder; atomically -> sentences that the user should know.

    type: of the model's matrices, as for `export_model`; None: a GGUF file as it is, a run's own model as f32. merge: whether
    the adapters are merged in, or stand beside the model. Raises the errors of `export_model`, `export_adapter` and
    `replacing_folder`.
    """
    beside = bool(stored.adapters) and not merge
    said, notices = modelfile(stored, beside)
    with replacing_folder(Path(path), FILES) as folder:
        base = stored._replace(adapters={}, alpha=None) if beside else stored
        file = stored.base or stored.path
        whole = beside or not stored.adapters
        if type in (None, KEEP) and whole and stored.in_gguf is not None and _is_one_file(file):
            shutil.copyfile(file, folder / MODEL)
        else:
            export_model(base, folder / MODEL, type or ("f32" if stored.in_gguf is None else KEEP))
        if beside:
            export_adapter(stored, folder / ADAPTER)
        (folder / MODELFILE).write_text(said, encoding="utf-8", newline="\n")
    return notices


def modelfile(stored: Stored, adapter: bool = False) -> tuple[str, tuple[str, ...]]:
    """The Modelfile of a model, and sentences that the user should know. adapter: whether it has one beside it."""
    lines, notices, tokenizer = [f"FROM ./{MODEL}"], [], stored.tokenizer
    if adapter:
        lines.append(f"ADAPTER ./{ADAPTER}")
    if getattr(tokenizer, "chat_template", None) is None:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    if isinstance(tokenizer, GGUFTokenizer):
        if tokenizer.chat_template is not None:
            begin = tokenizer.tokens[tokenizer.bos_id] if tokenizer.add_bos else ""
            if (turns := turns_of(tokenizer.template(), begin)) is None:
                notices.append(
                    "its chat template has no form as a template of Ollama that is sure to give the same text: none is "
                    "written, and Ollama takes what it finds in the GGUF file"
                )
            else:
                lines.append(f'TEMPLATE """{turns.go()}"""')
        ends = sorted({tokenizer.tokens[i] for i in tokenizer.stop_ids})
        lines += [f"PARAMETER stop {json.dumps(end, ensure_ascii=False)}" for end in ends if '"' not in end]
    return "\n".join(lines) + "\n", tuple(notices)


def turns_of(template: ChatTemplate, begin: str = "") -> Turns | None:
    """A chat template as `Turns`, None when it is something else. begin: the token that the tokenizer puts before a text by
    itself, as Ollama does then: it is left out."""
    try:
        turns = _found(template, begin)
        for roles in _TRIED:
            for date in _DATES:
                if turns is None or turns.render(_messages(roles)) != _text(template, roles, date):
                    return None
    except ChatTemplateError:
        return None
    assert turns is not None
    turns = turns._replace(start=turns.start.removeprefix(begin))
    return None if '"""' in turns.go() else turns


def _found(template: ChatTemplate, begin: str) -> Turns | None:
    """What stands around the messages of four conversations, taken apart; whether that is all there is to it is seen by
    rendering others. begin: the token that may stand before everything, or ""."""
    conversations = [_between(template, roles) for roles in ("u", "su", "uau", "ua")]
    if any(parts is None for parts in conversations):
        return None
    one, system, several, answered = cast(list[list[str]], conversations)
    after_answer = answered[-1]
    before_user = several[2].removeprefix(after_answer)
    # what ends a message is mostly the same for both; where it is not, all of it counts as what comes next
    after_user = after_answer if one[1].startswith(after_answer) and several[1].startswith(after_answer) else ""
    first = one[0].removesuffix(before_user)  # start and default
    start = first if system[0].startswith(first) else begin * (first.startswith(begin) and system[0].startswith(begin))
    return Turns(
        start,
        first.removeprefix(start),
        {
            "system": (system[0].removeprefix(start), system[1].removesuffix(before_user)),
            "user": (before_user, after_user),
            "assistant": (several[1].removeprefix(after_user), after_answer),
        },
        one[1].removeprefix(after_user),
    )


def _messages(roles: str) -> list[dict[str, str]]:
    names = {role[0]: role for role in _ROLES}
    return [{"role": names[letter], "content": f"Words{n}of{letter}."} for n, letter in enumerate(roles)]


def _text(template: ChatTemplate, roles: str, now: datetime.datetime = _DATES[0]) -> str:
    return template.render(_messages(roles), add_generation_prompt=not roles.endswith("a"), now=now)


def _between(template: ChatTemplate, roles: str) -> list[str] | None:
    """The parts of the text before, between and after the contents; None when these are not in it once, in their order."""
    parts, rest = [], _text(template, roles)
    for message in _messages(roles):
        before, found, rest = rest.partition(message["content"])
        if not found:
            return None
        parts.append(before)
    return [*parts, rest]


def _said(text: str) -> str:
    """The action that writes this text; Go reads JSON's quoted strings."""
    return "" if text == "" else "{{ " + json.dumps(text, ensure_ascii=False) + " }}"


def _is_one_file(path: Path) -> bool:
    return path.is_file() and "-of-" not in path.name
