"""The connections of the server: those of clients that neither send nor read are cut off."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

if TYPE_CHECKING:
    from uvicorn.protocols.http.h11_impl import H11Protocol as Protocol
else:
    Protocol = AutoHTTPProtocol


class Connection(Protocol):
    """As uvicorn has it, which waits for ever for the head of a request, and for a client to read its answer.

    Args:
        idle_seconds: that either may take. A request's body has its own limit, see
            :mod:`~nanochat_pl.serving.gate`.
        how: what uvicorn gives.
    """

    def __init__(self, *, idle_seconds: float, **how: Any) -> None:
        super().__init__(**how)
        self._idle_seconds = idle_seconds
        self._head_timer: asyncio.TimerHandle | None = None
        self._reading_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        super().connection_made(transport)
        # With anything that the system does not take at once, pause_writing is called: the client does not read.
        transport.set_write_buffer_limits(0)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """A part of a request."""
        super().data_received(data)
        self._await_head()

    def pause_writing(self) -> None:
        """The client reads too slowly."""
        super().pause_writing()
        self._await_reading(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """It has read everything."""
        super().resume_writing()
        self._stop_waiting_for_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """The end."""
        super().connection_lost(exc)
        self._stop_waiting_for_head()
        self._stop_waiting_for_reading()

    def _await_head(self) -> None:
        """Give the client its time, unless a request is being answered."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting_for_head()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self._idle_seconds, self._end_waiting_for_head)

    def _end_waiting_for_head(self) -> None:
        self._head_timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()

    def _await_reading(self, num_bytes: int) -> None:
        self._stop_waiting_for_reading()
        self._reading_timer = self.loop.call_later(self._idle_seconds, self._look_at_reading, num_bytes)

    def _look_at_reading(self, num_bytes: int) -> None:
        """Go on where anything of what was left was read."""
        if (left := self.transport.get_write_buffer_size()) < num_bytes:
            self._await_reading(left)
        else:
            self.transport.abort()

    def _stop_waiting_for_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_waiting_for_reading(self) -> None:
        if self._reading_timer is not None:
            self._reading_timer.cancel()
            self._reading_timer = None
