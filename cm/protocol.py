"""The handshake without its wires: what both sides of a session do with bytes and times. Pure.

The states are in `states`, the bound side in `server_sessions`, the connecting side in `client_session`.
"""

from __future__ import annotations

from rdmaxfer.cm.client_session import BYE_TIMEOUT_S, ClientHandler, ClientSession
from rdmaxfer.cm.server_sessions import ServerHandler, ServerSessions, ServerStatistics
from rdmaxfer.cm.states import ClientState, ServerState

__all__ = [
    "BYE_TIMEOUT_S",
    "ClientHandler",
    "ClientSession",
    "ClientState",
    "ServerHandler",
    "ServerSessions",
    "ServerState",
    "ServerStatistics",
]
