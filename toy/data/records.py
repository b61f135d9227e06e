"""What a corpus is made of: documents, completions, conversations, token ids; and how a JSON object becomes one of them."""

import json
from typing import NamedTuple

import numpy as np

ROLES = ("system", "user", "assistant", "tool")
_SHAPES = {"text": ("text",), "completion": ("prompt", "completion"), "conversation": ("messages",)}
_SHAPES_IN_WORDS = '{"text"}, {"prompt", "completion"} or {"messages": [{"role", "content"}, ...]}'
# keys by which other layouts of the same things are known -> what to rename or rewrite
_OTHER_LAYOUTS = {
    "conversations": 'rename "conversations", "from" and "value" to "messages", "role" (user, assistant) and "content"',
    "instruction": 'join "instruction" and "input" into "prompt", and rename "output" to "completion"',
    "chosen": 'pairs of preferences cannot be trained on: keep "chosen" as "messages"',
    "question": 'rename "question" to "prompt" and "answer" to "completion"',
    "response": 'rename "response" to "completion"',
    "role": 'put the messages of one conversation into a list: {"messages": [...]}',
    "content": 'rename "content" to "text"',
}


class CorpusError(ValueError):
    """The corpus cannot be trained on; the message says why."""


class Place(NamedTuple):
    """Where a record was found: the name of a file (or words), and the line in it, counted from 1 (0: all of it)."""

    name: str
    line: int = 0

    def __str__(self):
        return f"{self.name} line {self.line}" if self.line else self.name


class Document(NamedTuple):
    """A text, or a piece of a long one. after: what stands between it and the next one for a model without an end token.
    begins, ends: whether this is the document's first and last piece."""

    text: str
    where: Place
    after: str = ""
    begins: bool = True
    ends: bool = True


class Completion(NamedTuple):
    prompt: str
    completion: str
    where: Place


class Conversation(NamedTuple):
    """messages: tuple of dicts with a role of ROLES and a content, and whatever else the template may read. tools: None, or
    a list of JSON objects."""

    messages: tuple
    tools: list | None
    where: Place


class Tokens(NamedTuple):
    """ids: int array (n,), a part of one long document that somebody else encoded."""

    ids: np.ndarray
    where: Place


def parse_line(line, where):
    """The JSON object in one line (bytes) of a .jsonl file. Raises CorpusError, naming the line, for anything else."""
    try:
        value = _DECODER.decode(line.decode())
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{where} is not UTF-8: byte 0x{line[error.start]:02x} at offset {error.start} of the line ({error.reason}); "
            "convert the file first, for example with iconv"
        ) from error
    except _DuplicateKeyError as error:
        raise CorpusError(f"{where} has the key {str(error)!r} twice in one object: keep one of them") from error
    except RecursionError as error:
        raise CorpusError(f"{where} is nested too deeply: {_wanted()}") from error
    except ValueError as error:
        start = line[:60].decode(errors="replace").strip()
        raise CorpusError(f"{where} is not a JSON object ({error}), it begins {start!r}: {_wanted()}") from error
    if not isinstance(value, dict):
        raise CorpusError(f"{where} is a JSON {_json_name(value)}, not an object: {_wanted()}")
    return value


def record_of(value, where):
    """A JSON object -> (its Document, Completion or Conversation, the keys that were not used).

    Raises CorpusError, naming the place, for an object of another shape, an unknown role, a content that is not text.
    """
    if value.keys() == {"text"}:  # the commonest, and a corpus may have millions
        return Document(_text(value, "text", where), where), ()
    shapes = [shape for shape, keys in _SHAPES.items() if all(key in value for key in keys)]
    if len(shapes) != 1:
        raise _shape_error(value, shapes, where)
    if shapes == ["text"]:
        return Document(_text(value, "text", where), where), value.keys() - {"text"}
    if shapes == ["completion"]:
        record = Completion(_text(value, "prompt", where), _text(value, "completion", where), where)
        return record, value.keys() - {"prompt", "completion"}
    messages, tools = value["messages"], value.get("tools")
    if not isinstance(messages, (list, tuple)) or not messages:
        raise CorpusError(f"{where}: messages must be a list of at least one message, got {_short(messages)}")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise CorpusError(f"{where}: tools must be a list of objects, got {_short(tools)}")
    checked = tuple(_message(message, f"{where}, message {i}") for i, message in enumerate(messages, 1))
    return Conversation(checked, tools or None, where), value.keys() - {"messages", "tools"}


def is_known_shape(value):
    """Whether this is a JSON object that `record_of` would take, or one of the layouts that it gives advice for."""
    known = (*_SHAPES.values(), ("conversations",), ("instruction",), ("role", "content"), ("question", "answer"))
    return isinstance(value, dict) and any(all(key in value for key in keys) for keys in known)


def check_unicode(text, what):
    """Raise CorpusError for a str with lone surrogates, which no file can hold."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise CorpusError(f"{what} is not valid Unicode at offset {error.start} (a lone surrogate)") from error


def _message(message, where):
    if not isinstance(message, dict):
        raise CorpusError(f'{where} must be an object {{"role", "content"}}, got {_short(message)}')
    role = message.get("role")
    if role not in ROLES:
        raise CorpusError(f"{where} has the role {_short(role)}: a role is one of {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, list) and len(content) == 1 and isinstance(content[0], dict):
        part = content[0]  # {"type": "text", "text": ...}: one part is the same as the text alone
        content = part.get("text") if part.get("type") == "text" else content
    if content is None and role == "assistant" and message.get("tool_calls"):
        return {**message, "content": None}
    if not isinstance(content, str):
        parts = " (join its parts, which must be text)" if isinstance(content, list) else ""
        raise CorpusError(f"{where} ({role}): content must be a string, got {_short(content)}{parts}")
    check_unicode(content, f"{where}: its content")
    return {**message, "content": content}


def _text(value, key, where):
    text = value[key]
    if not isinstance(text, str):
        raise CorpusError(f"{where}: {key} must be a string, got {_short(text)}")
    check_unicode(text, f"{where}: its {key}")
    return text


def _shape_error(value, shapes, where):
    if shapes:
        found = " and ".join('"' + '" and "'.join(_SHAPES[shape]) + '"' for shape in shapes)
        return CorpusError(f"{where} has {found}, so what to train on is unclear: keep one of these shapes")
    keys = ", ".join(map(_short, list(value)[:8])) or "no keys"
    advice = next((advice for key, advice in _OTHER_LAYOUTS.items() if key in value), None)
    return CorpusError(f"{where} has the keys {keys}: {_wanted()}" + (f"; {advice}" if advice else ""))


def _wanted():
    return f"a .jsonl file has one object a line, {_SHAPES_IN_WORDS}"


class _DuplicateKeyError(ValueError):
    pass


def _without_duplicates(pairs):
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = (key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _DuplicateKeyError(next(twice))
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_without_duplicates)


def _json_name(value):
    names = {list: "list", str: "string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "number")


def _short(value):
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
