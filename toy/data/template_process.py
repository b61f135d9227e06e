"""The process that runs chat templates for `toy.data.chat_template`: it knows nothing of the rest of this library.

It is started as a script, reads one JSON object a line and answers each with one. The first has the template, and says where
Jinja is and how much memory there is to be; it has no answer. After that each has variables; the answer has "text" and
"spans", or "refused" or "failed" with a reason. Processor time is counted by a timer whose signal ends the process.
"""

import datetime
import json
import re
import secrets
import signal
import sys

_LONGEST_REASON = 300


class Refused(Exception):
    """The template called raise_exception."""


class TooLong(Exception):
    """The text goes on and on."""


def main():
    if hasattr(signal, "SIGINT"):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    settings = json.loads(sys.stdin.readline())
    sys.path += settings["path"]
    environment, mark = make_environment()
    if settings["memory"] is not None:
        bound_memory(settings["memory"])
    compiled: list = []
    for line in sys.stdin:
        request = json.loads(line)
        bound_time(request["seconds"])
        answer = answer_to(request, settings["source"], environment, mark, compiled)
        bound_time(0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def answer_to(request, source, environment, mark, compiled):
    """compiled: a list that holds the compiled template from the first time on."""
    try:
        if not compiled:
            compiled.append(environment.from_string(source))
        mark.value = f"\x00{secrets.token_hex(8)}\x00" if request["spans"] else ""
        now = request["now"]
        mark.now = datetime.datetime.fromisoformat(now) if now else None
        text, length = [], 0
        for part in compiled[0].generate(**json.loads(request["variables"])):
            text.append(part)
            length += len(part)
            if length > request["output"]:
                raise TooLong
        text, spans = without_marks("".join(text), mark.value)
        return {"text": text, "spans": spans}
    except Refused as error:
        return {"refused": reason(error)}
    except TooLong:
        return {"failed": f"it writes more than {request['output']:,} characters", "stop": True}
    except MemoryError:
        return {"failed": "it takes too much memory", "stop": True}
    except RecursionError:
        return {"failed": "it is nested too deeply"}
    except Exception as error:
        line = getattr(error, "lineno", None)
        kind = type(error).__name__
        where = f"line {line}: " if isinstance(line, int) else ""
        return {"failed": where + (reason(error) or kind)}


def reason(error):
    text = str(error)
    return text if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON] + "..."


def without_marks(text, mark):
    """The text without the marks around what {% generation %} encloses, and the places of that in it."""
    if not mark:
        return text, []
    parts, spans, length, starts = [], [], 0, []
    for part in re.split(f"({mark}[<>])", text):
        if part == mark + "<":
            starts.append(length)
        elif part == mark + ">":
            spans.append((starts.pop(), length))
        else:
            parts.append(part)
            length += len(part)
    return "".join(parts), sorted(spans)


class Mark:
    """What is written around {% generation %}, "" when nobody asks; and the time that is told, None: the clock's."""

    value, now = "", None


def make_environment():
    """Jinja's sandbox with what transformers and llama.cpp give chat templates, and its `Mark`."""
    import jinja2
    import jinja2.exceptions
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox
    import jinja2.utils

    mark = Mark()

    class Generation(jinja2.ext.Extension):
        """{% generation %} ... {% endgeneration %} around what the assistant says."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_enclosed"), [], [], body).set_lineno(line)

        def _enclosed(self, caller):
            text = caller()
            return f"{mark.value}<{text}{mark.value}>" if mark.value else text

    def refuse(message):
        raise Refused(message)

    class Names(jinja2.utils.Namespace):
        """Jinja's namespace without names that begin with _, by which templates got out of the sandbox before."""

        def __setitem__(self, name, value):
            if str(name).startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace cannot have the name {name!r}")
            super().__setitem__(name, value)

    def namespace(*given, **named):
        names = Names()
        for name, value in dict(*given, **named).items():
            names[name] = value
        return names

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form):
        return (mark.now or datetime.datetime.now()).strftime(form)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=refuse, strftime_now=strftime_now, namespace=namespace)
    environment.globals["dict"] = lambda *given, **named: dict(*given, **named)
    return environment, mark


def bound_time(seconds):
    """End this process when it has computed for so long; 0: no longer. Windows has no such timer."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def bound_memory(n_bytes):
    """No more than `n_bytes` beyond what there is: an allocation then fails. Linux alone keeps to it."""
    import resource

    try:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        used = 2**29
    resource.setrlimit(resource.RLIMIT_AS, (used + n_bytes, used + n_bytes))


if __name__ == "__main__":
    main()
