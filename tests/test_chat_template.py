"""Chat templates: what they can use, what they may take, and how they fail. Judges: transformers and llama.cpp."""

import datetime
import json
import os
import signal
import subprocess
import sys
import threading

import pytest
from fetch_test_data import COMMAND, chat_templates
from test_gguf_tokenizer import bpe_metadata
from tokenizer_oracle import LlamaCppVocabulary

from toy.data import chat_template
from toy.data.chat_template import ChatTemplate, ChatTemplateError
from toy.data.gguf_tokenizer import GGUFTokenizer
from toy.files.errors import BadFileError, printable

pytest.importorskip("jinja2", reason="jinja2 is not installed (pip install jinja2)")

HELLO = [{"role": "user", "content": "hello"}]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'Get <b>the</b> weather & "more" of the city\'s day',
            "parameters": {"type": "object", "properties": {"town": {"type": "string"}, "days": {"type": "integer"}}},
        },
    }
]
CALL = {"id": "123456789", "type": "function", "function": {"name": "weather", "arguments": {"town": "Ulm", "days": 2}}}
CONVERSATIONS = {
    "user": ([{"role": "user", "content": "Hi <there> & 'you' \"ok\" é日"}], None),
    "system": (
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi!\n"},
            {"role": "user", "content": " And? "},
        ],
        None,
    ),
    "tools": (
        [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "123456789", "name": "weather", "content": "sunny"},
            {"role": "assistant", "content": "It is sunny."},
        ],
        TOOLS,
    ),
    "wrong": ([{"role": "assistant", "content": "x"}, {"role": "assistant", "content": "y"}], None),
}


def render(source, messages=HELLO, **options):
    template = ChatTemplate(source, TOKENS)
    try:
        return template.render(messages, **options)
    finally:
        template.close()


# -- what templates can use --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ messages[0].content }}{{ messages[0]['role'] }}", "hellouser"),
        ("{{ bos_token }}|{{ eos_token }}|{{ nothing }}|{{ tools }}|{{ documents }}", "<s>|</s>||None|None"),
        ("{% if true %}\n  {% if true %}\nx\n  {% endif %}\n{% endif %}y", "x\ny"),  # blocks are trimmed
        ("{% for i in [1,2,3,4] %}{% if i==2 %}{% continue %}{% elif i>3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "13"),
        ("{% set n = namespace(x=1) %}{% for i in range(3) %}{% set n.x = n.x + i %}{% endfor %}{{ n.x }}", "4"),
        ("{{ dict(a=1).items() | list }}", "[('a', 1)]"),
        ("{{ {'z': '<b>', 'a': \"it's & é\"} | tojson }}", '{"z": "<b>", "a": "it\'s & é"}'),
        ("{{ {'z': [1]} | tojson(indent=2) }}", '{\n  "z": [\n    1\n  ]\n}'),
        ("{{ {'z': 1, 'a': 2} | tojson(separators=(',', ':'), sort_keys=true, ensure_ascii=true) }}", '{"a":2,"z":1}'),
        ("{{ strftime_now('%d %b %Y') }}", "02 Jan 2030"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "hello!"),
        ("{{ '<|im_start|>' ~ ('a' is string) ~ ('x' | trim) ~ ([1, 2] | join('-')) }}", "<|im_start|>Truex1-2"),
        ("\U0001f600\x00é\u2028\n", "\U0001f600\x00é\u2028"),  # any text comes through
    ],
)  # fmt: skip
def test_templates_can_use(source, text):
    assert render(source, now=datetime.datetime(2030, 1, 2)) == text


def test_variables():
    own = "{{ add_generation_prompt }}{{ enable_thinking }}"
    assert render(own) == "False" and render(own, add_generation_prompt=True, enable_thinking=False) == "TrueFalse"
    assert render("{{ tools[0].function.name }}", tools=TOOLS) == "weather"
    assert render("{{ strftime_now('%Y') }}") == str(datetime.datetime.now().year)
    with pytest.raises(ChatTemplateError, match=r"the messages cannot be given to the chat template: .*JSON"):
        render("{{ x }}", x=object())
    with pytest.raises(ChatTemplateError, match="cannot be given"):
        loop = []
        loop.append(loop)
        render("x", loop)


def test_what_the_assistant_says():
    source = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    messages = [*HELLO, {"role": "assistant", "content": "é😀!"}, *HELLO, {"role": "assistant", "content": "b"}]
    template = ChatTemplate(source)
    text, spans = template.render_spans(messages)
    assert text == template.render(messages) == "<user>hello<assistant>é😀!</s><user>hello<assistant>b</s>"
    assert [text[a:b] for a, b in spans] == ["é😀!</s>", "b</s>"]
    assert ChatTemplate("{{ messages[0].content }}").render_spans(messages) == ("hello", [])
    captured = "{% set x %}a{% generation %}b{% endgeneration %}{% endset %}{{ x }}{{ x }}"
    assert ChatTemplate(captured).render_spans(messages) == ("abab", [(1, 2), (3, 4)])
    template.close()


def test_one_process_serves_all_and_starts_anew():
    template = ChatTemplate("{{ messages[0].content }}{{ 1 // messages[0].get('n', 1) }}")
    assert template.render(HELLO) == "hello1"
    pid = template._process._process.pid
    with pytest.raises(ChatTemplateError, match="division or modulo by zero"):
        template.render([{"role": "user", "content": "", "n": 0}])
    assert (
        template.render(HELLO) == "hello1" and template._process._process.pid == pid
    )  # a failure is no reason to stop
    template._process._process.kill()
    template._process._process.wait()
    assert template.render(HELLO) == "hello1" and template._process._process.pid != pid
    process = template._process._process
    long = [{"role": "user", "content": "x" * 3_000_000}]  # more than the process was made for
    assert template.render(long) == "x" * 3_000_000 + "1" and process.poll() is not None
    results = []

    def render_one(template):
        results.append(template.render(HELLO))

    threads = [threading.Thread(target=render_one, args=(template,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["hello1"] * 8
    process = template._process._process
    del template, threads, thread
    assert process.wait(60) is not None  # it goes with its template


def test_the_process_ends_with_this_one():
    code = (
        "from toy.data.chat_template import ChatTemplate\n"
        "template = ChatTemplate('x'); template.render([]); print(template._process._process.pid)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    with pytest.raises(ProcessLookupError):
        os.kill(int(told.stdout), 0)
    assert told.stderr == ""


# -- judges ------------------------------------------------------------------------------------------------------------


def templates():
    folder = chat_templates()
    if folder is None:
        pytest.skip(f"llama.cpp's chat templates are not in the cache ({COMMAND})")
    found = sorted(folder.glob("*.jinja"))
    assert len(found) >= 60
    return found


@pytest.mark.slow
@pytest.mark.parametrize("prompt", [False, True], ids=["whole", "prompt"])
def test_transformers_writes_the_same(prompt):
    """Every template of llama.cpp's collection, each conversation: the same text, or both refuse."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils", reason="transformers is not installed")
    n_texts = 0
    for path in templates():
        template = ChatTemplate(path.read_text(encoding="utf-8"), TOKENS)
        for name, (messages, tools) in CONVERSATIONS.items():
            try:
                text = template.render(messages, tools=tools, add_generation_prompt=prompt)
            except ChatTemplateError:
                text = None
            try:
                options = dict(chat_template=template.source, add_generation_prompt=prompt, **TOKENS)
                expected = utils.render_jinja_template([messages], tools=tools, **options)[0][0]
            except Exception:  # whatever a template raises
                expected = None
            assert text == expected, (path.name, name)
            n_texts += text is not None
        template.close()
    assert n_texts > 3 * 60


@pytest.mark.llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("conversation", ["user", "system"])
@pytest.mark.parametrize(
    "name",
    [
        "HuggingFaceTB-SmolLM3-3B", "Qwen-Qwen2.5-7B-Instruct", "Qwen-Qwen3-0.6B",
        "microsoft-Phi-3.5-mini-instruct", "meetkai-functionary-medium-v3.1", "mistralai-Mistral-Nemo-Instruct-2407",
    ],
)  # fmt: skip
def test_llama_cpp_writes_the_same(tmp_path, name, conversation):
    path = next((path for path in templates() if path.stem == name), None)
    if path is None:
        pytest.skip(f"{name} is not among the templates")
    metadata = bpe_metadata(**{"tokenizer.chat_template": path.read_text(encoding="utf-8")})
    messages = CONVERSATIONS[conversation][0]
    with LlamaCppVocabulary(tmp_path, metadata) as llama_cpp:
        # its server says of itself that the model may think
        ours = GGUFTokenizer(metadata).apply_chat_template(messages, enable_thinking=True)
        assert ours == llama_cpp.render(messages)


def test_a_template_for_tools(tmp_path):
    metadata = bpe_metadata(**{"tokenizer.chat_template": "plain", "tokenizer.chat_template.tool_use": "with tools"})
    tokenizer = GGUFTokenizer(metadata)
    assert tokenizer.apply_chat_template(HELLO) == "plain"
    assert tokenizer.apply_chat_template(HELLO, tools=TOOLS) == "with tools"
    del metadata["tokenizer.chat_template.tool_use"]
    assert GGUFTokenizer(metadata).apply_chat_template(HELLO, tools=TOOLS) == "plain"


# -- what they may take, and how they fail -----------------------------------------------------------------------------

TOO_MUCH = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops that write": "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "times": "{{ 'x' * 10**10 }}",
    "list": "{{ [0] * 10**10 }}",
    "power": "{{ 9**(9**9) }}",
    "percent": "{{ '%0999999999d' % 1 }}",
    "format": "{{ '{:>9999999999}'.format(1) }}",
    "format filter": "{{ '%999999999s' | format('x') }}",
    "doubling": "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "doubling a list": "{% set n = namespace(s=[0]) %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
    "indent": "{{ ('a\n' * 100000) | indent(100000) }}",
    "lipsum": "{{ lipsum(n=100000, max=100000) }}",
    "center": "{{ 'x' | center(10**10) }}",
    "replace": "{{ ('x' * 10**6) | replace('x', 'y' * 10**6) }}",
    "join": "{{ range(99999) | join('x' * 10**7) }}",
    "wordwrap": "{{ ('x ' * 9999999) | wordwrap(1) }}",
    "tojson": "{{ messages | tojson(indent=10**9) }}",
    "slices": "{{ range(99999) | slice(10**9) | list | length }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "doubled recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "nested brackets": "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
    "nested lists": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "nested blocks": "{% if 1 %}" * 20_000 + "{% endif %}" * 20_000,
}  # fmt: skip


@pytest.mark.parametrize("name", TOO_MUCH)
def test_templates_that_take_too_much_are_stopped(name, monkeypatch):
    monkeypatch.setattr(chat_template, "CPU_SECONDS", 1.0)
    template = ChatTemplate(TOO_MUCH[name])
    with pytest.raises(ChatTemplateError) as caught:
        template.render(HELLO)
    told = str(caught.value)
    assert told.startswith("the chat template of this model ") and len(told) < 400 and "\n" not in told
    reasons = ("processor time", "too much memory", "it writes more than", "nested too deeply", "too large", "too many")
    assert any(reason in told for reason in reasons), told
    template.source = "{{ messages[0].content }}"
    assert template.render(HELLO) == "hello"  # another one is rendered
    template.close()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (TOO_MUCH["loops"], "takes more than 1 seconds of processor time: it was stopped"),
        ("{{ ('x' * 300000000) | length }}", "failed: it takes too much memory"),
        ("{% for i in range(1000) %}0123456789{% endfor %}", r"failed: it writes more than \d,\d\d\d characters"),
        (TOO_MUCH["recursion"], "failed: it is nested too deeply"),
    ],
)  # fmt: skip
def test_each_bound_holds_by_itself(source, reason, monkeypatch):
    """What would end well, or never, without that one."""
    monkeypatch.setattr(chat_template, "CPU_SECONDS", 1.0)
    assert render("{{ ('x' * 1000000) | length }}") == "1000000"
    monkeypatch.setattr(chat_template, "OUTPUT", 100)
    assert render("{% for i in range(100) %}0123456789{% endfor %}") == "0123456789" * 100
    with pytest.raises(ChatTemplateError, match=reason):
        render(source)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_after_a_fork_each_has_a_process_of_its_own(tmp_path):
    template = ChatTemplate("{{ messages[0].content }}")
    assert template.render(HELLO) == "hello"
    child = os.fork()
    if child == 0:
        try:
            (tmp_path / "told").write_text(template.render(HELLO))
            template.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert (tmp_path / "told").read_text() == "hello"
    pid = template._process._process.pid
    assert (
        template.render(HELLO) == "hello" and template._process._process.pid == pid
    )  # it was not stopped by the other
    template.close()


def test_a_process_that_cannot_be_started(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(OSError, match="cannot start the process for the chat template: No such file"):
        render("x")


def test_the_clock_bounds_where_processor_time_does_not(monkeypatch):
    monkeypatch.setattr(chat_template, "CPU_SECONDS", 1000.0)
    monkeypatch.setattr(chat_template, "WALL_SECONDS", 1.0)
    with pytest.raises(ChatTemplateError, match="takes more than 1 seconds: it was stopped"):
        render(TOO_MUCH["loops"])


@pytest.mark.skipif(sys.platform == "win32", reason="there is no ps on Windows")
def test_memory_is_watched_where_the_system_does_not_bound_it(monkeypatch):
    if chat_template._resident_bytes(os.getpid()) == 0:
        pytest.skip("there is no ps here")
    monkeypatch.setattr(chat_template, "_SYSTEM_BOUNDS_MEMORY", False)
    monkeypatch.setattr(chat_template, "MEMORY", 64 * 2**20)
    slow = "{% set x = ['a' * 10**8, 'b' * 10**8] %}" + TOO_MUCH["loops"]
    with pytest.raises(ChatTemplateError, match="takes too much memory: it was stopped"):
        render(slow)


def test_ctrl_c_stops_the_process(monkeypatch):
    template = ChatTemplate(TOO_MUCH["loops"])
    monkeypatch.setattr(chat_template, "CPU_SECONDS", 1000.0)
    started = []

    def press(signal_number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, press)
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    try:
        with pytest.raises(KeyboardInterrupt):
            started.append(template.render(HELLO))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not started and template._process is None


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for %}", "failed: line 1: Expected"),
        ("{{ x", "failed: line 1: unexpected end of template"),
        ("\n\n{% nonsense %}", "failed: line 3: Encountered unknown tag 'nonsense'"),
        ("{{ messages[5].role + 1 }}", "failed: .* has no"),
        ("{{ 'a' + 1 }}", "failed: can only concatenate str"),
        ("{{ 1 / 0 }}", "failed: division by zero"),
        ("{{ 'x' | nonsense }}", "failed: line 1: No filter named 'nonsense'"),
        ("{{ range(10**7) }}", "failed: Range too big"),
        ("{% include 'x' %}", "failed: no loader"),
        ("{{ ''.__class__.__mro__ }}", "failed: access to attribute '__class__' .* unsafe"),
        ("{{ dict.__subclasses__() }}", "failed: .* has no attribute"),
        ("{{ namespace.__init__ }}{{ namespace.__init__.__globals__ }}", "failed"),
        ("{% set n = namespace(_x=1) %}", "failed: a namespace cannot have the name '_x'"),
        ("{{ messages.append(1) }}", "failed: .*unsafe|failed: .*not safely"),
        ("{{ raise_exception('only users, please') }}", "refuses these messages: only users, please$"),
        ("{{ raise_exception('\x1b[31mred\x1b[0m\x07\n next\u202e') }}", "refuses these messages: red +next$"),
        ("{{ messages[0].x['\x1b]0;title\x07y'] }}", "failed"),
        ("{{ raise_exception('x' * 10000) }}", "refuses these messages: x{300}\\.\\.\\.$"),
    ],
)
def test_every_broken_template_is_one_safe_sentence(source, message):
    with pytest.raises(ChatTemplateError, match=message) as caught:
        render(source)
    assert printable(str(caught.value)) == str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 日 😀", "plain é 日 😀"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("a\x1b]0;title\x07b", "a b"),
        ("a\x1b]8;;http://x\x1b\\link", "a link"),
        ("a\x9b31mb", "a b"),
        ("a\x1bcb\x1b(Bc", "a b c"),
        ("a\x1b[", "a"),
        ("one\r\ntwo\tthree", "one two three"),
        ("a\u202eb\u2066c\x7f\x85d", "a b c d"),
    ],
)
def test_nothing_that_a_terminal_acts_on_is_shown(text, shown):
    assert printable(text) == shown
    assert str(BadFileError("f", text)) == f"f: {shown}"


def test_the_request_is_json_alone():
    """What goes through the pipes is one JSON object a line."""
    request = {"variables": "{}", "now": None, "spans": False, "seconds": 5, "output": 10}
    settings = {"path": chat_template._where_jinja_is(), "memory": None, "source": "x"}
    lines = json.dumps(settings) + "\n" + json.dumps(request) + "\n"
    told = subprocess.run(
        [sys.executable, "-I", "-S", str(chat_template._PROGRAM)],
        input=lines,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(told.stdout) == {"text": "x", "spans": []}
