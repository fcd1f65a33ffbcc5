"""
The block graph of a running QEMU: which node a guest writes to, what lies below it, which bitmaps it has.

    device (block backend) -> filters (throttle, copy-on-read ...) -> format (qcow2, raw) -> protocol (file, nbd ...)
                                                                        |
                                                                        +- backing -> format -> protocol

Backups are of the topmost node that is no filter: a bitmap on a filter sees what the filter does, and QEMU refuses a
backup job there.  Pure functions over QEMU's answers to query-named-block-nodes, query-block, query-block-exports and
x-debug-query-block-graph, which alone tells the edges and who may write.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import Any

from backup.errors import SourceError
from backup.qmp.answers import NOT_QEMU

_FILTERS = {
    "backup-top", "blkdebug", "blklogwrites", "blkreplay", "blkverify", "commit_top", "compress", "copy-before-write",
    "copy-on-read", "filter-cor", "mirror_top", "preallocate", "throttle",
}  # fmt: skip
"""Drivers that pass a guest's writes on (those with `is_filter` in QEMU's block/)."""
_DOWN = ("file", "backing")
"""Names of the edges to the node that a guest's data comes from."""
OURS = "pybackup-"
"""What names of our nodes begin with, whichever repository's.  No guest writes to an overlay of ours on its disk."""
_WRITE = "write"
"""The permission to change what a node holds."""
_FLASH = re.compile(r"/machine/[^/]+\.flash[0-9]+")
"""The QOM path of a board's flash memory."""


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

    @property
    def encrypted(self) -> bool:
        """Does QEMU decrypt what the node's file holds?"""
        return self.driver == "luks" or "encrypt" in self.details


@dataclass(frozen=True, slots=True)
class Device:
    """
    A guest's device: its names, and the node that is attached to it; `io_status` is QEMU's.

    `path` is its QOM path, empty for a drive without a device.  `writes` says whether the guest can change the disk,
    `shares` whether the device lets others write to the disk.
    """

    names: tuple[str, ...]
    node: str
    io_status: str
    path: str = ""
    writes: bool = False
    shares: bool = False

    @property
    def is_disk(self) -> bool:
        """Is it a disk that a backup of the whole machine holds: writable, and not the board's flash memory?"""
        return self.writes and bool(self.path) and _FLASH.fullmatch(self.path) is None


@dataclass(frozen=True, slots=True)
class Blocks:
    """
    Nodes by name, edges as (parent, child, name of the edge), and devices, of one moment.

    `writers` are (parent, node) wherever a parent, a node or something else that uses the node, has the permission to
    write to it; `exported` are the nodes that a block export serves.
    """

    nodes: Mapping[str, Node]
    edges: tuple[tuple[str, str, str], ...]
    devices: tuple[Device, ...]
    empty: tuple[str, ...] = ()
    """Names of drives without a medium."""
    writers: tuple[tuple[str, str], ...] = ()
    exported: tuple[str, ...] = ()
    _children: dict[str, dict[str, str]] = field(init=False, repr=False, compare=False)
    _parents: dict[str, list[tuple[str, str]]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        children: dict[str, dict[str, str]] = {}
        parents: dict[str, list[tuple[str, str]]] = {}
        for parent, child, kind in self.edges:
            children.setdefault(parent, {})[kind] = child
            parents.setdefault(child, []).append((parent, kind))
        object.__setattr__(self, "_children", children)
        object.__setattr__(self, "_parents", parents)

    @classmethod
    def of(
        cls,
        named: Sequence[Mapping[str, Any]],
        devices: Sequence[Mapping[str, Any]],
        graph: Mapping[str, Any],
        exports: Sequence[Mapping[str, Any]] = (),
    ) -> Blocks:
        """
        From the answers to query-named-block-nodes (flat), query-block, x-debug-query-block-graph, query-block-exports.

        The answers are of several moments: what only some of them know is left out.

        Raises
        ------
        SourceError
            A node is below itself.
        """
        nodes = {found["node-name"]: _node(found) for found in named}
        drivers = {found["id"]: found["name"] for found in graph["nodes"] if found["type"] == "block-driver"}
        users = {found["id"]: found["name"] for found in graph["nodes"]}
        edges = [
            (users[edge["parent"]], drivers[edge["child"]], edge)
            for edge in graph["edges"]
            if edge["parent"] in users and drivers.get(edge["child"]) in nodes
        ]
        between = [
            (parent, child, edge["name"])
            for parent, child, edge in edges
            if edge["parent"] in drivers and parent in nodes
        ]
        _require_no_cycle(between)
        roots = {parent: edge for parent, _, edge in edges if edge["parent"] not in drivers}
        return cls(
            nodes=nodes,
            edges=tuple(between),
            devices=tuple(
                _device(found, roots) for found in devices if found.get("inserted", {}).get("node-name") in nodes
            ),
            empty=tuple(name for found in devices if "inserted" not in found for name in _device_names(found)),
            writers=tuple((parent, child) for parent, child, edge in edges if _WRITE in edge["perm"]),
            exported=tuple(found["node-name"] for found in exports if found["node-name"] in nodes),
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
        above = self._above(name)
        return [device for device in self.devices if device.node in above]

    def is_abandoned(self, name: str) -> bool:
        """
        Does neither a device nor an export use a node, in a machine that has devices?

        The guest writes elsewhere then.  Where no device is, an export or the monitor stands in for the guest.
        """
        above = self._above(name)
        has_devices = any(device.path for device in self.devices)
        return has_devices and not any(user in above for user in (*self._device_nodes(), *self.exported))

    def disks(self) -> list[tuple[Device, Node]]:
        """The machine's disks: devices that the guest can write to, with the node to back up, each node once."""
        found: dict[str, Device] = {}
        for device in self.devices:
            if device.is_disk:
                found.setdefault(self._below_filters(device.node), device)
        return [(device, self.nodes[name]) for name, device in found.items()]

    def is_encrypted(self, name: str) -> bool:
        """Does QEMU decrypt any of what a disk holds, in the disk's own image or in one below it?"""
        chain = [node.name for node in self.chain(name)]
        return any(self.nodes[node].encrypted for link in chain for node in (link, *self._storage_of(link)))

    def unseen_writer(self, name: str, same_file: Callable[[str, str], bool]) -> str | None:
        """
        Say what writes to a disk's storage past the disk's own node, whose bitmaps do not see that; None: nothing does.

        `same_file` tells whether two file names of QEMU's mean the same file.
        """
        below = self._storage_of(name)
        for writer, child in self.writers:
            if child in below and writer not in below and writer != name and not writer.startswith(OURS):
                what = f"{writer!r} of the same QEMU" if writer else "an export or a job of the same QEMU"
                return f"{what} writes to node {child} below it"
        file = self.storage(name).file
        for node in self.nodes.values():
            other = node.name != name and node.name not in below and not node.name.startswith(OURS)
            if other and not node.read_only and node.name not in self._children and same_file(node.file, file):
                return f"node {node.name!r} of the same QEMU has the same file open for writing"
        return None

    def _storage_of(self, name: str) -> set[str]:
        """All nodes below a node but those of its backing chain."""
        found: set[str] = set()
        waiting = [name]
        while waiting:
            children = self._children.get(waiting.pop(), {})
            new = {child for kind, child in children.items() if kind != "backing"} - found
            found |= new
            waiting += new
        return found

    def _above(self, name: str) -> set[str]:
        """The node and all nodes whose guest's data it is; an overlay of ours has no guest."""
        found = {name}
        waiting = [name]
        while waiting:
            new = {parent for parent in self._guests_parents(waiting.pop()) if parent not in found}
            found |= new
            waiting += new
        return found

    def _guests_parents(self, name: str) -> list[str]:
        return [
            parent
            for parent, edge in self._parents.get(name, ())
            if edge in _DOWN and not (edge == "backing" and parent.startswith(OURS))
        ]

    def _device_nodes(self) -> set[str]:
        return {device.node for device in self.devices}

    def _own_nodes(self) -> list[str]:
        roots = {self._below_filters(device.node) for device in self.devices}
        return sorted(roots | {name for name in self.nodes if name not in self._parents})

    def _named(self, text: str, same_file: Callable[[str, str], bool]) -> list[str]:
        if text in self.nodes:
            return [text]
        devices = [device.node for device in self.devices if text in device.names]
        return devices or [node.name for node in self.nodes.values() if same_file(text, node.file)]

    def _tops(self, name: str) -> set[str]:
        # A node with a device is the top of that disk, whatever else (another program's overlay) lies on it.
        with_device = self._device_nodes()
        above = self._above(name)
        return {node for node in above if node in with_device or not self._guests_parents(node)}

    def _below_filters(self, name: str) -> str:
        while self.nodes[name].driver in _FILTERS:
            below = self._child(name, _DOWN)
            if below is None:
                break
            name = below
        return name

    def _child(self, name: str, edges: Iterable[str]) -> str | None:
        found = self._children.get(name, {})
        return next((found[edge] for edge in edges if edge in found), None)


def _require_no_cycle(edges: Iterable[tuple[str, str, str]]) -> None:
    below: dict[str, set[str]] = {}
    for parent, child, _ in edges:
        below.setdefault(parent, set()).add(child)
    try:
        TopologicalSorter(below).prepare()
    except CycleError as error:
        raise SourceError(f"node {error.args[1][0]} of the machine lies below itself", hint=NOT_QEMU) from None


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


def _device(found: Mapping[str, Any], roots: Mapping[str, Mapping[str, Any]]) -> Device:
    """A device; `roots` are the edges from the names of block backends, which are the devices'."""
    qdev = found.get("qdev", "")
    own = f"/machine/peripheral/{qdev}" if qdev and not qdev.startswith("/") else qdev
    root = next((roots[name] for name in (found["device"], qdev) if name and name in roots), {})
    return Device(
        _device_names(found),
        found["inserted"]["node-name"],
        found.get("io-status", "ok"),
        path=own,
        writes=_WRITE in root.get("perm", ()),
        shares=_WRITE in root.get("shared-perm", ()),
    )


def _device_names(found: Mapping[str, Any]) -> tuple[str, ...]:
    qdev = found.get("qdev", "")
    # "/machine/peripheral/vd0/virtio-backend" is the device that -device calls vd0.
    words = qdev.split("/")
    own = words[3:4] if words[:3] == ["", "machine", "peripheral"] else []
    return tuple(dict.fromkeys(name for name in (*own, found.get("device", ""), qdev) if name))
