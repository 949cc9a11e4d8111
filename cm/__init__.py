"""The connection manager: how two processes introduce themselves to each other over ZeroMQ, stay in touch, and say goodbye.

`messages` and `protocol` are pure; `control` is what the rest of the package uses. docs/protocol.md is the specification.
"""
