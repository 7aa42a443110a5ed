"""The process in which a chat template runs, started by `template.py` as a script.

A template is a program out of a model file. The engine counts its steps (fuel), but thirty steps
can double a string into gigabytes, and a failed allocation or a deep nest of operators ends the
whole process; so that process is this one, with limits on its memory and its processor time. It
reads one JSON object a line and answers with one. It imports nothing of lmclock.
"""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from datetime import datetime
from typing import Any

FUEL = 5_000_000
SECONDS = 0.5  # of processor time, for one rendering
BYTES = 160 << 20  # of memory, plus room for a large conversation
BYTES_PER_BYTE = 24
SECONDS_PER_BYTE = 1e-7


class Refused(Exception):
    """The template called raise_exception: what it says is meant for the author of the messages."""


def main() -> None:
    sys.path[:] = json.loads(sys.argv[1])
    answers, environment = sys.stdout.buffer, None
    for line in sys.stdin.buffer:
        request = json.loads(line)
        if "source" in request:
            environment, answer = compiled(request["source"])
        else:
            answer = rendered(environment, request, len(line))
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def compiled(source: str) -> tuple[Any, dict[str, str]]:
    """(the environment that holds the template, {} or what is wrong with it)."""
    import minijinja

    environment = minijinja.Environment(
        fuel=FUEL, trim_blocks=True, lstrip_blocks=True, debug=False, pycompat=True
    )
    environment.add_filter("tojson", tojson)
    environment.add_filter("trim", trim)
    environment.add_global("raise_exception", refuse)
    environment.remove_global("debug")
    with limits(len(source)):
        try:
            environment.add_template("chat", source)
        except minijinja.TemplateError as error:
            return None, {"error": first_line(error)}
    return environment, {}


def rendered(environment: Any, request: dict[str, Any], size: int) -> dict[str, str]:
    """{"text": ...}, {"refused": ...} or {"error": ...}."""
    now = datetime.fromisoformat(request["now"])
    environment.add_global("strftime_now", lambda form: now.strftime(form))
    with limits(size):
        try:
            return {"text": environment.render_template("chat", **request["variables"])}
        except Refused as error:
            return {"refused": str(error)}
        except Exception as error:  # a template can make any filter or method raise anything
            return {"error": first_line(error)}


@contextmanager
def limits(size: int) -> Any:
    """Memory and processor time for a request of `size` bytes; beyond them the process ends."""
    try:
        import resource
        import signal
    except ImportError:  # not POSIX: the caller's wall clock is the only limit
        yield
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = BYTES + BYTES_PER_BYTE * size
    soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.setitimer(signal.ITIMER_PROF, SECONDS + SECONDS_PER_BYTE * size)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def refuse(message: object = "") -> None:
    raise Refused(str(message)[:1000])


def trim(value: object, characters: str | None = None) -> str:
    """Python's idea of a space, which templates were written against, has four more characters."""
    return str(value).strip(characters)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """JSON as `transformers` gives it to templates: no HTML escapes, the author's spacing."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators and tuple(separators),
        sort_keys=sort_keys,
    )


if __name__ == "__main__":
    main()
