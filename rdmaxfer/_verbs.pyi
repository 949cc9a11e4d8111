# The cffi extension that CMake builds from _native/.
from typing import Any

ffi: Any
lib: Any
