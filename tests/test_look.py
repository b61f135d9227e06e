"""toy look: the numbers against direct ones in numpy, the page as data and in a browser."""

import base64
import dataclasses
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from fetch_test_data import COMMAND, smollm2
from single_thread import single_thread  # noqa: F401 (autouse)

import toy
from toy.checks import gradcheck
from toy.data.tokenizers import ByteTokenizer, CharTokenizer
from toy.models import ARCHITECTURES, model_for
from toy.trained import look
from toy.trained.look import TEMPERATURES, look_inside, most_tokens, page, token_text

SIZES = {"vocab_size": 60, "d_model": 24, "n_heads": 4, "d_ff": 32, "n_layers": 3, "context_length": 20}
LETTERS = CharTokenizer([chr(ord("A") + i) for i in range(60)])
IDS = np.random.default_rng(1).integers(0, 60, 11)
CONFIGS = {
    "transformer": toy.TransformerConfig(**SIZES),
    "gpt2": toy.GPT2Config(**SIZES),
    "llama": toy.LlamaConfig(**SIZES, n_kv_heads=2),
    "llama, all of it": toy.LlamaConfig(
        **SIZES, n_kv_heads=2, head_dim=8, sliding_window=4, window_pattern=2, attention_softcap=1.5, attention_scale=0.3,
        qk_norm=True, rope_halves=True, embedding_scale=2.0, qkv_bias=True, post_norms=True, logit_softcap=5.0,
        residual_scale=0.5, rope_skips=3,
    ),
    "llama without norms before": toy.LlamaConfig(
        **SIZES, n_kv_heads=1, no_pre_norms=True, post_norms=True, qk_norm=True, qk_norm_together=True, untied=True
    ),
}  # fmt: skip


def make(config, seed=0):
    model = model_for(config)(config)
    gradcheck.random_parameters(model.parameters, np.random.default_rng(seed))
    return model


@pytest.fixture(params=CONFIGS)
def model(request):
    return make(CONFIGS[request.param])


def softmax(logits):
    powers = np.exp(np.asarray(logits, np.float64) - np.max(logits, axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


# ----------------------------------------------------------------------------------------------------------------------
# attention
# ----------------------------------------------------------------------------------------------------------------------


def direct_attention(model, layer, x):
    """The attention weights of a block by the formulas, one number at a time. x: (T, D), what comes into the block."""
    c, p = model.config, {name: np.asarray(a, np.float64) for name, a in model.parameters.items()}
    d, llama = c.d_head, isinstance(c, toy.LlamaConfig)
    n_kv_heads = c.n_kv_heads if llama else c.n_heads

    def rms(a, gain):
        return a / np.sqrt((a * a).mean(axis=-1, keepdims=True) + 1e-5) * gain

    if isinstance(c, toy.GPT2Config):
        centred = x - x.mean(axis=1, keepdims=True)
        h = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5)
        h = h * p[f"blk.{layer}.attn_norm.weight"] + p[f"blk.{layer}.attn_norm.bias"]
        q, k, _ = np.split(h @ p[f"blk.{layer}.attn_qkv.weight"].T + p[f"blk.{layer}.attn_qkv.bias"], 3, axis=1)
    elif llama:
        h = x if c.no_pre_norms else rms(x, p[f"blk.{layer}.attn_norm.weight"])
        q, k = (h @ p[f"blk.{layer}.attn_{n}.weight"].T + p.get(f"blk.{layer}.attn_{n}.bias", 0) for n in "qk")
        if c.qk_norm_together:
            q, k = (rms(a, p[f"blk.{layer}.attn_{n}_norm.weight"]) for a, n in ((q, "q"), (k, "k")))
    else:
        h = rms(x, p[f"blocks.{layer}.norm1_gamma"])
        q, k = (h @ p[f"blocks.{layer}.w_{n}"].T for n in "qk")
    sees_all = not llama or c.sliding_window is None or (c.window_pattern and (layer + 1) % c.window_pattern == 0)
    t = len(x)
    weights = np.zeros((c.n_heads, t, t))
    for head in range(c.n_heads):
        of_keys = head // (c.n_heads // n_kv_heads)
        query, key = q[:, head * d : (head + 1) * d], k[:, of_keys * d : (of_keys + 1) * d]
        if llama:
            if c.qk_norm and not c.qk_norm_together:
                query, key = (rms(a, p[f"blk.{layer}.attn_{n}_norm.weight"]) for a, n in ((query, "q"), (key, "k")))
            if not c.rope_skips or (layer + 1) % c.rope_skips:
                query, key = turned(query, c.rope_halves), turned(key, c.rope_halves)
        scale = d**-0.5 if not llama or c.attention_scale is None else c.attention_scale
        for i in range(t):
            for j in range(i + 1):
                score = scale * float(query[i] @ key[j])
                if llama and c.attention_softcap is not None:
                    score = c.attention_softcap * np.tanh(score / c.attention_softcap)
                weights[head, i, j] = np.exp(score) if sees_all or i - j < c.sliding_window else 0.0
    return weights / weights.sum(axis=2, keepdims=True)


def turned(x, halves):
    """RoPE by complex numbers: the pair (a, b) at position t times e^(i t base^(-2 pair / d))."""
    d = x.shape[1]
    a, b = (x[:, : d // 2], x[:, d // 2 :]) if halves else (x[:, ::2], x[:, 1::2])
    z = (a + 1j * b) * np.exp(1j * np.outer(np.arange(len(x)), 10000.0 ** (-np.arange(0, d, 2) / d)))
    return np.concatenate([z.real, z.imag], axis=1)  # another order of the numbers, the same products


def test_attention_is_that_of_the_formulas(model):
    inside = look_inside(model, LETTERS, IDS)
    c, t = model.config, len(IDS)
    assert inside.attention.shape == (c.n_layers, c.n_heads, t, t)
    assert np.abs(inside.attention.sum(axis=3) - 1).max() < 1e-6
    assert not np.triu(inside.attention, 1).any()
    _, states = look._watched(model, IDS)
    for layer in range(c.n_layers):
        direct = direct_attention(model, layer, states[layer].astype(np.float64))
        assert direct.std(axis=1).max() > 0.02  # the heads look at different things
        assert np.abs(inside.attention[layer] - direct).max() < 2e-5, layer


def test_the_model_is_left_as_it_was(model):
    before, attributes = model.forward(IDS)[0].copy(), dict(vars(model))
    look_inside(model, LETTERS, IDS)
    assert vars(model) == attributes
    assert np.array_equal(model.forward(IDS)[0], before)


# ----------------------------------------------------------------------------------------------------------------------
# the logit lens, and the next token
# ----------------------------------------------------------------------------------------------------------------------


def shorter(model, n_layers):
    """The same model without its last blocks; 0: its block adds nothing."""
    c = dataclasses.replace(model.config, n_layers=max(n_layers, 1))
    cut, parameters = model_for(c)(c), dict(model.parameters.items())
    for name, array in cut.parameters.items():
        adds = name.split(".")[2:3] in (["attn_output"], ["ffn_down"], ["w_o"], ["w_ff2"])
        array[...] = 0 if n_layers == 0 and adds else parameters[name]
    return cut


def test_the_lens_is_a_model_that_ends_there(model):
    inside = look_inside(model, LETTERS, IDS)
    last = model.config.n_layers
    for n_layers in range(last + 1):
        expected = softmax(shorter(model, n_layers).forward(IDS)[0])  # (T, V)
        for t in range(len(IDS)):
            best = inside.likeliest[n_layers, t]
            found = inside.likeliest_probabilities[n_layers, t]
            assert np.abs(found - expected[t, best]).max() < 1e-5
            assert np.abs(found - np.sort(expected[t])[::-1][: len(best)]).max() < 1e-5
            assert np.abs(inside.followed_probabilities[t, :, n_layers] - expected[t, inside.followed[t]]).max() < 1e-5
    for t in range(len(IDS)):
        followed = set(inside.followed[t].tolist())
        assert len(followed) == look.N_FOLLOWED
        assert set(inside.likeliest[last, t].tolist()) <= followed
        assert t + 1 == len(IDS) or int(IDS[t + 1]) in followed


def test_kept_logits_and_the_rest_are_the_whole_softmax(model):
    inside = look_inside(model, LETTERS, IDS)
    logits = model.forward(IDS)[0].astype(np.float64)
    assert inside.next_ids.shape == (len(IDS), look.N_NEXT) and inside.rest.shape == (len(IDS), len(TEMPERATURES))
    for t, kept in enumerate(inside.next_ids):
        for place, temperature in enumerate(TEMPERATURES):
            expected = softmax(logits[t] / temperature)
            parts = softmax(np.append(inside.next_logits[t] / temperature, inside.rest[t, place]))
            assert np.abs(parts[:-1] - expected[kept]).max() < 1e-4
            assert abs(parts[-1] - np.delete(expected, kept).sum()) < 1e-4


def test_a_vocabulary_that_is_kept_whole_has_no_rest():
    small = make(toy.TransformerConfig(**SIZES | {"vocab_size": 30}))
    letters = CharTokenizer(LETTERS.characters[:30])
    inside = look_inside(small, letters, IDS % 30)
    assert inside.next_ids.shape[1] == 30 and np.isinf(inside.rest).all()
    assert data_of(page(inside, letters, "a"))["rest"] is None


# ----------------------------------------------------------------------------------------------------------------------
# the map
# ----------------------------------------------------------------------------------------------------------------------


def test_the_map_is_on_the_main_axes(model):
    inside = look_inside(model, LETTERS, IDS)
    assert sorted(point.token_id for point in inside.points) == list(range(60))  # a small vocabulary: all of it
    assert {p.token_id for p in inside.points if p.kind == "prompt"} == set(IDS.tolist())
    tree = model.parameters
    table = np.asarray(tree.token_embd.weight if hasattr(tree, "token_embd") else tree.token_embed, np.float64)
    rows = table[[point.token_id for point in inside.points]]
    variances, axes = np.linalg.eigh(np.cov(rows.T))
    expected = (rows - rows.mean(axis=0)) @ axes[:, [-1, -2]]
    found = np.array([(point.x, point.y) for point in inside.points])
    assert np.allclose(np.abs(found), np.abs(expected), atol=1e-6)
    assert np.allclose(inside.shares, variances[[-1, -2]] / variances.sum(), atol=1e-9)
    directions = table / np.linalg.norm(table, axis=1, keepdims=True)
    assert inside.nearest.keys() == set(IDS.tolist())
    for i, row in inside.nearest.items():
        cosines = directions @ directions[i]
        cosines[i] = -2
        assert [j for j, _ in row] == np.argsort(-cosines)[: look.N_NEAREST].tolist()
        assert np.allclose([cosine for _, cosine in row], np.sort(cosines)[::-1][: look.N_NEAREST], atol=1e-6)


def test_a_large_vocabulary_is_searched_in_parts(monkeypatch):
    config = toy.TransformerConfig(**SIZES | {"vocab_size": 2000})
    model, tokenizer = make(config), CharTokenizer([chr(0x4E00 + i) for i in range(2000)])
    whole = look_inside(model, tokenizer, IDS)
    monkeypatch.setattr(look, "_EMBEDDING_ROWS", 7)
    parts = look_inside(model, tokenizer, IDS)
    assert len(whole.points) < 300 and {p.kind for p in whole.points} == {"prompt", "next", "nearest", "frequent"}
    assert {i: [j for j, _ in row] for i, row in parts.nearest.items()} == {
        i: [j for j, _ in row] for i, row in whole.nearest.items()
    }


def test_rows_that_are_all_the_same_have_a_map():
    model = make(toy.TransformerConfig(**SIZES))
    model.parameters.token_embed[...] = 0
    inside = look_inside(model, LETTERS, IDS)
    assert {(point.x, point.y) for point in inside.points} == {(0.0, 0.0)} and inside.shares == (0.0, 0.0)
    assert data_of(page(inside, LETTERS, "zero"))["points"][0][1:3] == [0, 0]


# ----------------------------------------------------------------------------------------------------------------------
# what is refused
# ----------------------------------------------------------------------------------------------------------------------


def test_a_prompt_that_fits_and_one_token_more(monkeypatch):
    model = make(CONFIGS["llama"])
    monkeypatch.setattr(look, "MOST_WEIGHTS", 3 * 4 * 66)  # 11 tokens: 66 pairs
    assert most_tokens(3, 4) == 11
    assert look_inside(model, LETTERS, IDS).attention.shape[-1] == 11
    with pytest.raises(ValueError, match=r"has 12 tokens.* at most 11 of a model with 3 layers of 4 heads: shorten it"):
        look_inside(model, LETTERS, np.append(IDS, 0))
    with pytest.raises(ValueError, match="context is 20: shorten it"):
        look_inside(model, LETTERS, np.zeros(21, int))
    with pytest.raises(ValueError, match="a token or more"):
        look_inside(model, LETTERS, np.zeros(0, int))
    with pytest.raises(ValueError, match="token_ids"):
        look_inside(model, LETTERS, [60])


def test_a_page_that_would_be_too_large(monkeypatch):
    inside = look_inside(make(CONFIGS["gpt2"]), LETTERS, IDS)
    size = len(page(inside, LETTERS, "a").encode())
    monkeypatch.setattr(look, "MOST_BYTES", size)
    page(inside, LETTERS, "a")
    monkeypatch.setattr(look, "MOST_BYTES", size - 1)
    with pytest.raises(ValueError, match="shorten the prompt"):
        page(inside, LETTERS, "a")


def test_the_longest_prompt_of_every_size_fits_the_page():
    for n_layers, n_heads in ((1, 1), (12, 12), (30, 9), (32, 32), (80, 64), (126, 128)):
        t = most_tokens(n_layers, n_heads)
        assert t >= 15
        weights = 4 / 3 * n_layers * n_heads * t * (t + 1) / 2
        lens = (n_layers + 1) * t * (look.N_LIKELIEST * 15 + look.N_FOLLOWED * 8)
        assert weights + lens + t * (look.N_NEXT * 14 + 8 * len(TEMPERATURES)) + 500_000 < look.MOST_BYTES


# ----------------------------------------------------------------------------------------------------------------------
# the page
# ----------------------------------------------------------------------------------------------------------------------


class Document(HTMLParser):
    """The elements of a page, and the text of its data."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.data, self.title, self._in = [], "", "", None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._in = tag if tag != "script" else dict(attributes).get("id", tag)

    def handle_endtag(self, tag):
        self._in = None

    def handle_data(self, text):
        if self._in == "data":
            self.data += text
        if self._in == "title":
            self.title += text


def data_of(text):
    return json.loads(Document(text).data)


HOSTILE = "</script><script>document.title='x'</script><!-- <b> & &amp; @DATA@ @NAME@ \u2028 \u202e é \U0001f600\x00"


class HostileTokenizer(ByteTokenizer):
    """One whose vocabulary has that text, as a learned one may have parts of it."""

    def token_bytes(self, token_id, *, special=False):
        return HOSTILE.encode() if token_id == ord("<") else super().token_bytes(token_id, special=special)


def hostile_page():
    model = make(toy.LlamaConfig(**SIZES | {"vocab_size": 256, "context_length": 200}, n_kv_heads=2))
    tokenizer = HostileTokenizer()
    inside = look_inside(model, tokenizer, tokenizer.encode(HOSTILE))
    return inside, page(inside, tokenizer, "</title></script><b>@DATA@ & \udcff")


def test_nothing_in_a_prompt_ends_the_script():
    inside, text = hostile_page()
    document = Document(text)
    assert [tag for tag, _ in document.tags].count("script") == 2 and text.count("</script") == 2
    assert document.title == "Inside </title></script><b>@DATA@ & ?" and "@NAME@" not in text.replace(document.data, "")
    data = json.loads(document.data)
    assert data["ids"] == inside.ids.tolist() and data["name"].endswith("<b>@DATA@ & ?")
    assert data["texts"][str(ord("<"))] == HOSTILE
    assert "b" not in [tag for tag, _ in document.tags]


def test_the_page_needs_nothing_else():
    text = page(look_inside(make(CONFIGS["gpt2"]), LETTERS, IDS), LETTERS, "a")
    document = Document(text)
    for tag, attributes in document.tags:
        assert not {"src", "href", "srcset", "action"} & attributes.keys(), tag
        assert tag not in ("link", "iframe", "object", "img")
    assert set(re.findall(r"\w+://[^\"'\s]+", text)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(|@import|url\(", text)
    (policy,) = (a["content"] for tag, a in document.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    tags = [tag for tag, _ in document.tags]
    assert "noscript" in tags and document.tags[tags.index("html")][1]["lang"] == "en" and document.title == "Inside a"


def test_the_data_are_those_of_the_model():
    inside = look_inside(make(CONFIGS["llama"]), LETTERS, IDS)
    data = data_of(page(inside, LETTERS, "a"))
    t, (n_layers, n_heads) = len(IDS), inside.attention.shape[:2]
    flat = np.frombuffer(base64.b64decode(data["attention"]), np.uint8).reshape(n_layers, n_heads, -1) / 255
    assert flat.shape[2] == t * (t + 1) // 2
    for i in range(t):
        row = flat[:, :, i * (i + 1) // 2 : (i + 1) * (i + 2) // 2]
        assert np.abs(row - inside.attention[:, :, i, : i + 1]).max() <= 0.5 / 255 + 1e-9
    assert np.abs(np.array(data["followedProbabilities"]) - inside.followed_probabilities).max() <= 5.1e-6
    assert np.abs(np.array(data["nextLogits"]) - inside.next_logits).max() <= 5.1e-5
    assert data["likeliest"] == inside.likeliest.tolist() and data["followed"] == inside.followed.tolist()
    used = {*data["ids"], *np.ravel(data["likeliest"]), *np.ravel(data["followed"]), *np.ravel(data["nextIds"])}
    assert {str(i) for i in used} <= data["texts"].keys()
    assert all(text == LETTERS.characters[int(i)] for i, text in data["texts"].items())


def test_what_a_token_is_called():
    assert token_text(ByteTokenizer(), 65) == "A" and token_text(ByteTokenizer(), 0xE2) == "\\xE2"
    assert token_text(ByteTokenizer(), 256) == "#256"  # a row of the matrix without a token


# ----------------------------------------------------------------------------------------------------------------------
# the command
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint of each language model, and one of an image model."""
    folder = tmp_path_factory.mktemp("look")
    for arch, row in ARCHITECTURES.items():
        if row.reads_text:
            config = dataclasses.replace(row.small, vocab_size=60)
            recipe = toy.recipes.FromScratch("numpy").realize(config, toy.RecipeOptions(t_seq=16))
            recipe.save(folder / f"{arch}.safetensors", tokenizer=LETTERS)
    toy.recipes.ViTTiny("numpy").realize(ARCHITECTURES["vit"].small).save(folder / "images.safetensors")
    return folder


@pytest.mark.parametrize("arch", [arch for arch, row in ARCHITECTURES.items() if row.reads_text])
def test_the_command_writes_a_page(toy_command, files, tmp_path, arch):
    out = tmp_path / "a.html"
    command = ["look", files / f"{arch}.safetensors", "--prompt", "HELLO", "--out", out]
    code, said, err = toy_command(*command)
    assert (code, err) == (0, "") and said == f"{out} ({out.stat().st_size / 1e6:.2f} MB)\n"
    data = data_of(out.read_text(encoding="utf-8"))
    assert [data["texts"][str(i)] for i in data["ids"]] == list("HELLO")
    code, _, err = toy_command(*command)
    assert code == 2 and "is there already" in err
    code, said, _ = toy_command(*command, "--force", "--json")
    record = json.loads(said)
    assert code == 0 and record["path"] == str(out) and record["bytes"] == out.stat().st_size
    assert [token["text"] for token in record["tokens"]] == list("HELLO")
    with toy.load(files / f"{arch}.safetensors") as loaded:
        expected = softmax(loaded.logits(LETTERS.encode("HELLO"))[-1])
    assert np.allclose([token["probability"] for token in record["next"]], np.sort(expected)[::-1][:8], atol=1e-6)
    assert record["next"][0]["id"] == expected.argmax()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--out": "a.txt"}, "does not end with .html"),
        ({"--out": "nowhere/a.html"}, "nowhere is not a directory"),
        ({"--prompt": ""}, "prompt is empty"),
        ({"--prompt": "HE~LO"}, "'~'"),
        ({"--prompt": "H" * 33}, "has 33 tokens, and the model's context is 32"),
        ({"model": "images.safetensors"}, "reads images"),
        ({"model": "none.safetensors"}, "none.safetensors"),
    ],
)
def test_the_command_refuses(toy_command, files, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    given = {"model": "llama.safetensors", "--prompt": "HELLO", "--out": "a.html"} | change
    command = ["look", files / given["model"], "--prompt", given["--prompt"], "--out", given["--out"]]
    code, out, err = toy_command(*command)
    assert (code, out) == (2, "") and message in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())
    assert toy_command("look", files / "llama.safetensors", "--prompt", "HELLO", "--out", "a.html")[0] == 0


def test_numbers_that_are_none_are_said():
    model = make(CONFIGS["gpt2"])
    model.parameters.output_norm.bias[...] = np.nan
    with pytest.raises(RuntimeError, match="not finite"):
        look_inside(model, LETTERS, IDS)


# ----------------------------------------------------------------------------------------------------------------------
# in a browser
# ----------------------------------------------------------------------------------------------------------------------

# What a user does, by events; the page's own functions say what came of it. The last line of the report is "done".
DRIVER = r"""
<script>
const report = [], say = (name, value) => report.push(name + "=" + value);
addEventListener("error", (event) => say("error", event.message));
const pressed = (key) => new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true});
const press = (key) => document.activeElement.dispatchEvent(pressed(key));
const where = () => [state.token, state.layer, state.head, state.state].join(",");
const change = (element, value, kind) => { element.value = value; element.dispatchEvent(new Event(kind, {bubbles: true})); };
say("start", where());
strip[n - 1].focus(); press("ArrowLeft"); say("left", where()); press("Home"); say("home", where());
press("ArrowLeft"); say("stays", where()); press("End"); say("end", where());
change($("layer"), 0, "change"); say("layer", where());
heads[0].focus(); press("ArrowRight"); say("head", where()); press("End"); say("heads", where());
cells.find((cell) => cell.tabIndex === 0).focus(); press("ArrowUp"); press("ArrowLeft"); say("lens", where());
$("temperature").focus(); change($("temperature"), 0, "input"); say("greedy", shares(state.token, 0)[0].slice(0, 2));
change($("temperature"), 40, "input"); const [parts, rest] = shares(state.token, 40);
say("sum", (parts.reduce((a, b) => a + b) + rest).toFixed(6)); say("hot", parts[0].toFixed(5));
say("bars", $("next").querySelectorAll("tbody tr").length);
points.find((point) => point.tabIndex === 0).focus(); press("ArrowDown"); say("map", $("map-caption").textContent.length > 0);
say("weight", weight(1, 2, 5, 3));
const stops = [...document.querySelectorAll("button, select, input, summary, [tabindex]")].filter((e) => e.tabIndex >= 0);
say("stops", stops.length);
say("nameless", [...document.querySelectorAll("button, select, input, summary, svg[role=img], g[role=button]")].filter((e) =>
  !(e.getAttribute("aria-label") || e.textContent.trim() || (e.labels && e.labels.length))).length);
say("title", document.title); say("wide", document.documentElement.scrollWidth <= innerWidth);
say("foreign", document.querySelectorAll("img, b, iframe").length);
document.body.replaceChildren(Object.assign(document.createElement("pre"), {textContent: report.join("\n") + "\ndone"}));
</script>
"""


def in_browser(text, folder, size="1280,900"):
    """The report of DRIVER run in the page -> dict. Skips where there is no browser that starts."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("there is no chromium here (Debian: apt-get install chromium)")
    path = Path(folder) / "page.html"
    path.write_bytes(text.replace("</body>", DRIVER + "</body>").encode())
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--window-size={size}",
        f"--user-data-dir={folder}/browser", "--virtual-time-budget=2000", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    found = subprocess.run(command, capture_output=True, timeout=300).stdout.decode()
    lines = re.search(r"<pre>(.*)</pre>", found, re.S)
    assert lines, found[-2000:]
    *report, last = lines[1].split("\n")
    assert last == "done"
    return dict(line.partition("=")[::2] for line in report)


@pytest.mark.slow
def test_in_a_browser_with_the_keyboard(tmp_path):
    model, ids = make(CONFIGS["llama"]), IDS
    inside = look_inside(model, LETTERS, ids)
    found = in_browser(page(inside, LETTERS, "letters"), tmp_path)
    assert "error" not in found
    assert found["start"] == "10,2,0,3"  # the last token; layer, head; state 3 is after the last block
    assert (found["left"], found["home"], found["stays"], found["end"]) == ("9,2,0,3", "0,2,0,3", "0,2,0,3", "10,2,0,3")
    assert (found["layer"], found["head"], found["heads"]) == ("10,0,0,3", "10,0,1,3", "10,0,3,3")
    assert found["lens"] == "9,0,3,2"
    assert found["greedy"] == "1,0" and float(found["sum"]) == 1
    hottest = softmax(model.forward(ids)[0][9].astype(np.float64) / TEMPERATURES[-1]).max()
    assert abs(float(found["hot"]) - hottest) < 1e-4
    assert int(found["bars"]) == look.N_NEXT + 1
    assert found["map"] == "true" and found["title"] == "Inside letters"
    assert abs(float(found["weight"]) - inside.attention[1, 2, 5, 3]) < 0.003
    # few: strip, two lists, heads, lens, a list of tokens, slider, bars, map, three tables to unfold
    assert int(found["stops"]) == 12 and found["nameless"] == "0"


@pytest.mark.slow
def test_a_hostile_prompt_in_a_narrow_browser(tmp_path):
    _, text = hostile_page()
    found = in_browser(text, tmp_path, "500,800")
    assert "error" not in found
    assert found["title"] == "Inside &lt;/title&gt;&lt;/script&gt;&lt;b&gt;@DATA@ &amp; ?"  # escaped once, in the dump
    assert found["foreign"] == "0" and found["wide"] == "true"
    assert found["start"].startswith(f"{len(HOSTILE.encode()) - 1},")


# ----------------------------------------------------------------------------------------------------------------------
# a real model
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_paris_rises_in_smollm2():
    pytest.importorskip("gguf", reason="the gguf package is not installed (pip install gguf)")
    pytest.importorskip("tokenizers", reason="the tokenizers library is not installed (pip install tokenizers)")
    path = smollm2()
    if path is None:
        pytest.skip(f"SmolLM2-135M is not in the cache ({COMMAND})")
    with toy.load(path) as loaded:
        tokenizer = loaded.tokenizer
        ids = tokenizer.encode("The capital of France is")
        inside = look_inside(loaded.model, tokenizer, ids)
        text = page(inside, tokenizer, "smollm2-135m")
    (paris,) = tokenizer.encode(" Paris")
    place = inside.followed[-1].tolist().index(paris)
    curve = inside.followed_probabilities[-1, place]  # after the embedding and each of 30 blocks
    assert curve[21] < 0.001 and abs(curve[29] - 0.07) < 0.01 and abs(curve[30] - 0.77) < 0.01
    assert inside.likeliest[-1, -1, 0] == paris
    france = tokenizer.encode(" France")[0]
    assert "France" in [tokenizer.decode([i]).strip() for i, _ in inside.nearest[int(france)]]
    assert len(text.encode()) < 200_000
    data = data_of(text)
    assert [data["texts"][str(i)] for i in data["ids"]] == ["The", " capital", " of", " France", " is"]
