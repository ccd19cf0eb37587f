"""Links to the project's own files: `repo:labs/README.md` on GitHub, `colab:labs/lab1/lab1.ipynb` opened in Colab.

The project's address stands in _config.yml alone.
"""

from sphinx.application import Sphinx

OUTSIDE = ("http", "https", "mailto")
COLAB = "https://colab.research.google.com/github"


def add_schemes(app: Sphinx, config) -> None:
    """The two schemes for MyST, with the address and the branch of _config.yml."""
    url, branch = (config.html_theme_options[name] for name in ("repository_url", "repository_branch"))
    file = f"{url}/blob/{branch}/{{{{path}}}}"
    schemes = {"repo": file, "colab": file.replace("https://github.com", COLAB)}
    config.myst_url_schemes = dict.fromkeys(OUTSIDE) | schemes


def setup(app: Sphinx) -> dict:
    app.connect("config-inited", add_schemes)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
