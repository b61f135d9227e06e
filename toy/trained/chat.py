"""A conversation with a model: its history, and a key/value cache that reads every token once."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from toy.data.encoding import Encoder
from toy.data.tokenizers import Tokenizer
from toy.models.generation import GeneratingModel, check_sampling, go_on

ROOM = 4  # of the context at least one part in so many is left for an answer


class Chat:
    """Messages back and forth, through the model's own chat template.

    model, tokenizer: as `toy.load` gives them, or for the model what `toy.trained.generator` makes of it. system: the system
    message, None for what the template does without one.
    n_tokens: longest answer. temperature, top_k, top_p, seed: as in `toy.models.generation.generate`.
    Raises ValueError for a model without a chat template, and settings out of range.

    Attributes: messages (dicts with "role" and "content", the system message among them), n_read (tokens that the model has
    read so far, answers included), forgotten (messages left out of the last prompt, because the context was full).
    """

    def __init__(
        self,
        model: GeneratingModel,
        tokenizer: Tokenizer,
        system: str | None = None,
        n_tokens: int = 512,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> None:
        template = getattr(tokenizer, "chat_template", None)
        if template is None:
            raise ValueError("this model has no chat template: toy generate goes on from a plain text")
        check_sampling(temperature, top_k, top_p)
        self.model, self.encoder = model, Encoder(tokenizer)
        self.tokenizer: Any = tokenizer  # one with special tokens, as it has a template
        self.n_tokens = n_tokens
        self.sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        self.rng = np.random.default_rng(seed)
        self.messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
        self.n_read = self.forgotten = 0
        self._cache: Any = model.new_kv_cache()
        self._ids: list[int] = []  # what the cache has read, and the last token of an answer, which it has not
        self._text = ""  # what those ids are the tokens of

    def answer(self, message: str) -> Iterator[str]:
        """Yield the pieces of the model's answer to a message. Both are in `messages` when it ends, also when the reader of
        the pieces ends it early: then as much of the answer as there was.

        Raises ValueError for a message that the template refuses or that leaves no room in the context; nothing is said then.
        """
        self.messages.append({"role": "user", "content": message})
        try:
            self._prepare()
        except BaseException:
            self.messages.pop()
            raise
        return self._pieces()

    def undo(self) -> bool:
        """Take back the last message and its answer. False when there is none."""
        while self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        if not self.messages or self.messages[-1]["role"] == "system":
            return False
        self.messages.pop()
        return True

    def clear(self) -> None:
        """Begin anew, with the same system message."""
        self.messages = [message for message in self.messages[:1] if message["role"] == "system"]

    def _prepare(self) -> None:
        """Bring `_ids` to the conversation as it is now, and the cache to as much of it as it has read."""
        kept, context = list(self.messages), self.model.config.context_length
        room = max(1, min(self.n_tokens, context // ROOM))
        while True:
            text, ids = self._encoded(kept)
            if len(ids) + room <= context:
                break
            begin = int(kept[0]["role"] == "system")
            end = next((i for i in range(begin + 1, len(kept)) if kept[i]["role"] == "user"), None)
            if end is None:
                raise ValueError(
                    f"the message takes {len(ids)} tokens with the chat template, and the model's context is {context}: "
                    "shorten it"
                )
            del kept[begin:end]  # the oldest question and its answer
        self.forgotten = len(self.messages) - len(kept)
        pairs = enumerate(zip(self._ids, ids))
        same = next((i for i, (a, b) in pairs if a != b), min(len(self._ids), len(ids)))
        # at least one token is read: the logits after it are the beginning of the answer
        self._cache.length = min(same, self._cache.length, len(ids) - 1)
        self._ids, self._text = ids, text

    def _encoded(self, messages: list[dict[str, str]]) -> tuple[str, list[int]]:
        """The text of the template and its ids. What goes on from the conversation as it was read is not encoded again: a
        model may have written its words in other tokens than the tokenizer would."""
        text = self.encoder.chat_text(messages)
        if self._text and text.startswith(self._text):
            more = self.tokenizer.encode(text[len(self._text) :], what="message", parse_special=True)
            return text, [*self._ids, *map(int, more)]
        return text, [int(i) for i in self.encoder.chat(messages)]

    def _pieces(self) -> Iterator[str]:
        stops, pieces = getattr(self.tokenizer, "stop_ids", ()), []
        before = self._cache.length
        n_tokens = min(self.n_tokens, self.model.config.context_length - len(self._ids))
        drawn = go_on(self.model, self._ids, self._cache, n_tokens, rng=self.rng, stop_ids=stops, **self.sampling)
        try:
            for piece in self.tokenizer.stream(drawn):
                pieces.append(piece)
                yield piece
        finally:
            answer = "".join(pieces)
            self.messages.append({"role": "assistant", "content": answer})
            self._text += answer
            self.n_read += self._cache.length - before
