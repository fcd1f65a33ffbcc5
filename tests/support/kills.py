"""Run pybackup and strike at a named step of it: a signal, or an error, before or after a function's call."""

from __future__ import annotations

from dataclasses import dataclass

DRIVER = r"""
import contextlib, importlib, os, sys

spec, *sys.argv[1:] = sys.argv[1:]
module, path, when, nth, number = spec.split()
*parents, name = path.split(".")
owner = importlib.import_module(module)
for parent in parents:
    owner = getattr(owner, parent)
original = getattr(owner, name)
calls = 0

def strike():
    os.kill(os.getpid(), int(number))

def wrapped(*args, **keywords):
    global calls
    calls += 1
    if when == "before" and calls == int(nth):
        strike()
    found = original(*args, **keywords)
    if when == "after" and calls == int(nth):
        strike()
    return found

@contextlib.contextmanager
def entered(*args, **keywords):
    with original(*args, **keywords) as found:
        strike()
        yield found

def answering(self, count, offset, extent, *flags):
    def called(*args):
        strike()
        return extent(*args)
    return original(self, count, offset, called, *flags)

setattr(owner, name, {"entered": entered, "answering": answering}.get(when, wrapped))
from backup.cli.app import main
main()
"""


@dataclass(frozen=True, slots=True)
class Step:
    """Where the signal comes: the function, before or after its nth call; `published` when the point exists by then."""

    module: str
    name: str
    when: str
    nth: int = 1
    published: bool = False

    def __str__(self) -> str:
        return f"{self.when} {self.name} {self.nth}"

    def spec(self, number: int) -> str:
        return f"{self.module} {self.name} {self.when} {self.nth} {int(number)}"


PROGRAMS, IMAGES, SERVERS = "backup.qemu.programs", "backup.qemu.image_bitmaps", "backup.qemu.servers"


DATA, REPOSITORY = "backup.repository.data_file_writer", "backup.repository.machine"
FOLDER = "backup.storage.folder"
