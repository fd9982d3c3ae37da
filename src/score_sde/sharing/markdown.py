"""Cards are templates of Markdown, in which whatever a fact says stands as text, code or data, and is nothing else."""

import json
import re
from importlib.resources import files

import jinja2

from .. import __version__
from ..pipelines.wording import one_line, printable


# an underscore inside a word is one
_MARKDOWN = re.compile(r"[\\`*\[\]<>|~&$]|(?<![^\W_])_|_(?![^\W_])")


class Written(str):
    """A text that stands in a card as it is."""


def as_text(value):
    """Any value as Markdown that shows it and is nothing else, in a paragraph, a heading, a list or a table."""
    text = _MARKDOWN.sub(r"\\\g<0>", one_line(value))
    # what begins a heading, a list, a line
    return Written(re.sub(r"^(\d*)([#+=:-]|[.)](?=\s|$))", r"\1\\\2", text))


def as_code(value):
    """Any value as a code span of Markdown."""
    text = one_line(value)
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return Written(f"{ticks}{space}{text}{space}{ticks}" if text else "")


def as_code_cell(value):
    """The same in a table, which knows no | even there."""
    return Written(as_code(value).replace("|", "\\|"))


def as_block(value):
    """A text of several lines as a block of code."""
    text = printable(str(value))
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return Written(f"{ticks}text\n{text}\n{ticks}")


def as_python(value):
    """A value of JSON as a literal of Python, in one line."""
    text = json.dumps(value, ensure_ascii=False)
    return Written("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))


def as_number(value):
    """A whole number with commas."""
    return f"{value:,}" if isinstance(value, int) else value


CARDS = jinja2.Environment(
    loader=jinja2.FunctionLoader(lambda name: (files("score_sde.model_cards") / name).read_text(encoding="utf-8")),
    finalize=lambda value: value if isinstance(value, (Written, int, float)) else as_text(value),
)
CARDS.filters |= {
    "code": as_code,
    "code_cell": as_code_cell,
    "block": as_block,
    "python": as_python,
    "number": as_number,
}


def render(template, data, **facts):
    """A card from a template in model_cards. Whatever the template names stands there as Markdown text, unless the
    template says otherwise: `| code`, `| code_cell` (in a table), `| python` or `| number`.

    Args:
        template: its name.
        data: the head of the card, `ModelCardData` or `DatasetCardData`.
        facts: what the template names.
    """
    return CARDS.get_template(template).render(card_data=Written(data.to_yaml()), version=__version__, **facts)
