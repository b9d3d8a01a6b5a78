"""TLS to an upstream: OpenSSL between the transport of a socket and the protocol that reads from it and writes to it.

The event loop's own (uvloop 0.23) takes a broken record for the end of the connection, and loses what it has decrypted
where it is paused, or where the protocol's buffer is small and the peer closes (sslproto.pyx, eof_received).
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Any

_READ_BYTES = 65_536
# Longer than what one read opens to, the rest of a record included that began in the read before.
_PLAIN_BYTES = _READ_BYTES + 32_768
# What is sealed at once: the buffer that takes it stays as large as it ever was.
_SLICE_BYTES = 16_384


class ReadBuffer:
    """Where the event loop puts what it reads: filled and parsed within one callback, so one is enough for all.

    What is read stands at the beginning of `plain`; under TLS it is opened from `sealed`, into which the loop reads.
    """

    def __init__(self) -> None:
        self.plain = memoryview(bytearray(_PLAIN_BYTES))
        self.sealed = memoryview(bytearray(_READ_BYTES))


async def attach(
    protocol: asyncio.BufferedProtocol,
    sock: socket.socket,
    *,
    buffer: ReadBuffer,
    context: ssl.SSLContext | None,
    server_hostname: str,
) -> None:
    """Let a protocol have a connected socket, behind TLS where there is a context; closed again if that fails.

    Errors: OSError where there is no TLS with the other side, ValueError where its name cannot be one; the protocol
    has then been told of nothing.
    """
    loop = asyncio.get_running_loop()
    tls = None
    try:
        if context is not None:
            tls = TlsTransport(protocol, buffer=buffer, context=context, server_hostname=server_hostname)
        transport, _ = await loop.create_connection(lambda: tls or protocol, sock=sock)
    except BaseException:
        sock.close()
        raise
    if tls is not None:
        try:
            await tls.ready
        except BaseException:
            transport.abort()
            raise
        tls.check()


class TlsTransport(asyncio.BufferedProtocol):
    """The protocol of a socket, and the transport of another protocol, which is told of it once the handshake is done.

    `ready` is done then, and where there is none, as `check` tells. `said_goodbye`: the other side's close_notify has
    come. The end of the connection is told as it is, also without one: many servers never send it.
    """

    def __init__(
        self, protocol: asyncio.BufferedProtocol, *, buffer: ReadBuffer, context: ssl.SSLContext, server_hostname: str
    ) -> None:
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.said_goodbye = False
        self._protocol = protocol
        self._buffer = buffer
        self._sealed_in, self._sealed_out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._sealed_in, self._sealed_out, server_hostname=server_hostname)
        self._socket_transport: Any = None
        self._is_greeted = False
        self._is_clogged = False
        self._unsealed: list[bytes] = []  # waits for the rest of what the other side is saying about TLS itself
        self._error: Exception | None = None

    def check(self) -> None:
        """Raise the OSError for which there was no handshake, once."""
        if not self._is_greeted:
            # An exception kept here would hold its traceback, that this frame, and this the object: a cycle.
            error, self._error = self._error, None
            try:
                raise error or ConnectionResetError("the connection was closed before TLS began")
            finally:
                del error

    # As a transport

    def write(self, data: bytes) -> None:
        if not data or self._socket_transport.is_closing():
            return
        if self._unsealed:
            self._unsealed.append(data)
        else:
            self._seal(memoryview(data))

    def abort(self) -> None:
        self._socket_transport.abort()

    def is_closing(self) -> bool:
        return bool(self._socket_transport.is_closing())

    def pause_reading(self) -> None:
        self._socket_transport.pause_reading()

    def resume_reading(self) -> None:
        self._socket_transport.resume_reading()

    def get_write_buffer_size(self) -> int:
        return int(self._socket_transport.get_write_buffer_size()) + sum(map(len, self._unsealed))

    def get_extra_info(self, name: str) -> Any:
        return self._socket_transport.get_extra_info(name)

    # As a protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._socket_transport = transport
        self._greet()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer.sealed

    def buffer_updated(self, nbytes: int) -> None:
        self._sealed_in.write(self._buffer.sealed[:nbytes])
        if not (self._is_greeted or self._greet()):
            return
        opened_bytes = self._open()
        if self._unsealed:
            self._seal_the_rest()
        self._flush()
        if opened_bytes:
            self._protocol.buffer_updated(opened_bytes)
        if self._error is not None or self.said_goodbye:
            self.abort()

    def pause_writing(self) -> None:
        self._is_clogged = True
        if self._is_greeted:
            self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._is_clogged = False
        if self._is_greeted and not self._unsealed:
            self._protocol.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ready.done():
            self.ready.set_result(None)
        if self._is_greeted:
            error, self._error = self._error, None
            self._protocol.connection_lost(error or exc)
        else:
            self._error = self._error or exc
        # It holds this object: a cycle for the garbage collector.
        del self._protocol

    # Between the two

    def _greet(self) -> bool:
        """Go on with the handshake; return whether it is done."""
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
            return False
        except ssl.SSLError as exc:
            self._fail(exc)
            return False
        self._flush()
        self._protocol.connection_made(self)  # type: ignore[arg-type]
        self._is_greeted = True
        if not self.ready.done():
            self.ready.set_result(None)
        return True

    def _open(self) -> int:
        """Open what has come into the buffer; return how much that is."""
        sealed_in, plain, opened_bytes = self._sealed_in, self._buffer.plain, 0
        read: Any = self._tls.read  # with a buffer it returns a number
        try:
            while sealed_in.pending:
                record_bytes = read(_PLAIN_BYTES, plain[opened_bytes:])
                if not record_bytes:
                    self.said_goodbye = True
                    break
                opened_bytes += record_bytes
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as exc:
            self._error = exc.with_traceback(None)  # which holds this object
        return opened_bytes

    def _seal(self, rest: memoryview) -> None:
        sealed = []
        try:
            while rest:
                rest = rest[self._tls.write(rest[:_SLICE_BYTES]) :]
                sealed.append(self._sealed_out.read())
        except ssl.SSLWantReadError:
            # A session ticket, say, has come in part: of TLS 1.3 nothing may be sent before the rest.
            self._unsealed.append(bytes(rest))
            self._protocol.pause_writing()
        except ssl.SSLError as exc:
            self._fail(exc)
            return
        self._socket_transport.writelines(sealed)

    def _seal_the_rest(self) -> None:
        unsealed, self._unsealed = self._unsealed, []
        for data in unsealed:
            self.write(data)
        if not (self._unsealed or self._is_clogged):
            self._protocol.resume_writing()

    def _flush(self) -> None:
        if self._sealed_out.pending and not self._socket_transport.is_closing():
            self._socket_transport.write(self._sealed_out.read())

    def _fail(self, error: ssl.SSLError) -> None:
        self._error = error.with_traceback(None)  # which holds this object
        self.abort()
