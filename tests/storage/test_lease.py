"""A lock in a bucket: one holder at a time, taken over when it is gone, whatever clocks say."""

import json
import subprocess
import sys
import time

import pytest

from jina_jax.errors import RunError
from jina_jax.storage import lease
from jina_jax.storage.lease import hold


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lease, "LEASE_SECONDS", 1.5)
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.3)


def elsewhere(monkeypatch):
    """From here on this process is one of another host."""
    here = lease._this_process() | {"host": "another"}
    monkeypatch.setattr(lease, "_this_process", lambda: here)


def must_not_wait(monkeypatch):
    """From here on whoever waits for a holder fails."""
    monkeypatch.setattr(lease.time, "sleep", lambda _: pytest.fail("a lock was waited for"))


def test_a_lock_has_one_holder_and_is_free_again(root, monkeypatch):
    lock = root / ".lock"
    with hold(lock, "busy"):
        elsewhere(monkeypatch)
        with pytest.raises(RunError, match="busy"):
            with hold(lock, "busy"):
                pass
    must_not_wait(monkeypatch)
    with hold(lock, "busy") as mine:
        mine.check()


DIES = """
import os, sys
from jina_jax.storage import as_path, lease
lease._acquire(as_path(sys.argv[1]), lease._this_process() | {"holder": "x", "renewals": 0}, "busy")
os._exit(9)
"""


def test_a_lock_of_a_dead_process_of_this_host_is_taken_at_once(root, monkeypatch):
    assert subprocess.run([sys.executable, "-c", DIES, str(root / ".lock")]).returncode == 9
    must_not_wait(monkeypatch)
    with hold(root / ".lock", "busy") as mine:
        mine.check()


@pytest.mark.parametrize("hours", [-5, 5])
def test_a_lock_whose_holder_is_gone_is_taken_over_whatever_the_clock_says(root, monkeypatch, hours):
    lock = root / ".lock"
    (lock).write_text(json.dumps(lease._this_process() | {"host": "another", "renewals": 3}))
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3600 * hours)
    began = time.monotonic()
    with hold(lock, "busy"):
        # Cloud Storage tells milliseconds, S3 seconds.
        assert 0.4 < time.monotonic() - began < 60
    assert not [path for path in root.iterdir() if path != lock]


def test_a_holder_that_was_taken_over_is_told(root):
    with hold(root / ".lock", "busy") as mine:
        mine.check()
        (root / ".lock").write_text("{}")
        with pytest.raises(RunError, match="another process has taken .* over"):
            mine.check()


def test_of_several_that_want_a_lock_at_once_one_gets_it(root, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setattr(lease, "LEASE_SECONDS", 60.0)  # however slow the machine, the winner renews in time

    def attempt(number):
        try:
            return lease._acquire(root / ".lock", lease._this_process() | {"holder": number, "renewals": 0}, "busy") and number
        except RunError:
            return None

    with ThreadPoolExecutor(6) as pool:
        futures = [pool.submit(attempt, number) for number in range(1, 7)]
        while not all(future.done() for future in futures):
            winner = json.loads((root / ".lock").read_bytes() or "{}") if (root / ".lock").exists() else {}
            if winner:  # it renews
                (root / ".lock").write_text(json.dumps(winner | {"renewals": winner["renewals"] + 1}))
            time.sleep(0.2)
        assert len([future.result() for future in futures if future.result()]) == 1
