"""A fixture for tests of models too small for threads: on a busy machine, threads that wait for each other are slow."""

import pytest
from threadpoolctl import threadpool_limits

from toy import switch


@pytest.fixture(autouse=True)
def single_thread(monkeypatch):
    """One thread for every backend; afterwards as many as before. Import it to use it."""
    try:
        from toy.ops import accelerated
    except ImportError:  # a pure Python run
        accelerated = None
    before = accelerated.get_num_threads() if accelerated else None
    monkeypatch.setattr(switch, "_n_threads", None)  # put back at the end
    with threadpool_limits(1, user_api="blas"):
        switch.set_num_threads(1)
        yield
    if accelerated:
        accelerated.set_num_threads(before)
