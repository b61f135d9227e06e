"""From a document, a completion or a conversation to token ids and labels: the one way, for training, evaluation, generation.

`labels[i]` is what the model is to say after `ids[i]`, -1 where nothing is asked.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from toy.data.records import Completion, Conversation

TRAIN_ON = ("answers", "all")
_MARKER = "toyAnswer{}Mark"  # stands in for an answer while the template is asked where it puts it


class Encoded(NamedTuple):
    ids: np.ndarray  # (n,) int32
    labels: np.ndarray  # (n,) int32


class ChatTemplateError(ValueError):
    """The chat template cannot be trained with; the message says what is wrong with it."""


class Encoder:
    """tokenizer: a Char- or ByteTokenizer, or one with special tokens and a chat template.

    begin, end: the ids that a document begins and ends with, None without one.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.has_special = hasattr(tokenizer, "apply_chat_template")
        self.begin = tokenizer.bos_id if getattr(tokenizer, "add_bos", False) else None
        self.end = getattr(tokenizer, "eos_id", None)
        self._stops = np.array(sorted(getattr(tokenizer, "stop_ids", ())), np.int64)

    # -- for training -------------------------------------------------------------------------------------------------

    def encode(self, record, train_on="answers"):
        """A `Completion` or `Conversation` -> `Encoded`."""
        if isinstance(record, Completion):
            return self.completion(record.prompt, record.completion, train_on)
        if isinstance(record, Conversation):
            return self.conversation(record.messages, record.tools, train_on)
        return self.document(record.text)

    def document(self, text):
        """The beginning token where the model wants one, the text, the end token where there is one; every token is asked
        for but the first. Special tokens written out in the text stay text."""
        ids = self._framed(self.plain(text))
        return Encoded(ids, _labels(ids, np.ones(len(ids), bool)))

    def completion(self, prompt, completion, train_on="answers"):
        """A document of the two texts; the completion and the end token are asked for ("all": the prompt too).

        The ids are those of the whole text when they begin with those of the prompt; when a token would lie across the
        seam, the two are encoded apart, because that is how generation goes on from a prompt.
        """
        _check_train_on(train_on)
        first, both = self.plain(prompt), self.plain(prompt + completion)
        if not np.array_equal(both[: len(first)], first):
            both = np.concatenate([first, self.continuing(completion)])
        ids = self._framed(both)
        asked = np.ones(len(ids), bool)
        if train_on == "answers":
            asked[: len(first) + (self.begin is not None)] = False
        return Encoded(ids, _labels(ids, asked))

    def conversation(self, messages, tools=None, train_on="answers"):
        """The model's chat template with special tokens parsed. The content of every assistant turn and the token that ends
        the turn are asked for ("all": every token).

        messages: dicts with "role" and "content". tools: for the template, a list of JSON objects or None.
        Raises ChatTemplateError when the template does not show where its answers are; ValueError when there is none.
        """
        _check_train_on(train_on)
        text = self._render(messages, tools)
        ids = self._template_ids(text)
        asked = np.ones(len(ids), bool) if train_on == "all" else self._answers(messages, tools, text, ids)
        return Encoded(ids, _labels(ids, asked))

    # -- for generation -----------------------------------------------------------------------------------------------

    def prompt(self, text: str, special: bool = False, what: str = "prompt") -> np.ndarray:
        """The ids of a text to go on from, after the beginning token where the model wants one. special: tokens such as
        <|im_start|> written out in it become that token. what: the text's name in errors."""
        options = {"parse_special": True} if special and self.has_special else {}
        return self._begun(self.tokenizer.encode(text, what=what, **options))

    def chat(self, messages: Sequence[Mapping[str, Any]], tools: list[Any] | None = None) -> np.ndarray:
        """The ids of a conversation up to where the assistant's next answer begins. Errors as `conversation`."""
        return self._template_ids(self.chat_text(messages, tools))

    def chat_text(self, messages: Sequence[Mapping[str, Any]], tools: list[Any] | None = None) -> str:
        """The text of a conversation up to there."""
        return self._render(messages, tools, add_generation_prompt=True)

    # -- plain text ---------------------------------------------------------------------------------------------------

    def plain(self, text, what="text"):
        """The ids of the text alone, int32 (n,)."""
        return self.tokenizer.encode(text, what=what)

    def continuing(self, text, before="\n"):
        """The ids of a text that goes on after another one: without the space that SentencePiece puts at the beginning.

        before: what stands before it; where no token of the two lies across the seam the result is exact.
        """
        if not self.has_special:
            return self.plain(text)
        for start in dict.fromkeys((before, "\n", ".", "x")):
            head, both = self.plain(start), self.plain(start + text)
            if np.array_equal(both[: len(head)], head):
                return both[len(head) :]
        return self.plain(text)

    def _framed(self, ids):
        ids = self._begun(ids)
        return ids if self.end is None else np.append(ids, np.int32(self.end))

    def _begun(self, ids):
        return ids if self.begin is None else np.concatenate([np.array([self.begin], np.int32), ids])

    # -- the chat template --------------------------------------------------------------------------------------------

    def _render(self, messages, tools, add_generation_prompt=False):
        if not self.has_special:
            raise ValueError(
                f"the tokenizer ({self.tokenizer.kind}) has no chat template, so it cannot read conversations: "
                "begin with a model that has one, or give prompts and completions"
            )
        variables = {"tools": tools} if tools else {}
        return self.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=add_generation_prompt, **variables
        )

    def _template_ids(self, text):
        ids = self.tokenizer.encode(text, what="conversation", parse_special=True)
        begun = len(ids) and ids[0] == self.begin  # many templates write it out
        return ids if begun else self._begun(ids)

    def _answers(self, messages, tools, text, ids):
        """Which ids the assistant is to say, bool (n,)."""
        asked, any_end = np.zeros(len(ids), bool), False
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            return asked
        starts, ends = self._places(ids, text)
        is_stop = np.isin(ids, self._stops)
        data = text.encode()
        for turn in turns:
            begin, end = self._answer(messages, tools, turn, text)
            first = len(text[:begin].encode())
            if end is None:  # of a turn that is known by where it begins: up to its end token
                after = np.flatnonzero((starts >= first) & is_stop)
                if not len(after):
                    raise ChatTemplateError(f"{_PROBLEM}: no end token follows message {turn + 1}")
                asked[(ends > first) & (np.arange(len(ids)) <= after[0])] = any_end = True
                continue
            last = len(text[:end].encode())
            asked[(ends > first) & (starts < last)] = True
            i = int(np.searchsorted(starts, last))
            while i < len(ids) and not is_stop[i] and data[starts[i] : ends[i]].isspace():
                i += 1
            if i < len(ids) and is_stop[i]:
                asked[(starts >= last) & (np.arange(len(ids)) <= i)] = any_end = True
        if not any_end:
            raise ChatTemplateError(
                f"{_PROBLEM}: it puts no end token after the assistant's answers, so the model would never stop"
            )
        return asked

    def _answer(self, messages, tools, turn, text):
        """Where in `text` the answer of a turn is -> (first, last) character offset; last None: its end token tells.

        The template is asked twice: with a marker in place of the content, and, where that does not help (an answer that
        calls tools, one that the template takes apart), how far the conversation before it reaches.
        """
        message = messages[turn]
        if message["content"] is not None and not message.get("tool_calls"):
            marker = next(m for m in map(_MARKER.format, range(len(text) + 1)) if m not in text)
            shown = self._render((*messages[:turn], {**message, "content": marker}, *messages[turn + 1 :]), tools)
            before, *after = shown.split(marker)
            fits = len(after) == 1 and text.startswith(before) and text.endswith(after[0])
            if fits and len(before) + len(after[0]) <= len(text):
                return len(before), len(text) - len(after[0])
        try:
            before = self._render(messages[:turn], tools)
            prompt = self._render(messages[:turn], tools, add_generation_prompt=True)
        except ValueError as error:
            raise ChatTemplateError(
                f"{_PROBLEM}: it renders message {turn + 1} only with what follows ({error})"
            ) from error
        if len(prompt) > len(before) and prompt.startswith(before) and text.startswith(prompt):
            return len(prompt), None
        raise ChatTemplateError(
            f"{_PROBLEM}: message {turn + 1} (assistant) is left out, repeated, or changes what stands around it"
        )

    def _places(self, ids, text):
        """Where each token lies in the UTF-8 bytes of the text -> starts, ends (n,). A token of nothing of it is empty.

        Tokenizers of the SentencePiece kind add a space to the text, and some special tokens swallow one.
        """
        data, at = text.encode(), 0
        starts, ends = np.zeros(len(ids), np.int64), np.zeros(len(ids), np.int64)
        for i, token in enumerate(ids.tolist()):
            piece = self.tokenizer.token_bytes(token, special=True)
            if i == 0 and token == self.begin and not data.startswith(piece):
                continue  # added before the text
            starts[i] = at
            if data.startswith(piece, at):
                at += len(piece)
            elif piece[:1] == b" " and data.startswith(piece[1:], at):
                at += len(piece) - 1
            else:
                left = at
                while data[left : left + 1].isspace() and not data.startswith(piece, left):
                    left += 1
                if not data.startswith(piece, left):
                    raise ChatTemplateError(
                        f"{_PROBLEM}: the tokenizer changes the text (token {i}, {piece[:20]!r}, is not where it was)"
                    )
                starts[i], at = left, left + len(piece)
            ends[i] = at
        return starts, ends


_PROBLEM = "the chat template of this model does not show where its answers are"


def _labels(ids, asked):
    """ids, asked: (n,) -> what is to be said after each: the next id where that one is asked for."""
    labels = np.full(len(ids), -1, np.int32)
    labels[:-1] = np.where(asked[1:], ids[1:], -1)
    return labels


def _check_train_on(train_on):
    if train_on not in TRAIN_ON:
        raise ValueError(f"train_on must be one of {', '.join(TRAIN_ON)}, got {train_on!r}")
