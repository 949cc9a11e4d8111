"""The connection manager: how two processes introduce themselves over ZeroMQ, stay in touch, and say goodbye.

`messages` and `protocol` are pure; `control` is what the rest of the package uses. docs/protocol.md specifies it.
"""
