"""How long waits spin: as long as it is rewarded."""

from __future__ import annotations

import itertools

from rdmaxfer.spinning import PATIENCE, PROBE_FIRST, PROBE_LAST, SPIN_S, Spin


def wait(spin: Spin, *, rewarded: bool) -> float:
    spin_s = spin.next_s()
    spin.tell(spin_s, slept=not (rewarded and spin_s))
    return spin_s


def test_a_fixed_time_stays() -> None:
    for fixed in (0.0, 0.25):
        spin = Spin(fixed)
        assert [wait(spin, rewarded=bool(n % 2)) for n in range(10)] == [fixed] * 10


def test_it_goes_on_while_it_is_rewarded_and_gives_up_soon() -> None:
    spin = Spin(None)
    assert [wait(spin, rewarded=True) for _ in range(100)] == [SPIN_S] * 100
    assert [wait(spin, rewarded=False) for _ in range(PATIENCE)] == [SPIN_S] * PATIENCE
    assert [wait(spin, rewarded=False) for _ in range(PROBE_FIRST)] == [0.0] * PROBE_FIRST
    assert wait(spin, rewarded=True) == SPIN_S
    assert wait(spin, rewarded=True) == SPIN_S


def test_one_try_in_vain_is_forgiven() -> None:
    spin = Spin(None)
    wait(spin, rewarded=True)
    for _ in range(5):
        assert wait(spin, rewarded=False) == SPIN_S
        assert wait(spin, rewarded=True) == SPIN_S


def test_who_waits_in_vain_tries_ever_more_rarely() -> None:
    spin = Spin(None)
    waits = 20000
    tries = [n for n in range(waits) if wait(spin, rewarded=False)]
    apart = [later - earlier for earlier, later in itertools.pairwise(tries)]
    assert apart == sorted(apart)
    assert apart[-1] == PROBE_LAST + 1
    assert len(tries) < 30
