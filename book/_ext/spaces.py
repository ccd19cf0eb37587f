"""A number stays on the line of its noun, its unit or its factor: "chapter 5", "16 GB", "384 × 1,536".

The spaces between them become no-break spaces on the page. The Markdown and the notebooks keep plain ones.
"""

import re

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform

NOUN = r"\b(?:[Cc]hapter|[Ee]xercise|figure|[Ss]ection) (?=\d)"
UNIT = r"(?<=\d) (?=(?:[KMGT]i?B(?:/s)?|bits?|bytes?|[mµn]?s|dB|pixels|sigma)\b)"
FACTOR = r"(?<=\d) (?=×)|(?<=×) (?=\d)"
BREAKS = re.compile(f"{NOUN}|{UNIT}|{FACTOR}")
VERBATIM = (nodes.literal, nodes.literal_block, nodes.math, nodes.math_block, nodes.raw, nodes.comment)


def bind(text: str) -> str:
    """The text with those spaces unbreakable."""
    return BREAKS.sub(lambda found: found[0].replace(" ", "\N{NO-BREAK SPACE}"), text)


class BindNumbers(SphinxPostTransform):
    default_priority = 900  # after references have their texts
    formats = ("html",)

    def run(self, **kwargs) -> None:
        for text in list(self.document.findall(nodes.Text)):
            bound = bind(text)
            if bound != text and not any(isinstance(above, VERBATIM) for above in ancestors(text)):
                text.parent.replace(text, nodes.Text(bound))


def ancestors(node: nodes.Node):
    while node.parent is not None:
        node = node.parent
        yield node


def setup(app: Sphinx) -> dict:
    app.add_post_transform(BindNumbers)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
