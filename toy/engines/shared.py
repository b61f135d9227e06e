"""One training step by several processes (data-parallel training): each takes its share of the rows of every batch, the
gradients are added up, and every process makes the same update.

The processes are called ranks, as in MPI, and are told apart by a number. Rank 0 leads: on it, a `SharedEngine` is used like
any other engine, with whole batches. The others `follow` it: they get their shares from it and need no data of their own. How
numbers get from one to another is not known here: a `Ranks` does that.
"""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import numpy.typing as npt

from toy.config import ModelConfig, RecipeOptions
from toy.engines.base import Arrays, Engine, Moments, Piece
from toy.engines.weights import Weights
from toy.models.base import Model
from toy.models.inputs import n_counted
from toy.models.parameters import check_arrays
from toy.switch import Resolved


class DriftError(RuntimeError):
    """The ranks no longer have the same weights. All of them raise it at once."""


class Order(NamedTuple):
    """What rank 0 wants another one to do: `SharedEngine._do_<do>(*arguments)`."""

    do: str
    arguments: tuple[Any, ...] = ()


class Ranks(Protocol):
    """The processes of one run. rank: the number of this one; size: how many there are; broken: that this one left a common
    step halfway. All ranks call `add_up`, `gather` and `broadcast` in the same order."""

    rank: int
    size: int
    broken: bool

    def send(self, orders: Sequence[Order]) -> None:
        """Of rank 0: one order for each of the ranks 1 to size - 1."""

    def receive(self) -> Order | None:
        """Of the others: the next order, None when there is nothing more to do."""

    def add_up(self, array: np.ndarray, numbers: Sequence[float]) -> np.ndarray:
        """`array`, float32 (n,), becomes the sum of that of all ranks, in place: added up in the order of the ranks, so that
        the same ranks find the same bits every time. -> the numbers of every rank, float64 (size, len(numbers))."""

    def gather(self, thing: Any) -> list[Any]:
        """What every rank has given, in the order of the ranks: on all of them."""

    def broadcast(self, array: np.ndarray) -> None:
        """A contiguous array becomes that of rank 0, in place."""

    def name(self, rank: int) -> str:
        """A rank for a message: "rank 3 on host b"."""


def check_shares(batch: int, size: int) -> None:
    """Raise ValueError when a batch of so many rows cannot be shared by so many processes."""
    if batch < size:
        raise ValueError(
            f"a batch of {batch} cannot be shared by {size} ranks: give a batch of at least {size}, or start fewer ranks"
        )


class SharedEngine(Engine):
    """See the top of this file. options: of the whole batch; `kind` is the class of the engine that makes this rank's part.

    A rank's engine takes as many rows as the largest share; a smaller one is filled up with rows that do not count. Raises
    ValueError for a batch that is smaller than the number of ranks.
    """

    def __init__(
        self,
        config: ModelConfig,
        options: RecipeOptions,
        choice: Resolved,
        weights: Weights | None,
        keep_gradients: bool,
        kind: Any,
        ranks: Ranks,
    ) -> None:
        check_shares(options.t_batch, ranks.size)
        super().__init__(config, options, choice, weights)
        self.ranks = ranks
        self.starts = [options.t_batch * rank // ranks.size for rank in range(ranks.size + 1)]  # where a share begins
        self.rows = max(np.diff(self.starts))
        part = dataclasses.replace(options, t_batch=int(self.rows))
        self.own: Engine = kind(self.config, part, choice, self.weights, keep_gradients, self._add_up)
        self.recompute, self.recompute_reason = self.own.recompute, self.own.recompute_reason

    def _check_fits(self) -> None:
        """A rank needs memory for its share alone, which its own engine looks for."""

    def _choose_recompute(self) -> tuple[int, str]:
        return 0, ""  # a rank's own engine chooses

    # -- rank 0: what an engine can do --------------------------------------------------------------------------------

    def _train(self, pieces: Sequence[Piece], counted: int, hp: np.ndarray, is_first: bool) -> float:
        shares = [[self._share(piece, rank) for piece in pieces] for rank in range(self.ranks.size)]
        there = [[share for share in some if share.counted] for some in shares]
        return cast(float, self._order("train", [(some, counted, hp, is_first) for some in there]))

    def _evaluate(self, inputs: Arrays, labels: np.ndarray) -> float:
        piece = Piece(inputs, labels, n_counted(labels))
        parts = self._order("evaluate", [(self._share(piece, rank),) for rank in range(self.ranks.size)])
        return sum(loss * (counted / piece.counted) for loss, counted in cast("list[tuple[float, int]]", parts))

    def _logits(self, inputs: Arrays) -> np.ndarray:
        piece = Piece(inputs, np.zeros(self.batch.n_rows, np.int64), 0)
        parts = self._order("logits", [(self._share(piece, rank).inputs,) for rank in range(self.ranks.size)])
        each = self.batch.n_rows // self.options.t_batch  # rows of the logits of one sequence or image
        sizes = np.diff(self.starts) * each
        return np.concatenate([part.reshape(-1, self.batch.n_classes)[:n] for part, n in zip(parts, sizes)])

    def parameters(self) -> Arrays:
        """dict of names to float32 copies of the weights. Raises `DriftError` when those of another rank are others."""
        return cast(Arrays, self._order("compare", [()] * self.ranks.size))

    def load_parameters(self, mapping: Mapping[str, npt.ArrayLike]) -> None:
        """Copy weights in, on all ranks. Raises ValueError for wrong names, shapes or numbers; nothing is changed then."""
        check_arrays(self.weights.own, mapping)
        self.own.load_parameters(mapping)
        self.spread()

    def spread(self) -> None:
        """Give the weights of rank 0 to all ranks."""
        self._order("take_parameters", [()] * self.ranks.size)

    def load_optimizer_state(self, state: Moments) -> None:
        """Copy moments in, on all ranks, all or nothing; errors as `load_parameters`."""
        self.own.load_optimizer_state(state)
        self._order("take_moments", [()] * self.ranks.size)

    def gradients(self) -> Arrays:
        """dict of names to copies of the last step's gradients, of all ranks together, before clipping."""
        return self.own.gradients()

    def optimizer_state(self) -> dict[str, Arrays]:
        """{"m": {name: array}, "v": {name: array}}: copies of the AdamW moments."""
        return self.own.optimizer_state()

    def explain(self) -> Any:
        """What a step of this rank's share runs."""
        return self.own.explain()

    def model_copy(self) -> Model:
        return self.own.model_copy()

    def close(self) -> None:
        self.own.close()

    def _order(self, do: str, arguments: Sequence[tuple[Any, ...]]) -> Any:
        """Let every rank do something, this one too. arguments: of each. -> what it is on this one."""
        self.ranks.broken = True
        self.ranks.send([Order(do, some) for some in arguments[1:]])
        result = self._do(Order(do, arguments[0]))
        self.ranks.broken = False
        return result

    def _share(self, piece: Piece, rank: int) -> Piece:
        """The rows of a rank; its first one once more, with no label that counts, where the share is not full."""
        begin, end = self.starts[rank : rank + 2]
        chosen = np.minimum(np.arange(begin, begin + self.rows), end - 1)

        def cut(array: np.ndarray) -> np.ndarray:
            by_sequence = array.reshape(self.options.t_batch, -1, *array.shape[1:])
            return by_sequence[chosen].reshape(-1, *array.shape[1:])

        labels = cut(piece.labels)
        filled_up = len(labels) * (end - begin) // self.rows
        labels[filled_up:] = -1 if labels.ndim == 1 else 0
        step, first = piece.moment
        moment = step, first + begin * (self.batch.n_rows // self.options.t_batch)
        return Piece({role: cut(array) for role, array in piece.inputs.items()}, labels, n_counted(labels), moment)

    # -- every rank ---------------------------------------------------------------------------------------------------

    def follow(self) -> None:
        """Do what rank 0 wants, until it wants nothing more."""
        while (order := self.ranks.receive()) is not None:
            self._do(order)

    def _do(self, order: Order) -> Any:
        return getattr(self, f"_do_{order.do}")(*order.arguments)

    def _do_train(self, pieces: Sequence[Piece], counted: int, hp: np.ndarray, is_first: bool) -> float:
        loss = self.own._train(pieces, counted, hp, is_first)
        self.grad_norm = self.own.grad_norm
        return loss

    def _add_up(self, gradient: np.ndarray, loss: float) -> float:
        rows = self.ranks.add_up(gradient, [loss, self.grad_norm])  # the norm is that of the step before
        self._check_same(rows[:, 1].tolist(), "found another gradient norm")
        return float(sum(rows[:, 0].tolist()))

    def _do_evaluate(self, piece: Piece) -> list[tuple[float, int]]:
        loss = self.own._evaluate(piece.inputs, piece.labels) if piece.counted else 0.0
        return self.ranks.gather((loss, piece.counted))

    def _do_logits(self, inputs: Arrays) -> list[np.ndarray]:
        return self.ranks.gather(self.own._logits(inputs))

    def _do_compare(self) -> Arrays:
        found = self.own.parameters()
        check = 0
        for name in sorted(found):
            check = zlib.crc32(np.ascontiguousarray(found[name]).reshape(-1).view(np.uint8).data, check)
        self._check_same(self.ranks.gather(check), "has other weights")
        return found

    def _do_take_parameters(self) -> None:
        self.own.load_parameters(self._taken(self.own.parameters()))

    def _do_take_moments(self) -> None:
        state = self.own.optimizer_state()
        self.own.load_optimizer_state({slot: self._taken(state[slot]) for slot in "mv"})

    def _taken(self, arrays: Arrays) -> Arrays:
        """Arrays of the right names and shapes, with the numbers of rank 0."""
        arrays = {name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)}
        for array in arrays.values():
            self.ranks.broadcast(array)
        return arrays

    def _check_same(self, found: Sequence[float], what: str) -> None:
        for rank, number in enumerate(found):
            if repr(number) != repr(found[0]):  # NaN is like NaN
                raise DriftError(
                    f"{self.ranks.name(rank)} {what} than {self.ranks.name(0)}: their weights drift apart, because their "
                    "processors or libraries compute differently; take machines of one kind, with the same packages"
                )
