"""When QEMU must keep one end of each connection to a domain, and what it is asked for that."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from backup.errors import SourceError
from backup.sources.libvirt_connections import must_stay
from backup.sources.libvirt_xml import DomainDocument


@dataclass
class Domain:
    """A domain whose QEMU has a version; None: libvirt passes it no commands."""

    version: tuple[int, int, int] | None
    name: str = "web1"
    asked: list[str] = field(default_factory=list)

    def command(self, name: str) -> Any:
        self.asked.append(name)
        if self.version is None:
            raise SourceError("libvirt refuses", hint="see its log")
        return {"qemu": dict(zip(("major", "minor", "micro"), self.version, strict=True))}


def document(*, iothreads: bool, least_qemu: str | None) -> DomainDocument:
    return DomainDocument((), None, None, iothreads, least_qemu)


@pytest.mark.parametrize(("iothreads", "least"), [(False, "7.2"), (False, None), (True, "9.0"), (True, "10.1")])
def test_a_domain_that_needs_no_guard_is_not_asked_and_so_not_tainted(iothreads, least):
    domain = Domain(None)
    assert not must_stay(domain, document(iothreads=iothreads, least_qemu=least))
    assert domain.asked == []


@pytest.mark.parametrize("least", ["7.2", None])
@pytest.mark.parametrize(
    ("version", "stays"), [((7, 2, 22), True), ((8, 2, 9), True), ((9, 0, 0), False), ((10, 0, 13), False)]
)
def test_qemu_is_asked_where_the_type_of_machine_leaves_it_open(least, version, stays):
    domain = Domain(version)
    assert must_stay(domain, document(iothreads=True, least_qemu=least)) == stays
    assert domain.asked == ["query-version"]


def test_a_qemu_that_cannot_be_asked_is_refused_with_what_to_do():
    with pytest.raises(SourceError, match="web1 has an iothread") as caught:
        must_stay(Domain(None), document(iothreads=True, least_qemu=None))
    assert "--qmp" in caught.value.hint
    assert "\n" not in caught.value.message
