"""Hugging Face's tokenizer.json: what is read gives the ids of the library that such files come from, the rest is refused."""

import json
import os

import numpy as np
import pytest
from test_gguf_tokenizer import CHAT, bpe_metadata
from tokenizer_oracle import hard_texts

from toy.data.corpora import python_documentation
from toy.data.open_tokenizer import make_tokenizer, open_tokenizer, tokenizer_from_json
from toy.data.tokenizer_json import read_tokenizer_json
from toy.files import gguf_write
from toy.files.errors import BadFileError
from toy.files.gguf import GGUF
from toy.files.gguf_vocabulary import tokenizer_metadata

tokenizers = pytest.importorskip(
    "tokenizers", reason="the tokenizers library is not installed (pip install tokenizers)"
)

TEXT = python_documentation().text[:80_000] + "\n".join(hard_texts(300))
TEXTS = [TEXT[:3000], *hard_texts(300, seed=8), "", " ", "\n", "a"]
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
END = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {  # as the models' own files have them
    "llama-bpe": [CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + END],
    "qwen2": [CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + END],
    "qwen35": [CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + END],
    "seed-coder": [
        CONTRACTIONS + "[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1}| ?[^\\s\\p{L}\\p{N}\r\n]+|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
    ],
    "bailingmoe": [
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
    ],
    "deepseek-v3": [
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
        + END,
    ],
}
WORDS = {
    "gpt-2": [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}],
    "smollm": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
} | {
    name: [
        *({"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in patterns),
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]
    for name, patterns in PATTERNS.items()
}


def description(name="qwen2", vocab_size=500):
    """A byte-level tokenizer.json, trained on TEXT, as the library writes it."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    data = json.loads(library.to_str())
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": WORDS[name]}
    data["model"]["ignore_merges"] = name == "llama-bpe"
    library = tokenizers.Tokenizer.from_str(json.dumps(data))
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator([TEXT], trainer)
    library.add_tokens(["<tool>"])
    return json.loads(library.to_str())


BYTE_LEVEL = description()


def sentencepiece_description(prepend=True):
    """A tokenizer.json in the manner of SentencePiece, with merges made of the scores, as transformers makes them."""
    words = sorted({word for word in TEXT.split(" ") if word.isascii() and word.isalpha()})[:150]
    pieces = dict.fromkeys("▁" + "".join(sorted({c for word in words for c in word})))
    for word in words:
        for n in range(2, len(word) + 2):
            pieces[("▁" + word)[:n]] = None
    pieces |= dict.fromkeys(["▁▁", "▁▁▁", "▁▁▁▁"])
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    ids = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token in tokens[259:]:
        splits = [(token[:n], token[n:]) for n in range(1, len(token))]
        merges += sorted((s for s in splits if s[0] in pieces and s[1] in pieces), key=lambda s: (ids[s[0]], ids[s[1]]))
    first = [{"type": "Prepend", "prepend": "▁"}] if prepend else []
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
            | {"special": True}
            for i, token in enumerate(tokens[:3])
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*first, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": None,
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": ids,
            "merges": [" ".join(merge) for merge in merges],
        },
    }


def changed(data, **changes):
    """A copy with other values; model__x changes x of the model."""
    data = json.loads(json.dumps(data))
    for name, value in changes.items():
        place, _, key = name.rpartition("__")
        (data[place] if place else data)[key] = value
    return data


def written(folder, data, **others):
    """tokenizer.json, and others by their names without .json."""
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    for name, content in others.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder / "tokenizer.json"


@pytest.mark.parametrize("name", WORDS)
def test_byte_level_files_give_the_library_s_ids(tmp_path, name):
    data = description(name)
    path = written(tmp_path, data)
    library, tokenizer = tokenizers.Tokenizer.from_file(str(path)), read_tokenizer_json(path)
    assert tokenizer.pre == name and tokenizer.vocab_size == library.get_vocab_size() == 501
    for text in TEXTS:
        text = (
            text.replace("\u1c89", "").replace("\U00013460", "").replace("\U0001cc00", "")
        )  # newer than llama.cpp's tables
        assert tokenizer.encode(text).tolist() == library.encode(text, add_special_tokens=False).ids, text
        assert tokenizer.decode(tokenizer.encode(text)) == text
    text = "<|im_start|>user\nhello<|im_end|> <tool><|endoftext|>"
    assert tokenizer.encode(text, parse_special=True).tolist() == library.encode(text, add_special_tokens=False).ids
    assert tokenizer.stop_ids == {0, 2}


@pytest.mark.parametrize("prepend", [True, False])
def test_sentencepiece_files_give_the_library_s_ids(tmp_path, prepend):
    path = written(tmp_path, sentencepiece_description(prepend))
    library, tokenizer = tokenizers.Tokenizer.from_file(str(path)), read_tokenizer_json(path)
    assert tokenizer.model == "llama" and tokenizer.add_bos and not tokenizer.add_eos
    assert (tokenizer.bos_id, tokenizer.unk_id) == (1, 0)
    for text in [TEXT[:20_000], *TEXTS[1:], "    a     b      c" * 3]:
        assert tokenizer.encode(text).tolist() == library.encode(text, add_special_tokens=False).ids, text
    assert tokenizer.encode("the", add_special=True).tolist() == library.encode("the").ids


@pytest.mark.parametrize("data", [BYTE_LEVEL, sentencepiece_description()], ids=["byte-level", "sentencepiece"])
def test_through_json_and_gguf(tmp_path, data):
    tokenizer = open_tokenizer(written(tmp_path, data))
    assert make_tokenizer(str(tmp_path), "not looked at").sha256 == tokenizer.sha256  # the folder will do
    again = tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json())))
    gguf_write._write(tmp_path / "t.gguf", {"general.architecture": "llama", **tokenizer_metadata(tokenizer)}, [])
    (tmp_path / "tokenizer.json").unlink()
    with GGUF.open(tmp_path / "t.gguf"):
        read = open_tokenizer(tmp_path / "t.gguf")
    for other in (again, read):
        assert other.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()
        assert (other.stop_ids, other.bos_id, other.eos_id) == (tokenizer.stop_ids, tokenizer.bos_id, tokenizer.eos_id)


def test_what_stands_beside_the_file(tmp_path):
    config = {
        "bos_token": {"content": "<|im_start|>"},
        "eos_token": "<|im_end|>",
        "pad_token": None,
        "add_bos_token": True,
        "chat_template": CHAT,
    }
    tokenizer = read_tokenizer_json(written(tmp_path, BYTE_LEVEL, tokenizer_config=config))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2) and tokenizer.add_bos and not tokenizer.add_eos
    assert tokenizer.encode("", add_special=True).tolist() == [1]
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}])
    assert text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    (tmp_path / "chat_template.jinja").write_text("{{ messages | length }}")
    assert read_tokenizer_json(tmp_path).apply_chat_template([]) == "0"
    config["chat_template"] = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    (tmp_path / "chat_template.jinja").unlink()
    tokenizer = read_tokenizer_json(written(tmp_path, BYTE_LEVEL, tokenizer_config=config))
    assert tokenizer.apply_chat_template([]) == "plain" and tokenizer.apply_chat_template([], tools=[{}]) == "tools"
    one = changed(BYTE_LEVEL, added_tokens=BYTE_LEVEL["added_tokens"][:1])
    del one["model"]["vocab"]["<|im_start|>"], one["model"]["vocab"]["<|im_end|>"]
    alone = read_tokenizer_json(written(tmp_path, one, tokenizer_config={}))
    assert alone.tokens[alone.eos_id] == "<|endoftext|>" and alone.tokens[1] == "[UNUSED_1]"


def test_what_transformers_does_otherwise_is_told(tmp_path):
    assert read_tokenizer_json(written(tmp_path, BYTE_LEVEL)).notices == ()
    nfc = read_tokenizer_json(written(tmp_path, changed(BYTE_LEVEL, normalizer={"type": "NFC"})))
    assert (
        len(nfc.notices) == 1 and "its normalizer NFC is left out" in nfc.notices[0] and str(tmp_path) in nfc.notices[0]
    )
    assert nfc.decode(nfc.encode("e\u0301")) == "e\u0301"
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    data = changed(sentencepiece_description(), normalizer=None, pre_tokenizer=metaspace)
    assert "before the text behind each special token" in read_tokenizer_json(written(tmp_path, data)).notices[0]
    data["pre_tokenizer"]["prepend_scheme"] = "never"
    never = read_tokenizer_json(written(tmp_path, data))
    assert never.notices == () and never.metadata["tokenizer.ggml.add_space_prefix"] is False


SP = sentencepiece_description()
SPLIT = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
BYTES = WORDS["gpt-2"][0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (changed(BYTE_LEVEL, model__type="Unigram"), "its tokenizer is of the kind 'Unigram'"),
        (changed(BYTE_LEVEL, model__type="WordPiece"), "its tokenizer is of the kind 'WordPiece'"),
        (changed(BYTE_LEVEL, model__dropout=0.1), "dropout 0.1, which cannot be done the same way"),
        (changed(BYTE_LEVEL, model__end_of_word_suffix="</w>"), "end_of_word_suffix '</w>'"),
        (changed(BYTE_LEVEL, model__ignore_merges=True), "with ignore_merges, which llama.cpp has no name for"),
        (changed(BYTE_LEVEL, model__byte_fallback=True), "it is byte-level and has byte_fallback"),
        (changed(BYTE_LEVEL, normalizer={"type": "Lowercase"}), r"its normalizer .*Lowercase.* cannot be done the same way"),
        (changed(BYTE_LEVEL, pre_tokenizer={"type": "Sequence", "pretokenizers": [SPLIT, BYTES]}), r"cuts words by '\(a\+\)"),
        (changed(BYTE_LEVEL, pre_tokenizer={**BYTES, "add_prefix_space": True}), "add_prefix_space.* cannot be done"),
        (changed(BYTE_LEVEL, pre_tokenizer={"type": "Whitespace"}), "neither byte-level nor has it byte_fallback"),
        (changed(BYTE_LEVEL, added_tokens=[{"id": 0, "content": "<|endoftext|>", "lstrip": True}]), "has lstrip, which"),
        (changed(SP, normalizer={"type": "NFKC"}), "its .*NFKC.* cannot be done the same way"),
        (changed(SP, normalizer=None), "does not write spaces as ▁"),
        (changed(SP, model__merges=SP["model"]["merges"][1:]), "does not merge .* to .*, which is a token"),
        (changed(SP, model__merges=[*(m for m in SP["model"]["merges"] if m != "▁▁ ▁"), "▁▁ ▁"]), "'▁▁▁' at two places"),
        (changed(SP, post_processor={"type": "TemplateProcessing", "single": [{"Sequence": {}}] * 2}), "more around a text"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_the_same_way_is_refused_by_name(tmp_path, data, message):
    path = written(tmp_path, data)
    with pytest.raises(ValueError, match=message) as caught:
        read_tokenizer_json(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not isinstance(caught.value, BadFileError)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "is not a JSON object"),
        ({}, "has no object where model"),
        (changed(BYTE_LEVEL, model__vocab=None), "has no vocabulary"),
        (changed(BYTE_LEVEL, model__merges=None), "has no list of merges"),
        (changed(BYTE_LEVEL, model__merges=[["a"]]), "has the merge"),
        (changed(BYTE_LEVEL, model__merges=["q z"]), "merges do not fit its tokens"),
        (changed(BYTE_LEVEL, model__vocab={"a": 0, "b": 0}), "with one id|token for"),
        (changed(BYTE_LEVEL, model__vocab={"a": 2**40}), "token ids that are no whole numbers"),
        (changed(BYTE_LEVEL, model__vocab={"a": -1}), "token ids that are no whole numbers"),
        (changed(BYTE_LEVEL, model__vocab={"a": "0"}, added_tokens=[]), "token ids that are no whole numbers"),
        (changed(BYTE_LEVEL, model__vocab={"a": 0}, added_tokens=[]), "no token for 255 of the 256 bytes"),
        (changed(BYTE_LEVEL, added_tokens=[{"id": 7, "content": "<|endoftext|>"}]), "with the id 7, and another"),
        (changed(BYTE_LEVEL, added_tokens=[3]), "has no object where added_tokens"),
        (changed(BYTE_LEVEL, pre_tokenizer={"type": "Sequence"}), "a Sequence without pretokenizers"),
        (changed(SP, model__merges=["▁ é"]), "the merge '▁ é', of which"),
    ],
)
def test_files_that_contradict_themselves(tmp_path, data, message):
    path = written(tmp_path, data)
    with pytest.raises(BadFileError, match=message) as caught:
        read_tokenizer_json(path)
    assert caught.value.path == path


def test_files_that_are_none(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_tokenizer_json(tmp_path)
    for data in (b"{", b"\xff{", b"[" * 100_000, b'{"a": ' * 100_000):
        path.write_bytes(data)
        with pytest.raises(BadFileError, match="is not JSON"):
            read_tokenizer_json(path)
    for data in (b"[" + b"[]," * 2**21 + b"0]", b"[" + b"0," * (2**23 + 1) + b"0]"):
        path.write_bytes(data)
        with pytest.raises(BadFileError, match="has more in it than any tokenizer"):
            read_tokenizer_json(path)
    with open(path, "wb") as file:
        file.truncate(49 * 2**20)
    with pytest.raises(BadFileError, match="more than any tokenizer"):
        read_tokenizer_json(path)
    path.unlink()
    if hasattr(os, "mkfifo"):
        os.mkfifo(path)
        with pytest.raises(BadFileError, match="not a regular file"):
            read_tokenizer_json(path)
        with pytest.raises(BadFileError, match="not a regular file"):
            open_tokenizer(path)


def test_names_that_mean_nothing():
    with pytest.raises(
        FileNotFoundError, match=r"no tokenizer 'nowhere'.*char, bytes, bpe, a tokenizer\.json, .*smollm2"
    ):
        make_tokenizer("nowhere", "text")
    with pytest.raises(ValueError, match="a vocabulary size can be chosen for the tokenizer bpe alone"):
        make_tokenizer("nowhere", "text", 300)


def test_a_run_s_tokenizer(tmp_path):
    """A run directory gives the tokenizer in its config."""
    from toy.files.runs import FORMAT

    for name in ("char", "bpe"):
        tokenizer = make_tokenizer(name, TEXT)
        (tmp_path / "config.json").write_text(json.dumps({"format": FORMAT, "tokenizer": tokenizer.to_json()}))
        assert open_tokenizer(tmp_path).to_json() == tokenizer.to_json()
    (tmp_path / "config.json").write_text(json.dumps({"format": FORMAT, "tokenizer": {"kind": "bpe"}}))
    with pytest.raises(BadFileError, match=r"config\.json: not a tokenizer"):
        open_tokenizer(tmp_path)


def test_a_changed_record_is_noticed():
    from toy.data.gguf_tokenizer import GGUFTokenizer

    data = json.loads(json.dumps(GGUFTokenizer(bpe_metadata()).to_json()))
    assert np.array_equal(tokenizer_from_json(data).types, bpe_metadata()["tokenizer.ggml.token_type"])
    data["metadata"]["tokenizer.ggml.tokens"][300 - 36] = "x!"
    with pytest.raises(ValueError, match=r"its digest is another|do not fit"):
        tokenizer_from_json(data)
    for wrong in (
        {"a": {"type": "int32", "runs": [[1, 2**40]]}},
        {"a": {"type": "int32", "runs": [[1, -1]]}},
        {"a": {"type": "object", "numbers": [1]}},
        {"a": {"type": "int32"}},
        {"a": {"runs": 3, "type": "int8"}},
        {"tokenizer.ggml.model": 3},
    ):
        with pytest.raises(ValueError, match=r"metadata|array|expected str"):
            tokenizer_from_json({"kind": "gguf", "sha256": "", "metadata": wrong})
