"""Encoded corpora: in memory and on the disk alike, made once, whole or not at all, in little memory."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from test_gguf_tokenizer import bpe_metadata

from toy.data import cache, cutting, reading, store
from toy.data.corpora import load_corpus
from toy.data.encoding import Encoder
from toy.data.gguf_tokenizer import GGUFTokenizer
from toy.data.records import CorpusError
from toy.data.sources import open_source
from toy.data.store import encode_source
from toy.data.tokenizers import ByteTokenizer, CharTokenizer, UnknownCharacterError

BYTES = Encoder(ByteTokenizer())
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TOY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / cache._FOLDER


@pytest.fixture
def on_disk(monkeypatch):
    """Everything goes to the cache, and in small blocks."""
    monkeypatch.setattr(store, "IN_MEMORY", 0)
    monkeypatch.setattr(cutting, "BLOCK", 3000)


@pytest.fixture
def small(request):
    return Encoder(GGUFTokenizer(bpe_metadata()))


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def jsonl(path, *objects):
    return write(path, "".join(json.dumps(o) + "\n" for o in objects))


def kept(folder):
    """What lies in the cache besides the index and the lock."""
    return sorted(path.name for path in folder.glob("*") if path.name not in ("index", ".lock"))


def same(a, b):
    assert (a.family, a.sha256, a.identity, a.notices) == (b.family, b.sha256, b.identity, b.notices)
    for name in ("ids", "asked"):
        left, right = getattr(a, name), getattr(b, name)
        assert (left is None) == (right is None)
        assert left is None or np.array_equal(left[:], right[:])
    for name in ("starts", "sizes", "hashes", "first", "n_asked"):
        left, right = getattr(a, name), getattr(b, name)
        assert (left is None) == (right is None)
        assert left is None or (left.dtype == right.dtype and np.array_equal(left, right))


# ----------------------------------------------------------------------------------------------------------------------
# what is encoded
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("joined", [False, True])
def test_characters_and_bytes_are_those_of_the_text(joined):
    text = load_corpus().text
    for tokenizer in (ByteTokenizer(), CharTokenizer(open_source().characters())):
        encoded = encode_source(open_source(), Encoder(tokenizer), joined=joined)
        assert np.array_equal(encoded.ids[:], tokenizer.encode(text))
        assert encoded.starts[0] == 0
        assert encoded.starts[-1] == len(encoded.ids)
        assert (len(encoded.starts) == 2) == joined
        assert len(encoded.sizes) == len(encoded.hashes) > 50


def test_documents_have_their_frames(small, tmp_path):
    write(tmp_path / "a" / "1.txt", "hello")
    write(tmp_path / "a" / "2.txt", "he\n")
    encoded = encode_source(open_source(tmp_path / "a"), small)
    plain = small.tokenizer.encode
    assert encoded.ids[:].tolist() == [*plain("hello"), 2, *plain("he\n"), 2]
    assert encoded.starts.tolist() == [0, len(plain("hello")) + 1, len(encoded.ids)]
    assert encoded.sizes.tolist() == [5, 3]
    joined = encode_source(open_source(tmp_path / "a"), small, joined=True)
    assert np.array_equal(joined.ids[:], plain("hello\nhe\n"))  # as it was before there were documents


def test_examples_have_their_labels_and_places(small, tmp_path):
    path = jsonl(
        tmp_path / "a.jsonl", {"messages": CHAT}, {"prompt": "he", "completion": "llo"}, {"messages": CHAT[:1]}
    )
    encoded = encode_source(open_source(path), small)
    wanted = [small.encode(record) for record in open_source(path).records()]
    assert np.array_equal(encoded.ids[:], np.concatenate([ids for ids, _ in wanted]))
    for i, (ids, labels) in enumerate(wanted):
        asked = encoded.asked[encoded.starts[i] : encoded.starts[i + 1]]
        assert np.array_equal(np.where(asked[1:], ids[1:], -1), labels[:-1])
        assert encoded.n_asked[i] == (labels >= 0).sum()
        assert encoded.first[i] == (np.flatnonzero(labels >= 0)[0] + 1 if encoded.n_asked[i] else -1)
        assert str(encoded.places[i]) == f"{path} line {i + 1}"
    assert encoded.n_asked.tolist() == [
        len(small.tokenizer.encode("hello")) + 1,
        len(small.tokenizer.encode("llo")) + 1,
        0,
    ]
    everything = encode_source(open_source(path), small, train_on="all")
    assert everything.n_asked.tolist() == (np.diff(encoded.starts) - 1).tolist()
    records = encode_source(open_source([{"messages": CHAT}] * 2), small)
    assert str(records.places[1]) == "record 2"


CORPORA = {
    "text": lambda folder: write(folder / "a.txt", "".join(f"line {i} é\n" for i in range(2000))),
    "folder": lambda folder: [write(folder / f"{i}.txt", f"hello {i % 7}\r\n" * 400) for i in range(20)] and folder,
    "documents": lambda folder: jsonl(folder / "a.jsonl", *({"text": "hello " * i} for i in range(100))),
    "chats": lambda folder: jsonl(
        folder / "a.jsonl", *({"messages": [*CHAT[:1], {"role": "assistant", "content": "he " * i}]} for i in range(60))
    ),
    "tokens": lambda folder: write(
        folder / "a.bin", np.random.default_rng(0).integers(0, 200, 40_000).astype("<u2").tobytes()
    ),
}


@pytest.mark.parametrize("name", CORPORA)
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_the_disk_holds_what_memory_would(name, kind, tmp_path, small, monkeypatch):
    encoder = small if kind == "bpe" or name == "chats" else BYTES
    path = CORPORA[name](tmp_path / "corpus")
    for joined in (False, True):
        in_memory = encode_source(open_source(path), encoder, joined=joined)
        assert not (tmp_path / "cache").exists()
        with monkeypatch.context() as patch:
            patch.setattr(store, "IN_MEMORY", 0)
            same(encode_source(open_source(path), encoder, joined=joined), in_memory)
            same(encode_source(open_source(path), encoder, joined=joined), in_memory)
        subprocess.run(["rm", "-r", str(tmp_path / "cache")], check=True)


def test_a_long_text_has_the_ids_of_the_whole(tmp_path, small, on_disk):
    text = "".join(f"hello {i} hell, he\n\n said " for i in range(8000))
    path = write(tmp_path / "a.txt", text)
    for encoder, tail in ((BYTES, []), (small, [2])):
        encoded = encode_source(open_source(path), encoder)
        assert np.array_equal(encoded.ids[:], [*encoder.tokenizer.encode(text), *tail])


def test_token_files_are_used_where_they_lie(tmp_path, on_disk, cache_folder):
    ids = np.random.default_rng(0).integers(0, 256, 100_000)
    path = tmp_path / "train.bin"
    ids.astype("<u2").tofile(path)
    encoded = encode_source(open_source(path), BYTES)
    assert np.array_equal(encoded.ids[:], ids)
    assert not list(cache_folder.glob("*/ids.bin"))
    other = tmp_path / "other.bin"
    other.write_bytes(path.read_bytes())
    again = encode_source(open_source(other), BYTES)
    path.write_bytes(bytes(200_000))  # the first changes, the second does not
    assert np.array_equal(again.ids[:], ids)
    assert np.array_equal(encode_source(open_source(other), BYTES).ids[:], ids)
    assert not encode_source(open_source(path), BYTES).ids[:].any()


def test_ids_beyond_the_vocabulary_are_named(tmp_path):
    ids = np.zeros(3_000_000, "<u2")
    ids[2_500_000] = 256
    ids.tofile(tmp_path / "train.bin")
    for what in (tmp_path / "train.bin", ids):
        with pytest.raises(CorpusError, match="token id 256 at position 2500000, beyond the vocabulary of 256"):
            encode_source(open_source(what), BYTES)


def test_the_type_of_a_token_file_follows_the_vocabulary(tmp_path):
    class Large(ByteTokenizer):
        vocab_size = 100_000

    np.array([99_999, 70_000, 1], "<u4").tofile(tmp_path / "a.bin")
    assert encode_source(open_source(tmp_path / "a.bin"), Encoder(Large())).ids[:].tolist() == [99_999, 70_000, 1]


def test_what_cannot_be_encoded_is_named_with_its_place(tmp_path, small):
    path = jsonl(tmp_path / "a.jsonl", {"messages": CHAT})
    with pytest.raises(CorpusError, match=r"a\.jsonl line 1: the tokenizer \(bytes\) has no chat template"):
        encode_source(open_source(path), BYTES)
    broken = Encoder(GGUFTokenizer(bpe_metadata(**{"tokenizer.chat_template": "{{ messages[5].content }}"})))
    with pytest.raises(CorpusError, match=r"a\.jsonl line 1: the chat template"):
        encode_source(open_source(path), broken)
    path = write(tmp_path / "b.txt", "ab" * 10 + "c")
    with pytest.raises(UnknownCharacterError, match=r"b\.txt has the character 'c' \(U\+0063\) at offset 20"):
        encode_source(open_source(path), Encoder(CharTokenizer("ab")))
    pair = jsonl(tmp_path / "c.jsonl", {"prompt": "ab", "completion": "c"})
    with pytest.raises(CorpusError, match=r"c\.jsonl line 1: the text has the character 'c'"):
        encode_source(open_source(pair), Encoder(CharTokenizer("ab")))


# ----------------------------------------------------------------------------------------------------------------------
# what is told
# ----------------------------------------------------------------------------------------------------------------------


def test_notices_with_their_counts(tmp_path, small, on_disk):
    write(tmp_path / "a" / "1.txt", "hello\r\n" * 500 + "<|im_start|>user <|im_end|><|im_start|>\n")
    write(tmp_path / "a" / "2.txt", "")
    (tmp_path / "a" / "link").symlink_to(tmp_path / "nowhere")
    for _ in range(2):  # the second time they come out of the cache
        notices = " | ".join(encode_source(open_source(tmp_path / "a"), small).notices)
        assert "500 line ends of \\r\\n" in notices
        assert "3 special tokens written out (<|im_start|>, <|im_end|>) stay text" in notices
        assert "1 empty document left out" in notices
        assert "1 entry of a folder left out" in notices
    notices = encode_source(open_source([{"text": "hello", "id": 3, "url": ""}] * 2), small).notices
    assert notices == ['keys of the records that nothing is made of: "id", "url"'] or '"url", "id"' in notices[0]
    chat = [{"role": "user", "content": "<|im_end|>"}, CHAT[1]]
    assert encode_source(open_source([{"messages": chat}]), small).notices == [
        "1 special token written out (<|im_end|>) in messages become tokens"
    ]


def test_characters_seen_once_matter_to_a_character_vocabulary():
    text = "abab\nabé\n"
    assert encode_source(open_source(text), Encoder(CharTokenizer.from_text(text))).notices == [
        "1 character of the vocabulary seen only once: 'é'"
    ]
    assert encode_source(open_source(text), BYTES).notices == []


def test_a_text_that_had_to_be_cut_by_force_says_so(small, monkeypatch):
    monkeypatch.setattr(cutting, "BLOCK", 1000)
    monkeypatch.setattr(cutting, "LONGEST", 3000)
    assert "was cut" in encode_source(open_source("()" * 9000 + "\n"), small).notices[0]


# ----------------------------------------------------------------------------------------------------------------------
# the cache
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """The files whose text is read, in order."""
    opened = []

    class Counting(reading.Bytes):
        def blocks(self, *arguments):
            opened.append(self.path.name)
            return super().blocks(*arguments)

    monkeypatch.setattr("toy.data.parts.Bytes", Counting)
    return opened


def test_the_second_start_reads_no_text(tmp_path, on_disk, counted, cache_folder):
    path = write(tmp_path / "a.txt", "hello\n" * 1000)
    first = encode_source(open_source(path), BYTES)
    assert counted == ["a.txt"]
    told = []
    source = open_source(path)
    same(encode_source(source, BYTES, progress=lambda *numbers: told.append(numbers)), first)
    assert source.digest() == first.sha256
    assert counted == ["a.txt"]
    assert told == []
    assert len(kept(cache_folder)) == 1


def test_a_file_that_was_touched_is_read_but_not_encoded_again(tmp_path, on_disk, counted, cache_folder, monkeypatch):
    path = write(tmp_path / "a.txt", "hello\n" * 1000)
    first = encode_source(open_source(path), BYTES)
    os.utime(path, (1, 1))
    monkeypatch.setattr(BYTES, "plain", None)
    same(encode_source(open_source(path), BYTES), first)
    assert counted == ["a.txt"] * 2
    copy = write(tmp_path / "copy.txt", path.read_bytes())
    same(encode_source(open_source(copy), BYTES), first)
    assert len(kept(cache_folder)) == 1


def test_another_text_tokenizer_or_way_is_encoded_for_itself(tmp_path, on_disk, cache_folder, small):
    path = write(tmp_path / "a.txt", "hello\n" * 1000)
    before = path.stat()
    encode_source(open_source(path), BYTES)
    write(path, "Hello\n" * 1000)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert encode_source(open_source(path), BYTES).ids[0] == ord("H")
    encode_source(open_source(path), small)
    encode_source(open_source(path), Encoder(GGUFTokenizer(bpe_metadata(**{"tokenizer.ggml.add_bos_token": True}))))
    encode_source(open_source(path), small, joined=True)
    assert len(kept(cache_folder)) == 5


@pytest.mark.parametrize("damage", ["short", "gone", "meta", "index", "empty index"])
def test_damage_in_the_cache_is_mended(tmp_path, on_disk, cache_folder, damage):
    path = write(tmp_path / "a.txt", "hello\n" * 1000)
    first = encode_source(open_source(path), BYTES)
    first = first._replace(ids=cache.IdArray(first.ids[:]))
    (folder,), (index,) = cache_folder.glob("*-*"), cache_folder.glob("index/*")
    if damage == "short":
        os.truncate(folder / "ids.bin", 100)
    elif damage == "gone":
        (folder / "starts.bin").unlink()
    elif damage == "meta":
        (folder / "meta.json").write_text('{"identity":')
    else:
        index.write_text("[]" if damage == "index" else "")
    same(encode_source(open_source(path), BYTES), first)
    assert (folder / "ids.bin").stat().st_size == 2 * 6000


def test_a_corpus_that_fails_leaves_nothing(tmp_path, on_disk, cache_folder):
    path = write(tmp_path / "a.txt", b"hello\n" * 1_000_000 + b"\xff")
    with pytest.raises(CorpusError, match="0xff at offset 6000000"):
        encode_source(open_source(path), BYTES)
    assert kept(cache_folder) == []
    assert not list(cache_folder.glob(".*.tmp"))


def test_a_file_that_changes_while_it_is_read_is_not_kept(tmp_path, on_disk, cache_folder):
    path = write(tmp_path / "a.txt", "hello\n" * 1000)
    with pytest.raises(CorpusError, match="changed while it was read"):
        encode_source(open_source(path), BYTES, progress=lambda *_: write(path, "Hello\n" * 1000))
    assert kept(cache_folder) == []


KILLED = """
import sys, time
from toy.data.encoding import Encoder
from toy.data.sources import open_source
from toy.data.store import encode_source
from toy.data.tokenizers import ByteTokenizer
def stop(done, total):
    print(done, flush=True)
    time.sleep(60)
encode_source(open_source(sys.argv[1]), Encoder(ByteTokenizer()), progress=stop)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no signals there")
def test_a_killed_encoding_leaves_nothing_half_made(tmp_path, on_disk, cache_folder):
    path = write(tmp_path / "a.txt", "hello\n" * 1_000_000)
    processes = [
        subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout.readline()  # in the middle of it
    temporary = set(cache_folder.glob(".*.tmp"))
    assert len(temporary) == 2
    assert kept(cache_folder) == sorted(path.name for path in temporary)  # nothing has its name yet
    processes[0].send_signal(signal.SIGKILL)
    processes[0].wait()
    try:
        encoded = encode_source(open_source(path), BYTES)
        assert len(encoded.ids) == 6_000_000
        left = set(cache_folder.glob(".*.tmp"))
        assert len(left) == 1  # of the one that still lives
        assert left < temporary
    finally:
        processes[1].kill()
        for process in processes:
            process.wait()
            process.stdout.close()
    encode_source(open_source(path), Encoder(CharTokenizer("helo\n")))
    assert not list(cache_folder.glob(".*.tmp"))


def test_two_at_once_give_one(tmp_path, on_disk, cache_folder):
    """The second one finishes first; the first finds its work done."""
    path = write(tmp_path / "a.txt", "hello\n" * 1000)
    inner = []

    def meanwhile(*_):
        if not inner:
            inner.append(None)
            inner[0] = encode_source(open_source(path), BYTES)

    same(encode_source(open_source(path), BYTES, progress=meanwhile), inner[0])
    assert len(kept(cache_folder)) == 1


FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
from toy.data.encoding import Encoder
from toy.data.sources import open_source
from toy.data.store import encode_source
from toy.data.tokenizers import ByteTokenizer
try:
    encode_source(open_source(sys.argv[1]), Encoder(ByteTokenizer()))
except OSError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limits there")
def test_a_full_disk_names_the_file(tmp_path, cache_folder):
    path = write(tmp_path / "a.txt", "hello\n" * 1_000_000)
    said = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, check=True).stdout
    assert said.startswith(f"cannot write {cache_folder}")
    assert "ids.bin: File too large" in said
    assert "TOY_CACHE" in said
    assert not list(cache_folder.glob(".*.tmp"))
    assert kept(cache_folder) == []


def test_a_cache_that_cannot_be_made_is_named(tmp_path, monkeypatch, on_disk):
    monkeypatch.setenv("TOY_CACHE", str(write(tmp_path / "file", "")))
    with pytest.raises(OSError, match=r"cannot write .*file.*TOY_CACHE"):
        encode_source(open_source(write(tmp_path / "a.txt", "hello\n")), BYTES)


def test_progress_goes_to_the_end(tmp_path, on_disk):
    path = write(tmp_path / "a.txt", "hello\n" * 1_000_000)
    told = []
    encode_source(open_source(path), BYTES, progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert told[-1] == (6_000_000, 6_000_000)


MEMORY = """
import re, sys
from toy.data.sources import open_source
from toy.data.tokenizers import ByteTokenizer
from toy.data.training_data import TextData
def peak():  # of this process alone: getrusage would count what its parent had
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) // 1024
before = peak()
data = TextData(open_source(sys.argv[1]), ByteTokenizer(), context=256, batch=64)
for step in range(500):
    data.training_batch(step)
data.validation_batches(8)
for batch in data.all_validation():
    pass
for start in range(0, 120_000_000, 1_000_000):
    assert data.training.ids[start : start + 1_000_000].any()
print(len(data.training), peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process' memory is read from /proc")
def test_a_large_text_takes_little_memory(tmp_path):
    """120 MB of text and 240 MB of ids, all of them touched."""
    path = write(tmp_path / "a.txt", b"It was a bright day, and more.\n" * 4_000_000)
    said = subprocess.run([sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True, check=True).stdout
    n, megabytes = map(int, said.split())
    assert n > 100_000_000
    assert megabytes < 100


def test_reading_ids_adds_up_to_no_memory(tmp_path):
    path = tmp_path / "ids.bin"
    np.arange(1000, dtype=np.uint16).tofile(path)
    array = cache.IdArray(path=path, kind=np.uint16)
    path.unlink()  # open is open
    assert array[10:13].dtype == np.int32
    assert array[10:13].tolist() == [10, 11, 12]
    assert array[np.array([[5, 6], [999, 0]])].tolist() == [[5, 6], [999, 0]]
    assert len(array) == 1000
