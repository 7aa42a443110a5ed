"""Text and tokens: tokenisers, chat templates, and text that arrives token by token."""

from lmclock.text.detokenise import IncrementalDetokeniser, StopStrings
from lmclock.text.folder_tokeniser import from_folder
from lmclock.text.gguf_tokeniser import from_gguf
from lmclock.text.specials import Segment, Special, Specials
from lmclock.text.template import Template
from lmclock.text.tokeniser import Marked, Tokeniser, encode_chat

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
