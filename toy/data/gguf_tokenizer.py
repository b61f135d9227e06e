"""The tokenizers inside GGUF files.

Byte-level BPE (`tokenizer.ggml.model` "gpt2") and the SentencePiece kind ("llama") are run by the `tokenizers` library;
`toy.data.open_tokenizer` makes one of a file.
"""

import codecs
import hashlib
import re

import numpy as np

from toy.data.tokenizers import UnknownCharacterError
from toy.files.gguf_models import short
from toy.files.gguf_vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, bytes_of_characters
from toy.optional import optional_package

# Where text is cut before BPE, by tokenizer.ggml.pre: patterns applied one after the other, each to the pieces that the
# earlier ones left. They are those of the models' own tokenizers, as llama.cpp applies them (llama-vocab.cpp).
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CONTRACTIONS = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_LINES = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_DIGIT_BY_DIGIT = (r"\p{N}", _WORDS)
_LLAMA3 = (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_LINES}",)
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}|{_LINES}".replace(r"^\s\p{L}", r"^\s\p{L}\p{M}"),
)
_QWEN2 = (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_LINES}",)
PRE_TOKENIZERS = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _WORDS, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _WORDS, r"[0-9][0-9][0-9]"),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
    "qwen35": _QWEN35,
    **dict.fromkeys(("gpt-2", "mpt", "olmo", "phi-2"), (_WORDS,)),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGIT_BY_DIGIT
    ),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), _QWEN2),
}
_WHOLE_PIECES = (
    "llama-bpe",
    "llama3",
    "llama-v3",
)  # a piece that is a token is not built from merges; and BOS is added

# what ends an answer where the file does not mark all of it, by the token's text (as llama.cpp)
_END_TEXTS = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<|end_of_text|>", "</s>",
}  # fmt: skip

_MAX_TOKEN = 1024  # characters: the longest in use are runs of spaces, a few hundred
_SPACE = "\u2581"  # SentencePiece's visible space


class BrokenTokenizerError(ValueError):
    """The metadata contradict themselves."""


class GGUFTokenizer:
    """A subword tokenizer from GGUF metadata.

    tokens: list of str, as in the file. bos_id, eos_id, unk_id: None where there is none. stop_ids: the ids that end an
    answer. add_bos, add_eos: what `encode(..., add_special=True)` adds. chat_template: Jinja text or None. metadata: the
    keys it was made from.
    """

    kind = "gguf"

    def __init__(self, metadata, path=None):
        """metadata: the mapping of a `toy.GGUF`. path: of the file, only to be remembered. Errors as `load_tokenizer`."""
        self.path = path
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
        self.types = read.token_types()
        self.bos_id, self.eos_id, self.unk_id = (read.token_id(name) for name in ("bos", "eos", "unknown"))
        self.chat_template = read("tokenizer.chat_template", str, None)
        if self.model == "gpt2":
            self.pre = read("tokenizer.ggml.pre", str, "default")
            self._add_space = False
            self._encoder = _byte_level_bpe(self.tokens, read.merges(), self.pre)
        else:
            self.pre = None
            self._add_space = read("tokenizer.ggml.add_space_prefix", bool, True)
            unk = None if self.unk_id is None else self.tokens[self.unk_id]
            self._encoder = _sentencepiece_bpe(self.tokens, self.types, read.scores(), unk)
        default = self.model == "llama" or self.pre in _WHOLE_PIECES
        self.add_bos = read("tokenizer.ggml.add_bos_token", bool, default) and self.bos_id is not None
        self.add_eos = read("tokenizer.ggml.add_eos_token", bool, False) and self.eos_id is not None
        special = {i: self.tokens[i] for i in np.flatnonzero(np.isin(self.types, (UNKNOWN, CONTROL, USER_DEFINED)))}
        marked = {self.eos_id, read.token_id("eot"), read.token_id("eom")} - {None}
        self.stop_ids = frozenset(marked | {int(i) for i, token in special.items() if token in _END_TEXTS})
        self._special_ids = {token: int(i) for i, token in special.items()}
        self._any_special = _one_of(special.values())
        self._user_defined = _one_of(token for i, token in special.items() if self.types[i] == USER_DEFINED)
        self._bytes = {}  # by id, filled as they are asked for

    @property
    def vocab_size(self):
        return len(self.tokens)

    def encode(self, text, what="text", *, add_special=False, parse_special=False):
        """str -> ids, int32 (n_tokens,).

        add_special: add the beginning (and end) token if the model wants them. parse_special: special tokens written out in
        the text, such as <|im_start|>, become that token; otherwise they are read as plain characters.
        Raises UnknownCharacterError for text that is not valid Unicode; `what` names the text in it.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:  # lone surrogates
            raise UnknownCharacterError(f"the {what} is not valid Unicode at offset {error.start}") from error
        ids = [self.bos_id] if add_special and self.add_bos else []
        at_start = True  # of the text, or behind a special token: where SentencePiece puts a space
        for part, is_special in _split(self._any_special if parse_special else self._user_defined, text):
            ids += [self._special_ids[part]] if is_special else self._encode_plain(part, at_start)
            at_start = is_special
        if add_special and self.add_eos:
            ids.append(self.eos_id)
        return np.array(ids, np.int32)

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

    def apply_chat_template(self, messages, *, add_generation_prompt=True, **variables):
        """The text of a conversation in the form the model was trained on; encode it with `parse_special=True`.

        messages: list of {"role": "system" | "user" | "assistant", "content": str}. add_generation_prompt: end with the
        beginning of the assistant's answer. The template comes with the file and runs in Jinja's sandbox.
        Raises ValueError when the file has no template, and when the template is broken or refuses the messages.
        """
        if self.chat_template is None:
            raise ValueError("this model has no chat template: give it plain text, without the chat option")
        jinja2 = optional_package("jinja2", "the chat template")
        sandbox = optional_package("jinja2.sandbox", "the chat template", install="jinja2")
        environment = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _refuse
        names = (("bos_token", self.bos_id), ("eos_token", self.eos_id), ("unk_token", self.unk_id))
        tokens = {name: "" if i is None else self.tokens[i] for name, i in names}
        try:
            template = environment.from_string(self.chat_template)
            return template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **(tokens | variables)
            )
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError) as error:
            raise ValueError(f"the chat template of this model failed: {error}") from error

    def to_json(self):
        """{"kind", "path", "sha256"}: where the tokenizer is, and a digest to know it again."""
        return {
            "kind": self.kind,
            "path": None if self.path is None else str(self.path.absolute()),
            "sha256": self.sha256,
        }

    @property
    def sha256(self):
        """Of everything the tokenizer was made from."""
        digest = hashlib.sha256()
        for key, value in sorted(self.metadata.items()):
            digest.update(repr((key, value.tolist() if isinstance(value, np.ndarray) else value)).encode())
        return digest.hexdigest()

    def _encode_plain(self, text, at_start):
        if self.model == "llama":
            text = ((" " if self._add_space and at_start else "") + text).replace(" ", _SPACE)
        return self._encoder.encode(text, add_special_tokens=False).ids

    def _bytes_of(self, token, kind):
        if kind in (CONTROL, UNKNOWN, USER_DEFINED):
            return token.encode()
        if self.model == "llama":
            byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token) if kind == BYTE else None
            return bytes((int(byte[1], 16),)) if byte else token.replace(_SPACE, " ").encode()
        data = bytes_of_characters(token)
        return token.encode() if data is None else data  # None: a token that was added without being byte-encoded


def _byte_level_bpe(tokens, merges, pre):
    if pre not in PRE_TOKENIZERS:
        raise ValueError(
            f"the pre-tokenizer {short(pre)} is not supported; these are: {', '.join(sorted(PRE_TOKENIZERS))}"
        )
    library = optional_package("tokenizers", "the tokenizer of a GGUF file")
    cut = [library.pre_tokenizers.Split(library.Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[pre]]
    to_bytes = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    encoder = _bpe(library, tokens, merges, ignore_merges=pre in _WHOLE_PIECES)
    encoder.pre_tokenizer = library.pre_tokenizers.Sequence([*cut, to_bytes])
    return encoder


def _sentencepiece_bpe(tokens, types, scores, unk):
    """SentencePiece merges the pair that makes the token of the highest score: as BPE, all ways to make a token from two
    others, the best tokens first."""
    library = optional_package("tokenizers", "the tokenizer of a GGUF file")
    known = {token for token, kind in zip(tokens, types) if kind != BYTE}
    merges = []
    for i in np.argsort(-scores, kind="stable"):
        token = tokens[i]
        if token in known:
            halves = ((token[:n], token[n:]) for n in range(1, len(token)))
            merges += [(left, right) for left, right in halves if left in known and right in known]
    return _bpe(library, tokens, merges, unk_token=unk, fuse_unk=True, byte_fallback=True)


def _bpe(library, tokens, merges, **options):
    try:
        return library.Tokenizer(library.models.BPE({token: i for i, token in enumerate(tokens)}, merges, **options))
    except Exception as error:  # the library raises nothing more special
        raise BrokenTokenizerError(f"its merges do not fit its tokens ({error})") from error


def _one_of(tokens):
    """A pattern that matches any of the tokens, the longest first; None when there are none."""
    tokens = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens))) if tokens else None


def _split(pattern, text):
    """Cut the text at its special tokens -> (part, whether it is one), in order."""
    position = 0
    for match in pattern.finditer(text) if pattern else ():
        if match.start() > position:
            yield text[position : match.start()], False
        yield match.group(), True
        position = match.end()
    if position < len(text):
        yield text[position:], False


def _refuse(message):
    raise ValueError(f"the chat template refuses these messages: {message}")


class _Reader:
    """Tokenizer metadata, checked as they are read."""

    def __init__(self, metadata):
        self.metadata = metadata
        self.n_tokens = 0

    def __call__(self, key, kind, default):
        value = self.metadata.get(key, default)
        if value is not default and type(value) is not kind:
            raise BrokenTokenizerError(f"{key} is {short(value)}, expected {kind.__name__}")
        return value

    def tokens(self):
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list) or not tokens:
            raise BrokenTokenizerError("its tokenizer has no tokens (tokenizer.ggml.tokens)")
        tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
        self.n_tokens = len(tokens)
        longest = max(map(len, tokens))
        if longest > _MAX_TOKEN:
            raise BrokenTokenizerError(
                f"has a token of {longest} characters, longer than any tokenizer's ({_MAX_TOKEN})"
            )
        if len(set(tokens)) != len(tokens):
            seen = set()
            twice = next(token for token in tokens if token in seen or seen.add(token))
            raise BrokenTokenizerError(f"has the token {twice!r} twice")
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
        if not isinstance(merges, list):
            raise BrokenTokenizerError("has no merges (tokenizer.ggml.merges)")
        pairs = [tuple(merge.split(" ")) for merge in merges]
        wrong = next((merge for merge, pair in zip(merges, pairs) if len(pair) != 2 or not all(pair)), None)
        if wrong is not None:
            raise BrokenTokenizerError(f"has the merge {short(wrong)}, expected two parts with a space between them")
        return pairs

    def token_id(self, name):
        """None where there is none, or one that is not in the vocabulary."""
        value = self(f"tokenizer.ggml.{name}_token_id", int, None)
        return value if value is not None and 0 <= value < self.n_tokens else None
