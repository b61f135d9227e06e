"""The tokenizers inside GGUF files.

Byte-level BPE (`tokenizer.ggml.model` "gpt2") is run by the `tokenizers` library, the SentencePiece kind ("llama") by
`toy.data.sentencepiece`; `toy.data.open_tokenizer` makes one of a file. What a file leaves unsaid is as in llama.cpp
(llama-vocab.cpp of ggml-org/llama.cpp).
"""

import codecs
import hashlib
import itertools
import re

import numpy as np

from toy.data import pre_tokenizers, sentencepiece
from toy.data.chat_template import ChatTemplate
from toy.data.pre_tokenizers import PRE_TOKENIZERS
from toy.data.special_tokens import SpecialTokens
from toy.data.tokenizers import UnknownCharacterError, check_unicode
from toy.files.gguf_models import short
from toy.files.gguf_vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, bytes_of_characters
from toy.optional import optional_package

# what ends an answer, by the token's text, whether the file marks it or not
_ENDS = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>",
    "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[", "<|ifm|im_end|>",  # noqa: RUF001
}  # fmt: skip
# tokens for filling in the middle: control tokens too, whether the file marks them or not; the second group ends an answer
_FILLING = {
    "fim_pre": {
        "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>",  # noqa: RUF001
        "<|code_prefix|>", "<|prefix|>", "<|plamo:fim_prefix|>",
    },
    "fim_suf": {
        "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>",  # noqa: RUF001
        "<|code_suffix|>", "<|suffix|>", "<|plamo:fim_suffix|>",
    },
    "fim_mid": {
        "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>",  # noqa: RUF001
        "<|code_middle|>", "<|middle|>", "<|plamo:fim_middle|>",
    },
    "fim_pad": {"<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"},
    "fim_rep": {"<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"},
    "fim_sep": {"<|file_sep|>", "<|plamo:file_separator|>"},
}  # fmt: skip
_ENDING_FILLING = ("fim_pad", "fim_rep", "fim_sep")
_SHOWN = {
    "<|channel|>",
    "<|message|>",
    "<|start|>",
    "<|constrain|>",
}  # of gpt-oss: no control tokens, whatever the file says

_MAX_TOKEN = 1024  # characters: the longest in use are runs of spaces, a few hundred
_MAX_SPECIAL_TOKEN = 256  # bytes
_MAX_SPECIAL_LENGTHS = 128  # different ones: runs of 1 to 31 spaces and new lines are the most in use

_BLOCK = 2**16  # characters that are encoded at a time, up to the next place where nothing is merged
_BLOCKS = 8  # that are encoded side by side
_LONGEST_STRETCH = (
    2**20
)  # characters that may have to be one piece: the memory grows with it, some hundred bytes for each


class BrokenTokenizerError(ValueError):
    """The metadata contradict themselves."""


class GGUFTokenizer:
    """A subword tokenizer from GGUF metadata.

    tokens: list of str, as in the file. bos_id, eos_id, unk_id: None where there is none. stop_ids: the ids that end an
    answer. add_bos, add_eos: what `encode(..., add_special=True)` adds. chat_template: Jinja text or None. metadata: the
    keys it was made from. notices: sentences about what it does otherwise than the file it was made from.
    """

    kind = "gguf"

    def __init__(self, metadata, path=None, notices=()):
        """metadata: the mapping of a `toy.GGUF`. path: of the file, only to be remembered. Errors as `load_tokenizer`."""
        self.path, self.notices = path, tuple(notices)
        self.metadata = {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}
        read = _Reader(self.metadata)
        self.model = read("tokenizer.ggml.model", str, None)
        if self.model not in ("gpt2", "llama"):
            found = (
                "there is no tokenizer in it"
                if self.model is None
                else f"its tokenizer is of the kind {short(self.model)}"
            )
            raise ValueError(f"{found}; byte-level BPE (gpt2) and SentencePiece (llama) can be read")
        self.tokens = read.tokens()
        bos, eos, unk = (1, 2, 0) if self.model == "llama" else (None, None, None)
        self.bos_id, self.eos_id = read.token_id("bos", bos), read.token_id("eos", eos)
        self.unk_id = read.token_id("unknown", unk)
        self.types, self.stop_ids = _types_and_stops(self.tokens, read, self.eos_id)
        self.chat_template = read("tokenizer.chat_template", str, None)
        rule = None
        if self.model == "gpt2":
            self.pre = read("tokenizer.ggml.pre", str, "default")
            self._add_space = False
            self._encoder, rule = _byte_level_bpe(self.tokens, read.merges(), self.pre)
        else:
            self.pre = None
            self._add_space = read("tokenizer.ggml.add_space_prefix", bool, True)
            self._encoder = _sentencepiece_bpe(self.tokens, self.types, read.scores(), self.unk_id)
        self._digits = rule.digits if rule else None
        self._stretch = re.compile(rule.stretch if rule else r" *[^ \n]+|\s+")
        self._starts = blocks = rule.blocks if rule else self._encoder.blocks
        self._starts = None if blocks is None else re.compile(blocks)
        default = self.model == "llama" or (rule is not None and rule.adds_bos)
        self.add_bos = read("tokenizer.ggml.add_bos_token", bool, default) and self.bos_id is not None
        self.add_eos = read("tokenizer.ggml.add_eos_token", bool, False) and self.eos_id is not None
        special = {self.tokens[i]: i for i in _ids_of_types(self.types, UNKNOWN, CONTROL, USER_DEFINED)}
        user_defined = {token: i for token, i in special.items() if self.types[i] == USER_DEFINED}
        eats = {special["<mask>"]} if str(self.pre).startswith("jina-v2-") and "<mask>" in special else ()
        self._special, self._user_defined = SpecialTokens(special, eats), SpecialTokens(user_defined, eats)
        _check_special(self._special, special)
        self._templates = {}  # made when they are asked for
        self._bytes = {}  # by id, filled as they are asked for

    @property
    def vocab_size(self):
        return len(self.tokens)

    def encode(self, text, what="text", *, add_special=False, parse_special=False):
        """str -> ids, int32 (n_tokens,).

        add_special: add the beginning (and end) token if the model wants them. parse_special: special tokens written out in
        the text, such as <|im_start|>, become that token; otherwise they are read as plain characters.
        Raises UnknownCharacterError for text that is not valid Unicode, and for a character that a SentencePiece vocabulary
        has no token for; `what` names the text in it.
        """
        check_unicode(text, what)
        ids: list = [[self.bos_id]] if add_special and self.add_bos else []  # of lists and arrays
        at_start = True  # of the text, or behind a special token: where SentencePiece puts a space
        for part, special_id in (self._special if parse_special else self._user_defined).split(text):
            if special_id is None:
                ids += (np.array(block, np.int32) for block in self._encode_plain(part, what, at_start))
            else:
                ids.append([special_id])
            at_start = special_id is not None
        if add_special and self.add_eos:
            ids.append([self.eos_id])
        return np.concatenate([np.zeros(0, np.int32), *ids], dtype=np.int32)

    def decode(self, ids, *, special=False):
        """ids -> str; bytes that are not UTF-8 become U+FFFD. special: write special tokens out instead of dropping them.

        The space that `encode` puts before a text of the SentencePiece kind is taken off again.
        """
        ids = [int(i) for i in ids]
        pieces = [self.token_bytes(i, special=special) for i in ids]
        first = 1 if ids and ids[0] == self.bos_id else 0
        if self._add_space and len(ids) > first and self.types[ids[first]] not in (CONTROL, UNKNOWN):
            pieces[first] = pieces[first].removeprefix(b" ")
        return b"".join(pieces).decode("utf-8", errors="replace")

    def stream(self, ids, *, special=False):
        """Yield the text of ids that continue another text, each as soon as the bytes of its characters are complete."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for i in ids:
            if piece := decoder.decode(self.token_bytes(i, special=special)):
                yield piece
        if rest := decoder.decode(b"", final=True):
            yield rest

    def token_bytes(self, token_id, *, special=False):
        """The bytes that one token stands for: b"" for a special token, unless `special` asks for its text.

        Raises ValueError for an id outside the vocabulary.
        """
        i = int(token_id)
        if not 0 <= i < len(self.tokens):
            raise ValueError(f"token id {i} is outside the vocabulary of {len(self.tokens)}")
        if self.types[i] in (CONTROL, UNKNOWN) and not special:
            return b""
        if i not in self._bytes:
            self._bytes[i] = self._bytes_of(self.tokens[i], self.types[i])
        return self._bytes[i]

    def apply_chat_template(self, messages, *, add_generation_prompt=True, tools=None, **variables):
        """The text of a conversation in the form the model was trained on; encode it with `parse_special=True`.

        messages: list of {"role": "system" | "user" | "assistant" | "tool", "content": str}. add_generation_prompt: end with
        the beginning of the assistant's answer. tools: list of JSON schemas of functions that may be called; files with a
        template of their own for that use it. The template comes with the file and is run as `toy.data.chat_template` says.
        Raises ValueError when the file has no template, and when the template is broken, takes too much time or memory, or
        refuses the messages.
        """
        return self.template(tools).render(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, **variables
        )

    def template(self, tools=None):
        """The `ChatTemplate` for conversations with these tools (None: without any). Raises ValueError when there is none."""
        source = self.chat_template
        if tools is not None:
            source = self.metadata.get("tokenizer.chat_template.tool_use", source)
        if not isinstance(source, str):
            raise ValueError("this model has no chat template: give it plain text, without the chat option")
        if source not in self._templates:
            read = _Reader(self.metadata, len(self.tokens))
            ids = {"bos": self.bos_id, "eos": self.eos_id, "unk": self.unk_id, "pad": read.token_id("padding")}
            tokens = {f"{name}_token": "" if i is None else self.tokens[i] for name, i in ids.items()}
            self._templates[source] = ChatTemplate(source, tokens)
        return self._templates[source]

    def to_json(self):
        """{"kind", "path", "sha256"}: where the tokenizer is, and a digest to know it again. Without a path, the tokenizer
        itself: {"kind", "sha256", "metadata"}."""
        if self.path is None:
            return {"kind": self.kind, "sha256": self.sha256, "metadata": metadata_to_json(self.metadata)}
        return {"kind": self.kind, "path": str(self.path.absolute()), "sha256": self.sha256}

    @property
    def sha256(self):
        """Of everything the tokenizer was made from."""
        digest = hashlib.sha256()
        for key, value in sorted(self.metadata.items()):
            digest.update(repr((key, value.tolist() if isinstance(value, np.ndarray) else value)).encode())
        return digest.hexdigest()

    def _encode_plain(self, text, what, at_start):
        """Yield lists of ids, some blocks at a time."""
        blocks = blocks_of(text, self._starts, self._stretch, what)
        if self.model == "llama":
            space = " " if self._add_space and at_start else ""
            for block in blocks:
                ids = self._encoder.encode((space + block).replace(" ", sentencepiece.SPACE))
                if None in ids:
                    raise UnknownCharacterError(
                        f"the {what} has characters that this tokenizer has neither a token nor byte tokens for"
                    )
                yield ids
                space = ""
            return
        while together := list(itertools.islice(blocks, _BLOCKS)):
            if self._digits:
                together = [piece for block in together for piece in pre_tokenizers.digit_groups(block, self._digits)]
            for encoding in self._encoder.encode_batch_fast(together, add_special_tokens=False):
                yield encoding.ids

    def _bytes_of(self, token, kind):
        if kind in (CONTROL, UNKNOWN, USER_DEFINED):
            return token.encode()
        byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token) if kind == BYTE else None
        if byte:
            return bytes((int(byte[1], 16),))
        if self.model == "llama":
            return token.replace(sentencepiece.SPACE, " ").encode()
        data = bytes_of_characters(token)
        return token.encode() if data is None else data  # None: a token that was added without being byte-encoded


def metadata_to_json(metadata):
    """What `metadata_from_json` reads: arrays of whole numbers as runs of equal ones, others as lists."""
    return {key: _array_to_json(value) if isinstance(value, np.ndarray) else value for key, value in metadata.items()}


def metadata_from_json(data):
    """The metadata of a `GGUFTokenizer`. Raises ValueError for anything that `metadata_to_json` does not write."""
    if not isinstance(data, dict):
        raise ValueError("its metadata are no JSON object")
    try:
        return {key: _array_from_json(value) if isinstance(value, dict) else value for key, value in data.items()}
    except (KeyError, TypeError, OverflowError, MemoryError) as error:
        raise ValueError(f"its metadata are not those of a tokenizer ({error})") from error


def _array_to_json(array):
    if array.dtype.kind == "f":
        return {"type": array.dtype.name, "numbers": [float(number) for number in array]}
    runs = [[key, len(list(group))] for key, group in itertools.groupby(array.tolist())]
    return {"type": array.dtype.name, "runs": runs}


def _array_from_json(data):
    dtype = np.dtype(data["type"])
    if dtype.kind not in "iufb":
        raise ValueError(f"an array of {dtype.name}")
    if "numbers" in data:
        return np.array(data["numbers"], dtype)
    if sum(length for _, length in data["runs"]) > 2**24 or any(length < 0 for _, length in data["runs"]):
        raise ValueError("an array that is too long")
    numbers, lengths = [number for number, _ in data["runs"]], [length for _, length in data["runs"]]
    return np.repeat(np.array(numbers, dtype), lengths)


def _types_and_stops(tokens, read, eos_id):
    """The token types, mended as llama.cpp mends them, and the frozenset of the ids that end an answer."""
    types, places = read.token_types(), {}
    ids = {name: read.token_id(name) for name in ("eot", "eom", *_FILLING)}
    old_names = {"fim_pre": "prefix", "fim_suf": "suffix", "fim_mid": "middle"}
    for name, old in old_names.items():
        ids[name] = ids[name] if ids[name] is not None else read.token_id(old)
    names_of: dict[str, str | None] = {text: None for text in _ENDS | _SHOWN | {"<|plamo:eos|>"}}
    names_of |= {text: name for name, texts in _FILLING.items() for text in texts}
    places = {token: i for i, token in enumerate(tokens) if token in names_of}
    types = types.copy()
    stops = {eos_id, ids["eot"], ids["eom"], *(ids[name] for name in _ENDING_FILLING)} - {None}
    for token, i in places.items():
        role = names_of[token]
        if token in _ENDS or (role is not None and ids[role] is None):
            types[i] = CONTROL
            if token in _ENDS or role in _ENDING_FILLING:
                stops.add(i)
    for token in _SHOWN & places.keys():
        types[places[token]] = USER_DEFINED
    ends = {tokens[i] for i in stops}
    calls = "<|call|>" in ends or "<|calls|>" in ends
    if (
        "<|end|>" in ends and calls and ends & {"<|return|>", "<|flush|>"}
    ):  # there <|end|> ends a message, not an answer
        types[places["<|end|>"]] = USER_DEFINED
        stops.discard(places["<|end|>"])
    if "</s>" in ends and ends & {"<|tool_response>", "<|plamo:eos|>"}:  # there </s> is a word of a markup language
        types[places["</s>"]] = NORMAL
        stops.discard(places["</s>"])
    return types, frozenset(stops)


def _ids_of_types(types, *kinds):
    return np.flatnonzero(np.isin(types, kinds)).tolist()


def _check_special(special, ids):
    longest = max((len(token.encode()) for token in ids), default=0)
    if longest > _MAX_SPECIAL_TOKEN:
        raise BrokenTokenizerError(
            f"has a special token of {longest} bytes, longer than any tokenizer's ({_MAX_SPECIAL_TOKEN})"
        )
    if special.n_lengths > _MAX_SPECIAL_LENGTHS:
        raise BrokenTokenizerError(
            f"has special tokens of {special.n_lengths} different lengths, more than any tokenizer ({_MAX_SPECIAL_LENGTHS})"
        )


def blocks_of(text, starts, stretch, what="text"):
    """Yield the text in blocks of about _BLOCK characters, which can be encoded one by one.

    starts, stretch: compiled, as `PreTokenizer.blocks` and `.stretch`. Raises ValueError for a text with a stretch so long
    that cutting it takes too much memory; `what` names the text.
    """
    start, stop = 0, 0
    while stop < len(text):
        match = starts.search(text, start + _BLOCK) if starts else None
        stop = match.start() if match else len(text)
        if stop - start > _LONGEST_STRETCH:
            longest = max(len(found[0]) for found in stretch.finditer(text, start, stop))
            if longest > _LONGEST_STRETCH:
                raise ValueError(
                    f"the {what} has a stretch of {longest:,} characters that this tokenizer must read whole: break it into "
                    f"pieces of at most {_LONGEST_STRETCH:,}, by new lines or in several texts"
                )
        yield text[start:stop]
        start = stop


def _byte_level_bpe(tokens, merges, pre):
    """-> the library's tokenizer, and the `PreTokenizer`."""
    if pre not in PRE_TOKENIZERS:
        raise ValueError(
            f"the pre-tokenizer {short(pre)} is not supported; these are: {', '.join(sorted(PRE_TOKENIZERS))}"
        )
    library = optional_package("tokenizers", "the tokenizer of a GGUF file")
    rule = PRE_TOKENIZERS[pre]
    try:
        model = library.models.BPE(
            {token: i for i, token in enumerate(tokens)}, merges, ignore_merges=rule.whole_pieces
        )
    except Exception as error:  # the library raises nothing more special
        raise BrokenTokenizerError(f"its merges do not fit its tokens ({error})") from error
    encoder = library.Tokenizer(model)
    encoder.pre_tokenizer = pre_tokenizers.split_and_encode_bytes(rule)
    return encoder, rule


def _sentencepiece_bpe(tokens, types, scores, unknown_id):
    places = {token: i for i, token in enumerate(tokens)}
    bytes_ = {byte: places.get(f"<0x{byte:02X}>") for byte in range(256)}
    # what is written out in a text never becomes a special token by being joined from its characters
    joinable = np.isin(types, (UNKNOWN, CONTROL, BYTE), invert=True).tolist()
    table = zip(tokens, scores.tolist(), joinable)
    known = {token: (score, i) for i, (token, score, usable) in enumerate(table) if usable}
    return sentencepiece.Merger(known, {byte: i for byte, i in bytes_.items() if i is not None}, unknown_id)


class _Reader:
    """Tokenizer metadata, checked as they are read."""

    def __init__(self, metadata, n_tokens=0):
        self.metadata, self.n_tokens = metadata, n_tokens

    def __call__(self, key, kind, default):
        value = self.metadata.get(key, default)
        if value is not default and type(value) is not kind:
            raise BrokenTokenizerError(f"{key} is {short(value)}, expected {kind.__name__}")
        return value

    def tokens(self):
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
            raise BrokenTokenizerError("its tokenizer has no tokens (tokenizer.ggml.tokens)")
        tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
        self.n_tokens = len(tokens)
        longest = max(map(len, tokens))
        if longest > _MAX_TOKEN:
            raise BrokenTokenizerError(
                f"has a token of {longest} characters, longer than any tokenizer's ({_MAX_TOKEN})"
            )
        if len(set(tokens)) != len(tokens):
            seen: set[str] = set()
            again = (token for token in tokens if token in seen or seen.add(token))  # type: ignore[func-returns-value]
            twice = next(again)
            raise BrokenTokenizerError(f"has the token {short(twice)} twice")
        return tokens

    def token_types(self):
        types = self.metadata.get("tokenizer.ggml.token_type", np.full(self.n_tokens, NORMAL))
        if not isinstance(types, np.ndarray) or len(types) != self.n_tokens or types.dtype.kind not in "iu":
            raise BrokenTokenizerError("its token types do not match its tokens (tokenizer.ggml.token_type)")
        return types

    def scores(self):
        scores = self.metadata.get("tokenizer.ggml.scores")
        if not isinstance(scores, np.ndarray) or len(scores) != self.n_tokens or not np.isfinite(scores).all():
            raise BrokenTokenizerError("has no score for each of its tokens (tokenizer.ggml.scores)")
        return scores

    def merges(self):
        merges = self.metadata.get("tokenizer.ggml.merges")
        if not isinstance(merges, list) or not all(isinstance(merge, str) for merge in merges):
            raise BrokenTokenizerError("has no merges (tokenizer.ggml.merges)")
        pairs = dict.fromkeys(
            tuple(merge.split(" ")) for merge in merges
        )  # of one that is there twice the first counts
        wrong = next((pair for pair in pairs if len(pair) != 2 or not all(pair)), None)
        if wrong is not None:
            raise BrokenTokenizerError(
                f"has the merge {short(' '.join(wrong))}, expected two parts with a space between them"
            )
        return list(pairs)

    def token_id(self, name, default=None):
        """`default` where none is given, or one that is not in the vocabulary; None when that is not in it either."""
        value = self(f"tokenizer.ggml.{name}_token_id", int, None)
        if value is None or not 0 <= value < self.n_tokens:
            value = default
        return value if value is not None and 0 <= value < self.n_tokens else None
