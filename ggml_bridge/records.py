"""Plain records that describe devices and graphs."""

from collections.abc import Callable
from typing import Any, NamedTuple

VIEWS = {"NONE", "RESHAPE", "VIEW", "PERMUTE", "TRANSPOSE"}  # nodes that compute nothing


class Device(NamedTuple):
    """A ggml device. `name` is what `device=` takes; memory in bytes; capabilities: names of what the device can do."""

    name: str
    kind: str  # "cpu", "gpu", "igpu", "accel" or "meta"
    description: str
    memory_total: int
    memory_free: int
    backend: str  # the ggml backend that drives it, for example "CPU", "MTL" (Metal), "Vulkan"
    capabilities: tuple[str, ...]


class Source(NamedTuple):
    """An input of a node."""

    name: str
    shape: tuple[int, ...]  # numpy order, always 4 axes
    dtype: str
    contiguous: bool
    contiguous_rows: bool  # the last axis has no gaps


class Node(NamedTuple):
    """One node of a graph, in the order in which nodes run."""

    index: int  # type: ignore[assignment]  # in place of tuple.index
    op: str  # ggml's name, for example "MUL_MAT"; the function for UNARY and GLU, for example "TANH", "SWIGLU"
    name: str
    shape: tuple[int, ...]  # numpy order, always 4 axes
    dtype: str
    device: str
    sources: tuple[Source, ...]
    is_view: bool  # shares the memory of another tensor


class Explanation(NamedTuple):
    """What `explain()` returns; `str()` of it is a table."""

    device: str
    n_threads: int
    nodes: tuple[Node, ...]
    splits: int  # parts of the graph that run on different devices; 1 = everything on one device
    bytes: dict[str, int]  # {"weights": ..., "graph": ..., "metadata": ...}

    def counts(self) -> dict[str, int]:
        """{op: how many nodes}, most frequent first."""
        found: dict[str, int] = {}
        for node in self.nodes:
            found[node.op] = found.get(node.op, 0) + 1
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def __str__(self) -> str:
        rows = [("node", "op", "shape", "type", "device", "name", "from")]
        for node in self.nodes:
            shape = "x".join(str(n) for n in strip_leading_ones(node.shape))
            sources = ", ".join(source.name or "?" for source in node.sources)
            rows.append((str(node.index), node.op, shape, node.dtype, node.device, node.name, sources))
        widths = [min(max(len(row[i]) for row in rows), 40) for i in range(6)]
        lines = ["  ".join([cell[:40].ljust(width) for cell, width in zip(row, widths)] + [row[6]]) for row in rows]
        sizes = ", ".join(f"{name} {size:,} bytes" for name, size in self.bytes.items())
        plural = "split" if self.splits == 1 else "splits"
        lines.append(f"{len(self.nodes)} nodes in {self.splits} {plural} on {self.device}, {self.n_threads} threads")
        lines.append(sizes)
        return "\n".join(line.rstrip() for line in lines)


def refused(graph: Any, reason: Callable[[Node], str | None]) -> list[tuple[Node, str]]:
    """The nodes of a Graph or Session for which `reason` gives one, as a list of (Node, reason)."""
    nodes = graph.describe() if hasattr(graph, "describe") else graph.explain().nodes
    return [(node, why) for node in nodes if (why := reason(node)) is not None]


def strip_leading_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """(1, 1, 3, 5) -> (3, 5), at least one axis kept."""
    start = 0
    while start < len(shape) - 1 and shape[start] == 1:
        start += 1
    return tuple(shape[start:])
