"""Chat templates: the Jinja program in a model file that writes a conversation in the form the model was trained on.

It is a program from a stranger, and Jinja's sandbox keeps it from this machine but not from its memory and time: two nested
loops or 'x' * 10**10 are enough. So it is run by a process of its own (`toy/data/template_process.py`), which is stopped when
a rendering takes more than its share of processor time, memory or text. The process is started with the first rendering
(about a tenth of a second), serves all of them, and starts anew after one that was stopped. Linux and macOS bound all three;
Windows bounds the time (on the clock) and the text.

What templates can use is what transformers and llama.cpp give them: blocks trimmed, loop controls, `raise_exception`,
`strftime_now`, `tojson` without HTML escapes, `{% generation %}`.
"""

import contextlib
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

from toy.files.errors import printable
from toy.optional import optional_package

CPU_SECONDS = 5.0  # of processor time for one rendering; real templates take some milliseconds
WALL_SECONDS = 120.0  # the same on the clock, for a machine that is busy and for systems that do not count
MEMORY = 256 * 2**20  # bytes beyond what the process has when it starts, and 64 for each character of the conversation
OUTPUT = 4 * 2**20  # characters, and 16 for each one of the conversation
_TICK = 0.05  # seconds between two looks at the memory where the system does not bound it

_SYSTEM_BOUNDS_MEMORY = sys.platform.startswith("linux")
_PROGRAM = Path(__file__).with_name("template_process.py")


class ChatTemplateError(ValueError):
    """The template is broken, takes too much, or refuses the messages."""


class ChatTemplate:
    """A template, ready to render. source: Jinja text. tokens: dict of variables such as bos_token."""

    def __init__(self, source, tokens=None):
        self.source, self.tokens = source, dict(tokens or {})
        self._process = None
        self._lock = threading.Lock()

    def render(self, messages, *, add_generation_prompt=False, tools=None, now=None, **variables):
        """The text of a conversation.

        messages: list of dicts with role and content. tools: list of JSON schemas, or None. now: the `datetime` that
        `strftime_now` tells, None: the clock's. variables: what else the template may use; all of it must be JSON.
        Raises ChatTemplateError, one sentence, when there is no text; RuntimeError when Jinja is not installed.
        """
        return self._render(messages, add_generation_prompt, tools, now, variables, False)["text"]

    def render_spans(self, messages, *, add_generation_prompt=False, tools=None, now=None, **variables):
        """The text, and a list of the (start, stop) of the parts inside {% generation %}: what the assistant says.

        The list is empty for a template without such blocks. Errors as `render`.
        """
        answer = self._render(messages, add_generation_prompt, tools, now, variables, True)
        return answer["text"], [tuple(span) for span in answer["spans"]]

    def close(self):
        """Stop the process. Another rendering starts a new one."""
        with self._lock:
            self._stop()

    def _render(self, messages, add_generation_prompt, tools, now, variables, spans):
        variables = {
            **self.tokens,
            "documents": None,
            **variables,
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            given = json.dumps(variables)
        except (TypeError, ValueError, RecursionError) as error:
            raise ChatTemplateError(f"the messages cannot be given to the chat template: {error}") from error
        request = {
            "variables": given,
            "now": None if now is None else now.isoformat(),
            "spans": spans,
            "seconds": CPU_SECONDS,
            "output": OUTPUT + 16 * len(given),
        }
        with self._lock:
            if self._process is None or not self._process.serves(self.source, len(given)):
                self._stop()
                self._process = _Process(self, len(given))
            try:
                answer = self._process.ask(json.dumps(request))
            except BaseException:  # Ctrl-C among them
                self._stop()
                raise
            if isinstance(answer, str) or answer.get("stop"):
                self._stop()
        if isinstance(answer, str):
            raise ChatTemplateError(f"the chat template of this model {answer}: it was stopped")
        if (problem := answer.get("refused")) is not None:
            raise ChatTemplateError(f"the chat template refuses these messages: {printable(problem)}")
        if (problem := answer.get("failed")) is not None:
            raise ChatTemplateError(f"the chat template of this model failed: {printable(problem)}")
        return answer

    def _stop(self):
        if self._process is not None:
            self._process.stop()
            self._process = None


class _Process:
    """The process that renders, and a thread that talks with it."""

    def __init__(self, owner, n_characters):
        """owner: the `ChatTemplate`. n_characters: of the conversation; more memory than it needs is not given."""
        self._source, self._parent = owner.source, os.getpid()
        self._characters = 2 * n_characters  # so that a longer conversation need not start another one at once
        memory = MEMORY + 64 * self._characters
        self._ceiling = None if _SYSTEM_BOUNDS_MEMORY or os.name == "nt" else memory
        settings = {
            "path": _where_jinja_is(),
            "memory": memory if _SYSTEM_BOUNDS_MEMORY else None,
            "source": owner.source,
        }
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_PROGRAM)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="ascii",
            )
        except OSError as error:
            raise OSError(f"cannot start the process for the chat template: {error.strerror or error}") from error
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=_talk, args=(self._process, self._requests, self._answers), daemon=True).start()
        self._stopper = weakref.finalize(owner, _kill, self._process, self._requests, os.getpid())
        self._requests.put(json.dumps(settings))

    def serves(self, source, n_characters):
        """Whether it is alive, was started by this process and not before a fork, and for this."""
        alive = self._parent == os.getpid() and self._process.poll() is None
        return alive and source == self._source and n_characters <= self._characters

    def ask(self, request):
        """The answer as a dict, or, when there is none, what the process was stopped for, as a str."""
        self._requests.put(request)
        end = time.monotonic() + WALL_SECONDS
        base = None
        while True:
            try:
                line = self._answers.get(timeout=_TICK if self._ceiling else max(0.0, end - time.monotonic()))
                break
            except queue.Empty:
                if time.monotonic() >= end:
                    return f"takes more than {WALL_SECONDS:g} seconds"
            if self._ceiling:
                now = _resident_bytes(self._process.pid)
                base = now if base is None else base
                if now - base > self._ceiling:
                    return "takes too much memory"
        if line:
            return json.loads(line)
        code = self._process.wait()
        if code == -getattr(signal, "SIGPROF", 0) and code:
            return f"takes more than {CPU_SECONDS:g} seconds of processor time"
        return "ended its process (too much memory, or too deeply nested)"

    def stop(self):
        self._stopper()


def _talk(process, requests, answers):
    """Pass requests to the process and its answers back, until it ends ("" is the last answer) or a request is None."""
    first = True
    while (request := requests.get()) is not None:
        line = ""
        with contextlib.suppress(OSError, ValueError):
            process.stdin.write(request + "\n")
            process.stdin.flush()
            if first:
                first = False
                continue
            line = process.stdout.readline()
        answers.put(line)
        if not line:
            break
    with contextlib.suppress(OSError):
        process.stdin.close()
    process.stdout.close()


def _kill(process, requests, parent):
    if os.getpid() != parent:  # a fork of the process that started it
        return
    process.kill()
    process.wait()
    requests.put(None)


def _where_jinja_is():
    """The folders that hold jinja2 and markupsafe. Raises RuntimeError, with the command to type, without them."""
    folders = []
    for name in ("jinja2", "markupsafe"):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            optional_package(name, "the chat template", install="jinja2")
        else:
            folders.append(str(Path(spec.origin).parent.parent))
    return list(dict.fromkeys(folders))


def _resident_bytes(pid):
    """The memory that a process has, 0 when that cannot be told."""
    try:
        told = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, timeout=10)
        return 1024 * int(told.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return 0
