"""How the ranks of a run begin together: rank 0 reads the data and says what to build, the others build it and follow."""

import dataclasses
from typing import NamedTuple

from toy import switch
from toy.config import ModelConfig
from toy.engines.shared import Order, SharedEngine
from toy.files.gguf_write import digest
from toy.training.options import RunOptions
from toy.training.ranks import MPIRanks, one_device_each
from toy.training.start import Start
from toy.training.table import RECIPES


class Plan(NamedTuple):
    """What every rank builds. options: complete, with the backend and the device that rank 0 found; config: of the model;
    threads: of each rank; hint: see `MPIRanks`."""

    options: RunOptions
    config: ModelConfig
    backend: str
    device: str
    threads: int
    hint: str


def lead(ranks: MPIRanks, start: Start, device: str, threads: int, hint: str) -> None:
    """`start.realize()` on rank 0 and on all others, with the weights of rank 0. start: its data are read.
    device: as it was asked for; threads: of each rank; hint: see `MPIRanks`.

    Raises what `realize` raises, RuntimeError with the rank and its host for what went wrong on another one, and ValueError
    when the model that the run begins with is another one there.
    """
    ranks.hint = hint
    plan = Plan(start.options, start.config, start.recipe.backend, device, threads, hint)
    ranks.broken = True
    ranks.send([Order("plan", (plan,))] * (ranks.size - 1))
    failed, engine = None, None
    try:
        engine = _realize(start, ranks)
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        failed = error
    found = ranks.gather((str(failed) if failed else "", digest(engine.weights.borrowed) if engine else ""))
    ranks.broken = False
    if failed is not None:
        raise failed
    for rank, (problem, base) in enumerate(found):
        if problem:
            raise RuntimeError(f"{ranks.name(rank)}: {problem}")
        if base != found[0][1]:
            raise ValueError(
                f"{ranks.name(rank)} has another {getattr(start.options, 'model', 'model')} than {ranks.name(0)}: "
                "copy the file to all machines"
            )
    assert engine is not None
    engine.spread()


def follow(ranks: MPIRanks) -> None:
    """What every rank but 0 does, from the beginning of the run to its end."""
    order = ranks.receive()
    if order is None:
        return
    plan: Plan = order.arguments[0]
    ranks.hint = plan.hint
    with switch.use_num_threads(plan.threads):
        problem, engine = "", None
        try:
            device = one_device_each(plan.device, ranks)
            options = dataclasses.replace(plan.options, backend=plan.backend, device=device)
            start = RECIPES[options.recipe](options)
            start.options, start.config = options, plan.config
            engine = _realize(start, ranks)
        except (ValueError, RuntimeError, OSError, MemoryError) as error:
            problem = str(error) or type(error).__name__
        ranks.gather((problem, digest(engine.weights.borrowed) if engine else ""))
        if engine is None:
            ranks.receive()  # rank 0 says what it was
        else:
            engine.follow()


def _realize(start: Start, ranks: MPIRanks) -> SharedEngine:
    start.recipe.ranks = ranks
    start.realize()
    engine = start.recipe.engine
    assert isinstance(engine, SharedEngine)
    return engine
