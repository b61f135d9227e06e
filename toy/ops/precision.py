"""The table of `toy.ops.accelerated` with products in another precision than float32."""

from functools import partial
from types import SimpleNamespace
from typing import cast

from toy.op_table import OpTable
from toy.ops import accelerated


def with_precision(precision: int) -> OpTable:
    """The accelerated ops, with `linear`, its backward and `linear_cross_entropy` in a precision of
    `toy.switch.kernel_precision`. Each table is an object of its own; several may be used at the same time."""
    table = {name: value for name, value in vars(accelerated).items() if not name.startswith("_")}
    table["linear"] = partial(accelerated._linear_in, precision)
    table["linear_cross_entropy"] = partial(accelerated._linear_cross_entropy_in, precision)
    return cast(OpTable, SimpleNamespace(**table))
