"""Threads that share jobs: all are done, the first error ends all, and none outlives the call."""

import itertools
import threading

import pytest

from backup.runtime.threads import in_threads


def test_all_jobs_are_done_once():
    done = []
    in_threads(range(1000), done.append, 4, lambda: None)
    assert sorted(done) == list(range(1000))


def test_the_first_error_stops_the_others_and_is_raised():
    stop = threading.Event()

    def work(job):
        if job == 3:
            raise ValueError(job)
        if job == 4:
            assert stop.wait(30)
            raise KeyError(job)

    before = threading.active_count()
    with pytest.raises(ValueError, match="3"):
        in_threads(itertools.chain([4, 3], itertools.count(5)), work, 2, lambda: None, stop)
    assert threading.active_count() == before


def test_a_signal_in_the_calling_thread_stops_them_too():
    def show():
        raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        in_threads(range(10**9), lambda job: None, 2, show)
    assert threading.active_count() == before
