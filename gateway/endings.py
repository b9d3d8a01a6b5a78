"""How an exchange can end before its end, and what client and ledger are told of it."""

from __future__ import annotations

import asyncio
import logging

import httpx2 as httpx

from billing.events import Outcome
from gateway.errors import (
    BadRequestError,
    GatewayError,
    ShuttingDownError,
    SpendLimitedError,
    UpstreamConnectionError,
    UpstreamProtocolError,
    UpstreamTimeoutError,
)

logger = logging.getLogger("gateway.relay")


class ClientLeftError(Exception):
    """The client closed its connection: nobody is left to answer."""


def outcome_of(error: GatewayError | ClientLeftError, *, was_asked: bool) -> Outcome:
    """Return how the ledger calls this end; `was_asked`: the request had been sent upstream."""
    if isinstance(error, ClientLeftError):
        return "client_closed"
    if isinstance(error, UpstreamTimeoutError | ShuttingDownError | SpendLimitedError) and was_asked:
        return "timeout"
    if isinstance(error, UpstreamConnectionError | UpstreamProtocolError | UpstreamTimeoutError):
        return "upstream_error"
    return "refused"


def failure_of(
    exc: BaseException, *, cancelled_for: GatewayError | ClientLeftError | None
) -> GatewayError | ClientLeftError:
    """Return what has ended an exchange; `cancelled_for` is why it was cancelled, if one knows."""
    if isinstance(exc, asyncio.CancelledError):
        return cancelled_for or shutting_down()
    if isinstance(exc, GatewayError | ClientLeftError):
        return exc
    if isinstance(exc, httpx.HTTPError):
        logger.warning("upstream failed: %s: %s", type(exc).__name__, exc)
        return upstream_failure(exc)
    # Not expected: a defect of ours, which must neither leave a connection open nor a client waiting.
    logger.error("the relay failed", exc_info=exc)
    return GatewayError("Internal server error.")


def shutting_down() -> ShuttingDownError:
    return ShuttingDownError("The gateway is restarting; try again.", retry_after_s=1)


def upstream_failure(exc: httpx.HTTPError) -> GatewayError:
    """Return what the client is told of a failure between here and the upstream.

    The exception's own text stays in the log: it may name the operator's network.
    """
    if isinstance(exc, httpx.ConnectTimeout | httpx.PoolTimeout):
        return UpstreamTimeoutError("The upstream could not be connected to in time.")
    if isinstance(exc, httpx.TimeoutException):
        return UpstreamTimeoutError("The upstream did not answer in time.")
    if isinstance(exc, httpx.LocalProtocolError):
        return BadRequestError("The request cannot be passed on as it is.")
    if isinstance(exc, httpx.RemoteProtocolError):
        return UpstreamProtocolError("The upstream broke off, or answered with something that is not HTTP.")
    return UpstreamConnectionError("The connection to the upstream failed.")
