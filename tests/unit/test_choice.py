"""What fabric is wanted."""

from __future__ import annotations

import pytest

import rdmaxfer
from rdmaxfer.fabric.choice import DEVICE_VARIABLE, VARIABLE, wanted


@pytest.mark.parametrize(
    ("argument", "variable", "names_device", "result"),
    [
        (None, "", False, "auto"),
        (None, "tcp", False, "tcp"),
        ("verbs", "tcp", False, "verbs"),
        ("auto", "tcp", False, "auto"),
        (None, "tcp", True, "verbs"),
        ("auto", "", True, "verbs"),
    ],
)
def test_the_argument_then_the_environment(
    argument: str | None, variable: str, names_device: bool, result: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, variable)
    monkeypatch.delenv(DEVICE_VARIABLE, raising=False)
    assert wanted(argument, names_device=names_device) == result  # type: ignore[arg-type]


def test_a_device_of_the_environment_means_verbs_unless_a_fabric_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEVICE_VARIABLE, "rxe7")
    monkeypatch.setenv(VARIABLE, "")
    assert wanted(None, names_device=False) == "verbs"
    assert wanted("auto", names_device=False) == "auto"
    monkeypatch.setenv(VARIABLE, "tcp")
    assert wanted(None, names_device=False) == "tcp"


def test_what_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="fabric='udp' is none of 'auto', 'verbs', 'shm', 'tcp'"):
        rdmaxfer.Sender(fabric="udp")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="does not go with a device"):
        rdmaxfer.Receiver(fabric="tcp", device="rxe0")
    monkeypatch.setenv(VARIABLE, "ib")
    with pytest.raises(ValueError, match=f"{VARIABLE}=ib is none of"):
        rdmaxfer.Sender()
