"""`Fields`: typed look-ups in a mapping that came from a file, for config/.

Every look-up checks type and range and remembers the key, so that `rest` can judge the keys nobody
asked for. A null counts as a missing key, as it does to the programs that write such files.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lmclock.errors import FileError, UnsupportedError, choices

MOST = (1 << 31) - 1
LEAST, LARGEST = 1e-30, 1e30
REQUIRED: Any = object()  # default of a key that must be there

# An unknown key with one of these in its name may change what is computed.
_ARITHMETIC = re.compile(
    "alibi|attention|attn|bias|bidirect|cap|causal|chunk|clamp|clip|cross|embd|embed|expert|factor|"
    "head|hidden|kv|layer|logit|lora|mask|mla|moe|mtp|mult|nextn|norm|position|quant|residual|rope|"
    "rotary|scal|sink|skip|softmax|sparse|window"
)
_NEUTRAL = (None, 0, 1, "", "none")  # values with which such a key does nothing, and False


class Fields:
    """Keys of `data` that begin with `prefix`; `where` names the file in messages."""

    def __init__(self, where: str, data: Mapping[str, Any], prefix: str = "") -> None:
        self.where = where
        self.data = data
        self.prefix = prefix
        self.asked: set[str] = set()

    def has(self, key: str) -> bool:
        return self.prefix + key in self.data

    def take(self, key: str, default: Any = None) -> Any:
        """The raw value, or the default; FileError when the key is REQUIRED and missing."""
        self.asked.add(self.prefix + key)
        value = self.data.get(self.prefix + key)
        if value is None and default is REQUIRED:
            raise FileError(f"{self.where} lacks {self.prefix}{key}")
        return default if value is None else value

    def wrong(self, key: str, value: object, valid: str) -> FileError:
        return FileError(f"{self.where}: {self.prefix}{key} is {str(value)[:80]!r}; valid: {valid}")

    def integer(self, key: str, default: Any = REQUIRED, low: int = 1, high: int = MOST) -> Any:
        """An integer from low to high; None only as the default."""
        value = self.take(key, default)
        return value if value is None else self._int(key, value, low, high)

    def _int(self, key: str, value: Any, low: int, high: int) -> Any:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.wrong(key, value, f"an integer from {low} to {high}")
        return value

    def number(self, key: str, default: Any = REQUIRED, low: float | None = None) -> float:
        """A number above 0, or from `low`; within bounds that no arithmetic overflows."""
        value = self.take(key, default)
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        least = LEAST if low is None else low
        if not fits or not least <= value <= LARGEST:
            raise self.wrong(key, value, f"a number from {least} to {LARGEST}")
        return shortest(float(value))

    def flag(self, key: str, default: Any = REQUIRED) -> bool:
        value = self.take(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: Any = REQUIRED, valid: Collection[str] = ()) -> str:
        value = self.take(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, value, choices(valid) or "a string")
        if valid and value not in valid:
            raise UnsupportedError(str(self.wrong(key, value, choices(valid))))
        return value

    def ids(self, key: str) -> tuple[int, ...]:
        """One token id, a list of them, or none; negative ones stand for none."""
        value = self.take(key, ())
        values = value if isinstance(value, Sequence) else (value,)
        return tuple(i for i in values if self._int(key, i, -1, MOST) >= 0)

    def count(self, key: str) -> int:
        """Elements of a list; 0 when the key is missing."""
        value = self.take(key, ())
        if isinstance(value, str) or not hasattr(value, "__len__"):
            raise self.wrong(key, value, "a list")
        return len(value)

    def each(self, key: str, layers: int) -> tuple[int, ...]:
        """One positive integer for every layer, stated once or in a list."""
        values = plain(self.take(key, REQUIRED))
        if not isinstance(values, list):
            return (self._int(key, values, 1, MOST),) * layers
        if len(values) != layers:
            raise self.wrong(key, values, f"an integer, or {layers} of them")
        return tuple(self._int(key, value, 1, MOST) for value in values)

    def same(self, key: str, layers: int, high: int, default: Any = REQUIRED) -> int:
        """One positive integer, or a list that states the same one for every layer."""
        if self.take(key, default) is default:
            return self.integer(key, default)
        values = self.each(key, layers)
        if len(set(values)) > 1:
            message = f"{self.where}: {self.prefix}{key} differs from layer to layer"
            raise UnsupportedError(message + "; valid: the same in all")
        return int(self._int(key, values[0], 1, high))

    def flags(self, key: str, layers: int) -> tuple[bool, ...]:
        """One flag for every layer, in a list; all true when the key is missing."""
        values = plain(self.take(key, [True] * layers))
        fits = isinstance(values, list) and all(v in (False, True) for v in values)
        if not fits or len(values) != layers:
            raise self.wrong(key, values, f"{layers} flags")
        return tuple(bool(value) for value in values)

    def rest(self, harmless: Collection[str], what: str) -> tuple[str, ...]:
        """A note that lists the keys nobody asked for; UnsupportedError for one that may change the
        arithmetic of `what` and does not have a value that switches it off.
        """
        known = {self.prefix + key for key in harmless} | self.asked
        unknown = [k for k in self.data if str(k).startswith(self.prefix) and k not in known]
        for key in unknown:
            value = plain(self.data[key])
            if _ARITHMETIC.search(str(key).removeprefix(self.prefix)) and not _neutral(value):
                raise UnsupportedError(
                    f"{self.where}: {shown(key)}={shown(value)} may change the arithmetic, "
                    f"and is no option of {what} here"
                )
        names = sorted(shown(key) for key in unknown)
        return (f"ignored in {self.where}: {', '.join(names)}",) if names else ()


def _neutral(value: Any) -> bool:
    if isinstance(value, list | Mapping):
        return not value
    return value is False or (value is not True and value in _NEUTRAL)


def shown(value: Any) -> str:
    """At most 80 characters of something from a file, on one line and safe to print."""
    return "".join(c if c.isprintable() else "?" for c in str(value)[:80])


def plain(value: Any) -> Any:
    """A NumPy array or tuple as a list; anything else as it is."""
    if isinstance(value, tuple):
        return list(value)
    return value.tolist() if hasattr(value, "tolist") else value


def shortest(value: float) -> float:
    """The shortest decimal that means the same float32, when `value` is one exactly: files that
    store 1e-5 in four bytes are read as 1e-05, not as 9.999999747378752e-06.
    """
    if abs(value) > 3e38 or _float32(value) != value:
        return value
    texts = (f"{value:.{digits}g}" for digits in range(1, 10))
    return next((float(t) for t in texts if _float32(float(t)) == value), value)


def _float32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])
