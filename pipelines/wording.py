"""Values in messages: of bounded length, whatever they are."""

import math
import numbers
import re


# what cannot be written, or would turn the direction of writing
_UNWRITABLE = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def one_line(value):
    """A text, or what else has one, in one line, without what a terminal or a page would obey."""
    return _UNWRITABLE.sub("\ufffd", " ".join(str(value).split()))


def printable(text):
    """A text of several lines without what a terminal or a page would obey."""
    return "\n".join(_UNWRITABLE.sub("\ufffd", line.expandtabs()) for line in text.split("\n"))


def shortened(text):
    """What a message says of a text that may be of any length."""
    text = str(text)
    return text if len(text) <= 200 else f"{text[:200]}..."


def quoted(value):
    """A value in a message, of bounded length."""
    return shortened(repr(value))


def few(names, most=3):
    """A list of names as text, of many the first ones and their number."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def unknown(name, value, choices):
    """What is said of a value that is not among those that there are."""
    return f"{name} {quoted(value)} is unknown; choose one of {', '.join(map(str, choices))}"


def check_finite(name, value):
    """Raise ValueError for what is no finite number."""
    try:
        fits = math.isfinite(value)
    except (TypeError, ValueError, RuntimeError):
        fits = False
    if not fits:
        raise ValueError(f"{name} {quoted(value)} must be a finite number")


def check_count(name, value):
    """Raise ValueError for what is no whole number from 1 on."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} {quoted(value)} must be a whole number, at least 1")


def check_choice(name, value, choices):
    """Raise ValueError for a value that is not among the choices, with these."""
    if value not in choices:
        raise ValueError(unknown(name, value, choices))
