"""Random programs against the whole of ggml_bridge. Run in a process of its own by test_bridge_safety.py:

    python tests/bridge_fuzz.py LOG level max_examples [seed]

Without a seed the examples are the same in every run.
Every call is written to LOG before it is made, as a line of Python, so that after a crash the last example of the log
is the program that caused it. Exceptions of the documented kinds are fine; anything else, another exception or the end
of the process, is a failure. Most arguments are chosen to fit, so that programs get as far as computing; some are not.
"""

import sys

import hypothesis
import numpy as np
from hypothesis import strategies as st

import ggml_bridge

ALLOWED = (TypeError, ValueError, RuntimeError, MemoryError)

ODD_SIZES = ["0", "-1", "2**31", "2**40", "2**63", "1.5", "True", "None", "'3'", "np.int64(2)", "(2,)"]
NUMBERS = ["0", "1", "-1", "0.5", "1e-5", "-2.5", "1e30", "-0.0", "3"]
ODD_NUMBERS = ["float('nan')", "float('inf')", "1e300", "'x'", "None", "1j", "np.float32(2)", "True"]
ODD_DTYPES = ["'f16'", "'bf16'", "'q8_0'", "'q4_1'", "'x'", "None", "7"]
ODD_ARRAYS = ["None", "'abc'", "[[1], [2, 3]]", "3", "object()", "np.array([None])", "b'\\0' * 34", "[]"]
NAMES = ["'x'", "''", "'é' * 60", "'\\0a'", "'\\ud800'", "None", "5"]
AXES = ["0", "1", "2", "-1", "-2", "3"]
ODD_INDICES = ["4", "-5", "2**40", "None", "True", "1.0"]
MAPPED = ["aligned(64)", "aligned(96)[4:68]", "aligned(64).view(np.float32).reshape(4, 4).T", "b''", "None"]


def aligned(n):
    """n bytes at an address divisible by 64 (that of a new array differs from run to run)."""
    memory = np.zeros(n + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + n]


class Program:
    """Executes lines, logs them, and remembers which variables are tensors."""

    def __init__(self, log, data, owner):
        self.log = log
        self.data = data
        self.owner = owner  # the variable that makes inputs
        self.names = []
        self.space = {"np": np, "ggml_bridge": ggml_bridge, "aligned": aligned}
        self.sizes = [1, *data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))]
        self.log.write("# example\nimport numpy as np, ggml_bridge; from bridge_fuzz import aligned\n")

    # --- drawing

    def rarely(self, one_in):
        return self.data.draw(st.integers(1, one_in)) == one_in

    def count(self, least, most):
        return self.data.draw(st.integers(least, most))

    def pick(self, options):
        options = options or ["None"]
        return options[self.data.draw(st.integers(0, len(options) - 1))]

    # --- running

    def run(self, line):
        self.log.write(line + "\n")
        self.log.flush()
        try:
            exec(line, self.space)
        except ALLOWED as error:
            assert str(error), f"{line}: {type(error).__name__} without a message"
            self.log.write(f"# {type(error).__name__}: {error}\n")
            return False
        return True

    def make(self, call):
        """Assign the result to a new variable; returns its name if it is a tensor."""
        name = f"t{len(self.names)}"
        if self.run(f"{name} = {call}") and isinstance(self.space[name], ggml_bridge.Tensor):
            self.names.append(name)
            return name
        return None

    def shape(self, name):
        """The shape of a variable, () if it is no usable tensor."""
        try:
            return tuple(self.space[name].shape)
        except (KeyError, AttributeError, RuntimeError):
            return ()

    def tensors(self, fits=lambda tensor: True):
        found = []
        for name in self.names:
            try:
                if fits(self.space[name]):
                    found.append(name)
            except RuntimeError:
                return []  # closed
        return found

    # --- arguments

    def argument(self, kind, earlier):
        """Source text of an argument; `earlier`: the arguments before it."""
        first = self.shape(earlier[0]) if earlier else ()
        if kind in ARGUMENTS:
            if self.rarely(12):
                return self.pick([*self.names, "None", "3", "np.zeros(3)", "s"])
            return ARGUMENTS[kind](self, first) or self.pick(self.names or ["None"])
        if kind == "size":
            return self.pick(ODD_SIZES) if self.rarely(12) else str(self.pick(self.sizes))
        if kind == "shape":
            if self.rarely(12):
                axes = [self.pick(ODD_SIZES) for _ in range(self.count(0, 6))]
                return self.pick(["({},)", "[{}]", "{}"]).format(", ".join(axes)) if axes else "()"
            return str(tuple(self.pick(self.sizes) for _ in range(self.pick([1, 2, 2, 2, 3, 4]))))
        if kind == "same":  # a shape with as many elements as the first argument
            flat = (int(np.prod(first)),)
            return str(self.pick([flat, first[::-1], (1, *flat), (*flat, 1), first[:4], (2, 3)]))
        if kind == "multiple":
            return str(tuple(axis * self.pick([1, 1, 2, 3]) for axis in first))
        if kind == "axes":
            return str(tuple(self.data.draw(st.permutations(range(len(first) or 2)))))
        if kind == "index":
            return self.pick(ODD_INDICES) if self.rarely(12) else self.pick(AXES)
        if kind == "number":
            return self.pick(ODD_NUMBERS) if self.rarely(12) else self.pick(NUMBERS)
        if kind == "positive":
            return self.pick(ODD_NUMBERS) if self.rarely(12) else self.pick(["1e-5", "0", "1.0", "10000.0"])
        if kind == "dtype":
            return self.pick(ODD_DTYPES) if self.rarely(8) else self.pick(["'f32'", "'f32'", "'i32'"])
        if kind == "name":
            return self.pick(NAMES)
        if kind == "function":
            return self.pick(["'tanh'", "'exp'", "'step'", "'softplus'", "'relu'", "'gelu'", "None"])
        assert kind == "mapped", kind
        return self.pick(MAPPED)

    def fresh(self, shape, dtype):
        """A new input of this shape."""
        if self.owner == "g":
            return self.make(f"g.input({shape}, {dtype!r})")
        if dtype == "i32":
            return self.make(f"s.input_1d_i32({shape[0]})") if len(shape) == 1 else None
        if len(shape) > 2:
            return None
        return self.make(f"s.input_{len(shape)}d_f32({', '.join(map(str, shape))})")

    def found(self, fits, shape=None, dtype="f32"):
        """A tensor that fits, or a new input of the given shape."""
        options = self.tensors(fits)
        if shape and (not options or self.rarely(4)):
            return self.fresh(shape, dtype)
        return self.pick(options) if options else None

    def call(self, target, method, kinds):
        arguments = []
        for kind in kinds:
            arguments.append(self.argument(kind, arguments))
        return self.make(f"{target}.{method}({', '.join(arguments)})")

    def calls(self, target, table, least, most):
        for _ in range(self.count(least, most)):
            method = self.pick(sorted(table))
            self.call(target, method, table[method])

    def array(self, name):
        """An expression for an array to upload, usually of the tensor's shape."""
        shape = self.shape(name)
        if self.rarely(15):
            shape = tuple(self.pick(self.sizes) for _ in range(self.count(0, 5)))
        if self.rarely(15):
            return self.pick(ODD_ARRAYS)
        if self.rarely(15):
            return f"np.zeros({shape}, {self.pick(['complex', 'bool', 'object', 'uint64', 'M8[s]', 'S3'])!r})"
        if self.rarely(10):
            return f"np.full({shape}, {self.pick(['np.nan', 'np.inf', '-np.inf', '1e38', '-3.4e38'])}, np.float32)"
        generator = f"np.random.default_rng({self.count(0, 9)})"
        if name in self.tensors(lambda tensor: tensor.dtype == "i32") or self.rarely(15):
            low, high = self.pick([(0, 1), (0, 2), (0, 3), (0, 9), (-1, 2), (-1, 9), (0, 2**31), (-(2**40), 2**40)])
            return f"{generator}.integers({low}, {high}, {shape})"
        return f"{generator}.normal(size={shape}){self.pick(['', '.T.copy().T', '.astype(np.float32)'])}"


def is_f32(tensor):
    return tensor.dtype == "f32"


def is_index(tensor):
    return tensor.dtype == "i32" and tensor.is_input


# how each kind of tensor argument is found, given the shape of the first argument
ARGUMENTS = {
    "any": lambda p, first: p.found(lambda t: True),
    "f32": lambda p, first: p.found(is_f32),
    "recent": lambda p, first: p.pick(p.names[-6:]) if p.names else None,
    "contiguous": lambda p, first: p.found(lambda t: is_f32(t) and t.is_contiguous),
    "matrix": lambda p, first: p.found(lambda t: is_f32(t) and t.ndim == 2),
    "deep": lambda p, first: p.found(lambda t: is_f32(t) and t.ndim >= 3, (2, 3, 4, 6)),
    "like": lambda p, first: p.found(lambda t: is_f32(t) and t.shape == first),
    "broadcast": lambda p, first: p.found(
        lambda t: is_f32(t) and t.ndim <= len(first) and all(n in (1, m) for n, m in zip(t.shape[::-1], first[::-1]))
    ),
    "columns": lambda p, first: p.found(
        lambda t: is_f32(t) and t.ndim == len(first) and t.shape[-1] == first[-1],
    ),
    "gain": lambda p, first: p.found(lambda t: is_f32(t) and t.shape == first[-1:], first[-1:]),
    "persistent": lambda p, first: p.found(lambda t: is_f32(t) and t.is_persistent),
    "persistent like": lambda p, first: p.found(lambda t: is_f32(t) and t.is_persistent and t.shape == first),
    "ids": lambda p, first: p.found(lambda t: is_index(t) and t.ndim == 1, (p.pick(p.sizes),), "i32"),
    "rows": lambda p, first: p.found(lambda t: is_f32(t) and t.ndim == 2 and t.shape[1:] == first[1:], first),
    "row ids": lambda p, first: p.found(lambda t: is_index(t) and t.ndim == 1, first[:1], "i32"),
    "positions": lambda p, first: p.found(
        lambda t: is_index(t) and t.shape == first[-3:-2], first[-3:-2] if len(first) >= 3 else (2,), "i32"
    ),
    "mask": lambda p, first: p.found(lambda t: is_f32(t) and t.shape == first[-2:], first[-2:]),
    "labels": lambda p, first: p.found(
        lambda t: (is_index(t) and t.shape == first[:1]) or (is_f32(t) and t.is_input and t.shape == first),
        first[:1],
        "i32",
    ),
    "hp": lambda p, first: p.found(lambda t: is_f32(t) and t.shape in ((7,), (1, 7)), (1, 7)),
    "scalar": lambda p, first: p.found(lambda t: is_f32(t) and t.shape in ((1,), (1, 1)) and not t.is_input),
}

ONE = ["f32"]
TWO = ["f32", "broadcast"]
GRAPH = {
    "input": ["shape", "dtype", "name"], "output": ["any"], "set_name": ["any", "name"],
    "limit": ["ids", "index", "size"], "clear": ["any"], "slice": ["any", "index", "index", "size"],
    "reshape": ["contiguous", "same"], "permute": ["any", "axes"], "transpose": ["matrix"], "cont": ["any"],
    "cast": ["any", "dtype"], "cpy": ["any", "persistent like"], "concat": ["f32", "columns", "index"],
    "repeat": ["f32", "multiple"], "full": ["shape", "number"], "blank": ["shape"],
    "add": TWO, "sub": TWO, "mul": TWO, "div": TWO,
    "scale": ["contiguous", "number", "number"], "sqr": ONE, "sqrt": ONE, "log": ONE, "sin": ONE, "cos": ONE,
    "unary": ["f32", "function"], "tanh": ONE, "exp": ONE, "neg": ONE, "sigmoid": ONE, "silu": ONE, "relu": ONE,
    "silu_back": ["contiguous", "like"], "swiglu": ["f32", "like"], "sum": ["contiguous"], "sum_rows": ONE,
    "mean": ONE, "cumsum": ONE, "argmax": ["matrix"], "mul_mat": ["any", "columns"],
    "soft_max_ext": ["contiguous", "mask", "number"], "norm": ["f32", "positive"], "rms_norm": ["f32", "positive"],
    "rope": ["deep", "positions"],
    "rope_back": ["deep", "positions", "size", "positive", "index", "any", "number"],
    "get_rows": ["matrix", "ids"], "set_rows": ["matrix", "rows", "row ids"], "add_into": ["persistent", "broadcast"],
    "fill_into": ["persistent", "number"], "describe": [], "explain": [],
    "opt_step_adamw": ["persistent", "like", "persistent like", "persistent like", "hp"],
}  # fmt: skip
BACKEND = {"persistent": ["shape", "dtype", "name"], "mapped": ["mapped", "shape", "dtype"], "allocate": []}
SESSION = {
    "get_rows": ["matrix", "ids"], "add": TWO, "mul": TWO, "matmul": ["matrix", "columns"],
    "scale": ["f32", "number"], "layer_norm": ["matrix", "gain", "gain", "positive"],
    "rms_norm": ["matrix", "gain", "positive"], "gelu": ONE, "silu": ONE, "softmax": ONE,
    "diag_mask_inf": ["matrix", "index"], "transpose": ["matrix"], "cont_2d": ["f32", "size", "size"],
    "concat": ["matrix", "columns", "index"], "cross_entropy_loss": ["matrix", "labels"], "set_output": ["any"],
}  # fmt: skip
INPUTS = {"input_1d_i32": ["size"], "input_1d_f32": ["size"], "input_2d_f32": ["size", "size"]}
WEIGHTS = {"input_1d_f32_persistent": ["size"], "input_2d_f32_persistent": ["size", "size"]}
ANY_TIME = {
    "set_param": ["any"], "finalize_weights": [], "zero_tensor": ["any"], "download": ["any"], "tensor_grad": ["any"],
    "download_row_major": ["any", "size", "size"], "build_forward_only": ["any"], "build_backward": [],
    "opt_step_adamw": ["persistent", "hp"], "extend_backward_graph": ["any"], "realize_backward": [], "realize": [],
    "compute": [], "graph_reset": [], "graph_reset_grads_only": [], "compute_backward": [],
    "set_graph_capacity": ["size"], "set_loss": ["any"], "explain": [], "describe": [], "close": [],
}  # fmt: skip


def graph_example(program):
    program.run(f"s = ggml_bridge.Backend('cpu', {program.pick([1, 1, 2])})")
    program.run("g = s.graph()")
    for _ in range(program.count(1, 4)):
        program.call("g", "input", GRAPH["input"])
        shape, dtype = program.argument("shape", []), program.argument("dtype", [])
        for _ in range(program.pick([1, 3])):  # as for a weight and its moments
            program.make(f"s.persistent({shape}, {dtype})")
    if program.rarely(6):
        program.run("other = ggml_bridge.Backend('cpu', 1)")
        program.call("other", "persistent", BACKEND["persistent"])
    for _ in range(program.count(3, 30)):
        if program.rarely(15):
            program.calls("s", BACKEND, 1, 1)
        else:
            program.calls("g", GRAPH, 1, 1)
    for name in program.names[-3:]:
        program.run(f"g.output({name})")
    program.run("g.allocate()")
    for name in program.tensors(lambda tensor: tensor.is_input):
        if program.run(f"{name}.upload({program.array(name)})") is False:
            program.run(f"{name}.zero()")  # so that most graphs can be computed
    for _ in range(program.count(1, 3)):
        program.run("g.compute()")
        for name in program.names[-3:]:
            program.run(f"{name}.download()")
        for name in program.tensors(lambda tensor: tensor.is_input)[:3]:
            program.run(f"{name}.upload({program.array(name)})")
        if program.rarely(6):
            program.calls("g", GRAPH, 1, 1)
        if program.rarely(6):
            program.run(
                program.pick(["g.close()", "s.close()", "s.n_threads = 1", "s.n_threads = 0", "g.capacity = 3"])
            )
    program.run("s.close()")
    for name in program.names[:2]:
        program.run(f"{name}.download()")
    program.calls("g", GRAPH, 1, 1)


def session_example(program):
    capacity = 20 if program.rarely(10) else 4000
    program.run(f"s = ggml_bridge.Session(n_threads={program.pick([1, 1, 2])}, graph_capacity={capacity})")

    def out_of_order():
        if program.rarely(8):
            program.calls("s", ANY_TIME, 1, 2)

    out_of_order()
    program.calls("s", WEIGHTS, 2, 6)
    for name in program.names:
        program.run(f"s.set_param({name})")
    out_of_order()
    program.run("s.finalize_weights()")
    for name in program.tensors(lambda tensor: tensor.is_persistent):
        program.run(f"s.upload_row_major({name}, {program.array(name)})")
    program.calls("s", INPUTS, 1, 3)
    for _ in range(program.count(2, 25)):
        program.calls("s", SESSION, 1, 1)
        out_of_order()
    for _ in range(program.count(1, 3)):
        program.call("s", "cross_entropy_loss", SESSION["cross_entropy_loss"])
    for _ in range(5):
        loss = program.argument("scalar", [])
        if program.run(f"s.set_loss({loss})") and program.run("s.build_backward()"):
            break
    out_of_order()
    for name in program.tensors(lambda tensor: tensor.is_persistent)[:4] + program.names[-3:]:
        program.make(f"s.tensor_grad({name})")
        program.make(f"s.opt_step_adamw({name}, {program.argument('hp', [])})")
    if program.rarely(4):
        program.run(f"s.build_forward_only({program.pick(program.names)})")
        program.run("s.realize()")
    program.run("s.realize_backward()")
    for step in range(program.count(1, 3)):
        out_of_order()
        program.run("s.graph_reset()" if step == 0 else "s.graph_reset_grads_only()")
        for name in program.tensors(lambda tensor: tensor.is_input):
            integers = name in program.tensors(is_index)
            verb = "upload_int_array" if integers else "upload_row_major"
            if not program.run(f"s.{verb}({name}, {program.array(name)})") and step == 0:
                program.run(f"s.zero_tensor({name})")
        program.run("s.compute_backward()")
        program.run("s.compute()")
        for name in program.names[-4:]:
            program.run(f"s.download({name})")
    program.run("s.close()")
    program.calls("s", SESSION | ANY_TIME, 1, 2)


EXAMPLES = {"graph": (graph_example, "g"), "session": (session_example, "s")}


def main(path, level, max_examples, seed=None):
    example, owner = EXAMPLES[level]
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as log:

        @hypothesis.settings(
            max_examples=int(max_examples),
            deadline=None,
            derandomize=seed is None,
            database=None,
            phases=[hypothesis.Phase.generate],  # the log is the program; a shorter one is not worth the minutes
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(st.data())
        def examples(data):
            with np.errstate(all="ignore"):
                example(Program(log, data, owner))

        (examples if seed is None else hypothesis.seed(int(seed))(examples))()


if __name__ == "__main__":
    main(*sys.argv[1:])
