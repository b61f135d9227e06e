"""What a tokenizer is called inside a GGUF file, so that llama.cpp tokenises as this library does."""

import numpy as np

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_LIKELY_ENDS = "~^|`@\\#"


def tokenizer_metadata(tokenizer):
    """dict of the metadata keys with which llama.cpp tokenises as `tokenizer` does.

    A subword tokenizer gives the keys it was read from or made with. None: llama.cpp then takes token ids alone.

    Bytes and ASCII characters become llama.cpp's "rwkv" kind: the longest token that fits, here always the only one, and no
    end token, which these vocabularies do not have. "rwkv" cannot tell a character outside the vocabulary from one inside
    that begins with the same byte (llama.cpp would never come to an end), so vocabularies with characters beyond ASCII become
    byte-level BPE, with merges that build each character from its bytes. BPE must have an end token, so one character has to
    serve: the first of ~^|`@\\# that is in the vocabulary, otherwise the last; llama.cpp stops where the model writes it.
    Text with other characters is an error in llama.cpp for "rwkv", and loses them for BPE (`CharTokenizer` raises).
    """
    kind = getattr(tokenizer, "kind", None)
    if tokenizer is None:
        return {"tokenizer.ggml.model": "none"}
    if kind in ("gguf", "bpe"):
        return dict(tokenizer.metadata)
    if kind == "bytes":
        return _rwkv(range(256))
    if kind == "char":
        return _rwkv(tokenizer.characters.encode()) if tokenizer.characters.isascii() else _bpe(tokenizer.characters)
    raise ValueError(f"GGUF has no form for a {type(tokenizer).__name__}")


def _rwkv(data):
    """Every byte is a token, in this order. The kind's own escapes keep all of them printable."""
    tokens = [chr(b) if 0x20 < b < 0x7F and b != ord("\\") else f"\\x{b:02x}" for b in data]
    return {"tokenizer.ggml.model": "rwkv", **_token_arrays(tokens)}


def _bpe(characters):
    tokens: list[str] = []
    merges: dict[str, None] = {}
    for character in characters:
        try:
            symbols = [CHARACTER_OF_BYTE[b] for b in character.encode()]
        except UnicodeEncodeError as error:
            raise ValueError(f"the vocabulary has U+{ord(character):04X}, which is half a character") from error
        tokens.append("".join(symbols))
        merges |= {f"{''.join(symbols[:n])} {symbols[n]}": None for n in range(1, len(symbols))}
    end = next((characters.index(c) for c in _LIKELY_ENDS if c in characters), len(characters) - 1)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",  # cuts between characters only, and leaves all spaces in the decoded text
        **_token_arrays(tokens),
        "tokenizer.ggml.merges": list(merges),
        "tokenizer.ggml.bos_token_id": end,
        "tokenizer.ggml.eos_token_id": end,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
    }


def _token_arrays(tokens):
    return {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": np.full(len(tokens), NORMAL, np.int32)}


def _byte_characters():
    """GPT-2's printable character for every byte (Radford et al. 2019): itself where it is one, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(0x100 + n) for n, b in enumerate(others)}


CHARACTER_OF_BYTE = _byte_characters()
BYTE_OF_CHARACTER = {character: b for b, character in CHARACTER_OF_BYTE.items()}


def bytes_of_characters(token):
    """The bytes that a token of a byte-level vocabulary stands for, None when it is not written in its characters."""
    try:
        return bytes([BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:
        return None
