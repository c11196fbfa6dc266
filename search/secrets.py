"""Passwords stay in memory: whatever is written, printed or sent goes through here first."""

import re


def strip_password(text: str) -> str:
    """`http://user:secret@host` -> `http://user@host`, in a URI or anywhere in a message."""
    text = re.sub(r"(\w://[^\s:@/?#]*):\S*@", r"\1@", text)
    return re.sub(r"(?i)([?&][^\s=&]*(?:password|token|secret)[^\s=&]*)=[^\s&]*", r"\1=", text)


def first_line(error: Exception) -> str:
    """What an error says first; its kind where it says nothing."""
    return (strip_password(str(error)).strip().splitlines() or [type(error).__name__])[0]
