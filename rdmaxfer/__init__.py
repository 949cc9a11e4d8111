"""Move numpy frames between Python processes over RDMA, with no copy.

    with rdmaxfer.Receiver() as receiver:
        receiver.bind("tcp://0.0.0.0:7471")
        for frame in receiver:
            with frame:
                print(frame.seq, frame.array.shape)

    with rdmaxfer.Sender() as sender:
        sender.connect("tcp://10.0.0.2:7471")
        sender.push(image)
        sender.flush()

Importing this package loads neither pyverbs nor libibverbs: they are loaded at the first `bind` or `connect`.
"""

try:
    import rdmaxfer.cm  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        "this is rdmaxfer's source folder, not the installed package: Python looks into the current folder (or the script's) "
        "first. "
        "Fix: run from another folder, or install the sources with `pip install -e .`"
    ) from error

from rdmaxfer.callback import Callback
from rdmaxfer.errors import (
    ClosedError,
    ConnectTimeout,
    CurveError,
    DeviceError,
    DeviceLost,
    EndOfStream,
    EndpointError,
    ForkedError,
    FrameError,
    FrameReleased,
    FrameTooLarge,
    LocalProtocolError,
    MemlockError,
    NoDevice,
    NoMemory,
    NotConnected,
    PeerError,
    PeerLost,
    RdmaxferError,
    Refused,
    RemoteProtocolError,
    TimeoutExpired,
    UnsupportedDtype,
    VerbsError,
    VerbsUnavailable,
)
from rdmaxfer.intake import Intake
from rdmaxfer.lease import Frame, Gap, Slot
from rdmaxfer.node import LinkInfo, StateChange
from rdmaxfer.receiver import Receiver
from rdmaxfer.send_stream import Dropped
from rdmaxfer.sender import Sender
from rdmaxfer.sharing import attach
from rdmaxfer.staging import Registration
from rdmaxfer.statistics import Latency, ReceiverStatistics, SenderStatistics

__version__ = "0.1.0"

__all__ = [
    "Callback",
    "ClosedError",
    "ConnectTimeout",
    "CurveError",
    "DeviceError",
    "DeviceLost",
    "Dropped",
    "EndOfStream",
    "EndpointError",
    "ForkedError",
    "Frame",
    "FrameError",
    "FrameReleased",
    "FrameTooLarge",
    "Gap",
    "Intake",
    "Latency",
    "LinkInfo",
    "LocalProtocolError",
    "MemlockError",
    "NoDevice",
    "NoMemory",
    "NotConnected",
    "PeerError",
    "PeerLost",
    "RdmaxferError",
    "Receiver",
    "ReceiverStatistics",
    "Refused",
    "Registration",
    "RemoteProtocolError",
    "Sender",
    "SenderStatistics",
    "Slot",
    "StateChange",
    "TimeoutExpired",
    "UnsupportedDtype",
    "VerbsError",
    "VerbsUnavailable",
    "__version__",
    "attach",
]
