"""A program that speaks like guestfish, and takes the host's files for the guest's."""

from __future__ import annotations

import os

FISH = """#!/usr/bin/env python3
import os, shlex, sys, tarfile
for line in sys.stdin:
    command, *words = shlex.split(line.encode().decode("unicode_escape"))
    path = words[0] if words else None
    if command == "echo":
        print(path, flush=True)
    elif command == "-exit":
        sys.exit()
    elif command == "-list-filesystems":
        print("/dev/sda: ext4")
    elif command in {"-statns", "-lstatns"}:
        try:
            found = os.stat(path, follow_symlinks=command == "-statns")
        except OSError as error:
            print(f"libguestfs: error: statns: {path}: {error.strerror}", file=sys.stderr, flush=True)
        else:
            for name in ("mode", "size", "uid", "gid"):
                print(f"st_{name}: {getattr(found, 'st_' + name)}")
            print(f"st_mtime_sec: {int(found.st_mtime)}")
    elif command == "-ls0":
        print("".join(name + chr(0) for name in os.listdir(path)), end="")
    elif command == "-readlink":
        print(os.readlink(path))
    elif command == "-tar-out" and os.path.isdir(path):
        with open(words[1], "wb") as file, tarfile.open(fileobj=file, mode="w|") as tar:
            tar.add(path, arcname=".")
    elif command in {"-download", "-tar-out"}:
        with open(words[1], "wb") as file:
            file.write(open(path, "rb").read())
        if command == "-tar-out":
            print("libguestfs: error: tar: a damaged file system", file=sys.stderr, flush=True)
"""
"""Its text; its tar-out of a file fails after it wrote."""


def path_with(folder, *programs):
    """A PATH that has pybackup's programs and these."""
    folder.mkdir()
    for name, text in programs:
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    for name in ("qemu-img", "sh", "env"):
        found = next(place for place in os.environ["PATH"].split(":") if os.path.exists(f"{place}/{name}"))
        (folder / name).symlink_to(f"{found}/{name}")
    return {"PATH": str(folder)}
