"""`rdmaxfer recv --view`: a web page with the latest frame and how the stream is doing."""

from rdmaxfer.cli.view.server import Viewer

__all__ = ["Viewer"]
