"""The page that lists the package's sources: a list within a list belongs into an item of it, for HTML and for WCAG."""

import re

from sphinx.application import Sphinx

INNER = re.compile(r"</li>\s*<ul>((?:(?!<ul>).)*?)</ul>", re.DOTALL)


def nest(app: Sphinx, pagename: str, templatename: str, context: dict, doctree) -> None:
    """Move each inner list of viewcode's overview to the end of the item before it, from the inside out."""
    if pagename != "_modules/index":
        return
    body, moved = context["body"], 1
    while moved:
        body, moved = INNER.subn(r"<ul>\1</ul></li>", body)
    context["body"] = body


def setup(app: Sphinx) -> dict:
    app.connect("html-page-context", nest)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
