"""
The block graph of a running QEMU: which node a guest writes to, what is below that node, and which bitmaps it has.

    device (block backend) -> filters (throttle, copy-on-read ...) -> format (qcow2, raw) -> protocol (file, nbd ...)
                                                                        |
                                                                        +- backing -> format -> protocol

A backup reads the topmost node that is not a filter.  A bitmap on a filter would record what the filter does, and QEMU
refuses a backup job on a filter.  This module contains pure functions of QEMU's answers to query-named-block-nodes,
query-block, query-block-exports and x-debug-query-block-graph.  Only the last one contains the edges and permissions.
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
"""Drivers of filters, which pass the writes of a guest on (those with `is_filter` in QEMU's block/)."""
_DOWN = ("file", "backing")
"""Names of the edges to the node from which a guest's data comes."""
OURS = "pybackup-"
"""Prefix of the names of pybackup's nodes, for all repositories.  No guest writes to pybackup's overlays."""
_WRITE = "write"
"""The permission to change the content of a node."""
_FLASH = re.compile(r"/machine/[^/]+\.flash[0-9]+")
"""QOM path of a board's flash memory."""


@dataclass(frozen=True, slots=True)
class NodeBitmap:
    """A dirty bitmap of a node (BlockDirtyInfo).  `granularity` and `dirty` in bytes."""

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
    A node of the graph; `size` in bytes, `file` is the name as QEMU writes it.

    `details` are the facts that are specific to the format (ImageInfo's format-specific data).
    """

    name: str
    driver: str
    size: int
    file: str
    bitmaps: tuple[NodeBitmap, ...]
    details: Mapping[str, Any]
    stored: int
    """Bytes that the file occupies."""
    read_only: bool = False

    @property
    def encrypted(self) -> bool:
        """Whether QEMU decrypts the content of the node's file."""
        return self.driver == "luks" or "encrypt" in self.details


@dataclass(frozen=True, slots=True)
class Device:
    """
    A device of the guest: its names, the attached node, and QEMU's `io_status` ("ok", "failed" or "nospace").

    `path` is the QOM path, empty for a drive without a device.  `writes` tells whether the guest can change the disk,
    and `shares` whether the device allows others to write to the disk.
    """

    names: tuple[str, ...]
    node: str
    io_status: str
    path: str = ""
    writes: bool = False
    shares: bool = False

    @property
    def is_disk(self) -> bool:
        """
        Whether a backup of the whole machine includes this device: it is writable and not the board's flash memory.
        """
        return self.writes and bool(self.path) and _FLASH.fullmatch(self.path) is None


@dataclass(frozen=True, slots=True)
class BlockGraph:
    """
    The nodes by name, the edges as (parent, child, name of the edge), and the devices, at one moment.

    `writers` are pairs (parent, node) in which the parent has the permission to write to the node; the parent is
    another node or any other user of the node.  `exported` are the nodes of block exports.
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
    ) -> BlockGraph:
        """
        Read the answers to query-named-block-nodes (flat), query-block, x-debug-query-block-graph, query-block-exports.

        The answers come from different moments; nodes that only some of them contain are left out.

        Raises
        ------
        SourceError
            A node is below itself.
        """
        nodes = {entry["node-name"]: _node(entry) for entry in named}
        drivers = {entry["id"]: entry["name"] for entry in graph["nodes"] if entry["type"] == "block-driver"}
        users = {entry["id"]: entry["name"] for entry in graph["nodes"]}
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
                _device(entry, roots) for entry in devices if entry.get("inserted", {}).get("node-name") in nodes
            ),
            empty=tuple(name for entry in devices if "inserted" not in entry for name in _device_names(entry)),
            writers=tuple((parent, child) for parent, child, edge in edges if _WRITE in edge["perm"]),
            exported=tuple(entry["node-name"] for entry in exports if entry["node-name"] in nodes),
        )

    def resolve(self, text: str, same_file: Callable[[str, str], bool]) -> Node:
        """
        Return the node to back up, the one that the guest writes to, for the name of a node, a device or an image.

        `same_file` tells whether two file names mean the same file; the second one is QEMU's.

        Raises
        ------
        SourceError
            The name matches no disk, or more than one.
        """
        named = self._named(text, same_file)
        tops = sorted({top for name in named for top in self._tops(name)})
        attached = [top for top in tops if any(device.node == top for device in self.devices)]
        disks = sorted({self._below_filters(top) for top in attached or tops})
        if len(disks) == 1:
            return self.nodes[disks[0]]
        if text in self.empty:
            raise SourceError(f"drive {text!r} of the machine is empty", hint="insert a medium, or leave the drive out")
        known = ", ".join(sorted(device.names[0] for device in self.devices if device.names)) or "none"
        if not disks:
            raise SourceError(
                f"the machine has no node, device or image {text!r}",
                hint=f"its devices are: {known}; its nodes are: {', '.join(self._own_nodes()) or 'none'}",
            )
        raise SourceError(
            f"{text!r} belongs to several disks: {', '.join(disks)}", hint="name the disk's own node with --node"
        )

    def chain(self, name: str) -> list[Node]:
        """Return the node and its backing chain, nearest first, without filters."""
        links = [self.nodes[name]]
        below = self._child(name, ("backing",))
        while below is not None:
            below = self._below_filters(below)
            links.append(self.nodes[below])
            below = self._child(below, ("backing",))
        return links

    def storage(self, name: str) -> Node:
        """Return the protocol node that holds a format node's data; its file name contains no options of the format."""
        below = self._child(name, ("file",))
        return self.nodes[name] if below is None else self.storage(below)

    def data_file(self, name: str) -> str | None:
        """Return the name of the external data file of a node's image; None: the image has none."""
        below = self._child(name, ("data-file",))
        return self.nodes[name].details.get("data-file") if below is None else self.storage(below).file

    def devices_above(self, name: str) -> list[Device]:
        """Return the devices whose writes go through a node, for example a filter of ours."""
        above = self._above(name)
        return [device for device in self.devices if device.node in above]

    def is_abandoned(self, name: str) -> bool:
        """
        Tell whether neither a device nor an export uses a node, although the machine has devices.

        Then the guest writes elsewhere.  In a machine without devices an export, or the monitor, takes the guest's
        part.
        """
        above = self._above(name)
        has_devices = any(device.path for device in self.devices)
        return has_devices and not any(user in above for user in (*self._device_nodes(), *self.exported))

    def disks(self) -> list[tuple[Device, Node]]:
        """Return the disks of the machine: devices that the guest can write to, with the node to back up, each once."""
        by_node: dict[str, Device] = {}
        for device in self.devices:
            if device.is_disk:
                by_node.setdefault(self._below_filters(device.node), device)
        return [(device, self.nodes[name]) for name, device in by_node.items()]

    def is_encrypted(self, name: str) -> bool:
        """Tell whether QEMU decrypts any of a disk's content, in the disk's own image or in one below it."""
        chain = [node.name for node in self.chain(name)]
        return any(self.nodes[node].encrypted for link in chain for node in (link, *self._storage_of(link)))

    def unseen_writer(self, name: str, same_file: Callable[[str, str], bool]) -> str | None:
        """
        Return what writes to a disk's storage and bypasses the disk's node and its bitmaps; None if nothing does.

        `same_file` tells whether two file names of QEMU mean the same file.
        """
        below = self._storage_of(name)
        for writer, child in self.writers:
            if child in below and writer not in below and writer != name and not writer.startswith(OURS):
                what = f"{writer!r} of the same QEMU" if writer else "an export or a job of the same QEMU"
                return f"{what} writes to node {child} below it"
        files = [self.storage(name).file, *filter(None, [self.data_file(name)])]
        for node in self.nodes.values():
            other = node.name != name and node.name not in below and not node.name.startswith(OURS)
            at_the_end = node.name not in self._children
            if other and not node.read_only and at_the_end and any(same_file(node.file, file) for file in files):
                return f"node {node.name!r} of the same QEMU has the same file open for writing"
        return None

    def _storage_of(self, name: str) -> set[str]:
        """Return all nodes below a node, except those of its backing chain."""
        storage: set[str] = set()
        waiting = [name]
        while waiting:
            children = self._children.get(waiting.pop(), {})
            new = {child for kind, child in children.items() if kind != "backing"} - storage
            storage |= new
            waiting += new
        return storage

    def _above(self, name: str) -> set[str]:
        """
        Return the node and all nodes above it through which a guest sees its data; a guest uses no overlay of ours.
        """
        above = {name}
        waiting = [name]
        while waiting:
            new = {parent for parent in self._guests_parents(waiting.pop()) if parent not in above}
            above |= new
            waiting += new
        return above

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
        # A node with a device is the top of a disk, whatever else is above it (an overlay of another program).
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
        children = self._children.get(name, {})
        return next((children[edge] for edge in edges if edge in children), None)


def _require_no_cycle(edges: Iterable[tuple[str, str, str]]) -> None:
    below: dict[str, set[str]] = {}
    for parent, child, _ in edges:
        below.setdefault(parent, set()).add(child)
    try:
        TopologicalSorter(below).prepare()
    except CycleError as error:
        raise SourceError(f"node {error.args[1][0]} of the machine lies below itself", hint=NOT_QEMU) from None


def _node(entry: Mapping[str, Any]) -> Node:
    image = entry["image"]
    return Node(
        name=entry["node-name"],
        driver=entry["drv"],
        size=int(image["virtual-size"]),
        file=_unambiguous(entry["drv"], entry["file"]),
        # QEMU's internal bitmaps have no name.
        bitmaps=tuple(_bitmap(bitmap) for bitmap in entry.get("dirty-bitmaps", ()) if bitmap.get("name")),
        details=image.get("format-specific", {}).get("data", {}),
        stored=int(image.get("actual-size", 0)),
        read_only=bool(entry["ro"]),
    )


def _unambiguous(driver: str, file: str) -> str:
    """Return a file name in which a colon cannot be mistaken for the end of a protocol's name."""
    relative = driver == "file" and not file.startswith(("/", "json:"))
    return f"./{file}" if relative else file


def _bitmap(entry: Mapping[str, Any]) -> NodeBitmap:
    return NodeBitmap(
        name=entry["name"],
        granularity=int(entry["granularity"]),
        dirty=int(entry["count"]),
        recording=bool(entry["recording"]),
        persistent=bool(entry["persistent"]),
        busy=bool(entry["busy"]),
        inconsistent=bool(entry.get("inconsistent", False)),
    )


def _device(entry: Mapping[str, Any], roots: Mapping[str, Mapping[str, Any]]) -> Device:
    """Return a device.  `roots` maps the names of block backends, which devices share, to their edges."""
    qdev = entry.get("qdev", "")
    own = f"/machine/peripheral/{qdev}" if qdev and not qdev.startswith("/") else qdev
    root = next((roots[name] for name in (entry["device"], qdev) if name and name in roots), {})
    return Device(
        _device_names(entry),
        entry["inserted"]["node-name"],
        entry.get("io-status", "ok"),
        path=own,
        writes=_WRITE in root.get("perm", ()),
        shares=_WRITE in root.get("shared-perm", ()),
    )


def _device_names(entry: Mapping[str, Any]) -> tuple[str, ...]:
    qdev = entry.get("qdev", "")
    # "/machine/peripheral/vd0/virtio-backend" belongs to the device that -device names vd0.
    words = qdev.split("/")
    own = words[3:4] if words[:3] == ["", "machine", "peripheral"] else []
    return tuple(dict.fromkeys(name for name in (*own, entry.get("device", ""), qdev) if name))
