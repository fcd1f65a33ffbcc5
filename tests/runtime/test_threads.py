"""Threads that share jobs: all are done, the first error ends all, and none outlives the call."""

import itertools
import random
import threading
import time

import pytest

from backup.runtime.threads import Begun, Turns, in_threads, run_threads


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


def test_the_error_of_a_thread_is_raised_rather_than_the_one_that_it_causes_while_jobs_are_fed():
    halted = threading.Event()

    def work():
        raise ValueError("the cause")

    def feed():
        assert halted.wait(30)
        raise OSError("the target was abandoned")

    with pytest.raises(ValueError, match="the cause"):
        run_threads(work, 1, lambda: None, halted.set, feed)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_or_signal_while_jobs_are_fed_halts_the_threads(error):
    halted = threading.Event()

    def feed():
        raise error

    before = threading.active_count()
    with pytest.raises(error):
        run_threads(lambda: halted.wait(30), 2, lambda: None, halted.set, feed)
    assert halted.is_set()
    assert threading.active_count() == before


def test_threads_that_ended_by_themselves_are_not_halted():
    halted = threading.Event()
    run_threads(lambda: None, 2, lambda: None, halted.set)
    assert not halted.is_set()


def test_a_call_goes_on_while_its_result_is_awaited_and_its_error_is_raised_there():
    go = threading.Event()
    looks = []

    def work():
        assert go.wait(10)
        return 7

    def look():
        looks.append(1)
        go.set()

    begun = Begun(work, "seven")
    assert begun.result(look) == 7
    assert looks
    assert begun.result(lambda: pytest.fail("the result is there")) == 7
    failing = Begun(lambda: 1 // 0, "failing")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            failing.result(lambda: None)


def test_a_look_can_end_the_waiting():
    never = threading.Event()

    def give_up():
        raise TimeoutError

    with pytest.raises(TimeoutError):
        Begun(never.wait, "never").result(give_up)
    never.set()


def test_steps_are_taken_in_the_order_of_the_jobs():
    stop, taken = threading.Event(), []
    turns, chance = Turns(stop), random.Random(7)

    def work(job):
        time.sleep(chance.random() / 500)
        turns.take(job, lambda: taken.append(job))

    in_threads(range(200), work, 8, lambda: None, stop)
    assert taken == list(range(200))


@pytest.mark.parametrize("where", ["before its turn", "in its turn"])
def test_an_error_ends_the_threads_that_wait_for_their_turn(where):
    stop, taken = threading.Event(), []
    turns = Turns(stop)

    def fail():
        raise ValueError("wrong")

    def work(job):
        if job == 3 and where == "before its turn":
            time.sleep(0.05)  # so that the others wait already
            fail()
        turns.take(job, fail if job == 3 else lambda: taken.append(job))

    before = threading.active_count()
    with pytest.raises(ValueError, match="wrong"):
        in_threads(range(100), work, 4, lambda: None, stop)
    assert (taken, threading.active_count()) == ([0, 1, 2], before)
