"""
pybackup's connections to the disks of a domain that has an iothread, whose QEMU may abort when a client leaves.

The rules are those of `backup/qmp/clients.py`: QEMU keeps one end of each connection, and closes it only after it has
ended the exports.  If a backup job were ended before that, QEMU would hang for ever with a client in its handshake.
Each repository has names of its own for these ends, so that its next run can close what a killed run left.
"""

from __future__ import annotations

from collections.abc import Sequence

from backup.errors import SourceError
from backup.qmp import answers, leftovers
from backup.qmp.clients import may_abort
from backup.qmp.leftovers import Connected
from backup.sources.libvirt_domain import Domain
from backup.sources.libvirt_xml import DomainDocument


def must_stay(domain: Domain, document: DomainDocument) -> bool:
    """
    Tell whether QEMU must keep one end of each connection to a running domain.

    Only a domain whose document leaves this open is asked for QEMU's version: libvirt marks such a domain as tainted.

    Raises
    ------
    SourceError
        QEMU must keep them, and libvirt passes it no commands.
    """
    if not document.iothreads or (document.least_qemu is not None and not may_abort(document.least_qemu)):
        return False
    try:
        return may_abort(answers.show_version(domain.command("query-version")))
    except SourceError as error:
        raise SourceError(
            f"domain {domain.name} has an iothread, and its QEMU can abort when a backup is interrupted; pybackup "
            f"cannot prevent this, because libvirt passes no commands to QEMU: {error.message}",
            hint="libvirt 8.2 or later passes them, with python3-libvirt of the same version; else give the machine a "
            "QMP socket of its own and use --qmp (`qmp:`), or back it up while it is off",
        ) from None


def end(domain: Domain, address: str, owns: Sequence[str], clients: Connected | None = None) -> None:
    """
    End all connections to the exports of a backup job of ours, so that the job can be ended.

    `address` is the path of the job's socket, and `owns` are the prefixes of the names by which QEMU keeps our ends.

    Raises
    ------
    SourceError
        A connection remains, so that the job must not be ended.
    """
    exports = [export["id"] for export in domain.command("query-block-exports")]
    leftovers.end_exports(domain, exports, owns, clients)
    if leftovers.has_client_at([address]):
        raise SourceError(
            f"the NBD server of domain {domain.name} still has a client, and QEMU would hang if its backup job ended",
            hint="end the client; then the next run, or `pybackup clean`, ends the job",
        )


def close_kept(domain: Domain, owns: Sequence[str]) -> None:
    """Have QEMU close the ends that it keeps, after a job has ended."""
    leftovers.end_exports(domain, [], owns)
