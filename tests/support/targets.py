"""NBD servers that a restore writes to."""

from __future__ import annotations

import os
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path


def listens(path):
    """Does a server listen there?  The socket's name is there a moment before that; connecting could use it up."""
    sockets = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    return any(words[-1] == path and words[3] == "00010000" for words in sockets)  # __SO_ACCEPTCON


@contextmanager
def server(*command):
    """An NBD server on a socket in the folder; `command` has SOCKET where the path goes."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "s")
        process = subprocess.Popen([word.replace("SOCKET", path) for word in command], stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 20
            while not listens(path) and time.monotonic() < deadline:
                assert process.poll() is None
                time.sleep(0.01)
            yield f"nbd+unix:///?socket={path}"
        finally:
            process.kill()
            process.wait()


def nbdkit(*arguments):
    return server("nbdkit", "-f", "-U", "SOCKET", *arguments)


def qemu_nbd(path, *options, image_format="raw"):
    return server("qemu-nbd", "-t", "-f", image_format, "-k", "SOCKET", *options, str(path))
