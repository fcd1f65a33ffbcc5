"""URIs of libvirt: pybackup reads the disks of a domain through a Unix socket, so that the daemon must be local."""

from __future__ import annotations

from urllib.parse import parse_qs, urlsplit

_SCHEMES = {"qemu", "qemu+unix"}
_PATHS = {"/system", "/session"}
_SOCKETS = {f"{folder}/libvirt/{daemon}-sock" for folder in ("/run", "/var/run") for daemon in ("libvirt", "virtqemud")}
"""Where the daemon of the system listens: libvirtd, or virtqemud."""


def uri_problem(text: str) -> str | None:
    """Return why pybackup cannot use a libvirt URI; None if it can."""
    try:
        parts = urlsplit(text)
        host = parts.netloc
    except ValueError:
        return "it is not a URI"
    driver, _, transport = parts.scheme.partition("+")
    if driver != "qemu":
        return "it does not name libvirt's QEMU driver"
    if host or parts.scheme not in _SCHEMES:
        return (
            f"it names a daemon on another host ({host or transport}), and pybackup reads the domains of this host only"
        )
    if parts.path not in _PATHS:
        return f"its path is {parts.path or 'missing'}, not /system or /session"
    return None


URI_HINT = "for example qemu:///system or qemu:///session; back up the domains of another host on that host"


def socket_of(uri: str) -> str | None:
    """Return the path in a URI's parameter `socket`; None: the URI means the daemon's default socket."""
    return parse_qs(urlsplit(uri).query).get("socket", [None])[0]


def is_session(uri: str) -> bool:
    """Tell whether a URI means a user's own daemon."""
    return urlsplit(uri).path == "/session"


def has_usual_folders(uri: str) -> bool:
    """Tell whether a URI means the daemon of the system or of this user, which keep their files at known places."""
    socket = socket_of(uri)
    return socket is None or (not is_session(uri) and socket in _SOCKETS)


def is_pattern(domain: str) -> bool:
    """Tell whether a domain's name is a pattern (`web*`) that several domains may match."""
    return any(character in domain for character in "*?[")
