"""Named parameter trees: a flat mapping of names to arrays, also reachable as attributes.

    tree["blocks.0.w_q"]  is  tree.blocks[0].w_q

All arrays of a tree are views of ONE flat buffer (`tree.flat`), so that zeroing, AdamW, the gradient norm and checkpoints
are one pass over one array. A tree whose leaves are something else (the nodes of a graph) has `flat = None`.
"""

import zlib
from collections.abc import ItemsView, Iterable, Iterator, Mapping, ValuesView
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from toy.arrays import plain_array

if TYPE_CHECKING:
    from typing_extensions import Self

Shapes = dict[str, tuple[int, ...]]  # of parameters, by name
Stds = dict[str, float | str]  # how parameters start, by name; see `initialize_array`


class Namespace:
    """Attributes made from the dotted part of names; assigning to a leaf copies into its array."""

    if TYPE_CHECKING:  # the names are those of the model's parameters

        def __getattr__(self, name: str) -> Any: ...

    def __setattr__(self, name: str, value: Any) -> None:
        current = self.__dict__.get(name)
        if current is value:
            return  # the second half of `tree.w += x`: the array was changed in place
        if not isinstance(current, np.ndarray):
            raise AttributeError(f"{name!r} is not an array of this parameter tree and cannot be assigned")
        if np.shape(value) != current.shape:
            raise ValueError(f"{name} has shape {current.shape}, cannot assign an array of shape {np.shape(value)}")
        current[...] = value

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self.__dict__)})"


class Block(Namespace):
    """The parameters (or gradients) of one transformer block."""


class ParameterTree(Namespace):
    """leaves: dict of dotted names to arrays (or graph nodes), in order. A numeric part indexes a list of blocks.

    A leaf of None can be reached as an attribute but is not an item of the tree (a frozen parameter in a gradient tree).
    """

    _leaves: dict[str, Any]
    flat: np.ndarray  # None where the leaves are something else than views of it

    def __init__(self, leaves: Mapping[str, Any], flat: np.ndarray | None = None) -> None:
        self.__dict__.update(_leaves={name: leaf for name, leaf in leaves.items() if leaf is not None}, flat=flat)
        for name, leaf in leaves.items():
            *path, last = name.split(".")
            node: Any = self.__dict__
            for part, following in zip(path, [*path[1:], last]):
                if part.isdigit():
                    while len(node) <= int(part):
                        node.append(Block())
                    node = node[int(part)].__dict__
                else:
                    node = node.setdefault(part, [] if following.isdigit() else Namespace())
                    node = node if isinstance(node, list) else node.__dict__
            node[last] = leaf

    @classmethod
    def zeros(cls, shapes: Shapes, dtype: npt.DTypeLike = np.float32) -> "Self":
        """A tree of zeros. shapes: dict of names to shapes."""
        return cls(*_allocate(shapes, dtype))

    def __getitem__(self, name: str) -> Any:
        return self._leaves[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._leaves)

    def __len__(self) -> int:
        return len(self._leaves)

    def items(self) -> ItemsView[str, Any]:
        return self._leaves.items()

    def values(self) -> ValuesView[Any]:
        return self._leaves.values()

    @property
    def shapes(self) -> Shapes:
        return {name: leaf.shape for name, leaf in self.items()}

    @property
    def dtype(self) -> np.dtype:
        """Of the arrays; float32 for a tree of several buffers."""
        return np.dtype(np.float32) if self.flat is None else self.flat.dtype

    @property
    def n_parameters(self) -> int:
        return sum(int(np.prod(leaf.shape)) for leaf in self._leaves.values())

    def lowest_block(self) -> int:
        """Of gradients: the number of the first of the blocks `blk` that a backward must reach, nothing before it has any."""
        if any(not name.startswith(("blk.", "output")) for name in self):
            return 0
        return min((int(name.split(".")[1]) for name in self if name.startswith("blk.")), default=len(self.blk))

    def summary(self) -> str:
        """The tree as text: every name with its shape and count; blocks of the same shapes are shown once."""
        lines = [f"{self.n_parameters:,} parameters"]
        blocks: dict[tuple[str, int], list[tuple[str, tuple[int, ...], int]]] = {}  # (list, block) -> its rows
        for name, leaf in self.items():
            row = (name, tuple(leaf.shape), int(np.prod(leaf.shape)))
            head, _, rest = name.partition(".")
            index, _, inner = rest.partition(".")
            if index.isdigit():
                blocks.setdefault((head, int(index)), []).append((inner, *row[1:]))
            else:
                lines.append(_summary_line(*row))
        for (head, first), rows in blocks.items():
            if (head, first - 1) in blocks and blocks[head, first - 1] == rows:
                continue
            last = first
            while blocks.get((head, last + 1)) == rows:
                last += 1
            which = f"{head}.{first}" if last == first else f"{head}.{first} to {head}.{last}, each"
            lines.append(f"{which}: {sum(count for *_, count in rows):,}")
            lines += ["  " + _summary_line(*row) for row in rows]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self.summary()}"

    def copies(self) -> dict[str, np.ndarray]:
        """dict of names to float32 copies of the arrays."""
        return {name: np.array(leaf, dtype=np.float32) for name, leaf in self.items()}

    def load(self, mapping: Mapping[str, npt.ArrayLike], what: str = "parameters") -> None:
        """Copy arrays in, all or nothing.

        Raises ValueError for a missing or unknown name, another shape, or a number that is not finite (in this tree's
        dtype); nothing is changed then.
        """
        self.check(mapping, what)
        for name, leaf in self.items():
            leaf[...] = mapping[name]

    def check(self, mapping: Mapping[str, npt.ArrayLike], what: str = "parameters") -> None:
        """Raise the errors of `load` without changing anything."""
        check_arrays(self.shapes, mapping, what)


def _summary_line(name: str, shape: tuple[int, ...], count: int) -> str:
    return f"{name:<28} {' x '.join(map(str, shape)):>16} {count:>14,}"


def check_arrays(shapes: Shapes, mapping: Mapping[str, npt.ArrayLike], what: str = "parameters") -> None:
    """Raise ValueError unless `mapping` has exactly the names and shapes of `shapes`, with finite float32 numbers."""
    missing = [name for name in shapes if name not in mapping]
    unknown = [name for name in mapping if name not in shapes]
    if missing or unknown:
        raise ValueError(
            f"{what}: the names do not match this model"
            + (f"; missing: {some_names(missing)}" if missing else "")
            + (f"; unknown: {some_names(unknown)}" if unknown else "")
        )
    for name, shape in shapes.items():
        array = plain_array(f"{what}: {name}", mapping[name])
        if array.shape != tuple(shape):
            raise ValueError(f"{what}: {name} has shape {array.shape}, this model expects {tuple(shape)}")
        if array.dtype.kind not in "fiu":
            raise ValueError(f"{what}: {name} has dtype {array.dtype}, expected real numbers")
        with np.errstate(over="ignore"):
            if not np.isfinite(array.astype(np.float32, copy=False)).all():
                raise ValueError(f"{what}: {name} holds numbers that are not finite in float32")


class GradientTree(ParameterTree):
    """The mirror of a parameter tree: the same names and shapes, plus `loss`. All zeros when made.

    Backward passes add to every array and to `loss`; `fill_zero()` starts anew.
    """

    loss: float

    def __init__(self, leaves: Mapping[str, Any], flat: np.ndarray | None = None) -> None:
        super().__init__(leaves, flat)
        self.loss = 0.0

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "loss":
            self.__dict__["loss"] = value
        else:
            super().__setattr__(name, value)

    @classmethod
    def like(cls, tree: ParameterTree, trainable: Iterable[str] | None = None) -> "Self":
        """The mirror of `tree`; trainable: names of the parameters that have a gradient (None: all), the others get None."""
        names = set(tree if trainable is None else trainable)
        leaves, flat = _allocate({name: shape for name, shape in tree.shapes.items() if name in names}, tree.dtype)
        return cls({name: leaves.get(name) for name in tree}, flat)

    def fill_zero(self) -> None:
        self.flat.fill(0)
        self.loss = 0.0


def initialize(tree: ParameterTree, init_stds: Stds, seed: int, init_scale: float = 1.0) -> None:
    """Fill `tree` with its initial weights. init_stds: dict of names to what `initialize_array` takes as `std`."""
    for name, leaf in tree.items():
        initialize_array(name, leaf, init_stds[name], seed, init_scale)


def residual_stream_stds(names: Iterable[str], n_layers: int) -> Stds:
    """What GPT-2 (Radford et al. 2019, section 2.3) and models after it start from, for GGUF names, as a dict
    for `initialize`: Normal(0, 0.02), projections into the residual stream scaled by 1/sqrt(2 n_layers), gains 1, biases
    0."""
    stds: Stds = {}
    for name in names:
        if name.endswith("bias"):
            stds[name] = "zeros"
        elif name.endswith("norm.weight"):
            stds[name] = "ones"
        elif name.endswith(("attn_output.weight", "ffn_down.weight")):
            stds[name] = 0.02 / (2 * n_layers) ** 0.5
        else:
            stds[name] = 0.02
    return stds


def initialize_array(name: str, out: np.ndarray, std: float | str, seed: int, init_scale: float = 1.0) -> None:
    """Fill the C-contiguous array `out` with the initial values of the parameter `name`.

    std: the standard deviation of a zero-mean normal distribution, or "ones" / "zeros" (gains and biases). Every tensor has
    its own random stream, made from (seed, name): the weights do not depend on the order of the tensors, on their number or
    on the backend.
    """
    if std == "ones":
        out.fill(1.0)
    elif std == "zeros":
        out.fill(0.0)
    else:
        generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
        flat = out.reshape(-1)
        for start in range(
            0, flat.size, _CHUNK
        ):  # the same numbers as in one draw, without its float64 copy of the whole
            part = flat[start : start + _CHUNK]
            part[...] = init_scale * float(std) * generator.standard_normal(part.size)


def round_weights(weights: np.ndarray, dtype: str) -> np.ndarray:
    """float32 -> float32 rounded to the nearest "f16" or "bf16" number, ties to even ("f32": as it is)."""
    if dtype == "f16":
        with np.errstate(over="ignore"):
            return weights.astype(np.float16).astype(np.float32)
    if dtype == "bf16":  # the upper 16 bits of a float32
        bits = weights.view(np.uint32)
        rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        return np.where(np.isnan(weights), weights, (rounded & np.uint32(0xFFFF0000)).view(np.float32))
    return weights


_CHUNK = 2**16  # numbers
_ALIGNMENT = 64  # bytes: a cache line, and the widest SIMD register


def _allocate(shapes: Shapes, dtype: npt.DTypeLike) -> tuple[dict[str, np.ndarray], np.ndarray]:
    dtype = np.dtype(dtype)
    step = _ALIGNMENT // dtype.itemsize
    offsets, total = {}, 0
    for name, shape in shapes.items():
        offsets[name] = total
        total += -(-int(np.prod(shape)) // step) * step  # the gaps stay zero under AdamW: their gradient is zero
    memory = np.zeros(total + step, dtype)
    start = (-memory.ctypes.data % _ALIGNMENT) // dtype.itemsize
    flat = memory[start : start + total]
    leaves = {name: flat[offsets[name] :][: int(np.prod(shape))].reshape(shape) for name, shape in shapes.items()}
    return leaves, flat


def some_names(names: Iterable[str], most: int = 5) -> str:
    """The first names, for an error message, and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
