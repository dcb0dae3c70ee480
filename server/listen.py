"""Where a server may listen, and the socket that it listens on.

Everybody on a network can read and alter what is sent without TLS, and can use a server that asks for no key. So what is not loopback needs
both, unless the user says that something in front of it, such as a proxy or a container's network, takes care of it.
"""

from __future__ import annotations

import ipaddress
import socket

from fwdllama.errors import ResourceError, UsageError


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on `host`; a name other than localhost is not looked up."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_exposure(host: str, *, key: bool, tls: bool, insecure: bool) -> None:
    """Refuse to be reached from other machines without a key and TLS.

    Raises:
        UsageError: it would be; the sentence names the options that are missing.
    """
    missing = [option for option, given in (("--api-key-file", key), ("--tls-cert with --tls-key", tls)) if not given]
    if missing and not insecure and not is_loopback(host):
        raise UsageError(
            f"--host {host} can be reached from other machines, so it needs {' and '.join(missing)}; "
            "give --insecure if a proxy or a closed network takes care of that."
        )


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens on `host` and `port`, 0 for a free one.

    Raises:
        ResourceError: the address is taken, is not this machine's, or may not be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        opened = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise ResourceError(f"--host {host}: is no address of this machine: {getattr(error, 'strerror', None) or error}.") from error
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
        opened.listen(1024)
    except OSError as error:
        opened.close()
        raise ResourceError(f"{host}:{port} cannot be listened on: {error.strerror or error}. Choose another --port.") from error
    return opened


def url_of(opened: socket.socket, *, tls: bool) -> str:
    """Where clients find what listens on it."""
    host, port = opened.getsockname()[:2]
    return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"
