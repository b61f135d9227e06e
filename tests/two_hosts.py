"""Two hosts made of network namespaces, for MPICH's launcher: each has a name and an address of its own, and a cable between
them that can be pulled. It needs Linux, root and `ip` (Debian's iproute2)."""

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import time

import mpi

NAMES = ("toyhosta", "toyhostb")
ADDRESSES = ("10.213.7.1", "10.213.7.2")


def _ip(*words, check=True):
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=check)


def _carries():
    """Whether the cable carries, and every address has turned out to be nobody else's (IPv6 takes a second for that, and MPI
    may choose it)."""
    links = [_ip("-n", name, "-o", "link", "show", "up").stdout for name in NAMES]
    addresses = [_ip("-n", name, "-o", "addr").stdout for name in NAMES]
    return all(link.count("LOWER_UP") == 2 for link in links) and not any("tentative" in text for text in addresses)


@contextlib.contextmanager
def hosts():
    """Make both, as a context. Yields None where the machine does not allow it, and else a function that pulls the cable."""
    if shutil.which("ip") is None or not hasattr(os, "geteuid") or os.geteuid() != 0:
        yield None
        return
    try:
        try:
            for name in NAMES:
                _ip("netns", "add", name)
            a, b = NAMES
            _ip("link", "add", "toya", "netns", a, "type", "veth", "peer", "name", "toyb", "netns", b)
            for name, device, address in zip(NAMES, ("toya", "toyb"), ADDRESSES):
                _ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
                _ip("-n", name, "link", "set", "lo", "up")
                _ip("-n", name, "link", "set", device, "up")
        except (subprocess.CalledProcessError, OSError):
            yield None
            return
        deadline = time.monotonic() + 20
        while not _carries() and time.monotonic() < deadline:
            time.sleep(0.02)
        yield lambda: _ip("-n", NAMES[0], "link", "set", "toya", "down")
    finally:
        for name in NAMES:
            _ip("netns", "del", name, check=False)


def on_host(name, words):
    """The command line that runs `words` on a host."""
    script = f"hostname {name}; exec {words if isinstance(words, str) else shlex.join(map(str, words))}"
    return ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", script]


def start(folder, words, **changes):
    """`mpirun -n 2 WORDS`, from the first host, one rank on each; as `mpi.start`. folder: for the launcher's script."""
    script = folder / "launcher"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} {os.path.abspath(__file__)} "$@"\n')
    script.chmod(0o755)
    launcher = ["-launcher", "ssh", "-launcher-exec", script, "-hosts", ",".join(ADDRESSES), "-n", 2]
    # over the cable: it is one machine, and MPICH would find the shared memory
    environment = mpi.environment(UCX_TLS="tcp,self", FI_PROVIDER="tcp", **changes)
    return subprocess.Popen(
        on_host(NAMES[0], [mpi.MPIRUN, *launcher, *words]), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        stdin=subprocess.DEVNULL, env=environment, start_new_session=True,
    )  # fmt: skip


if __name__ == "__main__":  # in the place of ssh: [OPTION]... ADDRESS WORDS
    given = [word for word in sys.argv[1:]]
    while given[0].startswith("-"):
        del given[0]
    command = on_host(NAMES[ADDRESSES.index(given[0])], " ".join(given[1:]))
    os.execvp(command[0], command)
