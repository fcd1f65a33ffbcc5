"""
A domain's definition: what it says of the machine's small files, and how it is changed for a restored machine.  Pure.

A definition from a repository is not trusted: a document type, with which entities could be defined, is refused, and no
path in the definition is opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from backup.sources.libvirt_xml import REMOVABLE

_RAW, _QCOW2 = "raw", "qcow2"
_NAMESPACES = {
    "qemu": "http://libvirt.org/schemas/domain/qemu/1.0",
    "libosinfo": "http://libosinfo.org/xmlns/libvirt/domain/1.0",
}
"""Namespaces that definitions commonly have, with their usual prefixes."""
_DEEPEST = 200
"""The deepest nesting of elements that is accepted; libvirt's own documents have about ten levels."""
_OPTIONAL_STORAGE = {"file", "block"}
"""Types of drives for which libvirt can leave out a medium that is missing."""

for _prefix, _uri in _NAMESPACES.items():
    ET.register_namespace(_prefix, _uri)


class BadDefinition(Exception):
    """A text is no definition of a domain; the message says why, in a few words."""


@dataclass(frozen=True, slots=True)
class Nvram:
    """
    The file of the firmware's variables: its path (None: no local file is named), and its format.

    `unnamed`: the definition names no file, and libvirt puts one at its default place when the domain starts.
    """

    path: str | None
    format: str
    unnamed: bool = False


@dataclass(frozen=True, slots=True)
class Tpm:
    """
    A TPM: its backend ("emulator": swtpm), its version, and the folder of its state (None: libvirt's default).

    `in_file`: the state is a single file or device, which is no folder of swtpm's.
    """

    backend: str
    version: str
    source: str | None
    in_file: bool = False


@dataclass(frozen=True, slots=True)
class Definition:
    """What a definition says beside the disks; None: the machine has none."""

    name: str
    uuid: str | None
    nvram: Nvram | None
    tpm: Tpm | None


@dataclass(frozen=True, slots=True)
class RestoredDisk:
    """A disk that was restored: the absolute path of its file, the file's format, and where the disk was read from."""

    path: str
    format: str
    source: str


@dataclass(frozen=True, slots=True)
class Rewritten:
    """A definition for a restored machine, and what the user should know of it."""

    text: str
    notes: tuple[str, ...]


def read(text: str) -> Definition:
    """
    Read a definition.

    Raises
    ------
    BadDefinition
        The text is no definition.
    """
    root = _parse(text)
    return Definition(
        root.findtext("./name") or "", root.findtext("./uuid"), _nvram(root), _tpm(root.find("./devices/tpm/backend"))
    )


def _nvram(root: ET.Element) -> Nvram | None:
    element = root.find("./os/nvram")
    if element is None:
        return Nvram(None, _RAW, unnamed=True) if _has_unnamed_variables(root) else None
    source = element.find("source")
    path = source.get("file") if source is not None else (element.text or "").strip()
    is_file = element.get("type", "file") == "file"
    return Nvram(path if is_file and path else None, element.get("format", _RAW), unnamed=is_file and not path)


def _has_unnamed_variables(root: ET.Element) -> bool:
    """Tell whether libvirt chooses the firmware; before libvirt 9.2, the definition then names no file of variables."""
    loader = root.find("./os/loader")
    stateless = loader is not None and (loader.get("stateless") == "yes" or loader.get("type") == "rom")
    return root.find("./os[@firmware='efi']") is not None and not stateless


def _tpm(backend: ET.Element | None) -> Tpm | None:
    if backend is None:
        return None
    source = backend.find("source")
    in_folder = source is not None and source.get("type") == "dir"
    return Tpm(
        backend.get("type", ""),
        backend.get("version", "2.0"),
        source.get("path") if source is not None and in_folder else None,
        in_file=source is not None and not in_folder,
    )


def rewrite(text: str, disks: Mapping[str, RestoredDisk], *, nvram: str | None, name: str | None) -> Rewritten:
    """
    Change a definition so that it defines the restored machine.

    Parameters
    ----------
    disks : mapping
        The restored disks by their names in the point: target devices (vda), or other names of disks that a point knows
        by the path that they were read from.
    nvram : str or None
        The absolute path of the restored variables of the firmware; None: libvirt makes new ones from its template.
    name : str or None
        The name of a new machine, which has nothing that tells it from the original but its content: libvirt gives it
        a UUID and MAC addresses of its own.  None: the machine is the original.

    Raises
    ------
    BadDefinition
        The text is no definition, or a path cannot be written in XML.
    """
    for path in (*(disk.path for disk in disks.values()), *([nvram] if nvram else [])):
        if not all(map(_is_in_xml, path)):
            raise BadDefinition(f"the path {path!r} has characters that XML cannot express")
    root = _parse(text)
    notes = _rewrite_disks(root, disks)
    _rewrite_nvram(root, nvram)
    if (generation := root.find("./genid")) is not None:
        generation.text = None  # a new id tells the guest (Windows, for example) that it was restored
    if name is not None:
        _rename(root, name)
    return Rewritten(ET.tostring(root, encoding="unicode") + "\n", tuple(notes))


def _is_in_xml(character: str) -> bool:
    return character >= " " and not "\ud800" <= character <= "\udfff" and character not in "\ufffe\uffff"


def _parse(text: str) -> ET.Element:
    if "<!DOCTYPE" in text:
        raise BadDefinition("it has a document type, which no definition of libvirt has")
    try:
        root = ET.fromstring(text)  # noqa: S314 - without a document type there are no entities
    except ET.ParseError as error:
        raise BadDefinition(f"it is not XML ({error})") from None
    if root.tag != "domain":
        raise BadDefinition("it does not define a domain")
    level, depth = [root], 0
    while level:
        level, depth = [child for element in level for child in element], depth + 1
        if depth > _DEEPEST:
            raise BadDefinition("its elements are nested too deeply")
    return root


def _rewrite_disks(root: ET.Element, disks: Mapping[str, RestoredDisk]) -> list[str]:
    notes = []
    missing = dict(disks)
    devices = root.find("./devices")
    for element in [] if devices is None else devices.findall("disk"):
        name, target = _restored_as(element, missing), _target(element)
        if name is not None:
            _rewrite_disk(element, missing.pop(name))
        elif element.get("device", "disk") in REMOVABLE:
            _make_optional(element)
        else:
            assert devices is not None
            devices.remove(element)
            notes.append(f"disk {target} is not in the point, so that the restored definition has no such disk")
    notes += [
        f"disk {name} is in the point, and the definition has no such disk (it was attached only until the domain's "
        f"end, for example): attach {disk.path} yourself"
        for name, disk in missing.items()
    ]
    return notes


def _target(element: ET.Element) -> str:
    target = element.find("target")
    return "" if target is None else target.get("dev", "")


def _restored_as(element: ET.Element, disks: Mapping[str, RestoredDisk]) -> str | None:
    """Return the name of the restored disk that a `<disk>` describes: by its target, else by its path."""
    target, source = _target(element), element.find("source")
    if target in disks:
        return target
    path = None if source is None else source.get("file") or source.get("dev")
    return next((name for name, disk in disks.items() if path is not None and disk.source == path), None)


def _rewrite_disk(element: ET.Element, disk: RestoredDisk) -> None:
    """Have a `<disk>` describe the restored file, which is neither encrypted nor an overlay."""
    for tag in ("source", "backingStore", "mirror", "auth", "encryption"):
        for child in element.findall(tag):
            element.remove(child)
    element.set("type", "file")
    if element.get("device") == "lun":  # for block devices only
        element.set("device", "disk")
    for attribute in ("sgio", "rawio"):
        element.attrib.pop(attribute, None)
    driver = element.find("driver")
    if driver is None:
        driver = ET.Element("driver", name="qemu")
        element.insert(0, driver)
    driver.set("type", disk.format)
    if disk.format == _RAW:
        driver.attrib.pop("discard_no_unref", None)
        for cache in driver.findall("metadata_cache"):
            driver.remove(cache)
    if disk.format == _QCOW2 and (shareable := element.find("shareable")) is not None:
        element.remove(shareable)  # which libvirt allows for raw images only
    element.insert(list(element).index(driver) + 1, ET.Element("source", file=disk.path))


def _make_optional(element: ET.Element) -> None:
    """Have libvirt leave the drive empty where the medium is not there."""
    source = element.find("source")
    if source is not None and element.get("type", "file") in _OPTIONAL_STORAGE:
        source.set("startupPolicy", "optional")


def _rewrite_nvram(root: ET.Element, path: str | None) -> None:
    machine, element = root.find("./os"), root.find("./os/nvram")
    if element is None:
        if machine is not None and path is not None:
            ET.SubElement(machine, "nvram").text = path
        return
    for child in list(element):
        element.remove(child)
    element.attrib.pop("type", None)
    if path is None:
        element.attrib.pop("format", None)
    element.text = path


def _rename(root: ET.Element, name: str) -> None:
    """Take from a definition everything by which libvirt, a network or the guest would take two machines for one."""
    named = root.find("./name")
    if named is None:
        named = ET.SubElement(root, "name")
    named.text = name
    _remove_all(root, "uuid")
    for system in root.iterfind("./sysinfo/system"):
        for entry in system.findall("./entry[@name='uuid']"):  # which must be the domain's
            system.remove(entry)
    for interface in root.iterfind("./devices/interface"):
        _remove_all(interface, "mac")
        for parameters in interface.iterfind("./virtualport/parameters"):
            for attribute in ("interfaceid", "instanceid"):
                parameters.attrib.pop(attribute, None)
    for backend in root.iterfind("./devices/tpm/backend"):
        _remove_all(backend, "source")
    for source in root.iterfind("./devices/channel/source[@mode='bind']"):
        source.attrib.pop("path", None)


def _remove_all(parent: ET.Element, tag: str) -> None:
    for child in parent.findall(tag):
        parent.remove(child)
