"""A package index on this machine that serves one wheel and can be told to misbehave."""

from __future__ import annotations

import io
import zipfile
from http.server import BaseHTTPRequestHandler

WHEEL = "lmclock_toy-1.0-py3-none-any.whl"


def make_wheel(content: dict[str, bytes]) -> bytes:
    """A wheel that pip accepts, with `content` in its folder `toy/model`."""
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, data in content.items():
            wheel.writestr(f"toy/model/{name}", data)
        info = "lmclock_toy-1.0.dist-info"
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: lmclock-toy\nVersion: 1.0\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return raw.getvalue()


class Index(BaseHTTPRequestHandler):
    """A simple package index that can be told to misbehave."""

    wheel = b""
    ranges = True
    cut = 0  # bytes after which a response for the wheel stops; 0: never
    status = 0  # answer the wheel with this code
    asked: list[str | None]  # the Range header of every request for the wheel

    def do_GET(self) -> None:
        if self.path.endswith(".whl"):
            return self._wheel()
        page = f'<!DOCTYPE html><a href="/files/{WHEEL}">{WHEEL}</a>'.encode()
        known = self.path == "/simple/lmclock-toy/"
        self._answer(200 if known else 404, page, {"Content-Type": "text/html"})
        return None

    def do_HEAD(self) -> None:
        self.do_GET()

    def _wheel(self) -> None:
        cls = type(self)
        asked = self.headers.get("Range")
        if self.headers.get("User-Agent") == "lmclock":
            cls.asked.append(asked)
            if cls.status:
                return self._answer(cls.status, b"no", {})
        if not asked or not cls.ranges:
            return self._answer(200, cls.wheel, {"Accept-Ranges": "bytes"})
        first, _, last = asked.removeprefix("bytes=").partition("-")
        begin = int(first)
        body = cls.wheel[begin : int(last) + 1 if last else None]
        end = begin + len(body) - 1
        return self._answer(206, body, {"Content-Range": f"bytes {begin}-{end}/{len(cls.wheel)}"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = type(self).cut if self.headers.get("User-Agent") == "lmclock" else 0
        self.wfile.write(body[: cut or None])

    def log_message(self, *args: object) -> None:
        pass
