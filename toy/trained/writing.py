"""What a model writes, from token ids to text, up to where it is to stop."""

from collections.abc import Iterable, Iterator, Sequence

from toy.data.tokenizers import Tokenizer


class Writing:
    """The text of the ids that a model generates: iterate over it once, it comes piece by piece.

    ids: what `toy.models.generation.generate` yields. stop: texts that end it; the first one that is complete does, and it is
    not part of the text. Raises ValueError for one that is empty.

    Attributes, while it is iterated over and afterwards: ids, list of those that were generated (with the ones of a stop
    text); text, what was yielded; stopped_by, the stop text that ended it, None without one.
    """

    def __init__(self, tokenizer: Tokenizer, ids: Iterable[int], stop: Sequence[str] = ()) -> None:
        check_stop(stop)
        self._tokenizer, self._generated, self._stop = tokenizer, ids, stop
        self.ids: list[int] = []
        self.text = ""
        self.stopped_by: str | None = None

    def __iter__(self) -> Iterator[str]:
        held = ""  # what may be the beginning of a stop text
        for piece in self._tokenizer.stream(self._kept()):
            held += piece
            found = [(place + len(text), place, text) for text in self._stop if (place := held.find(text)) >= 0]
            if found:
                _, place, self.stopped_by = min(found)
                held = held[:place]
                break
            free = len(held) - _begun(held, self._stop)
            if free:
                self.text += held[:free]
                yield held[:free]
            held = held[free:]
        if held:
            self.text += held
            yield held

    def _kept(self) -> Iterator[int]:
        for token in self._generated:
            self.ids.append(token)
            yield token


def check_stop(stop: Sequence[str]) -> None:
    """Raise ValueError for a stop text that is empty, and for one text in the place of a list of them."""
    if isinstance(stop, str):
        raise ValueError(f"stop must be a list of texts, got the text {stop!r}")
    if not all(stop):
        raise ValueError("a stop text is empty: every text ends with that, give at least one character")


def stop_ids_of(tokenizer: Tokenizer, stop: Sequence[str]) -> frozenset[int]:
    """The ids that end an answer: the model's own, and the special tokens that are stop texts, which write nothing."""
    ids = set(tokenizer.stop_ids)
    for text in stop:
        try:
            found = tokenizer.encode(text, parse_special=True).tolist()
        except ValueError:  # it has characters that the model cannot write
            continue
        if len(found) == 1 and not tokenizer.token_bytes(found[0]):
            ids.update(found)
    return frozenset(ids)


def _begun(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of the text may be the beginning of a stop text."""
    longest = max((len(one) for one in stop), default=1) - 1
    for n in range(min(longest, len(text)), 0, -1):
        if any(one.startswith(text[-n:]) for one in stop):
            return n
    return 0
