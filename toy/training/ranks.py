"""The processes that MPI's launcher started for one run (`mpirun -n 4 toy train ...`): how they find each other, how numbers
get from one to another, and how one that is lost is noticed.

MPI is mpi4py and whatever MPI stands behind it; it is loaded only in a process that such a launcher started. Sums are not
left to it: the standard advises, and does not promise, that the same numbers give the same sum (MPI 4.1, advice to
implementors in the section on MPI_REDUCE). So MPI carries the numbers and this file adds them up, rank by rank, which takes
as many bytes.
"""

import contextlib
import itertools
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from toy import switch
from toy.config import VERSION
from toy.engines.shared import Order
from toy.switch import MOST_THREADS

# what launchers tell the processes that they start: (rank, how many). MPICH and its relatives, Slurm's PMI; Open MPI
_LAUNCHERS = (("PMI_RANK", "PMI_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"))

SILENCE = 20.0  # seconds without a sign of life after which a rank is lost; TOY_RANKS_SILENCE sets another number
LOST = 79  # exit code of a rank that misses another one
_EVERY = 1.0  # seconds between two signs of life
_THREAD_VARIABLES = ("TOY_NUM_THREADS", "OMP_NUM_THREADS")
_ORDERS = 1  # tag of messages
_SPIN, _LONGEST_PAUSE = 5e-4, 2e-3  # seconds: first a rank looks all the time, then less and less often


class RanksDifferError(ValueError):
    """Ranks of one run that do not fit together. All of them raise it at once; rank 0 is to tell it."""


def launched() -> tuple[int, int] | None:
    """(rank, how many) as an MPI launcher says it to this process; None when there is none, or one process alone."""
    for rank, size in _LAUNCHERS:
        numbers = os.environ.get(rank, ""), os.environ.get(size, "")
        if all(number.isdigit() for number in numbers) and int(numbers[1]) > 1:
            return int(numbers[0]), int(numbers[1])
    return None


def join() -> "MPIRanks | None":
    """The ranks of this job, None where this process was not started as one of several.

    Raises RuntimeError, with what to install, when mpi4py or its MPI is missing or belongs to another launcher, and
    `RanksDifferError` for ranks with another version of this library or other variables about threads.
    """
    place = launched()
    if place is None:
        return None
    ranks = MPIRanks(*place)
    variables = {name: os.environ.get(name, "").strip() or "not set" for name in _THREAD_VARIABLES}
    ranks.check_same({"toy": VERSION, **variables})
    return ranks


class MPIRanks:
    """See `toy.engines.shared.Ranks`. rank and size: as the launcher said them.

    hosts: the name of every rank's machine. local_rank, local_size: the place among the ranks of this machine, and how many
    they are. broken: that a common step was left halfway, so that the others may still wait for this rank. stop: the signal
    by which this rank was asked to stop, 0 = none; stopped_by: the one by which any of them was, after the last step.
    exit_code: what rank 0 ends the job with. hint: how the run goes on, for the message about a rank that is lost.
    """

    def __init__(self, rank: int, size: int) -> None:
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:  # RuntimeError: without a libmpi
            missing = "the package mpi4py" if isinstance(error, ImportError) else "an MPI library that mpi4py finds"
            raise RuntimeError(
                f"{size} ranks were started, and without {missing} each would train the whole run for itself: "
                "install both with: pip install mpi4py mpich"
            ) from error
        world = MPI.COMM_WORLD
        if world.size != size:
            library = MPI.Get_library_version().split("\n")[0].split(",")[0].strip()
            raise RuntimeError(
                f"{size} ranks were started, and mpi4py sees {world.size}: the MPI that it loads ({library}) is not that of "
                "this mpirun; use the mpirun of that MPI, or install the mpi4py of this one"
            )
        self.rank, self.size, self._mpi = world.rank, size, MPI
        self._comm, self._hearts = world.Dup(), world.Dup()
        local = world.Split_type(MPI.COMM_TYPE_SHARED)
        self.local_rank, self.local_size = local.rank, local.size
        self._shares = world.allgather(_share(local.allgather(_affinity()), local.rank))  # of processors, of every rank
        local.Free()
        self.hosts: list[str] = self._comm.allgather(socket.gethostname())
        self.broken, self.stop, self.stopped_by, self.exit_code, self.hint = False, 0, 0, 0, ""
        self.adding_seconds = 0.0  # spent with sums after all ranks were there
        self._sent: list[Any] = []  # requests of orders that may be on their way
        self._buffers: dict[int, tuple[Any, ...]] = {}
        self._heart = _Heart(self)
        if MPI.Query_thread() == MPI.THREAD_MULTIPLE:  # an MPI for one thread alone: then without signs of life
            self._heart.start()

    # -- what they are ------------------------------------------------------------------------------------------------

    def name(self, rank: int) -> str:
        return f"rank {rank} on host {self.hosts[rank]}"

    def words(self) -> str:
        """Which hosts there are, with the number of their ranks."""
        names = list(dict.fromkeys(self.hosts))
        return ", ".join(f"{self.hosts.count(name)} on {name}" for name in names)

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Raise `RanksDifferError`, on all ranks, unless all of them say the same. facts: what -> its value, in words."""
        everywhere = self.gather(dict(facts))
        for rank, theirs in enumerate(everywhere):
            for what in everywhere[0].keys() | theirs.keys():
                here, there = everywhere[0].get(what), theirs.get(what)
                if here != there:
                    raise RanksDifferError(
                        f"{self.name(rank)} has {what} {there}, and {self.name(0)} has {here}: all ranks of a run must have "
                        "the same"
                    )

    def threads(self, asked: int | None) -> tuple[int, str]:
        """How many threads each rank uses, and why. asked: what the run's options say.

        In this order: the options, TOY_NUM_THREADS, OMP_NUM_THREADS (which `join` finds to be the same everywhere), and else
        a rank's share of the processors that the ranks on its machine may use, the smallest of all ranks.
        """
        if asked is not None:
            return asked, "for each rank, as asked for"
        for name in _THREAD_VARIABLES:
            text = os.environ.get(name, "").strip()
            if text.isdigit() and 0 < int(text) <= MOST_THREADS:
                return int(text), f"for each rank, {name} says so"
        smallest = self._shares.index(min(self._shares))
        where = "" if len(set(self.hosts)) == 1 else f" of {self.hosts[smallest]}"
        return self._shares[smallest], f"for each rank, its share of the processors{where}"

    # -- `toy.engines.shared.Ranks` -----------------------------------------------------------------------------------

    def send(self, orders: Sequence[Order]) -> None:
        self._wait(lambda: self._mpi.Request.Testall(self._sent))
        self._sent = [self._comm.isend(order, dest=rank + 1, tag=_ORDERS) for rank, order in enumerate(orders)]

    def receive(self) -> Order | None:
        found: list[Any] = []

        def arrived() -> bool:
            message = self._comm.improbe(source=0, tag=_ORDERS)
            found.append(message)
            return message is not None

        self._wait(arrived)
        order = found[-1].recv()
        if order.do == "end":
            self.exit_code = order.arguments[0]
            return None
        return order

    def add_up(self, array: np.ndarray, numbers: Sequence[float]) -> np.ndarray:
        float32, double = self._mpi.FLOAT, self._mpi.DOUBLE
        mine = np.array([self.stop, *numbers], np.float64)
        rows = np.empty((self.size, len(mine)))
        self._finish(self._comm.Iallgather([mine, double], [rows, double]))
        began = time.perf_counter()
        n = len(array)
        if n not in self._buffers:  # rank r adds up the elements from starts[r] on
            edges = [n * rank // self.size for rank in range(self.size + 1)]
            counts, own = np.diff(edges), edges[self.rank + 1] - edges[self.rank]
            self._buffers[n] = edges[:-1], counts, np.empty((self.size, own), np.float32)
        starts, counts, parts = self._buffers[n]
        own = parts.shape[1]
        places = [rank * own for rank in range(self.size)]
        received = [parts, [own] * self.size, places, float32]
        self._finish(self._comm.Ialltoallv([array, counts, starts, float32], received), flows=True)
        total = parts[0]
        for part in parts[1:]:
            total += part
        self._finish(self._comm.Iallgatherv([total, float32], [array, counts, starts, float32]), flows=True)
        self.adding_seconds += time.perf_counter() - began
        self.stopped_by = int(rows[:, 0].max())
        return rows[:, 1:]

    def gather(self, thing: Any) -> list[Any]:
        sizes = np.empty(self.size, np.int64)
        data = np.frombuffer(self._mpi.pickle.dumps(thing), np.uint8)
        self._finish(self._comm.Iallgather(np.array([len(data)], np.int64), sizes))
        everything = np.empty(sizes.sum(), np.uint8)
        starts = np.concatenate([[0], sizes.cumsum()])
        self._finish(self._comm.Iallgatherv(data, [everything, sizes, starts[:-1], self._mpi.BYTE]))
        return [self._mpi.pickle.loads(everything[a:b].tobytes()) for a, b in itertools.pairwise(starts)]

    def broadcast(self, array: np.ndarray) -> None:
        self._finish(self._comm.Ibcast(array, root=0))

    # -- waiting ------------------------------------------------------------------------------------------------------

    def _finish(self, request: Any, flows: bool = False) -> None:
        """Wait for a request. flows: all ranks are there and data are on their way, which only goes on while one looks."""
        self._wait(request.Test, flows)

    def _wait(self, done: Callable[[], bool], flows: bool = False) -> None:
        """A rank that waits leaves the processor to others, which a blocking call of MPI does not."""
        began, pause = time.perf_counter(), 2e-5
        while not done():
            if flows or time.perf_counter() - began < _SPIN:
                _yield()
            else:
                time.sleep(pause)
                pause = min(1.2 * pause, _LONGEST_PAUSE)

    # -- the end ------------------------------------------------------------------------------------------------------

    def end(self, exit_code: int) -> None:
        """Of rank 0: tell the others that there is nothing more to do; then `leave`. When they may be waiting in the middle
        of a common step, the job is ended at once instead, and this does not return."""
        if self.broken:
            self.abort(exit_code)
        self.send([Order("end", (exit_code,))] * (self.size - 1))
        self.leave()

    def leave(self) -> None:
        """Part from the others in peace: wait for all of them, so that nobody is taken for lost."""
        self._wait(lambda: self._mpi.Request.Testall(self._sent))
        self._finish(self._comm.Ibarrier())
        self._heart.finish()
        self._finish(self._comm.Ibarrier())
        self._heart.drain()

    def abort(self, exit_code: int) -> None:
        """End this process at once; the launcher then ends the others."""
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(exit_code or 1)


class _Heart(threading.Thread):
    """Sends signs of life to rank 0, from rank 0 to all others, and ends the job when nothing comes any more: of a process
    that died the launcher knows, of a machine that is cut off or stands still nobody does."""

    def __init__(self, ranks: MPIRanks) -> None:
        super().__init__(daemon=True)
        self.ranks, self.comm, self._mpi = ranks, ranks._hearts, ranks._mpi
        self.peers = list(range(1, ranks.size)) if ranks.rank == 0 else [0]
        self.silence = _silence()
        self._done = threading.Event()
        self._byte = bytearray(1)
        self._sent: dict[int, Any] = {}  # the last request to every peer

    def run(self) -> None:
        looked = time.monotonic()
        seen = dict.fromkeys(self.peers, looked)
        while not self._done.wait(min(_EVERY, self.silence / 5)):
            now = time.monotonic()
            if now - looked > self.silence / 2:  # it was this process that stood still
                seen = dict.fromkeys(self.peers, now)
            looked = now
            for peer in self.peers:
                if peer not in self._sent or self._sent[peer].Test():
                    self._sent[peer] = self.comm.Isend([self._byte, self._mpi.BYTE], dest=peer)
            for peer in self.drain():
                seen[peer] = now
            for peer in self.peers:
                if now - seen[peer] > self.silence:
                    self._lost(peer)

    def drain(self) -> set[int]:
        """The ranks from which signs of life have come."""
        status, found, taken = self._mpi.Status(), set(), bytearray(1)
        while self.comm.Iprobe(status=status):
            self.comm.Recv([taken, self._mpi.BYTE], source=status.source)
            found.add(status.source)
        return found

    def finish(self) -> None:
        self._done.set()
        if self.is_alive():
            self.join()

    def _lost(self, peer: int) -> None:
        if self.ranks.rank > 1:  # one of those who miss rank 0 is enough to say it
            time.sleep(_EVERY)
        hint = f" {self.ranks.hint}" if self.ranks.hint else ""
        sentence = (
            f"toy: {self.ranks.name(peer)} has given no sign of life for {self.silence:g} seconds (its machine is cut off or "
            f"stands still), so the job ends.{hint}\n"
        )
        with contextlib.suppress(OSError):
            os.write(2, sentence.encode(errors="replace"))
        self.ranks.abort(LOST)


def _silence() -> float:
    text = os.environ.get("TOY_RANKS_SILENCE", "").strip()
    try:
        seconds = float(text or SILENCE)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(f"TOY_RANKS_SILENCE must be a number of seconds above 0, got {text!r}")
    return seconds


def _yield() -> None:
    if hasattr(os, "sched_yield"):
        os.sched_yield()
    else:
        time.sleep(0)


def _affinity() -> tuple[frozenset[int], int]:
    """The processors that this process may run on, and how many of them it may use."""
    there = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return frozenset(there), switch.usable_processors()


def _share(everyone: Sequence[tuple[frozenset[int], int]], place: int) -> int:
    """How many processors are left for one of several ranks on a machine. everyone: `_affinity` of each."""
    mine, usable = everyone[place]
    sharing = sum(1 for theirs, _ in everyone if theirs & mine)
    return max(1, min(usable, len(mine)) // sharing)


def one_device_each(device: str, ranks: "MPIRanks | None") -> str:
    """The device for this rank: of a kind of which a machine has several (GPUs), the ranks of a machine take one each.

    device: as the run's options name it. Raises ValueError when there are more ranks than devices.
    """
    if ranks is None or device in ("auto", "cpu", "cpu-native"):
        return device
    name, alike = switch.devices_like(device)
    if ranks.local_size > len(alike):
        raise ValueError(
            f"each rank needs a device of its own, and {socket.gethostname()} has {', '.join(alike)} for {ranks.local_size} "
            "ranks: start fewer there"
        )
    return name if ranks.local_size == 1 else alike[ranks.local_rank]
