"""Text and tokens: tokenisers, chat templates, and text that arrives token by token.

`from_folder` is loaded when it is first asked for: a GGUF file needs nothing of it.
"""

from typing import TYPE_CHECKING, Any

from lmclock.text.detokenise import IncrementalDetokeniser, StopStrings
from lmclock.text.gguf_tokeniser import from_gguf
from lmclock.text.specials import Segment, Special, Specials
from lmclock.text.template import Template
from lmclock.text.tokeniser import Marked, Tokeniser, encode_chat

if TYPE_CHECKING:
    from lmclock.text.folder_tokeniser import from_folder

__all__ = [
    "IncrementalDetokeniser",
    "Marked",
    "Segment",
    "Special",
    "Specials",
    "StopStrings",
    "Template",
    "Tokeniser",
    "encode_chat",
    "from_folder",
    "from_gguf",
]


def __getattr__(name: str) -> Any:
    if name == "from_folder":
        from lmclock.text.folder_tokeniser import from_folder

        return from_folder
    raise AttributeError(f"module 'lmclock.text' has no attribute {name!r}")
