"""
Parameters that several commands have.  Texts and flags only, also where a path is meant: see `app._unconverted`.
"""

from __future__ import annotations

from typing import Annotated

import typer

MachineNames = Annotated[
    list[str] | None, typer.Argument(metavar="MACHINE", help="All, where none is named.", show_default=False)
]
Repo = Annotated[str | None, typer.Option("--repo", metavar="DIR", help="The repository's folder.")]
Image = Annotated[str | None, typer.Option("--image", metavar="FILE", help="An image that no machine has open.")]
ImageFormat = Annotated[
    str | None,
    typer.Option("--image-format", metavar="qcow2|raw", help="The image's format; else its first bytes tell."),
]
Images = Annotated[
    list[str] | None,
    typer.Option("--image", metavar="FILE", help="An image that no machine has open; again for the machine's others."),
]
ImageFormats = Annotated[
    list[str] | None,
    typer.Option(
        "--image-format",
        metavar="qcow2|raw",
        help="The images' format, or one for each --image, in order; else their first bytes tell.",
    ),
]
Nbd = Annotated[str | None, typer.Option("--nbd", metavar="URI", help="An export of any NBD server.")]
Since = Annotated[
    str | None,
    typer.Option("--since", metavar="POINT", help="With --nbd: the point that the server's bitmap starts from."),
]
Qmp = Annotated[str | None, typer.Option("--qmp", metavar="SOCKET", help="The QMP socket of a running machine's QEMU.")]
Nodes = Annotated[
    list[str] | None,
    typer.Option(
        "--node",
        metavar="NODE",
        help="With --qmp: a disk, by its node, device id or image; again for more.  Without it, all writable disks.",
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option("--exclude", metavar="DISK", help="With --qmp: a disk that no point needs to hold; again for more."),
]
AllowPlaintext = Annotated[
    bool,
    typer.Option("--allow-plaintext", help="With --qmp: store encrypted disks as QEMU decrypts them."),
]
Scratch = Annotated[
    str | None, typer.Option("--scratch", metavar="DIR", help="With --qmp: where QEMU keeps what the guest overwrites.")
]
FreezeFlag = Annotated[
    bool, typer.Option("--freeze", help="With --qmp: have the guest agent freeze the file systems for the instant.")
]
AgentSocket = Annotated[str | None, typer.Option("--agent", metavar="SOCKET", help="The guest agent's socket.")]
MachineName = Annotated[str | None, typer.Option("--machine", metavar="NAME", help="The machine, for a source.")]
DiskNames = Annotated[
    list[str] | None,
    typer.Option("--disk", metavar="NAME", help="The disk, for a source; in the order of --image or --node."),
]
BitmapName = Annotated[
    str | None,
    typer.Option("--bitmap", metavar="NAME", help="Family of the bitmaps to keep; with --nbd, the server's bitmap."),
]
CompressionText = Annotated[
    str | None, typer.Option("--compression", metavar="none|zstd[:LEVEL]", help="How clusters are stored.")
]
Limit = Annotated[
    str | None, typer.Option("--limit", metavar="SIZE", help="Read at most so many bytes a second, such as 50M.")
]
WriteLimit = Annotated[
    str | None, typer.Option("--limit", metavar="SIZE", help="Write at most so many bytes a second, such as 50M.")
]
Filesystem = Annotated[
    str | None, typer.Option("--filesystem", metavar="DEVICE", help="Where there are several: /dev/sda1, /dev/vg/lv.")
]
PointDisk = Annotated[str | None, typer.Option("--disk", metavar="NAME", help="The disk, where there are several.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what a run would do; change nothing.")]
NoFallback = Annotated[
    bool, typer.Option("--no-fallback", help="Fail with 14 rather than read everything (a rescan or a full) instead.")
]
Manifest_ = Annotated[
    str, typer.Argument(metavar="MANIFEST", help="MACHINE[/POINT or /2026-11-28], a part of a point's id, or a path.")
]
