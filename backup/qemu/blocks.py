"""
The block graph of a running QEMU: which node a guest writes to, what lies below it, which bitmaps it has.

    device (block backend) -> filters (throttle, copy-on-read ...) -> format (qcow2, raw) -> protocol (file, nbd ...)
                                                                        |
                                                                        +- backing -> format -> protocol

Backups are of the topmost node that is no filter: a bitmap on a filter sees what the filter does, and QEMU refuses a
backup job there.  Pure functions over QEMU's answers to query-named-block-nodes, query-block and
x-debug-query-block-graph, which alone tells the edges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from backup.errors import SourceError

_FILTERS = {
    "backup-top", "blkdebug", "blklogwrites", "blkreplay", "blkverify", "commit_top", "compress", "copy-before-write",
    "copy-on-read", "filter-cor", "mirror_top", "preallocate", "throttle",
}  # fmt: skip
"""Drivers that pass a guest's writes on (those with `is_filter` in QEMU's block/)."""
_DOWN = ("file", "backing")
"""Names of the edges to the node that a guest's data comes from."""
OURS = "pybackup-"
"""What names of our nodes begin with, whichever repository's.  No guest writes to an overlay of ours on its disk."""


@dataclass(frozen=True, slots=True)
class NodeBitmap:
    """A dirty bitmap as QEMU shows it (BlockDirtyInfo).  `granularity` and `dirty` in bytes."""

    name: str
    granularity: int
    dirty: int
    recording: bool
    persistent: bool
    busy: bool
    inconsistent: bool


@dataclass(frozen=True, slots=True)
class Node:
    """
    A node: its name and driver, size (bytes), file name as QEMU writes it, bitmaps.

    `details` are the format's own facts (ImageInfo's format-specific data).
    """

    name: str
    driver: str
    size: int
    file: str
    bitmaps: tuple[NodeBitmap, ...]
    details: Mapping[str, Any]
    stored: int
    """Bytes that its file takes."""
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class Device:
    """A guest's device: its names, and the node that is attached to it; `io_status` is QEMU's."""

    names: tuple[str, ...]
    node: str
    io_status: str


@dataclass(frozen=True, slots=True)
class Blocks:
    """Nodes by name, edges as (parent, child, name of the edge), and devices, of one moment."""

    nodes: Mapping[str, Node]
    edges: tuple[tuple[str, str, str], ...]
    devices: tuple[Device, ...]
    empty: tuple[str, ...] = ()
    """Names of drives without a medium."""

    @classmethod
    def of(
        cls,
        named: Sequence[Mapping[str, Any]],
        devices: Sequence[Mapping[str, Any]],
        graph: Mapping[str, Any],
    ) -> Blocks:
        """From the answers to query-named-block-nodes (flat), query-block and x-debug-query-block-graph."""
        drivers = {found["id"]: found["name"] for found in graph["nodes"] if found["type"] == "block-driver"}
        return cls(
            nodes={found["node-name"]: _node(found) for found in named},
            edges=tuple(
                (drivers[edge["parent"]], drivers[edge["child"]], edge["name"])
                for edge in graph["edges"]
                if edge["parent"] in drivers and edge["child"] in drivers
            ),
            devices=tuple(_device(found) for found in devices if "inserted" in found),
            empty=tuple(name for found in devices if "inserted" not in found for name in _device_names(found)),
        )

    def resolve(self, text: str, same_file: Callable[[str, str], bool]) -> Node:
        """
        The node that the guest writes to and that can be backed up, from a node's name, a device's id or an image.

        `same_file` tells whether two file names, the second one QEMU's, mean the same file.

        Raises
        ------
        SourceError
            Nothing has that name, or more than one disk does.
        """
        named = self._named(text, same_file)
        tops = sorted({top for name in named for top in self._tops(name)})
        attached = [top for top in tops if any(device.node == top for device in self.devices)]
        found = sorted({self._below_filters(top) for top in attached or tops})
        if len(found) == 1:
            return self.nodes[found[0]]
        if text in self.empty:
            raise SourceError(f"drive {text!r} of the machine is empty", hint="insert a medium, or leave the drive out")
        known = ", ".join(sorted(device.names[0] for device in self.devices if device.names)) or "none"
        if not found:
            raise SourceError(
                f"the machine has no node, device or image {text!r}",
                hint=f"its devices are: {known}; its nodes are: {', '.join(self._own_nodes()) or 'none'}",
            )
        raise SourceError(
            f"{text!r} belongs to several disks: {', '.join(found)}", hint="name the disk's own node with --node"
        )

    def chain(self, name: str) -> list[Node]:
        """The node and those below it in its backing chain, nearest first; filters are passed through."""
        links = [self.nodes[name]]
        below = self._child(name, ("backing",))
        while below is not None:
            below = self._below_filters(below)
            links.append(self.nodes[below])
            below = self._child(below, ("backing",))
        return links

    def storage(self, name: str) -> Node:
        """The protocol node that a format node's data is in: its file name has no options of the format in it."""
        below = self._child(name, ("file",))
        return self.nodes[name] if below is None else self.storage(below)

    def devices_above(self, name: str) -> list[Device]:
        """Devices whose writes go through a node: a filter of ours, for example."""
        above = {name}
        for _ in self.nodes:
            above |= {parent for parent, child, edge in self.edges if child in above and edge in _DOWN}
        return [device for device in self.devices if device.node in above]

    def _own_nodes(self) -> list[str]:
        roots = {self._below_filters(device.node) for device in self.devices}
        children = {child for _, child, _ in self.edges}
        return sorted(roots | {name for name in self.nodes if name not in children})

    def _named(self, text: str, same_file: Callable[[str, str], bool]) -> list[str]:
        if text in self.nodes:
            return [text]
        devices = [device.node for device in self.devices if text in device.names]
        return devices or [node.name for node in self.nodes.values() if same_file(text, node.file)]

    def _tops(self, name: str) -> list[str]:
        above = [
            parent
            for parent, child, edge in self.edges
            if child == name and edge in _DOWN and not (edge == "backing" and parent.startswith(OURS))
        ]
        # A node with a device is the top of that disk, whatever else (another program's overlay) lies on it.
        own = [name] if not above or any(device.node == name for device in self.devices) else []
        return own + [top for parent in above for top in self._tops(parent)]

    def _below_filters(self, name: str) -> str:
        while name in self.nodes and self.nodes[name].driver in _FILTERS:
            below = self._child(name, _DOWN)
            if below is None:
                break
            name = below
        return name

    def _child(self, name: str, edges: Iterable[str]) -> str | None:
        found = {kind: child for parent, child, kind in self.edges if parent == name}
        return next((found[edge] for edge in edges if edge in found), None)


def _node(found: Mapping[str, Any]) -> Node:
    image = found["image"]
    return Node(
        name=found["node-name"],
        driver=found["drv"],
        size=int(image["virtual-size"]),
        file=_plain(found["drv"], found["file"]),
        # An internal bitmap of QEMU's own has no name.
        bitmaps=tuple(_bitmap(bitmap) for bitmap in found.get("dirty-bitmaps", ()) if bitmap.get("name")),
        details=image.get("format-specific", {}).get("data", {}),
        stored=int(image.get("actual-size", 0)),
        read_only=bool(found["ro"]),
    )


def _plain(driver: str, file: str) -> str:
    """A file's name in which no colon can be taken for the end of a protocol's name."""
    relative = driver == "file" and not file.startswith(("/", "json:"))
    return f"./{file}" if relative else file


def _bitmap(found: Mapping[str, Any]) -> NodeBitmap:
    return NodeBitmap(
        name=found["name"],
        granularity=int(found["granularity"]),
        dirty=int(found["count"]),
        recording=bool(found["recording"]),
        persistent=bool(found["persistent"]),
        busy=bool(found["busy"]),
        inconsistent=bool(found.get("inconsistent", False)),
    )


def _device(found: Mapping[str, Any]) -> Device:
    return Device(_device_names(found), found["inserted"]["node-name"], found.get("io-status", "ok"))


def _device_names(found: Mapping[str, Any]) -> tuple[str, ...]:
    qdev = found.get("qdev", "")
    # "/machine/peripheral/vd0/virtio-backend" is the device that -device calls vd0.
    words = qdev.split("/")
    own = words[3:4] if words[:3] == ["", "machine", "peripheral"] else []
    return tuple(dict.fromkeys(name for name in (*own, found.get("device", ""), qdev) if name))
