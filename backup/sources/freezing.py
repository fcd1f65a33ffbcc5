"""The guest's file systems, flushed and frozen for the instant of a backup, and thawed whatever happens."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

from backup.errors import SourceError
from backup.qmp.agent import AgentError
from backup.runtime.signals import to_the_end
from backup.sources.base import Freeze

_THAW_TRIES = 3


class GuestAgent(Protocol):
    """A connection to a guest agent; its methods raise AgentError."""

    def __enter__(self) -> Self:
        """Connect."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Disconnect."""

    def close(self) -> None:
        """Disconnect; also a connection that was never made."""

    def frozen(self) -> bool:
        """Tell whether any program has frozen the guest's file systems; also true where the agent does not tell."""

    def freeze(self) -> object:
        """Flush and freeze them."""

    def thaw(self) -> object:
        """Thaw them."""


class Freezing:
    """
    Has the guest flush and freeze its file systems for the transaction, and thaw them, whatever happens.

    `no_agent`: why the agent did not answer at the start of the run.
    """

    def __init__(
        self, freeze: Freeze, open_agent: Callable[[], GuestAgent], no_agent: AgentError | None = None
    ) -> None:
        self._freeze = freeze
        self._open_agent = open_agent
        self._no_agent = no_agent
        self._asked: float | None = None
        self.consistency = "crash"
        self.warnings: list[str] = []
        self.seconds: float | None = None
        self.stuck: str | None = None
        """A warning that the guest may still be frozen, with what to do."""

    @property
    def wanted(self) -> bool:
        """Whether the guest is to be frozen or, for a rehearsal, its agent is to be asked."""
        return self._freeze.wanted

    def begin(self) -> None:
        """Freeze; a failure is a warning, or an error if a freeze is required."""
        if not self._freeze.wanted:
            return
        try:
            if self._no_agent is not None:
                raise self._no_agent
            with self._open_agent() as agent:
                frozen = agent.frozen()
                if self._freeze.rehearsed:
                    return
                if frozen:
                    agent.thaw()
                self._asked = time.monotonic()
                agent.freeze()
        except AgentError as error:
            self.end()  # the guest may be frozen
            if self._freeze.required:
                raise SourceError(
                    f"the guest's file systems cannot be frozen: {error.message}",
                    hint=f"{error.hint}; with `freeze: true` the backup is taken without the freeze",
                ) from None
            self.warnings.append(f"the guest was not frozen, and the backup is only crash-consistent: {error.message}")
        else:
            self.consistency = "filesystem"

    def end(self) -> None:
        """Thaw, if the guest was asked to freeze."""
        to_the_end(self._thaw_again)

    def _thaw_again(self) -> None:
        if self._asked is None:
            return
        problems = [self._thaw()]
        while problems[-1] is not None and len(problems) < _THAW_TRIES:
            problems.append(self._thaw())
        if problems[-1] is not None:
            self.stuck = (
                f"the guest's file systems may still be frozen: {problems[-1]}; thaw them through the agent "
                "(guest-fsfreeze-thaw, virsh domfsthaw)"
            )
        self.seconds, self._asked = time.monotonic() - self._asked, None

    def _thaw(self) -> str | None:
        """Try to thaw once; return what went wrong."""
        agent = self._open_agent()
        try:
            with agent:
                if agent.frozen():
                    agent.thaw()
        except AgentError as error:
            return error.message
        finally:
            agent.close()  # also if a signal came before `with`: the next attempt would find the agent busy
        return None
