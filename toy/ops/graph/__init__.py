"""The op table of a ggml graph: the same calls as `reference`, recorded instead of computed.

A model's forward and backward run once on one of these tables, with graph tensors in place of arrays; afterwards the whole
training step is one `compute` of the graph. There are two spellings:

* `CpuGraphOps`: one node per op, computed by the project's own kernels (ggml_bridge/kernels.pyx) on ggml's threads;
* `NativeGraphOps`: compositions of ggml's own forward operations, each of which every ggml device has (Metal's list), and no
  backward operation of ggml. Its loss is summed over the rows inside the graph; the division by their number comes
  with the optimizer, because small gradients would vanish in the half-precision products of some devices.

Shapes, caches and the meaning of every op are those of `reference.py`. What is different:

* Integers (`token_ids`, `positions`, `labels`) are made by `integers()`: the caller fills them before each compute, through
  `feeds`, a list of (tensor, function); the function takes the arrays by role and returns what to upload.
* A parameter gradient is a `Slot`: the first backward that adds to it makes it, later ones add in place. `finished(slot)` is
  called as soon as every use of its parameter has added, so that the optimizer can follow at once.
* A quantised weight is a tensor of that type (`Backend.mapped` or `persistent`), half precision among them. It is frozen.
"""

from toy.ops.graph.cpu import CpuGraphOps
from toy.ops.graph.native import NativeGraphOps
from toy.ops.graph.recording import Integers, Slot

__all__ = ["CpuGraphOps", "Integers", "NativeGraphOps", "Slot"]
