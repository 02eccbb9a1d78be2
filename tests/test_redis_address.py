"""Addresses of Redis: every form is understood, a wrong one says what is wrong, and none shows its password."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.redis_address import TLS, AddressError, RedisAddress, parse


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://localhost", RedisAddress("single", (("localhost", 6379),))),
        ("redis://h:1/2", RedisAddress("single", (("h", 1),), database=2)),
        ("redis://h?db=3", RedisAddress("single", (("h", 6379),), database=3)),
        ("redis://u:p%40%2F@[::1]:7", RedisAddress("single", (("::1", 7),), user="u", password="p@/")),
        ("unix://:p@/run/redis.sock?db=1", RedisAddress("single", (), "/run/redis.sock", None, "p", 1)),
        ("redis+sentinel://a,b:2/main", RedisAddress("sentinel", (("a", 26379), ("b", 2)), master="main")),
        (
            "redis+sentinel://u:p@a/main/4?sentinel_user=s&sentinel_password=q",
            RedisAddress("sentinel", (("a", 26379),), None, "u", "p", 4, "main", "s", "q"),
        ),
        ("redis+cluster://:p@a:1,b:2", RedisAddress("cluster", (("a", 1), ("b", 2)), password="p")),
        ("rediss+cluster://a/0", RedisAddress("cluster", (("a", 6379),), tls=TLS())),
        (
            "rediss://h?ssl_check_hostname=false&ssl_cert_reqs=none",
            RedisAddress("single", (("h", 6379),), tls=TLS(check_hostname=False, verify=False)),
        ),
    ],
)
def test_every_form_of_an_address_is_understood(url: str, expected: RedisAddress) -> None:
    assert parse(url) == expected


def test_certificate_files_are_named_in_the_address(tmp_path: Path) -> None:
    authority = tmp_path / "ca.crt"
    authority.touch()
    assert parse(f"rediss://h?ssl_ca_certs={authority}").tls == TLS(ca_certs=str(authority))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://h", "is not of the form redis[s]://"),
        ("redis+sentry://h", "is not of the form redis[s]://"),
        ("redis://", "is not of the form redis[s]://"),
        ("redis://a,b", "is not of the form redis[s]://"),
        ("redis://:secret@h:port", "written as %XX"),
        ("redis://:sec#ret@h", "written as %XX"),
        ("redis://:secret/x@h/0", "written as %XX"),
        ("unix://", "is not of the form"),
        ("redis+sentinel://h", "name of the master it watches"),
        ("redis+cluster://h/3", "database 0 only, the address asks for 3"),
        ("redis://h?ssl_ca_certs=/x", "begin it with rediss"),
        ("rediss://h?ssl_ca_certs=/no/such/file", "ssl_ca_certs of the Redis address is /no/such/file: no such file"),
        ("rediss://h?ssl_cert_reqs=maybe", "expected one of required, none"),
        ("rediss://h?ssl_check_hostname=perhaps", "expected true or false"),
        ("redis://h?protocol=3", "not known here: protocol; known are"),
        ("redis://h?sentinel_password=secret", "not known here: sentinel_password"),
    ],
)
def test_a_wrong_address_says_what_is_wrong_and_no_password(url: str, said: str) -> None:
    with pytest.raises(AddressError) as error:
        parse(url)
    assert said in str(error.value)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://u:secret@h:1/0", "h:1"),
        ("rediss+cluster://u:secret@h,[::1]:2", "h:6379,[::1]:2"),
        ("redis+sentinel://u:secret@h/main?sentinel_password=secret", "master 'main' of Sentinel h:26379"),
        ("unix://:secret@/run/redis.sock", "/run/redis.sock"),
    ],
)
def test_what_messages_show_of_an_address_holds_no_password(url: str, shown: str) -> None:
    address = parse(url)
    assert address.shown == shown
    assert "secret" not in repr(address)
