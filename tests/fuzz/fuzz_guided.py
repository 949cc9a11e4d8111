"""Coverage-guided fuzzing of one target by atheris (libFuzzer), in a process of its own, because libFuzzer ends it:

    .venv/bin/python tests/fuzz/fuzz_guided.py TARGET CORPUS-DIRECTORY [options of libFuzzer, such as -runs=1000000]

libFuzzer keeps what reaches new code in the directory. Half of the time it changes an input by its own means, else by
fuzz_mutate. What breaks a rule is written to crash-..., and a traceback is printed.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import atheris

sys.path[:0] = [str(Path(__file__).parents[1] / name) for name in ("fuzz", "unit")]
with atheris.instrument_imports(include=["rdmaxfer"]):
    import rdmaxfer.cm.client_session
    import rdmaxfer.cm.server_sessions
    import rdmaxfer.frame
    import rdmaxfer.inband  # noqa: F401 - first of all here, so that they are instrumented
import fuzz_mutate  # noqa: E402
from fuzz_choices import Choices  # noqa: E402
from fuzz_targets import TARGETS  # noqa: E402


def main() -> None:
    name, corpus = sys.argv[1], Path(sys.argv[2])
    target = TARGETS[name]
    for seed in target.seeds:
        (corpus / hashlib.sha1(seed).hexdigest()).write_bytes(seed)

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        choose = Choices(f"{seed}")
        if choose.one_in(2):
            return bytes(atheris.Mutate(data, most))
        return (target.make(choose) if choose.one_in(4) else fuzz_mutate.change_bytes(data, choose))[:most]

    atheris.Setup([sys.argv[0], *sys.argv[2:]], lambda data: target.run(data) and None, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
