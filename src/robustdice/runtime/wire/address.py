"""Addresses of devices, ``tcp://HOST:PORT``: what is accepted, and which numeric addresses a name stands for."""

from __future__ import annotations

import ipaddress
import re
import socket
import threading
from dataclasses import dataclass
from typing import Any

from robustdice.errors import ClusterError

SCHEME = "tcp://"
ANY = "*"
"""As a host to listen on: all addresses of the machine, of IPv4 and of IPv6."""
_LABEL = r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)"
_NAME = re.compile(rf"{_LABEL}(\.{_LABEL})*\.?")
_DOTTED_NUMBERS = re.compile(r"[0-9.]+|0[xX][0-9a-fA-F]+")
"""What resolvers take for an IPv4 address, in one spelling or another."""


@dataclass(frozen=True)
class Address:
    """A host (a name, ``*``, or a numeric address in its usual spelling, without brackets) and a port."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: object) -> Address:
        """The address that ``text`` spells; ClusterError with what is wrong with it."""
        found = re.fullmatch(r"tcp://(\[[^\[\]]*\]|[^\[\]:]*):([0-9]{1,5})", text) if isinstance(text, str) else None
        if found is None:
            raise ClusterError(f"the address {text!r} is not of the form tcp://HOST:PORT (IPv6: tcp://[HOST]:PORT)")
        return cls.of(found[1], int(found[2]))

    @classmethod
    def of(cls, host: str, port: int) -> Address:
        """The address of a host, IPv6 with or without brackets; ClusterError with what is wrong with it."""
        if not 0 < port < 2**16:
            raise ClusterError(f"the port {port} of host {host!r} is not one of 1 to {2**16 - 1}")
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        if ip := _numeric(bare):
            if (ip.version == 6) or bare == host:
                return cls(str(ip), port)
        elif bare == host and (
            host == ANY or (len(host) < 254 and _NAME.fullmatch(host) and not _DOTTED_NUMBERS.fullmatch(host))
        ):
            return cls(host.lower(), port)
        raise ClusterError(f"the host {host!r} is neither a name nor an IPv4 or IPv6 address, without a port")

    @property
    def ip(self) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
        """The host as a number, or None when it is a name or ``*``."""
        return _numeric(self.host)

    @property
    def loopback(self) -> bool:
        """Is it certain that only the machine itself can reach this host?"""
        return self.host == "localhost" or (self.ip is not None and _inner(self.ip).is_loopback)

    @property
    def reachable(self) -> bool:
        """Can anybody connect to this host, or is it only one to listen on, or for many at once?"""
        if self.ip is None:
            return self.host != ANY
        ip = _inner(self.ip)
        return not (ip.is_unspecified or ip.is_multicast or ip == ipaddress.IPv4Address(0xFFFFFFFF))

    @property
    def ipv6(self) -> bool:
        """Does ZeroMQ need its IPv6 option for this (numeric) address?"""
        return self.host == ANY or ":" in self.host

    def __str__(self) -> str:
        return f"{SCHEME}[{self.host}]:{self.port}" if ":" in self.host else f"{SCHEME}{self.host}:{self.port}"


class Lookup:
    """The numeric addresses of ``address``, looked up beside the caller: a resolver may take many seconds to fail.

    Once :attr:`done` is set, ``found`` has them, those of IPv4 first, or is empty and ``error`` says why.
    """

    def __init__(self, address: Address) -> None:
        """Start; what is numeric already is done at once."""
        self.done = threading.Event()
        self.found: tuple[Address, ...] = ()
        self.error = ""
        self._address = address
        if address.ip is not None or address.host == ANY:
            self.found = (address,)
            self.done.set()
        else:
            threading.Thread(target=self._run, name="lookup", daemon=True).start()

    def _run(self) -> None:
        try:
            entries = socket.getaddrinfo(self._address.host, self._address.port, type=socket.SOCK_STREAM)
            hosts = [_host(entry[4]) for entry in sorted(entries, key=lambda entry: entry[0] != socket.AF_INET)]
            self.found = tuple(Address(host, self._address.port) for host in dict.fromkeys(hosts))
        except (OSError, UnicodeError) as error:
            self.error = getattr(error, "strerror", None) or str(error)
        self.done.set()


def _host(entry: tuple[Any, ...]) -> str:
    """The host of a socket address, with the number of its network interface where it has one (RFC 4007)."""
    return f"{entry[0]}%{entry[3]}" if len(entry) == 4 and entry[3] else str(entry[0])


def _numeric(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _inner(
    ip: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The IPv4 address inside of one such as ``::ffff:192.168.0.1``."""
    return (ip.ipv4_mapped or ip) if isinstance(ip, ipaddress.IPv6Address) else ip
