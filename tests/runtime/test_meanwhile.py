"""Imports that are left for moments of waiting."""

import sys
import threading

from backup.runtime import meanwhile
from backup.runtime.threads import Begun

MODULES = ["this", "antigravity"]


def left(monkeypatch):
    """Leave two modules, none of which is imported; importing them is only noted."""
    done = []
    monkeypatch.setattr(meanwhile, "import_module", done.append)
    meanwhile.leave_imports(MODULES)
    return done


def test_what_is_left_is_imported_in_order_until_the_wait_is_over(monkeypatch):
    done = left(monkeypatch)
    meanwhile.work(lambda: True)
    assert done == []
    meanwhile.work(lambda: bool(done))
    assert done == MODULES[:1]
    meanwhile.work(lambda: False)
    meanwhile.work(lambda: False)
    assert done == MODULES
    assert not {*MODULES} & {*sys.modules}


def test_a_thread_that_waits_leaves_it_to_the_main_thread(monkeypatch):
    done = left(monkeypatch)
    thread = threading.Thread(target=meanwhile.work, args=(lambda: False,))
    thread.start()
    thread.join()
    assert done == []
    meanwhile.work(lambda: False)
    assert done == MODULES


def test_what_one_run_left_is_no_work_of_the_next_one(monkeypatch):
    left(monkeypatch)
    meanwhile.leave_imports([])
    meanwhile.work(lambda: (_ for _ in ()).throw(AssertionError("nothing is left")))


def test_a_call_that_has_begun_tells_whether_it_has_ended():
    go_on = threading.Event()
    call = Begun(lambda: go_on.wait(60), "test")
    assert not call.ends_within(0.001)
    go_on.set()
    assert call.ends_within(60)
    assert call.ends_within(0)
    assert call.result(lambda: None) is True
