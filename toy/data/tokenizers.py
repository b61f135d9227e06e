"""Tokenizers: characters (the vocabulary is read from the corpus) and bytes (256 ids, any text).

All tokenizers, the subword ones of the other files too, have the same methods and attributes; these two have no special
tokens, so nothing begins or ends a text and nothing but its own length ends an answer.
"""

import codecs
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np

KINDS = ("char", "bytes", "bpe")  # what can be made from a text


class UnknownCharacterError(ValueError):
    """A text has a character that the tokenizer has no id for. fault: the sentence without what to do about it."""

    def __init__(self, fault: str, advice: str | None = None) -> None:
        super().__init__(fault if advice is None else f"{fault}: {advice}")
        self.fault = fault


ANY_TEXT = "train with --tokenizer bytes, which has a token for any text"


def not_among(characters: int, what: object, character: str, offset: int) -> UnknownCharacterError:
    """The error about a character of `what` that is not in a vocabulary of so many characters."""
    return UnknownCharacterError(
        f"{what} has the character {character!r} (U+{ord(character):04X}) at offset {offset}, "
        f"which is not among the {characters} characters of the training text",
        f"leave it out, or {ANY_TEXT}",
    )


class Tokenizer(Protocol):
    """What all of them have. bos_id, eos_id, unk_id: None where there is no such token. stop_ids: of the tokens that end an
    answer."""

    @property
    def kind(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_id(self) -> int | None: ...
    @property
    def unk_id(self) -> int | None: ...
    @property
    def add_bos(self) -> bool: ...
    @property
    def add_eos(self) -> bool: ...
    @property
    def stop_ids(self) -> frozenset[int]: ...
    @property
    def chat_template(self) -> str | None: ...

    def encode(
        self, text: str, what: str = "text", *, add_special: bool = False, parse_special: bool = False
    ) -> np.ndarray: ...
    def decode(self, ids: Iterable[int], *, special: bool = False) -> str: ...
    def stream(self, ids: Iterable[int], *, special: bool = False) -> Iterator[str]: ...
    def token_bytes(self, token_id: int, *, special: bool = False) -> bytes: ...
    def to_json(self) -> dict[str, Any]: ...


class _WithoutSpecialTokens:
    """What the tokenizers of characters and bytes share."""

    bos_id = eos_id = unk_id = chat_template = None
    add_bos = add_eos = False
    stop_ids: frozenset[int] = frozenset()
    notices: tuple[str, ...] = ()
    encode: Callable[..., np.ndarray]
    token_bytes: Callable[..., bytes]

    def stream(self, ids: Iterable[int], *, special: bool = False) -> Iterator[str]:
        """Yield text as soon as the bytes of a character are complete."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for i in ids:
            if piece := decoder.decode(self.token_bytes(i)):
                yield piece
        if rest := decoder.decode(b"", final=True):
            yield rest


class CharTokenizer(_WithoutSpecialTokens):
    """One id per distinct character, in the order of the code points."""

    kind = "char"

    def __init__(self, characters: Iterable[str]) -> None:
        """characters: str or list of distinct characters; the position in it is the id."""
        self.characters = "".join(characters)
        if not self.characters or len(set(self.characters)) != len(self.characters):
            raise ValueError("a character tokenizer needs a list of distinct characters, at least one")
        self._codes = _code_points(self.characters)  # (V,)
        self._order = np.argsort(self._codes)
        self._sorted_codes = self._codes[self._order]

    @classmethod
    def from_text(cls, text: str | Iterable[str]) -> "CharTokenizer":
        """The tokenizer whose vocabulary is the characters of `text`: a str, or an iterable of its parts."""
        return cls(sorted(set().union(*([text] if isinstance(text, str) else text))))

    @property
    def vocab_size(self) -> int:
        return len(self.characters)

    def encode(
        self, text: str, what: str = "text", *, add_special: bool = False, parse_special: bool = False
    ) -> np.ndarray:
        """str -> ids, int32 (n_characters,). `what` names the text in the error. There is nothing to add or to parse.

        Raises UnknownCharacterError for the first character without an id, with its offset.
        """
        codes = _code_points(text)
        places = np.minimum(np.searchsorted(self._sorted_codes, codes), self.vocab_size - 1)
        unknown = self._sorted_codes[places] != codes
        if unknown.any():
            offset = int(unknown.argmax())
            raise not_among(self.vocab_size, f"the {what}", text[offset], offset)
        return self._order[places].astype(np.int32)

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """ids -> str."""
        return "".join(self.stream(ids))

    def stream(self, ids: Iterable[int], *, special: bool = False) -> Iterator[str]:
        """Yield the text of each id as it comes."""
        for i in ids:
            yield self.characters[i]

    def token_bytes(self, token_id: int, *, special: bool = False) -> bytes:
        """The UTF-8 bytes of one character; half a character, which has none, is a question mark."""
        return self.characters[token_id].encode("utf-8", errors="replace")

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "characters": self.characters}


class ByteTokenizer(_WithoutSpecialTokens):
    """The bytes of the UTF-8 text: 256 ids, so every text has one."""

    kind = "bytes"
    vocab_size = 256

    def encode(
        self, text: str, what: str = "text", *, add_special: bool = False, parse_special: bool = False
    ) -> np.ndarray:
        """str -> ids, int32 (n_bytes,). There is nothing to add or to parse.

        Raises UnknownCharacterError for text that is not valid Unicode; `what` names it.
        """
        return np.frombuffer(check_unicode(text, what), np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """ids -> str; bytes that are not UTF-8 become U+FFFD."""
        return bytes(int(i) for i in ids).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int, *, special: bool = False) -> bytes:
        return bytes((int(token_id),))

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind}


def check_unicode(text: str, what: str = "text") -> bytes:
    """The UTF-8 bytes of a text.

    Raises UnknownCharacterError where it has none: half a character, which is what a command-line argument that cannot be
    decoded has in it. `what` names the text.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UnknownCharacterError(f"the {what} is not valid Unicode at offset {error.start}") from error


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), np.uint32)
