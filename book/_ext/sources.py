"""The package's sources as pages: which are made again, and the list of them.

A list within a list belongs into an item of it, for HTML and for WCAG.
"""

import re
from pathlib import Path

from sphinx.application import Sphinx

INNER = re.compile(r"</li>\s*<ul>((?:(?!<ul>).)*?)</ul>", re.DOTALL)


def leave(app: Sphinx) -> tuple:
    """Let viewcode leave the pages of sources that are older than they: to find those it would import every module."""
    modules = getattr(app.env, "_viewcode_modules", {})
    app.env._viewcode_modules = {name: entry if entry and newer(app, name) else None for name, entry in modules.items()}
    return ()


def newer(app: Sphinx, module: str) -> bool:
    """Whether a module's source is newer than its page, or one of them is not found."""
    place = module.replace(".", "/")
    page, stem = Path(app.outdir) / "_modules" / f"{place}.html", Path(app.srcdir) / place
    source = next((path for path in (stem / "__init__.py", stem.with_suffix(".py")) if path.exists()), None)
    return source is None or not page.exists() or source.stat().st_mtime > page.stat().st_mtime


def nest(app: Sphinx, pagename: str, templatename: str, context: dict, doctree) -> None:
    """Move each inner list of viewcode's overview to the end of the item before it, from the inside out."""
    if pagename != "_modules/index":
        return
    body, moved = context["body"], 1
    while moved:
        body, moved = INNER.subn(r"<ul>\1</ul></li>", body)
    context["body"] = body


def name_by_own_module(app, env) -> None:
    """A source page's links back name the module that it is of, and not another that imports from it."""
    modules = getattr(env, "_viewcode_modules", {})
    own = env.get_domain("py").modules  # those that have a place of their own on the API page
    modules.update({name: (*entry[:3], name) for name, entry in modules.items() if entry and name in own})


def setup(app: Sphinx) -> dict:
    app.connect("env-updated", name_by_own_module)
    app.connect("html-collect-pages", leave, priority=100)  # before viewcode
    app.connect("html-page-context", nest)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
