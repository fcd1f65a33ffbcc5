"""
A signal ends the program once, wherever in Python it comes.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

PREPARED = """
import asyncio, os, signal, time, weakref
from backup.runtime import signals
from backup.errors import Interrupted

signals.catch()

class Something:
    pass

def strike(*_):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0)

async def work():
    pass
"""

STRUCK = {
    "a weak reference's end": "it = Something(); kept = weakref.ref(it, strike); del it; time.sleep(20)",
    "an object's end": "Something.__del__ = strike; Something(); time.sleep(20)",
    "tidying up": "it = Something(); kept = weakref.ref(it, strike); signals.to_the_end(tidy_up)",
    "a coroutine that is not run": "made = work(); strike()",
}


@pytest.mark.parametrize("struck", STRUCK.values(), ids=STRUCK.keys())
def test_a_signal_is_not_swallowed_and_nothing_is_said_of_it(struck):
    told = "it = None\ndef tidy_up():\n    global it\n    it = None\n    time.sleep(0.2)\n    print('tidied up')\n"
    told += f"try:\n    {struck}\nexcept Interrupted as stopped:\n    print(stopped.message)"
    done = subprocess.run(
        [sys.executable, "-c", PREPARED + told], capture_output=True, text=True, timeout=60, check=False
    )
    tidied = "tidied up\n" * ("to_the_end" in struck)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tidied}stopped by SIGTERM\n", "")
