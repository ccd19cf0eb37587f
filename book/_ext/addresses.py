"""Links to the project's own files: `repo:labs/README.md` on GitHub, `colab:labs/lab1/lab1.ipynb` opened in Colab.

The project's address stands in _config.yml alone. While it is still the placeholder, the pages have no button and no
link that would lead there, and their footer says how to give this copy a home.
"""

from docutils import nodes
from sphinx.application import Sphinx

OUTSIDE = ("http", "https", "mailto")
COLAB = "https://colab.research.google.com/github"
PLACEHOLDER = "YOUR_ORG"  # nobody can register this name: it has an underscore
NO_HOME = """<br>This copy has no address yet: <code>make home URL=https://github.com/you/nf4lab</code>
gives its pages their buttons, for Colab and for the source."""


def add_schemes(app: Sphinx, config) -> None:
    """The two schemes for MyST, with the address and the branch of _config.yml; without an address, no buttons."""
    theme = config.html_theme_options
    url, branch = theme["repository_url"], theme["repository_branch"]
    file = f"{url}/blob/{branch}/{{{{path}}}}"
    schemes = {"repo": file, "colab": file.replace("https://github.com", COLAB)}
    config.myst_url_schemes = dict.fromkeys(OUTSIDE) | schemes
    if PLACEHOLDER in url:
        theme |= {"use_repository_button": False, "use_issues_button": False, "launch_buttons": {}}
        theme["extra_footer"] = theme.get("extra_footer", "") + NO_HOME


def unlink(app: Sphinx, doctree: nodes.document) -> None:
    """What would lead to the placeholder stays as text."""
    for link in list(doctree.findall(nodes.reference)):
        if PLACEHOLDER in link.get("refuri", ""):
            link.replace_self(link.children)


def setup(app: Sphinx) -> dict:
    app.connect("config-inited", add_schemes)
    app.connect("doctree-read", unlink)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
