"""Chat templates: messages to text, with a record of which text may become special tokens.

    template = Template(tokeniser.chat_template, tokeniser.specials)
    segments = template.render([{"role": "user", "content": "Hi"}])

**Trust.** What the template writes is trusted, what messages, tools and variables hold is not; yet
the two come out as one string, trimmed, sliced and joined as the template likes. Marking where a
content begins and ends would change what such templates do, so only characters that could take part
in spelling a special token are marked, each by a private character placed after it
(`Specials.exposed`). A conversation that spells none, nearly every one, is rendered untouched. In
the output each marked character becomes a segment of its own, and a special token never spans
segments. Text that the template cuts apart and rejoins without the mark is its own doing.

**Limits.** The template runs in a process of its own (`template_worker.py` says why), started by
the first rendering and kept until the `Template` is closed or collected.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from lmclock.errors import FileError, OptionError, UnsupportedError
from lmclock.text.specials import Segment, Specials

MAX_SOURCE = 1 << 20
WALL_SECONDS = 20.0  # where the worker's own limits do not end it: no POSIX, or a stuck machine
WORKER = Path(__file__).with_name("template_worker.py")

ROLES = frozenset(("system", "developer", "user", "assistant", "tool", "function"))
RESERVED = frozenset(
    {
        *("messages", "tools", "add_generation_prompt", "raise_exception", "strftime_now"),
        *("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token"),
    }
)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content"
    " + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PLAIN = (
    "{% for message in messages %}{{ message.role | capitalize }}: {{ message.content }}\n\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)

# `transformers` lets templates mark the assistant's text with this tag; it prints nothing. A block
# that is always taken prints nothing either, and trims the spaces around it alike.
_GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


class Template:
    """One chat template, with the special tokens its text may hold.

    `origin` is "file" for a template of the model. Where the model has none (`source` is None) it
    is "chatml" if the vocabulary has both special tokens of that format, else "plain": a transcript
    of `Role: text` paragraphs, for models that were never taught turns. A caller can say which.
    """

    def __init__(self, source: str | None, specials: Specials) -> None:
        chatml = {"<|im_start|>", "<|im_end|>"} <= specials.by_text.keys()
        default = ("chatml", CHATML) if chatml else ("plain", PLAIN)
        self.origin, self.source = ("file", source) if source else default
        if len(self.source) > MAX_SOURCE:
            raise FileError(
                f"the chat template has {len(self.source)} characters; valid: at most {MAX_SOURCE}"
            )
        self._specials = specials
        self._lock = threading.Lock()
        self._worker: _Worker | None = None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        now: datetime | None = None,
        **variables: Any,
    ) -> list[Segment]:
        """The text of a conversation; joined, the segments are what the template wrote.

        `now` is what the template's clock shows (default: the present). `variables` are the extra
        names some templates know. OptionError for messages the template refuses or that are not
        plain data, FileError for a template that is wrong or that does not end.
        """
        _check(messages, variables)
        given = {"messages": messages, "tools": tools, **variables}
        given["add_generation_prompt"] = add_generation_prompt
        try:
            mark = _free_character(json.dumps([given, self.source], ensure_ascii=False))
            marked = self._marked(given, mark)
            request = {
                "now": (now or datetime.now()).isoformat(),
                "variables": {**self._specials.named, **marked},
            }
            line = json.dumps(request, ensure_ascii=False, allow_nan=False).encode()
        except UnicodeEncodeError:
            raise OptionError("the messages hold half of a character (a lone surrogate)") from None
        except (TypeError, ValueError, RecursionError) as error:
            raise OptionError(f"the messages are not plain data: {error}") from None
        return _segments(self._run(line), mark)

    def close(self) -> None:
        """End the process; a later `render` starts another."""
        with self._lock:
            self._drop()

    def _marked(self, value: Any, mark: str) -> Any:
        """The value with `mark` after each character that could help to spell a special token."""
        if isinstance(value, str):
            if value in ROLES:  # no secret and no attack, but what templates compare with
                return value
            pieces, begin = [], 0
            for at in self._specials.exposed(value):
                pieces += [value[begin : at + 1], mark]
                begin = at + 1
            return "".join(pieces) + value[begin:] if pieces else value
        if isinstance(value, Mapping):
            return {
                self._marked(key, mark): self._marked(item, mark) for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self._marked(item, mark) for item in value]
        return value

    def _run(self, line: bytes) -> str:
        with self._lock:
            try:
                if self._worker is None or self._worker.ended():
                    self._drop()
                    self._worker = _Worker(self.source)
                answer = self._worker.ask(line)
            except (OSError, EOFError):
                self._drop()
                raise FileError(
                    "the chat template was stopped: it took more time or memory than it may have"
                ) from None
            except BaseException:
                # Ctrl-C too: an answer not read would be taken for the next one.
                self._drop()
                raise
        if "refused" in answer:
            raise OptionError(f"the chat template refuses these messages: {answer['refused']}")
        if "error" in answer:
            raise FileError(f"the chat template fails: {answer['error']}")
        return str(answer["text"])

    def _drop(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None


class _Worker:
    """The process, a line in and a line out. EOFError when it has ended."""

    def __init__(self, source: str) -> None:
        if not sys.executable:
            raise UnsupportedError(
                "chat templates need a Python executable to run in, and none is known"
            )
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(WORKER), json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is the caller's
        )
        self.close = weakref.finalize(self, _end, self._process)
        tag = _GENERATION.sub(_as_condition, source)
        answer = self.ask(json.dumps({"source": tag}).encode())
        if "error" in answer:
            raise FileError(f"the chat template is not valid: {answer['error']}")

    def ended(self) -> bool:
        """Whether the process is gone (or another's: a fork cannot share it)."""
        return self._process.poll() is not None

    def ask(self, line: bytes) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        watch = threading.Timer(WALL_SECONDS, self._process.kill)
        watch.daemon = True
        watch.start()
        try:
            self._process.stdin.write(line + b"\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        finally:
            watch.cancel()
        if not answer.endswith(b"\n"):
            raise EOFError
        found = json.loads(answer)
        assert isinstance(found, dict)
        return found


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _as_condition(tag: re.Match[str]) -> str:
    """`{% generation %}` as a block that is always taken, with the same trimming."""
    return f"{{%{tag[1]} {'endif' if tag[2] else 'if true'} {tag[3]}%}}"


def _check(messages: object, variables: Mapping[str, Any]) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise OptionError(f"messages is a {type(messages).__name__}; valid: a list of messages")
    for at, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise OptionError(
                f"message {at} is {message!r:.60}; valid: a mapping with a text `role`"
            )
    for name in variables:
        if name in RESERVED:
            raise OptionError(f"the template variable {name!r} is set by lmclock, not by a caller")


def _free_character(used: str) -> str:
    """A private-use character that the text neither holds nor spells as an escape."""
    for code in range(0xE000, 0xF900):
        if chr(code) not in used and f"\\u{code:04x}" not in used:
            return chr(code)
    raise OptionError("the messages use all 6400 private-use characters; one must be free")


def _segments(text: str, mark: str) -> list[Segment]:
    """Text cut at the marks, each marked character untrusted and alone."""
    # `tojson(ensure_ascii=true)` writes the mark as an escape.
    *heads, tail = text.replace(f"\\u{ord(mark):04x}", mark).split(mark)
    found = []
    for head in heads:
        found += [Segment(head[:-1], True), Segment(head[-1:], False)]
    return [segment for segment in (*found, Segment(tail, True)) if segment.text]
