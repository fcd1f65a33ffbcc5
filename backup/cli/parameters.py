"""
Parameters that several commands have, with their texts in --help.

Every parameter is a text, a list of texts or a flag, also where a path or a number is meant: `backup.cli.app` hands
commands what the user wrote, and the commands convert it.
"""

from __future__ import annotations

from typing import Annotated

import typer

# What a command works on.

ConfiguredMachines = Annotated[
    list[str] | None,
    typer.Argument(metavar="MACHINE", help="Machines of the configuration.  Default: all.", show_default=False),
]
MachineNames = Annotated[
    list[str] | None,
    typer.Argument(metavar="MACHINE", help="Machines of the repository.  Default: all.", show_default=False),
]
PointName = Annotated[
    str,
    typer.Argument(
        metavar="MANIFEST",
        help=(
            "The point: MACHINE (its newest point), MACHINE/POINT, MACHINE/2026-11-28 (the newest point of that day or "
            "before), the beginning or end of a point's id, or the path of a manifest."
        ),
    ),
]
Repo = Annotated[
    str | None,
    typer.Option(
        "--repo",
        metavar="REPO",
        help="The repository: a folder, s3://BUCKET/PREFIX, or the name of a place in `copies` of the configuration.  "
        "Default: `repository` in the configuration.",
    ),
]
FirstRepo = Annotated[
    str | None,
    typer.Option(
        "--repo", metavar="DIR", help="Folder of the repository.  Default: `repository` in the configuration."
    ),
]
IdentityFile = Annotated[
    str | None,
    typer.Option(
        "--identity",
        metavar="FILE",
        help="File of the identity that opens a sealed repository.  Default: the file that PYBACKUP_IDENTITY names.",
    ),
]
PointDisk = Annotated[
    str | None,
    typer.Option("--disk", metavar="NAME", help="Disk of the point.  Needed if the point holds several disks."),
]
Filesystem = Annotated[
    str | None,
    typer.Option(
        "--filesystem",
        metavar="DEVICE",
        help="File system to mount, for example /dev/sda1 or /dev/vg/lv.  Default: the only file system, or all that "
        "the guest's only operating system mounts.",
    ),
]

# A source: one image or several, an NBD export, or a running machine.

Image = Annotated[str | None, typer.Option("--image", metavar="FILE", help="Image that no machine has open.")]
ImageFormat = Annotated[
    str | None,
    typer.Option("--image-format", metavar="qcow2|raw", help="Format of the image.  Default: detected."),
]
Images = Annotated[
    list[str] | None,
    typer.Option(
        "--image", metavar="FILE", help="Image that no machine has open.  Repeat it for each disk of the machine."
    ),
]
ImageFormats = Annotated[
    list[str] | None,
    typer.Option(
        "--image-format",
        metavar="qcow2|raw",
        help="Format of all images; or repeat it for each --image, in the same order.  Default: detected.",
    ),
]
Nbd = Annotated[
    str | None,
    typer.Option("--nbd", metavar="URI", help="Export of an NBD server, for example nbd://host/disk."),
]
Since = Annotated[
    str | None,
    typer.Option(
        "--since",
        metavar="POINT",
        help="With --nbd and --bitmap: the point at which the server's bitmap was started.  Without it, the "
        "bitmap is not used.",
    ),
]
Qmp = Annotated[
    str | None,
    typer.Option("--qmp", metavar="SOCKET", help="QMP socket of the QEMU that runs the machine."),
]
LibvirtUri = Annotated[
    str | None,
    typer.Option("--libvirt", metavar="URI", help="URI of the local libvirt that has the domain: qemu:///system."),
]
DomainName = Annotated[
    str | None,
    typer.Option("--domain", metavar="NAME", help="With --libvirt: the domain, on or off."),
]
Domains = Annotated[
    str | None,
    typer.Option(
        "--domain",
        metavar="NAME",
        help="With --libvirt: the domain, on or off.  A pattern ('web*') means every domain that matches, each as a "
        "machine of its own.",
    ),
]
Nodes = Annotated[
    list[str] | None,
    typer.Option(
        "--node",
        metavar="NODE",
        help="With --qmp: a disk, named by its node, device id or image.  Repeat it for each disk.  Default: all "
        "writable disks.",
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude",
        metavar="DISK",
        help="With --qmp or --libvirt: a disk to leave out, named as for --node, or by its target device (vdb).  "
        "Repeat it for more.  A disk that is left out without this option causes a warning.",
    ),
]
Scratch = Annotated[
    str | None,
    typer.Option(
        "--scratch",
        metavar="DIR",
        help="With --qmp or --libvirt: folder in which QEMU saves, while the disks are read, the old content of data "
        "that the guest overwrites.  Default: `scratch` in the configuration, else the folder of each image.",
    ),
]
FreezeFlag = Annotated[
    bool,
    typer.Option(
        "--freeze",
        help="With --libvirt, or with --qmp and --agent: have the guest agent freeze the guest's file systems for the "
        "instant of the backup.",
    ),
]
AgentSocket = Annotated[
    str | None,
    typer.Option("--agent", metavar="SOCKET", help="With --qmp: socket of the QEMU guest agent."),
]
AllowPlaintext = Annotated[
    bool,
    typer.Option(
        "--allow-plaintext",
        help="With --qmp or --libvirt: back up encrypted disks although the repository will hold their content "
        "unencrypted.",
    ),
]
TrustDataFile = Annotated[
    bool,
    typer.Option(
        "--trust-data-file",
        help="With --image, --qmp or --libvirt: use the bitmaps of images that have an external data file.  By this "
        "option you state that nothing writes to the data file except through its image.",
    ),
]
MachineName = Annotated[
    str | None,
    typer.Option(
        "--machine",
        metavar="NAME",
        help="Name under which the machine is stored.  Default: the name of the domain, image (without its suffix), "
        "export or node.  Needed for several images or nodes.",
    ),
]
DiskNames = Annotated[
    list[str] | None,
    typer.Option(
        "--disk",
        metavar="NAME",
        help="Name under which a disk is stored.  Repeat it in the order of --image or --node.  Default: the name of "
        "the image, export, node or device.  With --libvirt: the target device (vda) of a disk to back up.  Default: "
        "all disks but cdroms and floppies.",
    ),
]

# How a source is read and stored.

BitmapName = Annotated[
    str | None,
    typer.Option(
        "--bitmap",
        metavar="NAME",
        help="Name of pybackup's dirty bitmaps, which are called NAME.REPOSITORY.POINT in QEMU.  With --nbd: the "
        "exact name of the server's bitmap.  Default: `bitmap` in the configuration.",
    ),
]
CompressionText = Annotated[
    str | None,
    typer.Option(
        "--compression",
        metavar="none|zstd[:LEVEL]",
        help="Compression of the stored data.  LEVEL is -7 (fastest) to 19 (smallest).  Default: `compression` in the "
        "configuration, else zstd:1.",
    ),
]
Limit = Annotated[
    str | None,
    typer.Option(
        "--limit",
        metavar="SIZE",
        help="Read at most SIZE bytes a second, for example 50M.  Default: `limit` in the configuration, else no "
        "limit.",
    ),
]
WriteLimit = Annotated[
    str | None,
    typer.Option(
        "--limit", metavar="SIZE", help="Write at most SIZE bytes a second, for example 50M.  Default: no limit."
    ),
]
NoFallback = Annotated[
    bool,
    typer.Option(
        "--no-fallback",
        help="Fail with exit code 14 where no bitmap can be continued, instead of reading the whole disk.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and change nothing.")]
