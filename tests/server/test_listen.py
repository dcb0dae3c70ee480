"""What other machines can reach needs a key and TLS; an address that cannot be had is a sentence."""

from __future__ import annotations

import pytest
from fwdllama_server.listen import check_exposure, is_loopback, listening, url_of

from fwdllama.errors import ResourceError, UsageError


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        *((host, True) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost")),
        *((host, False) for host in ("0.0.0.0", "::", "10.0.0.1", "box")),
    ],
)
def test_only_loopback_needs_neither_key_nor_tls(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback
    check_exposure(host, key=True, tls=True, insecure=False)
    check_exposure(host, key=False, tls=False, insecure=True)
    if loopback:
        check_exposure(host, key=False, tls=False, insecure=False)


@pytest.mark.parametrize(
    ("key", "tls", "missing"),
    [(False, False, "--api-key-file and --tls-cert with --tls-key"), (True, False, "--tls-cert with --tls-key"), (False, True, "--api-key-file")],
)
def test_what_is_missing_is_named(key: bool, tls: bool, missing: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_exposure("0.0.0.0", key=key, tls=tls, insecure=False)
    assert str(caught.value) == (
        f"--host 0.0.0.0 can be reached from other machines, so it needs {missing}; "
        "give --insecure if a proxy or a closed network takes care of that."
    )


def test_an_address_that_is_taken_or_foreign_is_refused() -> None:
    with listening("127.0.0.1", 0) as opened:
        port = opened.getsockname()[1]
        assert url_of(opened, tls=False) == f"http://127.0.0.1:{port}"
        assert url_of(opened, tls=True) == f"https://127.0.0.1:{port}"
        with pytest.raises(ResourceError, match=rf"^127\.0\.0\.1:{port} cannot be listened on: Address already in use\. Choose another --port\.$"):
            listening("127.0.0.1", port)
    with pytest.raises(ResourceError, match=r"^--host no such host: is no address of this machine: "):
        listening("no such host", 0)
