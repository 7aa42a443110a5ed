"""What every test shares: the real model, its own cache folder, no network, repeatable examples."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from lmclock.errors import LmclockError

# Read when numpy and torch start: on a machine of many cores the tests' small matrices run slower
# on all of them. Nothing here may ask a hub, since a test must pass with networking off.
for name, value in {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}.items():
    os.environ.setdefault(name, value)

_SLOW_IS_FINE = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile(
    "ci", max_examples=25, deadline=None, derandomize=True, suppress_health_check=_SLOW_IS_FINE
)
settings.register_profile(
    "search", max_examples=1000, deadline=None, suppress_health_check=_SLOW_IS_FINE
)
# `pytest --hypothesis-profile=search` looks further, with new examples each time.
settings.load_profile("ci")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The SmolLM2-135M-Instruct GGUF in the user's cache; 98 MB are downloaded once."""
    from lmclock.files.pull import pull

    try:
        return Path(pull("smollm2"))
    except (LmclockError, OSError) as error:
        pytest.fail(
            f"this test needs SmolLM2, and `lmclock pull smollm2` failed: {error}", pytrace=False
        )


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder that lmclock uses, subprocesses included, while the test runs."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("LMCLOCK_CACHE", str(folder))
    return folder


class NetworkRefused(AssertionError):
    """A test without the `network` mark reached for another machine."""


def _is_loopback(host: object) -> bool:
    return host is None or str(host) in ("localhost", "::1", "") or str(host).startswith("127.")


@pytest.fixture(autouse=True)
def _no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Refuse every address but loopback, unless the test is marked `network`.

    Session fixtures are set up before this one, so `smollm2` may still download. Subprocesses are
    pointed at a proxy that is not there.
    """
    if request.node.get_closest_marker("network") is None:
        _refuse_connections(monkeypatch)
        for scheme in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(scheme, "http://127.0.0.1:9")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.setenv(name, "127.0.0.1,localhost,::1")
    yield


def _refuse_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    def guarded(name: str) -> None:
        inner = getattr(socket.socket, name)

        def method(self: socket.socket, *args: object) -> object:
            address = args[-1]  # connect(address), sendto(data, [flags,] address)
            if isinstance(address, tuple) and not _is_loopback(address[0]):
                raise NetworkRefused(f"{name} to {address[0]}: mark the test `network` to allow it")
            return inner(self, *args)

        monkeypatch.setattr(socket.socket, name, method)

    for name in ("connect", "connect_ex", "sendto"):
        guarded(name)
    look_up = socket.getaddrinfo

    def getaddrinfo(host: object, *args: object, **options: object) -> object:
        if not _is_loopback(host):
            raise NetworkRefused(f"look-up of {host!r}: mark the test `network` to allow it")
        return look_up(host, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
