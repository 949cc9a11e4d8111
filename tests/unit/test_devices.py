"""Which device, port and GID are chosen, from tables as machines have them."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdmaxfer.errors import NoDevice
from rdmaxfer.fabric.devices import Device, Gid, Port, choose_gid
from rdmaxfer.fabric.route import gid_to_ip, ip_to_gid, local_ip_towards

ip = ipaddress.ip_address


def gid(index: int, address: str, kind: str = "ROCE_V2") -> Gid:
    return Gid(index, ip_to_gid(ip(address)), kind)


def port(*gids: Gid, number: int = 1, state: str = "ACTIVE", mtu: int = 4096) -> Port:
    return Port(number, state, "ETHERNET", mtu, 1 << 30, 0, gids)


def infiniband(number: int = 1, state: str = "ACTIVE", lid: int = 5) -> Port:
    return Port(number, state, "INFINIBAND", 4096, 1 << 30, lid, (Gid(0, ip("fe80::5").packed, "IB"),))


RXE = Device("rxe0", ports=(port(gid(0, "fe80::1"), gid(1, "10.0.0.1"), gid(2, "fd00::1")),))
RXE1 = Device("rxe1", ports=(port(gid(0, "fe80::2"), gid(1, "10.9.0.1")),))
# A ConnectX: every address twice, v1 first; two ports.
CX5 = Device(
    "mlx5_0",
    ports=(
        port(
            gid(0, "fe80::a", "ROCE_V1"),
            gid(1, "fe80::a"),
            gid(2, "192.168.1.7", "ROCE_V1"),
            gid(3, "192.168.1.7"),
        ),
        port(gid(0, "fe80::b", "ROCE_V1"), gid(1, "fe80::b"), gid(2, "192.168.2.7"), number=2, state="DOWN"),
    ),
)
IB = Device("mlx5_ib", ports=(infiniband(),))
IWARP = Device("siw0", "IWARP", (port(gid(0, "10.0.0.1", "IB")),))


def chosen(*devices: Device, **known: Any) -> tuple[str, int, int]:
    route = choose_gid(devices, **known)
    return route.device, route.port, route.gid_index


# --- the address of the route decides ---


@pytest.mark.parametrize(
    ("local", "expected"),
    [
        ("10.0.0.1", ("rxe0", 1, 1)),
        ("fd00::1", ("rxe0", 1, 2)),
        ("fe80::1", ("rxe0", 1, 0)),
        ("10.9.0.1", ("rxe1", 1, 1)),
        ("192.168.1.7", ("mlx5_0", 1, 3)),
    ],
)
def test_the_entry_with_the_routes_address_is_chosen(local: str, expected: tuple[str, int, int]) -> None:
    assert chosen(RXE, RXE1, CX5, local_ip=ip(local)) == expected


def test_the_scope_of_a_link_local_address_does_not_matter() -> None:
    assert chosen(RXE, RXE1, local_ip=ip("fe80::2%eth0")) == ("rxe1", 1, 0)


def test_roce_v1_is_taken_only_where_there_is_no_v2() -> None:
    old = Device("mlx4_0", ports=(port(gid(0, "10.0.0.1", "ROCE_V1")),))
    assert chosen(old, local_ip=ip("10.0.0.1")) == ("mlx4_0", 1, 0)
    assert chosen(old, RXE, local_ip=ip("10.0.0.1")) == ("rxe0", 1, 1)


def test_a_route_tells_all_that_the_peer_must_know() -> None:
    route = choose_gid([RXE], local_ip=ip("10.0.0.1"))
    assert (route.gid, route.gid_type, route.lid) == (ip_to_gid(ip("10.0.0.1")), "ROCE_V2", 0)
    assert (route.link_layer, route.active_mtu, route.max_msg_sz) == ("ETHERNET", 4096, 1 << 30)
    assert "10.0.0.1" in route.reason
    assert str(route) == "rxe0 port 1 GID 1 (10.0.0.1)"


def test_an_address_that_no_device_has_is_an_error_that_lists_those_there_are() -> None:
    with pytest.raises(NoDevice, match=r"172\.16\.0\.1.*rxe0.*10\.0\.0\.1.*setup_softroce\.sh up --netdev"):
        choose_gid([RXE], local_ip=ip("172.16.0.1"))


def test_an_unknown_route_is_an_error_unless_the_device_is_named() -> None:
    with pytest.raises(NoDevice, match="leads to the peer"):
        choose_gid([RXE])
    assert chosen(RXE, device="rxe0") == ("rxe0", 1, 1)


# --- this host ---


@pytest.mark.parametrize("loopback", ["127.0.0.1", "127.0.1.1", "::1"])
def test_a_peer_on_this_host_gets_the_best_entry(loopback: str) -> None:
    assert chosen(RXE, local_ip=ip(loopback)) == ("rxe0", 1, 1)
    assert chosen(CX5, local_ip=ip(loopback)) == ("mlx5_0", 1, 3)


def test_an_address_of_this_host_counts_as_this_host() -> None:
    assert chosen(RXE, local_ip=ip("172.16.0.1"), peer_ip=ip("172.16.0.1")) == ("rxe0", 1, 1)


def test_ipv4_goes_before_global_ipv6_and_that_before_link_local() -> None:
    home = ip("127.0.0.1")
    assert chosen(Device("a", ports=(port(gid(0, "fe80::1"), gid(1, "fd00::1")),)), local_ip=home) == ("a", 1, 1)
    assert chosen(Device("a", ports=(port(gid(0, "fe80::1")),)), local_ip=home) == ("a", 1, 0)


def test_the_peers_kind_of_gid_goes_before_preference() -> None:
    known = {"local_ip": ip("127.0.0.1")}
    assert chosen(RXE, peer_gid=ip_to_gid(ip("fd00::9")), **known) == ("rxe0", 1, 2)
    assert chosen(RXE, peer_gid=ip_to_gid(ip("fe80::9")), **known) == ("rxe0", 1, 0)


# --- named by the caller ---


def test_a_named_device_is_used_though_another_has_the_address() -> None:
    assert chosen(RXE, RXE1, device="rxe1", local_ip=ip("10.0.0.1")) == ("rxe1", 1, 1)
    assert chosen(RXE, RXE1, device="rxe0", local_ip=ip("fe80::77")) == ("rxe0", 1, 0)
    assert chosen(RXE, RXE1, device="rxe0", local_ip=ip("fd99::77")) == ("rxe0", 1, 2)


def test_a_named_index_is_used() -> None:
    assert chosen(CX5, device="mlx5_0", gid_index=2, local_ip=ip("192.168.1.7")) == ("mlx5_0", 1, 2)
    assert chosen(RXE, gid_index=2) == ("rxe0", 1, 2)


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ({"device": "rxe9"}, r"no RDMA device 'rxe9'; there is rxe0 .*rxe1"),
        ({"port": 3}, "no port 3"),
        ({"gid_index": 9}, "no GID index 9"),
        ({"device": "rxe1", "gid_index": 2}, "no GID index 2.*rxe1"),
    ],
)
def test_what_the_caller_names_and_is_not_there_is_an_error(known: dict[str, Any], message: str) -> None:
    with pytest.raises(NoDevice, match=message) as caught:
        choose_gid([RXE, RXE1], local_ip=ip("10.0.0.1"), **known)
    assert caught.value.fix


def test_a_named_port_that_is_down_is_an_error() -> None:
    with pytest.raises(NoDevice, match=r"no port is active.*port 2 DOWN"):
        choose_gid([CX5], port=2, local_ip=ip("192.168.2.7"))


# --- what can't be used ---


def test_no_device_at_all_points_to_soft_roce() -> None:
    with pytest.raises(NoDevice, match=r"has no RDMA device.*setup_softroce"):
        choose_gid([])


def test_ports_that_are_down_are_passed_over() -> None:
    with pytest.raises(NoDevice, match=r"192\.168\.2\.7"):
        choose_gid([CX5], local_ip=ip("192.168.2.7"))


def test_a_device_that_can_not_be_opened_is_passed_over_and_named() -> None:
    broken = Device("mlx5_9", error="Permission denied")
    assert chosen(broken, RXE, local_ip=ip("127.0.0.1")) == ("rxe0", 1, 1)
    with pytest.raises(NoDevice, match=r"mlx5_9 .Permission denied.*/dev/infiniband"):
        choose_gid([broken], local_ip=ip("127.0.0.1"))


def test_iwarp_is_passed_over() -> None:
    assert chosen(IWARP, RXE, local_ip=ip("10.0.0.1")) == ("rxe0", 1, 1)
    with pytest.raises(NoDevice, match=r"siw0 \(iWARP\).*librdmacm"):
        choose_gid([IWARP], local_ip=ip("10.0.0.1"))


def test_an_index_beyond_what_the_kernel_interface_holds_is_passed_over() -> None:
    large = Device("a", ports=(port(gid(300, "10.0.0.1")),))
    with pytest.raises(NoDevice):
        choose_gid([large], local_ip=ip("10.0.0.1"))


# --- InfiniBand ---


def test_infiniband_is_addressed_by_lid_and_needs_no_matching_address() -> None:
    route = choose_gid([IB], local_ip=ip("10.0.0.1"))
    assert (route.device, route.gid_index, route.lid, route.link_layer) == ("mlx5_ib", 0, 5, "INFINIBAND")


def test_a_roce_entry_with_the_routes_address_goes_before_infiniband() -> None:
    assert chosen(IB, RXE, local_ip=ip("10.0.0.1")) == ("rxe0", 1, 1)


def test_infiniband_without_a_lid_points_to_the_subnet_manager() -> None:
    with pytest.raises(NoDevice, match="subnet manager"):
        choose_gid([Device("ib", ports=(infiniband(lid=0),))], local_ip=ip("10.0.0.1"))
    with pytest.raises(NoDevice, match="subnet manager"):
        choose_gid([Device("ib", ports=(infiniband(state="INIT"),))], local_ip=ip("10.0.0.1"))


# --- any table ---

ADDRESSES = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6))
GIDS = st.lists(st.tuples(ADDRESSES, st.sampled_from(["ROCE_V1", "ROCE_V2"])), max_size=5).map(
    lambda entries: tuple(Gid(i, ip_to_gid(address), kind) for i, (address, kind) in enumerate(entries))
)
PORTS = st.builds(
    Port,
    number=st.integers(1, 2),
    state=st.sampled_from(["ACTIVE", "DOWN"]),
    link_layer=st.sampled_from(["ETHERNET", "INFINIBAND"]),
    active_mtu=st.just(1024),
    max_msg_sz=st.just(1 << 30),
    lid=st.integers(0, 3),
    gids=GIDS,
)
DEVICES = st.lists(
    st.builds(
        Device,
        name=st.sampled_from(["a", "b", "c"]),
        transport=st.sampled_from(["IB", "IWARP"]),
        ports=st.lists(PORTS, max_size=2).map(tuple),
        error=st.sampled_from(["", "", "gone"]),
    ),
    max_size=3,
)


@given(
    devices=DEVICES,
    device=st.none() | st.sampled_from(["a", "b"]),
    index=st.none() | st.integers(0, 3),
    local=st.none() | ADDRESSES,
    peer=st.none() | ADDRESSES,
)
def test_the_choice_is_always_a_usable_entry_or_an_error_with_a_fix(
    devices: list[Device], device: str | None, index: int | None, local: Any, peer: Any
) -> None:
    failed: NoDevice | None = None
    try:
        route = choose_gid(devices, device=device, gid_index=index, local_ip=local, peer_ip=peer)
    except NoDevice as error:
        failed = error
    if failed is not None:
        assert failed.fix
        return
    assert device in (None, route.device)
    assert index in (None, route.gid_index)
    usable = [each for each in devices if each.name == route.device and not each.error and each.transport == "IB"]
    ports = [one for each in usable for one in each.ports if one.active and one.number == route.port]
    assert route.gid in [entry.raw for one in ports for entry in one.gids]


# --- addresses ---


@given(ADDRESSES)
def test_gids_and_addresses_convert_both_ways(address: Any) -> None:
    back = gid_to_ip(ip_to_gid(address))
    assert back == (getattr(address, "ipv4_mapped", None) or address)


def test_a_gid_has_sixteen_bytes() -> None:
    with pytest.raises(ValueError, match="16"):
        gid_to_ip(b"\0" * 4)


def test_the_local_address_towards_this_host() -> None:
    assert local_ip_towards("127.0.0.1") == ip("127.0.0.1")
    assert local_ip_towards("localhost") in (ip("127.0.0.1"), ip("::1"))


@pytest.mark.parametrize("host", ["no-such-host.invalid", "", "a" * 300, "[not::an::address]"])
def test_a_host_that_nothing_is_known_of_has_no_route(host: str) -> None:
    assert local_ip_towards(host) is None or host == ""
