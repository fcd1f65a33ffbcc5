"""The guest's file systems, flushed and frozen for the instant of a backup, and thawed whatever happens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol, Self

from backup.errors import BackupError, Interrupted, SourceError
from backup.qmp.agent import AgentError
from backup.runtime.signals import to_the_end
from backup.sources.base import Freeze

_THAW_TRIES = 3
_EARLY = "another program, or the guest itself, thawed them while pybackup had them frozen"


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

    def freeze(self) -> int:
        """Flush and freeze them; return how many."""

    def thaw(self) -> int:
        """Thaw them; return how many, 0 if none was frozen."""


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
        self._frozen = 0
        """How many file systems the agent froze."""
        self._lost = False
        self.consistency = "crash"
        self._warnings: list[str] = []
        self.seconds: float | None = None
        self.stuck: str | None = None
        """A warning that the guest may still be frozen, with what to do."""

    @property
    def warnings(self) -> Sequence[str]:
        """What went wrong, also that the guest may still be frozen."""
        return [*self._warnings, *([] if self.stuck is None else [self.stuck])]

    @property
    def notes(self) -> Sequence[str]:
        """How long the guest was frozen."""
        if self.consistency != "filesystem" or self.seconds is None:
            return []
        return [f"the guest's file systems were frozen for {self.seconds:.2f} s"]

    @contextmanager
    def told(self) -> Iterator[None]:
        """Add to the hint of an error of the block that the guest may still be frozen."""
        try:
            yield
        except (BackupError, Interrupted) as error:
            if self.stuck is not None:
                error.hint = f"{error.hint}; {self.stuck}"
            raise

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
                self._frozen = agent.freeze()
        except AgentError as error:
            self.end()  # the guest may be frozen
            if self._freeze.required:
                raise SourceError(
                    f"the guest's file systems cannot be frozen: {error.message}",
                    hint=f"{error.hint}; with `freeze: true` the backup is taken without the freeze",
                ) from None
            self._warnings.append(f"the guest was not frozen, and the backup is only crash-consistent: {error.message}")
        else:
            self.consistency = "filesystem"

    def end(self) -> None:
        """Thaw, if the guest was asked to freeze."""
        to_the_end(self._thaw_again)

    def require_held(self) -> None:
        """
        Make sure that a freeze that is required lasted until the instant.

        Raises
        ------
        SourceError
            The guest was thawed too early.
        """
        if self._lost and self._freeze.required:
            raise SourceError(
                f"the guest's file systems were thawed too early: {_EARLY}",
                hint="run the command again; with `freeze: true` the backup is taken without the freeze",
            )

    def _thaw_again(self) -> None:
        if self._asked is None:
            return
        tries = [self._thaw()]
        while isinstance(tries[-1], AgentError) and len(tries) < _THAW_TRIES:
            tries.append(self._thaw())
        if isinstance(tries[-1], AgentError):
            self.stuck = (
                f"the guest's file systems may still be frozen: {tries[-1].message}; thaw them through the agent "
                "(guest-fsfreeze-thaw, virsh domfsthaw)"
            )
        elif tries == [0] and self._frozen:
            self._doubt()
        self.seconds, self._asked = time.monotonic() - self._asked, None

    def _doubt(self) -> None:
        """Take back that the guest was frozen, because it may have written before the instant."""
        self._lost = True
        self.consistency = "crash"
        self._warnings.append(
            f"the guest's file systems were frozen, and the backup is only crash-consistent: {_EARLY}"
        )

    def _thaw(self) -> int | AgentError:
        """Try to thaw once; return how many file systems were frozen until then, or what went wrong."""
        agent = self._open_agent()
        try:
            with agent:
                return agent.thaw() if agent.frozen() else 0
        except AgentError as error:
            return error
        finally:
            agent.close()  # also if a signal came before `with`: the next attempt would find the agent busy
