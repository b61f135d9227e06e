"""A command that is one of several processes under MPI's launcher: rank 0 runs it, the others follow and are silent.

What the launcher starts is only a watcher, which starts the rank itself with the same command line. It is there to say in a
sentence that its rank was killed, by the system for its memory say, before the launcher ends the others, which no rank lives
to tell.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback

import click

from toy.cli.base import Failure, Phase
from toy.engines.shared import DriftError
from toy.training.ranks import LOST, RanksDifferError, join, launched
from toy.training.together import follow

_WATCHER = "TOY_RANK_WATCHER"  # in a rank's environment: the socket at whose other end its watcher is
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_NOT_JOINED = 78  # exit code of a rank that the others wait for in vain
_PATIENCE = 20  # seconds that a rank whose end rank 0 tells waits for it


def as_ranks(run, given, debug):
    """Do `run(ranks)` together with the other processes of this job -> exit code. given: what the command line says, which
    must be the same for all ranks."""
    place = launched()
    assert place is not None
    if _WATCHER not in os.environ:
        return _watch(*place)
    _end_with_the_watcher()
    asked_to_stop = _Stop()
    try:
        with Phase(2, debug):
            ranks = join()
            assert ranks is not None
    except Failure as failure:
        if isinstance(failure.__cause__, RanksDifferError):
            return _differ(place, failure)
        if _local_rank() == 0:  # the others of this machine would say the same
            click.echo(f"toy: rank {place[0]} on host {socket.gethostname()}: {failure.message}", err=True)
        return _NOT_JOINED
    try:
        ranks.check_same(given)
    except RanksDifferError as error:
        return _differ(place, Failure(str(error), 2))
    if ranks.rank == 0:
        asked_to_stop.undo()
        return _lead(run, ranks)
    asked_to_stop.tell(ranks)
    return _follow(ranks, debug)


def _lead(run, ranks):
    code = 1
    try:
        code = run(ranks) or 0
    except Failure as failure:
        code = failure.exit_code
        if ranks.broken:  # the process ends before anybody else can say it
            if failure.debug and failure.__cause__ is not None:
                traceback.print_exception(failure.__cause__)
            click.echo(f"toy: {failure.message}", err=True)
        raise
    except (KeyboardInterrupt, click.Abort):
        code = 128 + signal.SIGINT
        raise
    finally:
        ranks.end(code)
    return code


def _follow(ranks, debug):
    try:
        follow(ranks)
        ranks.leave()
    except DriftError:  # rank 0 says it and ends the job
        time.sleep(_PATIENCE)
    except BaseException as error:
        if debug:
            traceback.print_exc()
        message = " ".join(str(error).split()) or type(error).__name__
        click.echo(f"toy: {ranks.name(ranks.rank)}: {message}. {ranks.hint}", err=True)
        ranks.abort(1)
    return ranks.exit_code


def _differ(place, failure):
    """The end of ranks that do not fit together: all know why, rank 0 says it."""
    if place[0] == 0:
        click.echo(f"toy: {failure.message}", err=True)
    else:
        time.sleep(0.5)  # a launcher may end the others with the first, before it has passed on what was said
    return failure.exit_code


def _local_rank():
    return _number(("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK"), 0)


def _others_elsewhere(size):
    """Whether other machines have ranks too, as far as the launcher says it."""
    return _number(("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE"), size) < size


def _number(variables, otherwise):
    return next((int(os.environ[name]) for name in variables if os.environ.get(name, "").isdigit()), otherwise)


class _Stop:
    """While a rank has not begun, and on all but rank 0 always: a signal asks for a stop after the step, and ends nothing."""

    def __init__(self):
        self.number, self.ranks = 0, None
        self.before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}

    def _on_signal(self, number, frame):
        self.number = number
        if self.ranks is not None:
            self.ranks.stop = number

    def tell(self, ranks):
        self.ranks = ranks
        ranks.stop = self.number

    def undo(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.number:
            os.kill(os.getpid(), self.number)


# ----------------------------------------------------------------------------------------------------------------------
# the watcher
# ----------------------------------------------------------------------------------------------------------------------


def _watch(rank, size):
    """Start this command line again as the rank itself and wait for its end -> its exit code."""
    mine, its = socket.socketpair()
    its.set_inheritable(True)
    told = []

    def pass_on(number, frame):
        told.append(number)
        if process.returncode is None and process.poll() is None:
            process.send_signal(number)

    # close_fds: the launcher's own connection to the rank is among them
    command, environment = [sys.executable, *sys.orig_argv[1:]], {**os.environ, _WATCHER: str(its.fileno())}
    process = subprocess.Popen(command, env=environment, close_fds=False)
    for number in _SIGNALS:
        signal.signal(number, pass_on)
    its.close()
    code = process.wait()
    mine.close()
    if code == LOST:
        _end_the_launcher()
        code = 1
    if code == _NOT_JOINED and _others_elsewhere(size):
        _end_like(signal.SIGTERM)
    if code >= 0:
        return 2 if code == _NOT_JOINED else code
    if not told:
        name, more = _name(-code), " (was there enough memory?)" if -code == signal.SIGKILL else ""
        click.echo(
            f"toy: rank {rank} on host {socket.gethostname()} was ended by {name}{more}, so the job ends. The run goes "
            "on from its last checkpoint with --resume.",
            err=True,
        )
    _end_like(-code)


def _end_with_the_watcher():
    """Let this process end when its watcher does: then the launcher thinks it has ended."""
    there = socket.socket(fileno=int(os.environ[_WATCHER]))

    def wait():
        with contextlib.suppress(OSError):
            there.recv(1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _end_the_launcher():
    """Have somebody press Ctrl-C twice for the launcher, where it runs on this machine, when it is still there a second after
    this process: it would wait for the machine that is lost, for as long as the system thinks that it may come back.

    Not before: pressed while it takes in how this rank ended, Ctrl-C lets MPICH's launcher end as if all had been well.
    """
    launcher = _launcher()
    if launcher is None or os.fork():
        return
    os.setsid()  # of the launcher's own processes it ends all
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nothing, stream)
    for number, pause in ((0, 1.0), (signal.SIGINT, 0.5), (signal.SIGINT, 3.0), (signal.SIGKILL, 0)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(launcher, number)
            time.sleep(pause)
    os._exit(0)


def _launcher():
    """The process id of the launcher, where it runs on this machine, or None."""
    pid = os.getppid()
    for _ in range(3):  # its helper on this machine is between
        try:
            with open(f"/proc/{pid}/stat") as file:
                name, _, rest = file.read().partition("(")[2].rpartition(")")
        except OSError:  # not Linux
            return None
        if name.startswith(("mpirun", "mpiexec", "prterun")):
            return pid
        pid = int(rest.split()[1])
    return None


def _end_like(number):
    """End this process by a signal: of one that ends otherwise before MPI has begun, the launcher thinks nothing."""
    sys.stderr.flush()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), number if number in (signal.SIGKILL, signal.SIGTERM) else signal.SIGKILL)
    time.sleep(_PATIENCE)  # it comes at once


def _name(number):
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
