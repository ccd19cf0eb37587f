"""What a folded cell is called: the code of a figure, the checks of a section, or the code of a solution."""

from docutils import nodes
from myst_nb.sphinx_ import HideCodeCellNode, HideInputCells, depart_HideCellInput, visit_HideCellInput
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform

CALLED = {"input": "the code", "output": "the output", "input+output": "the cell", "all": "the solution's code"}


class NameFolds(SphinxPostTransform):
    """Name each fold by what it hides: `hide-cell` marks solutions, `hide-input` code that only plots or checks."""

    default_priority = HideInputCells.default_priority - 1
    formats = ("html",)

    def run(self, **kwargs) -> None:
        for cell in self.document.findall(nodes.container):
            if mode := cell.get("hide_mode"):
                called = "the checks" if "tag_checks" in cell["classes"] else CALLED[mode]
                cell["prompt_show"], cell["prompt_hide"] = f"Show {called}", f"Hide {called}"


def visit(translator, node: HideCodeCellNode) -> None:
    """myst-nb's fold, without the label that hides from screen readers what is written on it (WCAG 2.5.3)."""
    visit_HideCellInput(translator, node)
    translator.body = [part.replace(' aria-label="Toggle hidden content"', "") for part in translator.body]


def setup(app: Sphinx) -> dict:
    app.add_post_transform(NameFolds)
    app.add_node(HideCodeCellNode, override=True, html=(visit, depart_HideCellInput))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
