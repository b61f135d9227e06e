"""What a person would want to be told about a corpus, counted while it is read."""

import re

import numpy as np

from toy.data.records import Completion, Conversation
from toy.files.gguf_vocabulary import CONTROL

_EXAMPLES = 3  # things are named, then it is "and so on"


def special_tokens(tokenizer):
    """The texts of a tokenizer's special tokens, such as <|im_end|>; none for characters and bytes."""
    kinds, tokens = getattr(tokenizer, "types", None), getattr(tokenizer, "tokens", None)
    if kinds is None or tokens is None:
        return []
    return [tokens[i] for i in np.flatnonzero(np.asarray(kinds) == CONTROL) if len(tokens[i]) > 1]


class Survey:
    """Give it every text with `see`, then ask for `sentences`."""

    def __init__(self, tokenizer):
        tokens = sorted(special_tokens(tokenizer), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, tokens))) if tokens else None
        self._begins = {token[:2] for token in tokens}  # looked for first: that is much faster
        self._n_special, self._special_seen = 0, {}
        self._n_line_ends = 0
        counts_characters = getattr(tokenizer, "kind", None) == "char"
        self._counts = np.zeros(0x110000, np.int64) if counts_characters else None
        self._in_messages = False

    def see(self, text):
        """A text, or a piece of one that does not end between \\r and \\n."""
        self._n_line_ends += text.count("\r\n")
        if self._counts is not None and text:
            codes = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), np.uint32)
            counts = np.bincount(codes)
            self._counts[: len(counts)] += counts
        if self._special is not None and any(begin in text for begin in self._begins):
            for token in self._special.findall(text):
                self._n_special += 1
                self._special_seen[token] = self._special_seen.get(token, 0) + 1

    def see_record(self, record):
        """The texts of an example."""
        if isinstance(record, Completion):
            self.see(record.prompt)
            self.see(record.completion)
        elif isinstance(record, Conversation):
            self._in_messages = True
            for message in record.messages:
                self.see(message["content"] or "")

    def sentences(self, source):
        """source: the `Source` that was read. -> list of str, one for each thing worth telling."""
        found = []
        if source.skipped:
            names = _named([str(path) for path in source.skipped])
            found.append(
                f"{_count(len(source.skipped), 'entry', 'entries')} of a folder left out, no regular files: {names}"
            )
        if source.n_empty:
            found.append(f"{_count(source.n_empty, 'empty document')} left out")
        if source.ignored_keys:
            keys = _named([f'"{key}"' for key, _ in source.ignored_keys.most_common()])
            found.append(f"keys of the records that nothing is made of: {keys}")
        if self._n_line_ends:
            found.append(f"{_count(self._n_line_ends, 'line end')} of \\r\\n, and the model learns to write \\r\\n too")
        if self._counts is not None and (once := np.flatnonzero(self._counts == 1)).size:
            names = _named([repr(chr(code)) for code in once])
            found.append(f"{_count(len(once), 'character')} of the vocabulary seen only once: {names}")
        if self._n_special:
            names = _named(list(self._special_seen))
            what = "in messages become tokens" if self._in_messages else "stay text, they become no tokens"
            found.append(f"{_count(self._n_special, 'special token')} written out ({names}) {what}")
        return found


def _count(n, one, many=None):
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def _named(names):
    return ", ".join(names[:_EXAMPLES]) + (", ..." if len(names) > _EXAMPLES else "")
