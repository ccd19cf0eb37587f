"""What a page can be taken away as: its notebook, its source, itself on paper, and the whole book as one PDF."""

import shutil
from pathlib import Path

from sphinx.application import Sphinx

PDF = "nf4lab.pdf"  # written beside the pages by book/make_pdf.py, where there is a Chromium


def offer(app: Sphinx, pagename: str, templatename: str, context: dict, doctree) -> None:
    """The theme's download menu, with the notebook and the book in it."""
    groups = [button for button in context.get("header_buttons", []) if button.get("label") == "download-buttons"]
    if not groups:
        return
    buttons = groups[0]["buttons"]
    for button in buttons:
        button["text"] = {"download-pdf-button": "print this page"}.get(button["label"], f"source ({button['text']})")
    if notebook(app, pagename).exists():
        buttons.insert(0, link(context["pathto"](f"{pagename}.ipynb", 1), "notebook (.ipynb)", "fas fa-code"))
    if shutil.which("chromium"):
        buttons.append(link(context["pathto"](PDF, 1), "whole book (.pdf)", "fas fa-file-pdf"))


def link(url: str, text: str, icon: str) -> dict:
    """A button of the theme's."""
    return {"type": "link", "url": url, "text": text, "icon": icon, "tooltip": "", "label": f"download {text}"}


def notebook(app: Sphinx, pagename: str) -> Path:
    """Where the notebook of a page lies, if it has one."""
    return Path(app.srcdir) / f"{pagename}.ipynb"


def copy_notebooks(app: Sphinx, error: Exception | None) -> None:
    """Each notebook beside its page."""
    if error or app.builder.format != "html":
        return
    for pagename in app.env.found_docs:
        if (path := notebook(app, pagename)).exists():
            shutil.copyfile(path, Path(app.outdir) / f"{pagename}.ipynb")


def setup(app: Sphinx) -> dict:
    app.connect("html-page-context", offer, priority=600)  # after the theme made its menu, at 501
    app.connect("build-finished", copy_notebooks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
