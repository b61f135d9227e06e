"""The ranks of `toy.engines.shared` as threads of one process: what they compute, without MPI."""

import queue
import threading

import numpy as np

from toy.engines.shared import Order, SharedEngine


class Meeting:
    """Where the ranks of one job meet."""

    def __init__(self, size):
        self.size = size
        self.orders = [queue.Queue() for _ in range(size)]
        self.barrier, self.things = threading.Barrier(size, timeout=600), [None] * size


class ThreadRanks:
    """See `toy.engines.shared.Ranks`."""

    def __init__(self, meeting, rank):
        self.meeting, self.rank, self.size, self.broken = meeting, rank, meeting.size, False

    def send(self, orders):
        for to, order in zip(self.meeting.orders[1:], orders):
            to.put(order)

    def receive(self):
        order = self.meeting.orders[self.rank].get()
        return None if order.do == "end" else order

    def gather(self, thing):
        m = self.meeting
        m.things[self.rank] = thing
        m.barrier.wait()
        found = list(m.things)
        m.barrier.wait()
        return found

    def add_up(self, array, numbers):
        found = self.gather((array.copy(), list(numbers)))
        array[:] = found[0][0]
        for other, _ in found[1:]:
            array += other
        return np.array([numbers for _, numbers in found])

    def broadcast(self, array):
        array[...] = self.gather(array.copy())[0]

    def name(self, rank):
        return f"rank {rank} on host h{rank}"


class Together:
    """A recipe realized by several ranks: rank 0's, which the others follow, as `with Together(4, make) as recipe`.

    make(ranks): a recipe, realized, whose `ranks` were set before. others: the recipes of the other ranks; errors: what
    ended them.
    """

    def __init__(self, size, make):
        meeting = Meeting(size)
        self.ranks = [ThreadRanks(meeting, rank) for rank in range(size)]
        self.recipes = [make(ranks) for ranks in self.ranks]
        self.errors = []
        self.threads = [threading.Thread(target=self._follow, args=(recipe,)) for recipe in self.recipes[1:]]

    def _follow(self, recipe):
        assert isinstance(recipe.engine, SharedEngine)
        try:
            recipe.engine.follow()
        except RuntimeError as error:
            self.errors.append(str(error))

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self.recipes[0]

    def __exit__(self, *error):
        self.ranks[0].send([Order("end", (0,))] * (len(self.ranks) - 1))
        for thread in self.threads:
            thread.join()
