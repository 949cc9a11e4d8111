"""Queue pairs, memory and completions on a real device."""

from __future__ import annotations

import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from contextlib import ExitStack
from typing import Any

import pytest
from helpers import TIMEOUT_S

from rdmaxfer.cm.messages import MAX_QUEUE_PAIRS
from rdmaxfer.errors import ClosedError, NoDevice, VerbsError, VerbsUnavailable
from rdmaxfer.fabric import bridge, native
from rdmaxfer.fabric.devices import Route
from rdmaxfer.fabric.poller import Poller
from rdmaxfer.fabric.verbs import Domain, Endpoint, Region
from rdmaxfer.memory import Buffer

pytestmark = pytest.mark.verbs

KIB = 1024


def memory(pair: Any, nbytes: int = 64 * KIB) -> tuple[Buffer, Region, Buffer, Region]:
    """Registered source and target memory, the source filled with something."""
    source, target = Buffer(nbytes), Buffer(nbytes)
    source.view(0, nbytes)[:] = os.urandom(nbytes)
    return source, pair.pd_a.register(source, remote_write=False), target, pair.pd_b.register(target, remote_write=True)


def failure_of_a(pair: Any) -> dict[str, int]:
    """The first completion at `a`. (On rxe a failed request also takes a receive of the peer's.)"""
    found: list[dict[str, int]] = []
    while not found:
        found = [wc for endpoint, wc in pair.collect(1) if endpoint is pair.a]
    return found[0]


def sends(n: int) -> Any:
    return native.extension().ffi.new("rx_send_wr[]", n)


# --- moving bytes ---


@pytest.mark.smoke
def test_a_write_with_immediate_gathers_header_and_payload(pair: Any) -> None:
    source, mr, target, remote = memory(pair)
    args = (source.address + 3, 5, mr.lkey, source.address + 1000, 70, mr.lkey, target.address + 9, remote.rkey)
    pair.a.write(*args, 0xCAFEF00D, 41, True)
    done = dict(pair.collect(2))
    assert bytes(target.view(9, 75)) == bytes(source.view(3, 5)) + bytes(source.view(1000, 70))
    assert bytes(target.view(0, 9)) == bytes(9)
    assert bytes(target.view(84, 100)) == bytes(100)
    assert (done[pair.a]["status"], done[pair.a]["wr_id"], done[pair.a]["is_recv"]) == (0, 41, 0)
    assert (done[pair.b]["status"], done[pair.b]["wr_id"], done[pair.b]["is_recv"]) == (0, 0, 1)
    assert (done[pair.b]["has_imm"], done[pair.b]["imm"], done[pair.b]["byte_len"]) == (1, 0xCAFEF00D, 75)


def test_a_plain_write_completes_only_at_the_writer(pair: Any) -> None:
    source, mr, target, remote = memory(pair)
    lib = native.extension().lib
    wr = sends(1)
    wr[0].addr[0], wr[0].length[0], wr[0].lkey[0], wr[0].num_sge = source.address, 64 * KIB, mr.lkey, 1
    wr[0].opcode, wr[0].flags, wr[0].wr_id = lib.RX_WRITE, lib.RX_SIGNALED, 7
    wr[0].remote_addr, wr[0].rkey = target.address, remote.rkey
    pair.a.post_send(wr, 1)
    (wc,) = pair.collect_of(pair.a, 1)
    assert (wc["status"], wc["wr_id"], wc["has_imm"]) == (0, 7, 0)
    assert bytes(target.view(0, 64 * KIB)) == bytes(source.view(0, 64 * KIB))
    assert pair.poller.poll() == 0


def test_a_write_above_max_msg_sz_is_split_and_the_last_part_carries_the_immediate(make_pair: Any) -> None:
    pair = make_pair(max_msg_sz=4096)
    source, mr, target, remote = memory(pair)
    header, payload = 5000, 20000  # the header ends within the second part
    assert pair.a.wr_count(header + payload) == 7
    parts = (source.address, header, mr.lkey, source.address + 30000, payload, mr.lkey)
    pair.a.write(*parts, target.address, remote.rkey, 5, 1, True)
    done = pair.collect(2)
    assert [wc["status"] for _, wc in done] == [0, 0]
    assert sorted(wc["imm"] for _, wc in done) == [0, 5]
    assert bytes(target.view(0, 25000)) == bytes(source.view(0, 5000)) + bytes(source.view(30000, 20000))


def test_messages_arrive_in_the_receive_they_are_announced_for(pair: Any) -> None:
    assert pair.a.max_inline in (0, 64)
    for i in range(200):  # several times around all scratch slots
        pair.b.send_inline(b"message %d" % i, i, i % 16 == 15)
        received = [wc for endpoint, wc in pair.collect(1 + (i % 16 == 15)) if wc["is_recv"]]
        assert [pair.a.recv_payload(wc["wr_id"], wc["byte_len"]) for wc in received] == [b"message %d" % i]
        pair.a.repost_recv([received[0]["wr_id"]])
    with pytest.raises(ValueError, match="above 64"):
        pair.b.send_inline(bytes(65), 0, True)


def test_messages_arrive_where_the_device_has_no_inline_data(pair: Any) -> None:
    pair.b._inline = 0
    pair.b.send_inline(b"by reference", 1, True)
    received = [wc for _, wc in pair.collect(2) if wc["is_recv"]]
    assert pair.a.recv_payload(received[0]["wr_id"], received[0]["byte_len"]) == b"by reference"


def test_empty_writes_need_no_memory(pair: Any) -> None:
    pair.a.write_empty(1)
    pair.a.write_imm(99, 2)
    done = pair.collect(3)
    assert [wc["wr_id"] for endpoint, wc in done if endpoint is pair.a] == [1, 2]
    assert [(wc["imm"], wc["byte_len"]) for endpoint, wc in done if endpoint is pair.b] == [(99, 0)]


def test_receives_are_posted_again_in_batches(make_pair: Any) -> None:
    pair = make_pair(recv_depth=100, send_depth=128, recv_bytes=0)
    for turn in range(3):
        for i in range(100):
            pair.a.write_imm(i, turn * 100 + i)
        arrived = [wc for endpoint, wc in pair.collect(200) if endpoint is pair.b]
        assert [wc["imm"] for wc in arrived] == list(range(100))
        assert pair.b._lib.rx_ep_receives(pair.b._ep) == 0
        pair.b.repost_recv([wc["wr_id"] for wc in arrived])
        assert pair.b._lib.rx_ep_receives(pair.b._ep) == 100


def test_a_chain_of_any_length_is_posted_at_once_and_in_order(make_pair: Any) -> None:
    pair = make_pair(send_depth=150, recv_depth=150)
    source, mr, target, remote = memory(pair)
    lib = native.extension().lib
    wrs = sends(150)
    for i in range(150):
        wr = wrs[i]
        wr.addr[0], wr.length[0], wr.lkey[0], wr.num_sge = source.address + i * 100, 100, mr.lkey, 1
        wr.opcode, wr.imm, wr.wr_id = lib.RX_WRITE_IMM, i, i
        wr.flags = lib.RX_SIGNALED if i == 149 else 0
        wr.remote_addr, wr.rkey = target.address + i * 100, remote.rkey
    pair.a.post_send(wrs, 150)
    assert pair.a._posted[0] == 150
    done = pair.collect(151)
    assert [wc["imm"] for endpoint, wc in done if endpoint is pair.b] == list(range(150))
    assert [wc["wr_id"] for endpoint, wc in done if endpoint is pair.a] == [149]
    assert bytes(target.view(0, 15000)) == bytes(source.view(0, 15000))


def test_a_full_send_queue_says_how_many_were_taken(make_pair: Any) -> None:
    pair = make_pair(send_depth=16, recv_depth=128)
    lib = native.extension().lib
    wrs = sends(60)
    for i in range(60):
        wrs[i].opcode, wrs[i].flags, wrs[i].wr_id = lib.RX_WRITE, lib.RX_SIGNALED, i
    with pytest.raises(VerbsError, match="send queue is full") as caught:
        pair.a.post_send(wrs, 60)
    assert caught.value.verb == "ibv_post_send"
    taken = pair.a._posted[0]
    assert 16 <= taken < 60
    assert [wc["wr_id"] for wc in pair.collect_of(pair.a, taken)] == list(range(taken))


def test_a_malformed_work_request_is_refused_before_anything_is_posted(pair: Any) -> None:
    wrs = sends(2)
    wrs[1].num_sge = 3
    with pytest.raises(VerbsError, match="EINVAL"):
        pair.a.post_send(wrs, 2)
    assert pair.a._posted[0] == 0


# --- lanes ---


def test_each_lane_keeps_its_own_order_and_is_named_by_its_completions(make_pair: Any) -> None:
    pair = make_pair(recv_bytes=0, lanes=(3, 3))
    source, mr, target, remote = memory(pair)
    for i in range(30):
        at = i * 1000
        parts = (source.address + at, 0, mr.lkey, source.address + at, 1000, mr.lkey)
        pair.a.write(*parts, target.address + at, remote.rkey, i, i, True, i % 3)
    done = pair.collect(60)
    for lane in range(3):
        want = list(range(lane, 30, 3))
        assert [wc["wr_id"] for end, wc in done if end is pair.a and wc["lane"] == lane] == want
        assert [wc["imm"] for end, wc in done if end is pair.b and wc["lane"] == lane] == want
    assert bytes(target.view(0, 30000)) == bytes(source.view(0, 30000))


def test_lanes_have_queue_pairs_and_psns_of_their_own(make_pair: Any) -> None:
    pair = make_pair(lanes=(8, 8))
    for field in ("qp_num", "psn"):
        assert len({getattr(each, field) for end in (pair.a, pair.b) for each in end.address.queue_pairs}) == 16


def test_messages_come_on_lane_0_however_many_there_are(make_pair: Any) -> None:
    pair = make_pair(lanes=(2, 2))
    pair.b.send_inline(b"hello", 1, True)
    received = [wc for _, wc in pair.collect(2) if wc["is_recv"]]
    assert [(wc["lane"], pair.a.recv_payload(wc["wr_id"], wc["byte_len"])) for wc in received] == [(0, b"hello")]


def test_lanes_that_the_peer_does_not_have_are_not_used_and_do_not_hold_up_the_end(make_pair: Any) -> None:
    pair = make_pair(recv_bytes=0, lanes=(2, 5))
    assert (pair.a.lanes, pair.b.lanes) == (2, 2)
    for lane in range(2):
        pair.a.write_imm(lane, lane, lane)
    assert sorted(wc["imm"] for end, wc in pair.collect(4) if end is pair.b) == [0, 1]
    assert pair.b.drain(2)
    assert pair.a.drain(2)
    assert pair.b._lib.rx_ep_receives(pair.b._ep) == 0


def test_a_lane_that_there_is_not_is_refused(make_pair: Any) -> None:
    pair = make_pair(lanes=(2, 2))
    for call in (lambda: pair.a.write_imm(0, 0, 2), lambda: pair.a.repost_recv([0], 2)):
        with pytest.raises(VerbsError, match="EINVAL"):
            call()


def test_the_protocol_and_the_native_core_know_the_same_limit() -> None:
    assert native.extension().lib.RX_MAX_LANES == MAX_QUEUE_PAIRS


@pytest.mark.parametrize("lanes", [0, MAX_QUEUE_PAIRS + 1])
def test_how_many_lanes_there_can_be(route: Route, lanes: int) -> None:
    with Domain(route) as domain, domain.protection_domain() as pd, pytest.raises(VerbsError, match="EINVAL"):
        Endpoint(pd, route, send_depth=8, recv_depth=8, lanes=lanes, remote_write=False)


def test_more_queue_pairs_of_the_peer_than_lanes_are_refused(route: Route) -> None:
    with Domain(route) as domain, domain.protection_domain() as pd:
        end = Endpoint(pd, route, send_depth=8, recv_depth=8, lanes=2, remote_write=False)
        for count in (0, 3):
            with pytest.raises(ValueError, match=f"{count} queue pairs"):
                end.connect(queue_pairs=[(5, 1)] * count, gid=route.gid, lid=0, path_mtu=1024)


# --- completions and waiting ---


def test_poll_returns_nothing_when_nothing_completed(pair: Any) -> None:
    assert pair.poller.poll() == 0


def test_poll_is_fair_to_every_endpoint(make_pair: Any) -> None:
    pairs = [make_pair() for _ in range(3)]
    with Poller() as writers, Poller(max_completions=1) as poller:
        writers.watch([pair.b for pair in pairs])
        for pair in pairs:
            for i in range(20):
                pair.b.send_inline(b"", i, i == 19)
        confirmed = 0
        while confirmed < 3:  # then each `a` has 20 completions, which nobody has polled
            assert writers.wait(0, 5)
            confirmed += writers.count
            writers.clear()
        poller.watch([pair.a for pair in pairs])
        turns = [poller.found()[0][0] for _ in range(6) if poller.poll()]
    assert sorted(turns.count(pair.a) for pair in pairs) == [2, 2, 2]


def test_wait_gives_up_at_its_timeout(pair: Any) -> None:
    for spin in (0, 0.01, 10):
        start = time.monotonic()
        assert pair.poller.wait(spin, 0.05) == 0
        assert 0.049 <= time.monotonic() - start < 0.5
    assert pair.poller.wait(0, 0) == 0


@pytest.mark.parametrize("spin_s", [0, 1.0])
def test_wait_sees_a_completion_that_comes_while_it_waits(pair: Any, spin_s: float) -> None:
    timer = threading.Timer(0.1, lambda: pair.a.write_imm(1, 1))
    timer.start()
    start = time.monotonic()
    done = pair.collect(2) if spin_s == 0 else pair.poller.wait(spin_s, 5)
    assert done
    assert time.monotonic() - start < 1
    timer.join()


def test_waiting_again_and_again_misses_nothing(pair: Any) -> None:
    # Spinning takes completions whose notification is still under way: the sleep after that must neither hang nor miss.
    for i in range(500):
        pair.a.write_imm(i, i)
        seen = 0
        while seen < 2:
            count = pair.poller.wait(0.0001 if i % 3 else 0, 5)
            assert count, f"round {i}: nothing after 5 s"
            pair.b.repost_recv([wc.wr_id for endpoint, wc in pair.poller.found() if endpoint is pair.b])
            seen += count


def test_wake_ends_a_wait_and_is_used_up_by_it(pair: Any) -> None:
    timer = threading.Timer(0.1, pair.poller.wake)
    timer.start()
    start = time.monotonic()
    assert pair.poller.wait(0, 5) == 0
    assert 0.05 < time.monotonic() - start < 1
    timer.join()
    start = time.monotonic()
    assert pair.poller.wait(0, 0.05) == 0
    assert time.monotonic() - start >= 0.049


def test_a_wake_before_the_wait_is_not_lost(pair: Any) -> None:
    pair.poller.wake()
    start = time.monotonic()
    assert pair.poller.wait(0, 5) == 0
    assert time.monotonic() - start < 1


def test_waiting_without_endpoints_still_wakes_and_times_out() -> None:
    with Poller() as poller:
        assert poller.wait(0.01, 0.02) == 0
        poller.wake()
        assert poller.wait(0, 5) == 0


def test_a_signal_ends_a_wait_at_once(pair: Any) -> None:
    class Rung(Exception):
        pass

    def ring(*_: object) -> None:
        raise Rung

    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        start = time.monotonic()
        with pytest.raises(Rung):
            pair.poller.wait(0, 5)
        assert time.monotonic() - start < 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_other_threads_run_while_one_waits(pair: Any) -> None:
    counted = 0
    stop = threading.Event()

    def count() -> None:
        nonlocal counted
        while not stop.is_set():
            counted += 1

    thread = threading.Thread(target=count)
    thread.start()
    pair.poller.wait(0, 0.2)
    stop.set()
    thread.join()
    assert counted > 1000


# --- errors ---


def test_a_wrong_key_is_an_access_error_and_says_so(pair: Any) -> None:
    source, mr, target, remote = memory(pair)
    pair.a.write(source.address, 8, mr.lkey, 0, 0, 0, target.address, remote.rkey ^ 0x5500, 0, 3, False)
    wc = failure_of_a(pair)
    assert (wc["wr_id"], native.completion_name(wc["status"]), wc["is_recv"]) == (3, "WC_REM_ACCESS_ERR", 0)
    assert "not registered" in native.completion_error(wc["status"], wc["vendor_err"])


def test_memory_not_registered_for_writing_can_not_be_written(pair: Any) -> None:
    source, mr, target, _ = memory(pair)
    private = pair.pd_b.register(target, remote_write=False)
    pair.a.write(source.address, 8, mr.lkey, 0, 0, 0, target.address, private.rkey, 0, 3, True)
    assert native.completion_name(failure_of_a(pair)["status"]) == "WC_REM_ACCESS_ERR"


def test_an_endpoint_without_remote_write_can_not_be_written_through(make_pair: Any) -> None:
    pair = make_pair(remote_write=False)
    source, mr, target, remote = memory(pair)
    pair.a.write(source.address, 8, mr.lkey, 0, 0, 0, target.address, remote.rkey, 0, 3, True)
    name = native.completion_name(failure_of_a(pair)["status"])
    assert name in ("WC_REM_INV_REQ_ERR", "WC_REM_ACCESS_ERR")
    assert bytes(target.view(0, 8)) == bytes(8)


def test_memory_of_another_protection_domain_can_not_be_written(route: Route, pair: Any) -> None:
    source, mr, _, _ = memory(pair)
    with Domain(route) as domain:
        foreign = Buffer(4096)
        region = domain.protection_domain().register(foreign, remote_write=True)
        pair.a.write(source.address, 8, mr.lkey, 0, 0, 0, foreign.address, region.rkey, 0, 3, True)
        assert native.completion_name(failure_of_a(pair)["status"]) == "WC_REM_ACCESS_ERR"
        assert bytes(foreign.view(0, 8)) == bytes(8)


def test_a_failed_receive_still_says_that_it_is_one(pair: Any) -> None:
    pair.b.to_error()
    done = pair.collect_of(pair.b, pair.b.recv_depth)
    assert {native.completion_name(wc["status"]) for wc in done} == {"WC_WR_FLUSH_ERR"}
    assert all(wc["is_recv"] for wc in done)
    assert sorted(wc["wr_id"] for wc in done) == list(range(pair.b.recv_depth))


def test_connecting_with_a_wrong_mtu_names_the_verb_and_the_usual_cause(route: Route) -> None:
    with Domain(route) as domain, domain.protection_domain() as pd:
        end = Endpoint(pd, route, send_depth=8, recv_depth=8, remote_write=False)
        with pytest.raises(VerbsError, match="GID") as caught:
            end.connect(queue_pairs=[(5, 1)], gid=route.gid, lid=0, path_mtu=1500)
        assert (caught.value.verb, caught.value.errno) == ("ibv_modify_qp(RTR)", 22)


def test_a_domain_of_an_unknown_device_is_no_device() -> None:
    with pytest.raises(NoDevice, match="nosuch0"):
        Domain("nosuch0")


# --- the end ---


def test_draining_an_idle_endpoint_takes_every_receive(pair: Any) -> None:
    assert pair.a.drain(2)
    assert pair.b.drain(2)
    assert pair.b._lib.rx_ep_receives(pair.b._ep) == 0


def test_draining_after_an_error_takes_what_was_outstanding(pair: Any) -> None:
    source, mr, target, remote = memory(pair)
    for i in range(10):
        pair.a.write(source.address, 8, mr.lkey, 0, 0, 0, target.address, remote.rkey + 1, 0, i, False)
    pair.collect(1)
    assert pair.a.drain(2)
    assert pair.a.drain(2)  # again is harmless


def test_draining_with_a_full_send_queue(make_pair: Any) -> None:
    pair = make_pair(send_depth=16, recv_depth=4)
    for i in range(16):  # more than there are receives: the rest is outstanding
        pair.a.write_imm(i, i)
    assert pair.a.drain(5)


def test_draining_an_endpoint_that_was_never_connected(route: Route) -> None:
    with Domain(route) as domain, domain.protection_domain() as pd:
        end = Endpoint(pd, route, send_depth=8, recv_depth=8, remote_write=False)
        end.drain(0.2)


def test_closing_a_parent_closes_its_children_first(route: Route) -> None:
    domain = Domain(route)
    pd = domain.protection_domain()
    end = Endpoint(pd, route, send_depth=8, recv_depth=8, remote_write=False)
    region = pd.register(Buffer(4096), remote_write=True)
    domain.close()
    assert end.closed
    assert region.closed
    assert pd.closed
    for owner in (domain, pd, end, region):
        owner.close()
    with pytest.raises(ClosedError):
        end.write_empty(1)
    with pytest.raises(ClosedError):
        domain.protection_domain()


def test_an_endpoint_that_can_not_be_made_leaves_nothing_behind(route: Route) -> None:
    with Domain(route) as domain, domain.protection_domain() as pd:
        before = resources()
        with pytest.raises(VerbsError, match="ibv_create_"):
            Endpoint(pd, route, send_depth=8, recv_depth=1 << 24, remote_write=False)
        assert resources() == before


def test_what_was_never_closed_warns(route: Route) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Domain(route)
        gc.collect()
    assert [str(warning.message) for warning in caught] == [f"<Domain {route.device}> was never closed"]


def resources() -> str:
    """The kernel's count of verbs objects, of all processes."""
    return subprocess.run(["rdma", "resource", "show"], capture_output=True, text=True, check=True).stdout


def test_fifty_connections_leave_the_kernel_as_it_was(route: Route) -> None:
    before, files = resources(), len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        with ExitStack() as stack:
            domain = stack.enter_context(Domain(route))
            ends = [
                Endpoint(domain.protection_domain(), route, send_depth=8, recv_depth=8, remote_write=True)
                for _ in range(2)
            ]
            for one, other in (ends, ends[::-1]):
                to = other.address
                one.connect(queue_pairs=to.queue_pairs, gid=to.gid, lid=to.lid, path_mtu=to.active_mtu)
            poller = stack.enter_context(Poller())
            poller.watch(ends)
            ends[0].write_imm(1, 1)
            assert poller.wait(0, 5)
    assert resources() == before
    assert len(os.listdir("/proc/self/fd")) == files
    assert re.search(r"qp \d+", before)


FORKING = """
import os, sys, time
from contextlib import ExitStack
from rdmaxfer.errors import ForkedError
from rdmaxfer.fabric.devices import choose_gid, list_devices
from rdmaxfer.fabric.poller import Poller
from rdmaxfer.fabric.verbs import Domain, Endpoint
from rdmaxfer.memory import Buffer
import ipaddress

device = os.environ.get("RDMAXFER_DEVICE") or None
route = choose_gid(list_devices(), device=device, local_ip=ipaddress.ip_address("127.0.0.1"))
with ExitStack() as stack:
    domain = stack.enter_context(Domain(route))
    depths = {"send_depth": 8, "recv_depth": 8}
    a, b = (Endpoint(domain.protection_domain(), route, **depths, remote_write=True) for _ in range(2))
    for one, other in ((a, b), (b, a)):
        to = other.address
        one.connect(queue_pairs=to.queue_pairs, gid=to.gid, lid=to.lid, path_mtu=to.active_mtu)
    poller = stack.enter_context(Poller())
    poller.watch([a, b])
    source, target = Buffer(4096), Buffer(4096)
    mr, remote = a.pd.register(source, remote_write=False), b.pd.register(target, remote_write=True)
    child = os.fork()
    if child == 0:
        try:
            a.write_empty(1)
        except ForkedError:
            if sys.argv[1] == "os._exit":
                os._exit(3)
            stack.close()
            del a, b, poller, mr, remote, domain, one, other
            sys.exit(3)
        os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    source.view(0, 5)[:] = b"alive"
    a.write(source.address, 5, mr.lkey, 0, 0, 0, target.address, remote.rkey, 1, 1, True)
    done = []
    while len(done) < 2:
        assert poller.wait(0, 5)
        done += [wc.status for _, wc in poller.found()]
    assert done == [0, 0], done
    assert bytes(target.view(0, 5)) == b"alive"
print("parent unharmed")
"""


@pytest.mark.parametrize("way", ["sys.exit", "os._exit"])
def test_a_forked_child_can_not_harm_its_parent(route: Route, way: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FORKING, way], capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert (done.stdout, done.stderr) == ("parent unharmed\n", "")


# --- the bridge ---


def test_the_pointer_found_is_the_protection_domain(route: Route) -> None:
    with Domain(route) as domain, domain.protection_domain() as pd:
        assert bridge.pd_pointer(pd._pd, domain._context) == pd.pointer
        assert pd.pointer % 8 == 0


def test_the_pointer_of_another_devices_context_is_refused(route: Route) -> None:
    refusal = "refuses rather than guesses: the context found has the command fd"
    with Domain(route) as domain, Domain(route) as other, domain.protection_domain() as pd:  # noqa: SIM117
        with pytest.raises(VerbsUnavailable, match=refusal):
            bridge.pd_pointer(pd._pd, other._context)


def test_an_object_that_is_no_pd_is_refused(route: Route) -> None:
    class PD:
        handle = 0

    with Domain(route) as domain, pytest.raises(VerbsUnavailable, match="refuses rather than guesses"):
        bridge.pd_pointer(PD(), domain._context)


def test_a_pointer_that_can_not_be_read_is_refused(route: Route, monkeypatch: pytest.MonkeyPatch) -> None:
    with Domain(route) as domain, domain.protection_domain() as pd:
        monkeypatch.setattr(bridge, "_from_layout", lambda pd: 0x10)
        monkeypatch.setattr(bridge, "_has_usable_property", lambda: False)
        with pytest.raises(VerbsUnavailable, match="does not lead to memory"):
            bridge.pd_pointer(pd._pd, domain._context)
