"""A practice upstream inside the project: OpenAI's formats with no network and no cost, the same every time."""

from gateway.sandbox.router import Sandbox
from gateway.sandbox.sockets import SandboxRealtime, connect_realtime
from gateway.sandbox.transport import Pace, SandboxTransport

__all__ = ["Pace", "Sandbox", "SandboxRealtime", "SandboxTransport", "connect_realtime"]
