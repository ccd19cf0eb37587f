"""Docstrings for people who read them in an editor, shown as well in the book: plain prose to reStructuredText.

The package's docstrings use no markup. What they do use, consistently, becomes structure here:

    name: text           a line, or a sentence, that explains an argument or an attribute
    Raises XError ...    the errors, each with its condition
    name    text         a table, its columns two or more spaces apart
    `name`               a link where it names something of the package, code where it does not

Arguments, attributes and errors are handed to napoleon as Google's sections. Everything else is escaped, so that
2**bits and x_hat mean what they say.
"""

import inspect
import re
import sys

from sphinx.application import Sphinx
from sphinx.domains.python import PyObject
from sphinx.ext.autodoc import DataDocumenter, FunctionDocumenter

NAMES = r"[a-z_]\w*(?:, [a-z_]\w*)*"
LABEL = re.compile(rf"(?:^|(?<=\. ))({NAMES}): ")  # at the start of a line or of a sentence
ROW = re.compile(r"^ *(\w+(?:\([^)]*\))?(?:; \w+\([^)]*\).*?)?) {2,}(\S.*)$")
ERROR = re.compile(r"(?:^Raises |[,;] (?:and )?|\. Raises )(\w+(?:Error|Mistake)) ")
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{5})")


def to_rst(text: str, module) -> str:
    """Prose as reStructuredText that shows as it is written, but for `code`, which becomes a link where it can."""
    parts = re.split(r"`([^`]+)`", text)
    return "".join(link(part, module) if i % 2 else _escape(part) for i, part in enumerate(parts))


def _escape(text: str) -> str:
    text = re.sub(r"([\\*|])", r"\\\1", text)
    text = re.sub(r"(?<=\w)_(?!\w)", r"\\_", text)
    return ARXIV.sub(r"`arXiv:\1 <https://arxiv.org/abs/\1>`__", text)


def link(name: str, module) -> str:
    """`name` as a reference to what the package calls so in `module`, or as code."""
    expression = re.sub(r"\(.*\)$", "", name).removeprefix("nf4lab.")
    for start in (module, sys.modules["nf4lab"]):
        found = start
        for part in expression.split("."):
            found = getattr(found, part, None)
        target = f"{getattr(found, '__module__', None)}.{getattr(found, '__qualname__', None)}"
        if target.startswith("nf4lab.") and "None" not in target:
            return f":py:obj:`{name} <{target}>`"
    return f"``{name}``"


def labelled(lines: list[str]) -> list[tuple[str, str]] | None:
    """[(names, text)] of a paragraph that explains names, or None for one that does not."""
    items: list[tuple[str, str]] = []
    for line in lines:
        pieces = LABEL.split(line)
        if pieces[0] and not items:
            return None
        if pieces[0]:
            items[-1] = (items[-1][0], f"{items[-1][1]} {pieces[0].strip()}")
        items += [(names, text.strip()) for names, text in zip(pieces[1::2], pieces[2::2], strict=True)]
    return items


def table(lines: list[str]) -> list[tuple[str, str]] | None:
    """[(name, text)] of a paragraph in two columns, or None for one that is not."""
    items: list[tuple[str, str]] = []
    for line in lines:
        if row := ROW.match(line):
            items.append((row[1], row[2]))
        elif items and line.startswith("    "):
            items[-1] = (items[-1][0], f"{items[-1][1]} {line.strip()}")
        else:
            return None
    return items


def section(title: str, items: list[tuple[str, str]]) -> list[str]:
    """A section of napoleon's, one entry a name."""
    return [f"{title}:", *(f"    {name}: {text}" for names, text in items for name in names.split(", ")), ""]


def bullets(items: list[tuple[str, str]], mark: str) -> list[str]:
    return [*(f"- {mark}{name}{mark}: {text}" for name, text in items), ""]


def errors(text: str) -> list[tuple[str, str]]:
    """[(error, its condition)] of 'Raises AError for this, BError where that.'"""
    pieces = ERROR.split(text)
    return [(name, condition.rstrip(" .;,")) for name, condition in zip(pieces[1::2], pieces[2::2], strict=True)]


def paragraphs(lines: list[str], arguments: set[str]) -> list[list[str]]:
    """The docstring's paragraphs, each as its lines; prose that goes over into an argument's line is cut there."""
    found = []
    for paragraph in "\n".join(lines).strip("\n").split("\n\n"):
        rows = paragraph.split("\n")
        labels = [
            i for i, row in enumerate(rows) if (label := LABEL.match(row)) and label[1].split(", ")[0] in arguments
        ]
        cut = labels[0] if labels else 0
        found += [rows[:cut], rows[cut:]] if cut else [rows]
    return found


def restructure(lines: list[str], arguments: set[str], title: str, module) -> list[str]:
    """The docstring's lines as reStructuredText; names among `arguments` go under `title`, others into a list."""

    def in_rst(items: list[tuple[str, str]]) -> list[tuple[str, str]]:
        return [(name, to_rst(text, module)) for name, text in items]

    out: list[str] = []
    for rows in paragraphs(lines, arguments):
        text, _, source = " ".join(row.strip() for row in rows).partition("Source: ")
        if text.startswith(">>>"):
            out += [*rows, ""]
            continue
        if items := table(rows):
            out += bullets(in_rst(items), "``")
        elif items := labelled(rows):
            known = items[0][0].split(", ")[0] in arguments
            out += section(title, in_rst(items)) if known else bullets(in_rst(items), "**")
        else:
            if text.startswith("Raises ") and (conditions := errors(text)):
                out += section("Raises", in_rst(conditions))
            elif text:
                out += [to_rst(text.strip(), module), ""]
            if source:
                out += [f"**Source:** {to_rst(source, module)}", ""]
    return out


def names_of(obj) -> tuple[set[str], str]:
    """What an object's docstring may explain, and the section that it belongs to."""
    section = "Attributes" if inspect.isclass(obj) else "Args"
    own = set(getattr(obj, "__annotations__", {})) if inspect.isclass(obj) else set()
    try:
        return own | set(inspect.signature(getattr(obj, "py_func", obj)).parameters), section
    except (TypeError, ValueError):  # a property, a constant, and a class made in C have no signature
        return own, section


def process(app: Sphinx, what: str, name: str, obj, options, lines: list[str]) -> None:
    """Structure for a docstring, before napoleon reads it."""
    module = sys.modules[name] if what == "module" else inspect.getmodule(getattr(obj, "fget", None) or obj)
    if module is None or not module.__name__.startswith("nf4lab"):
        module = sys.modules["nf4lab"]
    lines[:] = restructure(lines, *names_of(obj), module)
    if what == "property":  # in a property's first line, napoleon takes what stands before a colon for a type
        lines.insert(0, "\\ ")


def skip_fields(app: Sphinx, what: str, name: str, obj, skip: bool, options) -> bool | None:
    """Leave out the fields of a named tuple, of which Python itself only tells the number: its class explains them."""
    return True if (inspect.getdoc(obj) or "").startswith("Alias for field number") else None


class CompiledDocumenter(FunctionDocumenter):
    """numba's compiled functions, documented as the Python functions that they were made from."""

    objtype = "compiled"
    directivetype = "function"
    priority = DataDocumenter.priority + 10

    @classmethod
    def can_document_member(cls, member, membername, isattr, parent) -> bool:
        return inspect.isfunction(getattr(member, "py_func", None))

    def import_object(self, raiseerror: bool = False) -> bool:
        imported = super().import_object(raiseerror)
        if imported:
            self.object = self.object.py_func
        return imported


def setup(app: Sphinx) -> dict:
    app.setup_extension("sphinx.ext.autodoc")
    app.add_autodocumenter(CompiledDocumenter)
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"  # Sphinx says "Variables"
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("autodoc-process-docstring", process, priority=100)  # before napoleon's, at 500
    return {"parallel_read_safe": True}
