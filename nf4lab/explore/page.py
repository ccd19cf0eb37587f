"""An explorable: one piece of HTML with its numbers, style and script inside. It needs no kernel and no network.

The rendered book, Colab and Jupyter show it as the output of the cell that made it. The script builds its elements in
a shadow root, so that no page's style reaches them, and it sets nothing global, so that pages and several explorables
on one page load in any order.
"""

import base64
import html
import importlib.resources
import json
import re
from dataclasses import dataclass

import numpy as np

FOLDER = importlib.resources.files(__package__)


@dataclass(frozen=True, repr=False)
class Explorable:
    """What a notebook shows as an interactive figure.

    name: of its script and style, `name.js` and `name.css`, beside this module. data: the numbers that the script
    works with, as JSON takes them. summary: one sentence for readers without JavaScript.
    """

    name: str
    data: dict
    summary: str

    @property
    def html(self) -> str:
        """The fragment that goes into a page: a place with the summary, and the script that fills it."""
        numbers = json.dumps(self.data, separators=(",", ":"), allow_nan=False)
        style = _without_comments(_read("kit.css") + _read(f"{self.name}.css"))
        script = (
            f"const DATA = {numbers};\nconst CSS = {json.dumps(style)};\n{_read('kit.js')}{_read(f'{self.name}.js')}"
        )
        script = script.replace("</", "<\\/")  # nothing in it may look like the end of the script
        return (
            f'<div data-explorable="{self.name}"><p>{html.escape(self.summary)} '
            "(This figure moves; it needs JavaScript.)</p></div>\n"
            f"<script>(() => {{\n{script}}})();</script>\n"
        )

    @property
    def page(self) -> str:
        """The fragment as a page of its own, to save and open without a server."""
        title = html.escape(self.name.replace("_", " "))
        return (
            f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{title}</title>\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            "<style>:root { color-scheme: light dark; } "
            "body { margin: 16px auto; max-width: 780px; padding: 0 12px; font-family: system-ui, sans-serif; }"
            "</style></head>\n"
            f"<body><main><h1>4-bit NormalFloat</h1><h2>{title}</h2>\n{self.html}</main></body>\n</html>\n"
        )

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return f"Explorable {self.name!r}: {self.summary}"


def float32_base64(values) -> str:
    """Float32 values as base64 of their little-endian bytes, exact: what the script's `floats` reads."""
    return base64.b64encode(np.asarray(values, dtype="<f4").tobytes()).decode()


def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _without_comments(style: str) -> str:
    return re.sub(r"\s*\n\s*", "\n", re.sub(r"/\*.*?\*/", "", style, flags=re.DOTALL))
