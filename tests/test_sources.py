"""What people bring: every kind is read as what it is, and everything else is refused by name."""

import gzip
import hashlib
import json
import os
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toy.data import reading
from toy.data.corpora import load_corpus
from toy.data.records import Completion, Conversation, CorpusError, Document, Tokens
from toy.data.sources import open_source

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
GOOD = {"text": "fine\n"}


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def jsonl(path, *objects):
    return write(path, "".join((o if isinstance(o, str) else json.dumps(o)) + "\n" for o in objects))


def texts(what, **options):
    return [record.text for record in open_source(what, **options).records()]


def whole(what):
    return "".join(record.text + record.after for record in open_source(what).records())


# ----------------------------------------------------------------------------------------------------------------------
# what is read
# ----------------------------------------------------------------------------------------------------------------------


def test_the_documentation_comes_by_topics_and_is_the_text_it_always_was():
    source = open_source()
    records = list(source.records())
    assert len(records) > 50
    assert all(isinstance(record, Document) and record.begins and record.ends for record in records)
    corpus = load_corpus()
    assert "".join(record.text + record.after for record in records) == corpus.text
    assert source.digest() == corpus.sha256 == hashlib.sha256(corpus.text.encode()).hexdigest()
    assert source.path is None


@pytest.mark.parametrize("start", ["", "\ufeff"], ids=["plain", "byte-order-mark"])
def test_a_text_file_is_one_document(tmp_path, start):
    path = write(tmp_path / "text.txt", start + "zwei\r\nÄpfel")
    (record,) = open_source(path).records()
    assert record == ("zwei\r\nÄpfel", (str(path), 0), "", True, True)
    assert open_source(str(path)).digest() == hashlib.sha256("zwei\r\nÄpfel".encode()).hexdigest()
    assert open_source(path).path == str(path.resolve())


def test_a_folder_has_a_document_for_each_file_in_sorted_order(tmp_path):
    for name, text in {
        "b.txt": "second\n",
        "a.txt": "first",
        "c/deep.md": "third",
        "empty.txt": "",
        ".git/x": "no",
    }.items():
        write(tmp_path / name, text)
    write(tmp_path / ".hidden", b"\xff")
    source = open_source(tmp_path)
    assert texts(tmp_path) == ["first", "second\n", "third"]
    assert whole(tmp_path) == load_corpus(tmp_path).text == "first\nsecond\nthird\n"
    assert source.digest() == load_corpus(tmp_path).sha256
    assert source.n_files == 4
    list(source.records())
    assert source.n_empty == 1


def test_a_list_of_paths_is_read_in_the_order_given(tmp_path):
    one, two = write(tmp_path / "1.txt", "one"), jsonl(tmp_path / "2.jsonl", {"text": "two"}, {"text": "three\n"})
    source = open_source([two, str(one), "in a\ntext"])
    assert [record.text for record in source.records()] == ["two", "three\n", "one", "in a\ntext"]
    assert source.path == [str(two.resolve()), str(one.resolve())]
    assert whole([two, one]) == "two\nthree\none\n"


def test_json_lines_of_each_shape(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"text": "é\n", "id": 7}, "", "   ", {"text": ""}, {"text": "b"})
    source = open_source(path)
    assert [(record.text, str(record.where)) for record in source.records()] == [
        ("é\n", f"{path} line 1"),
        ("b", f"{path} line 5"),
    ]
    assert (source.n_empty, dict(source.ignored_keys)) == (1, {"id": 1})
    path = jsonl(
        tmp_path / "b.jsonl", {"prompt": "1+1=", "completion": "2"}, {"messages": CHAT, "tools": [{"name": "f"}]}
    )
    first, second = open_source(path).records()
    assert isinstance(first, Completion)
    assert (first.prompt, first.completion) == ("1+1=", "2")
    assert isinstance(second, Conversation)
    assert second.messages == tuple(CHAT)
    assert second.tools == [{"name": "f"}]
    assert list(open_source(path).texts()) == ["1+1=", "2", "hi", "hello"]


def test_a_byte_order_mark_and_windows_line_ends_do_not_harm_json_lines(tmp_path):
    path = write(tmp_path / "a.jsonl", '\ufeff{"text": "a"}\r\n{"text": "b"}'.encode())
    assert texts(path) == ["a", "b"]


def test_messages_that_templates_may_need_more_of(tmp_path):
    calls = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    answer = {"role": "tool", "content": "1", "tool_call_id": "x"}
    part = {"role": "user", "content": [{"type": "text", "text": "hi"}]}
    (record,) = open_source([{"messages": [part, calls, answer]}]).records()
    assert record.messages == ({"role": "user", "content": "hi"}, calls, answer)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.GZ"])
def test_gz_of_each(tmp_path, name):
    data = b'{"text": "hello"}\n' if "jsonl" in name else b"\xef\xbb\xbfhello"
    path = write(tmp_path / name, gzip.compress(data[:4]) + gzip.compress(data[4:]))  # members follow one another
    assert texts(path) == ["hello"]
    if "jsonl" not in name:
        assert open_source(path).digest() == hashlib.sha256(b"hello").hexdigest()


@pytest.mark.parametrize("kind", ["uint16", "uint32"])
def test_token_files(tmp_path, kind):
    ids = np.arange(1, 50_001, dtype=kind)
    path = tmp_path / "train.bin"
    ids.tofile(path)
    records = list(open_source(path, token_type=kind).records())
    assert all(isinstance(record, Tokens) for record in records)
    assert np.array_equal(np.concatenate([record.ids for record in records]), ids)


def test_python_objects():
    assert texts("a text\nof two lines") == ["a text\nof two lines"]
    assert texts([{"text": "a"}, {"text": "b"}]) == ["a", "b"]
    once = open_source({"text": str(i)} for i in range(3))
    assert [len(list(once.records())) for _ in range(2)] == [3, 3]  # an iterator is read once and kept
    for ids in (np.array([3, 1, 2], np.uint8), [3, 1, 2], (np.int64(3), 1, 2)):
        (record,) = open_source(ids).records()
        assert record.ids.tolist() == [3, 1, 2]
    assert open_source(np.array([3, 1])).digest() == open_source([3, 1]).digest() != open_source([1, 3]).digest()


def test_a_text_in_blocks_is_the_text(tmp_path):
    text = "aé€😀\r\n" * 300
    path = write(tmp_path / "text.txt", text)
    for size in range(1, 40):
        blocks = list(reading.text_blocks(_small_blocks(path, size)))
        assert "".join(blocks) == text
        assert not any(block.endswith("\r") for block in blocks)
        assert size > 30 or len(blocks) > 40


def _small_blocks(path, size):
    class Small(reading.Bytes):
        def blocks(self, _=None):
            return super().blocks(size)

    return Small(path)


@given(st.binary(max_size=40), st.integers(1, 8))
def test_any_bytes_are_decoded_as_in_one_piece_or_refused_at_the_same_offset(data, size):
    class Fake:
        path, skipped = Path("some.txt"), 0

        def blocks(self):
            return (data[i : i + size] for i in range(0, len(data), size))

    try:
        wanted = data.decode()
    except UnicodeDecodeError as error:
        wanted, offset, reason = None, error.start, error.reason
    try:
        found = "".join(reading.text_blocks(Fake()))
    except CorpusError as error:
        if wanted is None and "not UTF-8" in str(error) and "offset 0)" not in str(error):
            assert f"at offset {offset} ({reason})" in str(error)
        else:
            assert b"\0" in data or "JSON" in str(error) or "it is" in str(error)
    else:
        assert found == wanted


def test_long_files_come_in_pieces_and_constant_memory(tmp_path):
    text = "abcdefghi\n" * 2_000_000  # 20 MB
    path, packed = write(tmp_path / "long.txt", text), tmp_path / "long.txt.gz"
    packed.write_bytes(gzip.compress(b"".join(b"%d\n" % (i * i) for i in range(1_500_000)), 1))
    lines = jsonl(tmp_path / "many.jsonl", *['{"text": "' + "abc " * 120 + '"}'] * 40_000)
    digest = hashlib.sha256(text.encode()).hexdigest()
    del text
    for corpus in (path, packed, lines):
        tracemalloc.start()
        n_pieces, ends = 0, 0
        for record in open_source(corpus).records():
            n_pieces, ends = n_pieces + 1, ends + record.ends
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert n_pieces > 10
        assert ends == (40_000 if corpus is lines else 1)
        assert peak < 12e6
    assert open_source(path).digest() == digest


# ----------------------------------------------------------------------------------------------------------------------
# what is refused
# ----------------------------------------------------------------------------------------------------------------------


def refused(what, message, **options):
    with pytest.raises(CorpusError, match=message) as error:
        list(open_source(what, **options).records())
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    return str(error.value)


FORMATS = {
    "latin1.txt": ("naïve".encode("latin-1"), "0xef at offset 2"),
    "utf16.txt": ("hello".encode("utf-16"), "UTF-16"),
    "utf16be.txt": (b"\xfe\xff" + "hello".encode("utf-16-be"), "UTF-16"),
    "utf16-without-mark.txt": ("hello".encode("utf-16-le"), "0x00 at offset 1.*UTF-16"),
    "utf32.txt": ("hello".encode("utf-32"), "UTF-32"),
    "data.parquet": (b"PAR1\x15\x04\x15", "Parquet"),
    "picture.png": (b"\x89PNG\r\n\x1a\n\0", "PNG"),
    "picture.jpg": (b"\xff\xd8\xff\xe0\0", "JPEG"),
    "words.docx": (b"PK\x03\x04\x14\0", "zip"),
    "object.pkl": (pickle.dumps([1, 2], 4), "pickle"),
    "model.gguf": (b"GGUF\x03\0\0\0", "GGUF"),
    "array.npy": (b"\x93NUMPY\x01\0", "numpy"),
    "program": (b"\x7fELF\x02\x01", "program"),
    "packed.txt": (gzip.compress(b"hello"), r"gzip.*\.gz"),
    "text.zst": (b"\x28\xb5\x2f\xfd\0", "zstandard"),
    "nul.txt": (b"text\0text", "0x00 at offset 4"),
    "list.json": (b'[{"a": 1},\n {"a": 2}]', r"JSON list.*\.jsonl"),
    "alpaca.json": (b'[\n  {\n    "instruction": "x",\n    "output": "y"}]', r"JSON list.*\.jsonl"),
    "renamed.txt": (b'{"text": "hello"}\n{"text": "you"}\n', r"JSON records.*\.jsonl"),
    "chat.json": (json.dumps({"id": 1, "messages": CHAT}).encode(), r"JSON records.*\.jsonl"),
    "indented.json": (json.dumps({"messages": CHAT}, indent=1).encode(), r"JSON records.*\.jsonl"),
    "torn.gz": (gzip.compress(b"hello" * 1000)[:-9], "not sound gzip data"),
    "false.gz": (b"hello", "not sound gzip data"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_other_formats_are_refused_by_name(tmp_path, name):
    write(tmp_path / "good.txt", "good\n")
    assert texts(tmp_path) == ["good\n"]
    data, message = FORMATS[name]
    path = write(tmp_path / name, data)
    for what in (path, tmp_path):  # in a folder, too
        assert name in refused(what, message)


def test_text_that_begins_like_json_is_text(tmp_path):
    for text in (
        "{braces} are fine\n",
        "[1] a reference\n",
        '{"a": 1}\n',
        '{"name": "toy",\n "version": "1"}\n',
        "[]\n",
    ):
        assert texts(write(tmp_path / "a.txt", text)) == [text]
    assert texts(write(tmp_path / "package.json", '{\n "name": "toy"}\n')) == ['{\n "name": "toy"}\n']


LINES = {
    "not json": ("{'text': 1}", "not a JSON object"),
    "a list": ("[1]", "JSON list"),
    "a string": ('"text"', "JSON string"),
    "null": ("null", "JSON null"),
    "a number": ("3", "JSON number"),
    "half": ('{"text": ', "not a JSON object"),
    "two": ('{"text": "a"} {"text": "b"}', "not a JSON object"),
    "indented": ("{", "one object a line"),
    "duplicate keys": ('{"text": "a", "text": "b"}', "'text' twice"),
    "inner duplicate keys": ('{"messages": [{"role": "user", "role": "tool", "content": ""}]}', "'role' twice"),
    "a bomb": ("[" * 100_000, "nested too deeply"),
    "an object bomb": ('{"a":' * 100_000, "nested too deeply"),
    "a nul": ('{"text": "a\0"}', "not a JSON object"),
    "no keys": ("{}", "no keys"),
    "another shape": ({"body": "x"}, "keys 'body'"),
    "only a prompt": ({"prompt": "x"}, "keys 'prompt'"),
    "two shapes": ({"text": "x", "messages": CHAT}, "unclear"),
    "sharegpt": ({"conversations": []}, 'rename "conversations"'),
    "alpaca": ({"instruction": "x", "output": "y"}, '"completion"'),
    "text null": ({"text": None}, "text must be a string"),
    "text list": ({"text": ["a"]}, "text must be a string"),
    "prompt messages": ({"prompt": CHAT, "completion": CHAT}, "prompt must be a string"),
    "surrogate": ('{"text": "\\ud800"}', "surrogate"),
    "surrogate in a message": ('{"messages": [{"role": "user", "content": "\\udfff"}]}', "message 1.*surrogate"),
    "no messages": ({"messages": []}, "at least one"),
    "messages text": ({"messages": "hi"}, "list of at least one"),
    "a message text": ({"messages": ["hi"]}, "message 1 must be an object"),
    "unknown role": ({"messages": [*CHAT, {"role": "human", "content": "x"}]}, "message 3 has the role 'human'"),
    "role list": ({"messages": [{"role": ["user"], "content": "x"}]}, r"role \['user'\]"),
    "no role": ({"messages": [{"content": "x"}]}, "role None"),
    "no content": ({"messages": [{"role": "user"}]}, "content must be a string, got None"),
    "null content": ({"messages": [{"role": "assistant", "content": None}]}, "content must be a string, got None"),
    "parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 2}]}, "join its parts"),
    "image part": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content must be a string"),
    "tools": ({"messages": CHAT, "tools": "f"}, "tools must be a list"),
    "a mixture": ({"messages": CHAT}, "cannot be trained on together"),
    "a huge number": ('{"text": ' + "9" * 5000 + "}", "line 2"),
    "huge": ('{"text": "' + "a" * reading.LONGEST_LINE + '"}', "more than 16 MB"),
}


@pytest.mark.parametrize("name", LINES)
def test_json_lines_of_another_shape_are_refused_with_the_line(tmp_path, name):
    line, message = LINES[name]
    assert texts(jsonl(tmp_path / "good.jsonl", GOOD)) == ["fine\n"]
    said = refused(jsonl(tmp_path / "bad.jsonl", GOOD, line), message)
    assert "bad.jsonl" in said
    assert "line 2" in said


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["text", "prompt", "completion", "messages", "role", "content", "tools"]),
                inner,
                max_size=3,
            )
        ),
    )
)
def test_any_json_is_a_record_or_one_sentence(value):
    try:
        records = list(open_source([value] if isinstance(value, dict) else [{"messages": [value]}]).records())
    except CorpusError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(records[0], (Document, Completion, Conversation))


def test_what_cannot_be_trained_on_together(tmp_path):
    text, tokens = write(tmp_path / "a.txt", "text\n"), write(tmp_path / "b.bin", np.arange(100, dtype="<u2").tobytes())
    chat, pairs = (
        jsonl(tmp_path / "c.jsonl", {"messages": CHAT}),
        jsonl(tmp_path / "d.jsonl", {"prompt": "", "completion": ""}),
    )
    for first, second in ((text, chat), (chat, text), (text, tokens), (tokens, pairs)):
        said = refused([first, second], "cannot be trained on together")
        assert first.name in said
        assert second.name in said
    assert len(list(open_source([chat, pairs]).records())) == 2


def test_paths_that_lead_nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "newline" in refused("nothing.txt", "does not exist")
    assert "newline" not in refused(tmp_path / "nothing.txt", "does not exist")
    refused("a\0b", "a\\\\x00b")
    refused("long " * 2000, "cannot be read|does not exist")
    refused(write(tmp_path / "empty.txt", ""), "is empty")
    refused(write(tmp_path / "mark.txt", "\ufeff"), "is empty")
    refused(jsonl(tmp_path / "blank.jsonl", {"text": ""}, {"text": ""}), "only empty documents")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", "no files")
    write(tmp_path / "folder" / "a.txt", "")
    refused(tmp_path / "folder", "only empty files")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_devices_pipes_and_circles_are_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "around").symlink_to(tmp_path)
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    for path in (tmp_path / "pipe", "/dev/zero", "/dev/null"):
        refused(path, "neither a regular file nor a folder")
    refused(tmp_path / "circle", "circle")
    refused(tmp_path / "dangling", "leads nowhere")
    write(tmp_path / "a.txt", "text\n")
    source = open_source(tmp_path)
    assert [record.text for record in source.records()] == ["text\n"]
    assert {path.name for path in source.skipped} == {"pipe", "circle", "around", "dangling"}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_files_that_may_not_be_read_are_named(tmp_path):
    path = write(tmp_path / "secret.txt", "text\n")
    path.chmod(0)
    for what in (path, tmp_path):
        refused(what, "secret.txt.*ermission")


def test_a_refusal_of_the_system_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "secret.txt", "text\n")
    assert texts(path) == ["text\n"]

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(reading, "open", refuse, raising=False)
    for what in (path, tmp_path):
        refused(what, r"secret\.txt' cannot be read: Permission denied")


def test_a_file_that_fails_while_it_is_read_is_named(tmp_path):
    path = write(tmp_path / "a.txt", "text\n")
    source = open_source(path)
    path.unlink()
    with pytest.raises(CorpusError, match=r"a\.txt.*cannot be read: No such file"):
        list(source.records())


def test_gzip_bombs_are_bounded(tmp_path):
    path = tmp_path / "bomb.txt.gz"
    with gzip.open(path, "wb", 9) as file:
        for _ in range(100):
            file.write(b" " * 2**20)
    refused(path, "unpacks to more than 250 times its size")
    tracemalloc.start()
    with pytest.raises(CorpusError, match="unpacks"):
        for _ in open_source(path).records():
            pass
    assert tracemalloc.get_traced_memory()[1] < 12e6
    tracemalloc.stop()


def test_token_files_of_another_kind(tmp_path):
    path = tmp_path / "a.bin"
    np.arange(1000, dtype="<u4").tofile(path)
    refused(path, "looks like uint32.*token_type uint32")
    assert len(list(open_source(path, token_type="uint32").records())) == 1
    write(path, np.arange(1, 100, dtype="<u2").tobytes() + b"x")
    refused(path, r"whole uint16 ids \(199 bytes\)")
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 100
    write(path, header.tobytes() + np.arange(100, dtype="<u2").tobytes())
    refused(path, "header of llm.c")
    with pytest.raises(CorpusError, match="token_type must be one of"):
        open_source(path, token_type="int8")


@pytest.mark.parametrize(
    "what, message",
    [
        ({"text": "a"}, "one dict"),
        (b"bytes\n", "bytes"),
        ([], "empty list"),
        (3, "give a path"),
        ([3.5], "3.5"),
        (np.zeros((2, 2), int), r"shape \(n,\)"),
        (np.zeros(3), "float64"),
        (np.array([], int), "without token ids"),
        ([1, -2], "between 0 and"),
        (np.array([2**40]), "between 0 and"),
        ([{"text": "a"}, "b\n", {"messages": CHAT}], "trained on together"),
        ("a\udcff\n", "surrogate"),
        ([{"text": "x\ud800"}], "surrogate"),
        ([{"messages": CHAT, "tools": [{"f": object()}]}], "not JSON"),
    ],
)
def test_python_objects_that_are_no_corpus(what, message):
    with pytest.raises(CorpusError, match=message):
        source = open_source(what)
        list(source.records(on_bytes=source.new_digest()))


# ----------------------------------------------------------------------------------------------------------------------
# which text it is
# ----------------------------------------------------------------------------------------------------------------------


def test_the_identity_knows_where_documents_end(tmp_path):
    one, two = write(tmp_path / "1" / "a.txt", "a\nb\n").parent, write(tmp_path / "2" / "a.txt", "a\n").parent
    write(two / "b.txt", "b\n")
    assert open_source(one).digest() == open_source(two).digest()
    assert open_source(one).identity() != open_source(two).identity()
    assert open_source(one / "a.txt").identity() == open_source(one).identity()


def test_a_digest_taken_on_the_way_is_the_one_taken_alone(tmp_path):
    jsonl(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b"})
    write(tmp_path / "b.txt", "c" * 3_000_000)
    for what in (tmp_path, tmp_path / "b.txt", None, [1, 2, 3], [{"text": "x"}], "a\nb"):
        source = open_source(what)
        digest = source.new_digest()
        list(source.records(on_bytes=digest))
        assert digest.finish() == (source.digest(), source.identity())


def test_the_signature_changes_when_a_file_does(tmp_path):
    path = write(tmp_path / "a.txt", "text\n")
    before = open_source(path).signature()
    assert open_source(path).signature() == before
    state = path.stat()
    write(path, "Text\n")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))  # same size, same time
    assert open_source(path).signature() != before
    assert open_source("a\ntext").signature() is None


def test_progress_ends_with_everything(tmp_path):
    write(tmp_path / "a.txt", "text\n" * 1_000_000)
    write(tmp_path / "b.txt", "text\n" * 1_000)
    told = []
    source = open_source(tmp_path)
    list(source.records(progress=lambda done, total: told.append((done, total))))
    assert told == sorted(told)
    assert told[-1] == (source.n_bytes, source.n_bytes) == (5_005_000, 5_005_000)
    assert len(told) > 3


def test_empty_documents_without_number(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"text": ""}\n' * 200_000 + b'{"text": "one"}\n')
    source = open_source(path)
    assert [record.text for record in source.records()] == ["one"]
    assert source.n_empty == 200_000
