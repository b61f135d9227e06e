"""Random programs against the op table of the compiled kernels. Run in a process of its own by test_kernels_safety.py:

    python tests/kernels_fuzz.py LOG max_examples [seed]

Without a seed the examples are the same in every run.
Every call is written to LOG before it is made, as a line of Python, so that after a crash the last example of the log
is the program that caused it. A call with wrong arguments may raise ValueError or TypeError, and the message must name an
argument of the op; anything else, another exception or the end of the process, is a failure. Most arguments fit, so that
forwards and backwards are computed; between the two the program does to arrays and caches whatever Python lets it do.
"""

import copy
import inspect
import pickle
import re
import sys

import hypothesis
import numpy as np
from hypothesis import strategies as st

from toy._kernels import memory
from toy._kernels import quantized as kernels
from toy.ops import accelerated as ops
from toy.quantized import TYPES, QuantizedMatrix

try:
    import resource  # a call that never returns is then ended by the system, however busy the machine is
except ImportError:
    resource = None

CPU_SECONDS = 1200
# besides TypeError and ValueError
POKED = (AttributeError, BufferError, pickle.PickleError, IndexError, OverflowError, np.ma.MaskError)

ODD_ARRAYS = [
    "None", "3", "'abc'", "[[1.0, 2.0]]", "object()", "np.zeros(())", "np.zeros((0, 0), np.float32)", "np.array([None])",
    "np.zeros((2, 3, 4), np.float32)", "np.zeros((0, 8), np.float32)", "np.zeros((3, 0), np.float32)",
    "np.zeros((2, 2), complex)", "np.zeros((2, 2), 'M8[s]')", "np.ma.masked", "b'12'", "np.float32(1)",
]  # fmt: skip
ODD_COUNTS = [
    "0",
    "-1",
    "2**31",
    "2**40",
    "2**63 - 1",
    "2**70",
    "1.5",
    "True",
    "'2'",
    "np.array([2])",
    "(2,)",
    "np.int8(2)",
]
ODD_NUMBERS = [
    "'x'",
    "1j",
    "None",
    "10**400",
    "float('nan')",
    "float('inf')",
    "-1.0",
    "0",
    "np.zeros(2)",
    "np.ma.masked",
]
ODD_INTEGERS = [
    "np.full({n}, 2**64 - 1, np.uint64)", "np.full({n}, 2**63, np.uint64)", "np.full({n}, -1)", "np.full({n}, 10**12)",
    "np.full({n}, -2**63)", "np.zeros({n})", "np.zeros({n} + 1, int)", "np.zeros(({n}, 1), int)", "[0] * {n}", "None",
    "np.ma.array(np.zeros({n}, int), mask=True)", "np.zeros({n}, bool)", "np.array([None] * {n})", "np.full({n}, 2**24 - 1)",
    "np.zeros({n}, '>i4')", "np.full({n}, 2**24)",
]  # fmt: skip
HP = "np.array([[1e-3, 0.9, 0.95, 1e-8, 0.1, 0.9, 0.95]])"
ODD_ROWS = [
    f"{HP}[:, :6]",
    "None",
    "'x'",
    f"{HP}.astype(complex)",
    f"np.ma.array({HP}, mask=True)",
    "[1, 2, 3, 4, 5, 6, 'x']",
]
ODD_RAW = [
    "np.zeros((4, 0), np.uint8)", "np.zeros((0, {bytes}), np.uint8)", "np.zeros((4, {bytes} + 1), np.uint8)", "None",
    "np.zeros((4, {bytes}), np.int8)", "np.zeros((4, 2 * {bytes}), np.uint8)[:, ::2]", "b'0' * 40",
    "np.ma.zeros((4, {bytes}), np.uint8)", "np.zeros({bytes}, np.uint8)",
]  # fmt: skip
# what Python lets one do to the arrays of a forward, and to its cache, before the backward
TO_ARRAYS = [
    "{a}.resize((1, 1), refcheck=False)", "{a}.resize((400, 400), refcheck=False)", "{a}.shape = {a}.shape[::-1]",
    "{a}.dtype = np.int32", "{a}.flags.writeable = False", "{a}[...] = np.nan", "{a}[...] = 10**12", "{a} = None",
    "{a}.fill(-(2**31))",
]  # fmt: skip
TO_CACHES = [
    "c = type(c)()", "c = type(c).__new__(type(c))", "c = copy.copy(c)", "c = copy.deepcopy(c)",
    "c = pickle.loads(pickle.dumps(c))", "c = pickle.loads(pickle.dumps(c, 0))", "c.__setstate__((0, 0, None))",
    "c.__setstate_cython__((0, 0, None))", "c.__init__(1, 2)", "c.token_ids[:] = 10**12", "c.labels[:] = 10**12",
    "c.positions[:] = 10**12", "c.token_ids = None", "c.cosines[:] = 7", "c.sines.flags.writeable = True", "c.x = None",
    "c.largest[:] = 0", "c.logits.resize((1, 1), refcheck=False)", "c.probabilities", "c = None", "c = (c,)",
    "c = type(c)(*range(3))", "c.share[:] = 1", "c.args", "c.rstd = None", "c = c[0]", "c = {'x': c}",
]  # fmt: skip


class Program:
    """Executes lines, logs them, and remembers arrays and caches by name."""

    def __init__(self, log, data):
        self.log, self.data, self.n = log, data, 0
        self.space = {
            "np": np, "ops": ops, "kernels": kernels, "memory": memory, "QuantizedMatrix": QuantizedMatrix, "copy": copy,
            "pickle": pickle,
        }  # fmt: skip
        self.log.write("# example\nfrom kernels_fuzz import *; r = np.random.default_rng(0)\n")
        self.space["r"] = np.random.default_rng(0)

    # -- drawing

    def rarely(self, one_in=14):
        return self.data.draw(st.integers(1, one_in)) == one_in

    def pick(self, options):
        return options[self.data.draw(st.integers(0, len(options) - 1))]

    def size(self):
        return self.pick([1, 2, 3, 4, 5, 8, 17, 70, 0])

    # -- running

    def run(self, line, allowed=(), named=()):
        """Execute a line. allowed: exceptions besides ValueError and TypeError; named: words, one must be in the message."""
        self.log.write(line + "\n")
        self.log.flush()
        try:
            exec(line, self.space)
        except (ValueError, TypeError, *allowed) as error:
            message = str(error)
            words = set(re.findall(r"\w+", message))
            assert not named or words & set(named), f"{line}: {message!r} names no argument of {sorted(named)}"
            self.log.write(f"# {type(error).__name__}: {message}\n")
            return False
        except MemoryError:
            return False
        return True

    def call(self, result, function, *arguments):
        """result = function(*arguments); an error must name a parameter of the function."""
        parameters = {"cache", *inspect.signature(eval(function, self.space)).parameters}
        if "table" in parameters or "weight" in parameters:
            parameters.add("raw")
        return self.run(f"{result} = {function}({', '.join(map(str, arguments))})", named=parameters)

    def new(self, expression):
        self.n += 1
        name = f"a{self.n}"
        self.run(f"{name} = {expression}", allowed=POKED)
        return name

    # -- arguments: source text

    def matrix(self, rows, columns):
        if self.rarely():
            return self.new(self.pick(ODD_ARRAYS))
        rows, columns = (self.size() if self.rarely(25) else n for n in (rows, columns))
        plain = f"r.standard_normal(({rows}, {columns}), np.float32)"
        changed = [
            f"{plain}.astype(np.float64)", f"{plain}.astype('>f4')", f"np.ma.array({plain})", f"{plain}.T.copy().T",
            f"np.zeros(({rows}, {columns} + 3), np.float32)[:, 2:-1]", f"{plain}[::-1]", f"np.asmatrix({plain})",
            f"np.broadcast_to({plain}[:1], ({rows}, {columns}))",
        ]  # fmt: skip
        return self.new(self.pick(changed) if self.rarely() else plain)

    def vector(self, size):
        if self.rarely():
            return self.new(self.pick(ODD_ARRAYS))
        plain = f"r.standard_normal({self.size() if self.rarely(25) else size}, np.float32)"
        return self.new(
            self.pick([f"{plain}[::-1]", f"np.ma.array({plain})", f"{plain}.astype(int)"]) if self.rarely() else plain
        )

    def integers(self, n, low, high):
        if self.rarely(6):
            return self.new(self.pick(ODD_INTEGERS).format(n=n))
        kind = self.pick(["np.int64", "np.int32", "np.uint8"]) if low >= 0 and high < 100 else "np.int64"
        return self.new(f"r.integers({low}, {max(high, low + 1)}, {n}, {kind})")

    def count(self, value):
        return self.pick(ODD_COUNTS) if self.rarely() else str(value)

    def number(self, value):
        return self.pick(ODD_NUMBERS) if self.rarely() else str(value)

    def gradient(self, *shape):
        """Where a parameter's gradient goes: usually zeros, sometimes nothing, sometimes an array that is in use."""
        if self.rarely(8):
            return "None"
        if self.rarely(8) and self.n:
            return f"a{self.data.draw(st.integers(1, self.n))}"
        return self.matrix(*shape) if len(shape) == 2 else self.vector(*shape)

    def disturb(self, *arrays):
        """Maybe do something to the forward's arrays or its cache `c`."""
        if self.rarely(4):
            self.run(self.pick(TO_ARRAYS).format(a=self.pick(arrays)), allowed=POKED)
        if self.rarely(4):
            self.run(self.pick(TO_CACHES), allowed=POKED)
        if self.rarely(6):
            self.run("c, other = other, c")

    def backward(self, function, *arguments):
        self.call("result", function, *arguments)
        if self.rarely(6):
            self.run("other = c")


def linear(p):
    n, n_in, n_out = p.size(), p.size(), p.size()
    x, w, b = p.matrix(n, n_in), p.matrix(n_out, n_in), p.gradient(n_out)
    p.call("y, c", "ops.linear", x, w, b)
    p.disturb(x, w)
    p.backward("ops.linear_backward", p.matrix(n, n_out), "c", p.gradient(n_out, n_in), p.gradient(n_out))


def norm(p):
    n, d = p.size(), p.size()
    x, gamma, beta = p.matrix(n, d), p.vector(d), p.vector(d)
    kind = p.pick(["rms_norm", "layer_norm"])
    parameters = [gamma] if kind == "rms_norm" else [gamma, beta]
    p.call("y, c", f"ops.{kind}", x, *parameters, p.number(1e-5))
    p.disturb(x, gamma)
    if p.rarely(20):
        kind = p.pick(["rms_norm", "layer_norm"])
    gradients = [p.gradient(d)] if kind == "rms_norm" else [p.gradient(d), p.gradient(d)]
    p.backward(f"ops.{kind}_backward", p.matrix(n, d), "c", *gradients)


def elementwise(p):
    n, d = p.size(), p.size()
    x, up = p.matrix(n, d), p.matrix(n, d)
    kind = p.pick(["gelu", "geglu", "silu", "softcap", "swiglu"])
    more = [up] if kind.endswith("glu") else [p.number(2.5)] if kind == "softcap" else []
    p.call("y, c", f"ops.{kind}", x, *more)
    p.call("y", "ops.add", x, up)
    p.disturb(x, up)
    p.backward(
        f"ops.{p.pick(['gelu', 'geglu', 'softcap', 'swiglu']) if p.rarely(10) else kind}_backward", p.matrix(n, d), "c"
    )
    p.call("y", "ops.scale", x, p.number(0.5))


def embedding(p):
    n, rows, d = p.size(), p.size(), p.size()
    ids, table = p.integers(n, 0, rows), p.matrix(rows, d)
    p.call("y, c", "ops.embedding", ids, table)
    p.disturb(ids, table)
    p.backward("ops.embedding_backward", p.matrix(n, d), "c", p.gradient(rows, d))


def rope(p):
    n, heads, half = p.size(), p.pick([1, 2, 3]), p.pick([1, 2, 4])
    x, positions = p.matrix(n, 2 * heads * half), p.integers(n, 0, p.pick([9, 3000, 2**24]))
    factors = p.pick(
        ["None", f"({1.5 * half},) * {half}", f"(1.0,) * {half + 1}", f"[2] * {half}", "[0.0]", "'f'", "[{}]"]
    )
    options = [p.pick(["False", "True", "None"]), factors, p.number(1.25)] if p.rarely(2) else []
    p.call("y, c", "ops.rope", x, positions, p.count(heads), p.number(10000.0), *options)
    p.disturb(x, positions)
    p.backward("ops.rope_backward", p.matrix(n, 2 * heads * half), "c")


def attention(p):
    batch, kv_heads, group, d_head = p.pick([1, 2, 3]), p.pick([1, 2]), p.pick([1, 2]), p.pick([1, 4, 8])
    t_q = p.size()
    t_k = t_q + p.pick([0, 0, 0, 3])
    width = kv_heads * group * d_head
    q, k, v = (
        p.matrix(batch * t_q, width),
        p.matrix(batch * t_k, kv_heads * d_head),
        p.matrix(batch * t_k, kv_heads * d_head),
    )
    causal = p.pick(["True", "False", "True", "None", "np.zeros(2)", "0"])
    p.run(f"flag = {causal}")
    arguments = [q, k, v, p.count(batch), p.count(kv_heads * group), p.count(kv_heads), "flag"]
    if p.rarely(2):
        arguments += [p.pick(["None", "1", "3", "0", "'w'"]), p.pick(["None", "0.5", "0.0", "-1", "'c'"])]
    if causal == "np.zeros(2)":
        p.run(f"y, c = ops.attention({', '.join(arguments)})")
    else:
        p.call("y, c", "ops.attention", *arguments)
    p.disturb(q, k, v)
    p.backward("ops.attention_backward", p.matrix(batch * t_q, width), "c")


def loss(p):
    n, vocabulary = p.size(), p.size()
    logits = p.matrix(n, vocabulary)
    labels = p.matrix(n, vocabulary) if p.rarely(4) else p.integers(n, -1, vocabulary)
    p.call("y, c", "ops.cross_entropy", logits, labels)
    p.disturb(logits, labels)
    p.backward("ops.cross_entropy_backward", "c")


def columns(p):
    n, widths = p.size(), [p.size() for _ in range(3)]
    x = p.matrix(n, sum(widths))
    given = p.pick(
        [f"[{p.count(widths[0])}, {widths[1]}, {p.count(widths[2])}]", "None", "'abc'", "[]", "[1, 2**63 - 1]"]
    )
    p.call("y", "ops.split", x, given if p.rarely(3) else widths)
    p.call("y", "ops.reshape", x, p.count(n))
    p.call("y", "ops.zeros_like", x)
    other = p.matrix(n, widths[0])
    p.call("y", "ops.concat", p.pick([f"[{x}, {other}]", "y", "None", "[]", "[None]", x, f"({other}, 3)"]))


def optimizer(p):
    shape = (p.size(), p.size())
    arrays = [p.matrix(*shape) for _ in range(4)]
    if p.rarely(3):
        arrays[p.data.draw(st.integers(0, 3))] = p.pick([arrays[0], f"{arrays[0]}[:]", f"{arrays[1]}.T"])
    hp = p.pick(ODD_ROWS) if p.rarely(5) else HP
    if all(p.run(f"view = {array}", allowed=POKED) for array in arrays if not array.isidentifier()):
        p.call("y", "ops.adamw_step", *arrays, hp)
    p.call("y", "ops.sum_of_squares", arrays[0])
    if p.rarely(8):
        p.run(f"memory.set_idle_limit({p.pick(ODD_COUNTS)})", named={"size"})
        p.run("memory.set_idle_limit(2**30)")


def quantized(p):
    kind = p.pick([*kernels.TYPES, "Q2_K"])
    name = p.pick([kind, kind, kind, kind, "None", "'x'", "[]", "7"])
    name = repr(kind) if name == kind else name
    block = TYPES[kind]
    n, n_out, blocks = p.size(), p.pick([1, 3, 20]), p.pick([1, 1, 2])
    n_in, row = blocks * block.block, blocks * block.n_bytes
    raw = p.new(p.pick(ODD_RAW).format(bytes=row) if p.rarely(3) else f"r.integers(0, 60, ({n_out}, {row}), np.uint8)")
    x, ids = p.matrix(n, n_in), p.integers(n, 0, n_out)
    # the functions under the table: raw bytes and a type, both unchecked until here
    p.call("y", "kernels.linear", x, raw, name, p.gradient(n_out))
    p.call("y", "kernels.linear_backward", p.matrix(n, n_out), raw, name, p.gradient(n_out))
    p.call("y", "kernels.embedding", ids, raw, name)
    p.call("y", "kernels.dequantize", raw, name, p.matrix(n_out, n_in))
    # a matrix, and the ops
    if p.run(f"w = QuantizedMatrix({raw}, {name}, ({n_out}, {n_in}))", named={"raw", "type", "shape", "matrix"}):
        if p.rarely(6):
            p.run(
                p.pick(
                    ["w.raw = np.zeros((1, 7), np.uint8)", "w.type = 'F32'", "w.raw = w.raw[:, :0]", "w.shape = (1, 1)"]
                )
            )
            p.run(f"y, c = ops.linear({x}, w)", allowed=POKED)
            p.run(f"y, c = ops.embedding({ids}, w)", allowed=POKED)
            return
        p.call("y, c", "ops.embedding", ids, "w")
        if p.call("y, c", "ops.linear", x, "w", p.gradient(n_out)):
            p.backward("ops.linear_backward", p.matrix(n, n_out), "c", p.pick(["None", "None", x]), "None")


OPS = [linear, norm, elementwise, embedding, rope, attention, loss, columns, optimizer, quantized]


def program(log, data):
    p = Program(log, data)
    p.run("c = other = y = None")
    for _ in range(data.draw(st.integers(2, 5))):
        p.pick(OPS)(p)


def main(path, max_examples, seed=None):
    if resource is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as log:

        @hypothesis.settings(
            max_examples=int(max_examples),
            deadline=None,
            derandomize=seed is None,
            database=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(st.data())
        def examples(data):
            with np.errstate(all="ignore"):
                program(log, data)

        (examples if seed is None else hypothesis.seed(int(seed))(examples))()


if __name__ == "__main__":
    main(*sys.argv[1:])
