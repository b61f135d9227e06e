"""Tokenizers: characters (the vocabulary is read from the corpus) and bytes (256 ids, any text)."""

import codecs

import numpy as np

KINDS = ("char", "bytes")


class UnknownCharacterError(ValueError):
    """A text has a character that the tokenizer has no id for."""


class CharTokenizer:
    """One id per distinct character, in the order of the code points."""

    kind = "char"

    def __init__(self, characters):
        """characters: str or list of distinct characters; the position in it is the id."""
        self.characters = "".join(characters)
        if not self.characters or len(set(self.characters)) != len(self.characters):
            raise ValueError("a character tokenizer needs a list of distinct characters, at least one")
        self._codes = _code_points(self.characters)  # (V,)
        self._order = np.argsort(self._codes)
        self._sorted_codes = self._codes[self._order]

    @classmethod
    def from_text(cls, text):
        """The tokenizer whose vocabulary is the characters of `text`."""
        return cls(sorted(set(text)))

    @property
    def vocab_size(self):
        return len(self.characters)

    def encode(self, text, what="text"):
        """str -> ids, int32 (n_characters,). `what` names the text in the error.

        Raises UnknownCharacterError for the first character without an id, with its offset.
        """
        codes = _code_points(text)
        places = np.minimum(np.searchsorted(self._sorted_codes, codes), self.vocab_size - 1)
        unknown = self._sorted_codes[places] != codes
        if unknown.any():
            offset = int(unknown.argmax())
            raise UnknownCharacterError(
                f"the {what} has the character {text[offset]!r} (U+{ord(text[offset]):04X}) at offset {offset}, "
                f"which is not among the {self.vocab_size} characters of the training text"
            )
        return self._order[places].astype(np.int32)

    def decode(self, ids):
        """ids -> str."""
        return "".join(self.stream(ids))

    def stream(self, ids):
        """Yield the text of each id as it comes."""
        for i in ids:
            yield self.characters[i]

    def to_json(self):
        return {"kind": self.kind, "characters": self.characters}


class ByteTokenizer:
    """The bytes of the UTF-8 text: 256 ids, so every text has one."""

    kind = "bytes"
    vocab_size = 256

    def encode(self, text, what="text"):
        """str -> ids, int32 (n_bytes,)."""
        try:
            data = text.encode()
        except UnicodeEncodeError as error:  # lone surrogates: what an undecodable command-line argument becomes
            raise UnknownCharacterError(f"the {what} is not valid Unicode at offset {error.start}") from error
        return np.frombuffer(data, np.uint8).astype(np.int32)

    def decode(self, ids):
        """ids -> str; bytes that are not UTF-8 become U+FFFD."""
        return bytes(int(i) for i in ids).decode("utf-8", errors="replace")

    def stream(self, ids):
        """Yield text as soon as the bytes of a character are complete."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for i in ids:
            if piece := decoder.decode(bytes((int(i),))):
                yield piece
        if rest := decoder.decode(b"", final=True):
            yield rest

    def to_json(self):
        return {"kind": self.kind}


def _code_points(text):
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), np.uint32)
