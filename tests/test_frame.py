"""The frame of the book: what its extensions make of docstrings, assets and the build itself."""

import importlib
import importlib.metadata
import io
import os
import pkgutil
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from sphinx.errors import ExtensionError

import nf4lab

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "_build" / "html"
sys.path.insert(0, str(ROOT / "book" / "_ext"))
addresses, docstrings, outside, spaces, status, weight = (
    pytest.importorskip(name) for name in ("addresses", "docstrings", "outside", "spaces", "status", "weight")
)
built = pytest.mark.skipif(not SITE.exists(), reason="the book is not built: run `make book`")


def restructured(text, arguments=()):
    return docstrings.restructure(text.split("\n"), set(arguments), "Args", nf4lab.blockwise)


def test_prose_shows_as_it_is_written():
    assert restructured("2**bits and x_hat, a_ too.") == [r"2\*\*bits and x_hat, a\_ too.", ""]


def test_arguments_and_errors_become_sections():
    text = "What it does.\nformat, n: how. dtype: which.\n\nRaises TypeError for x, ValueError where y. Source: Z."
    assert restructured(text, ["format", "n", "dtype"]) == [
        "What it does.", "", "Args:", "    format: how.", "    n: how.", "    dtype: which.", "",
        "Raises:", "    TypeError: for x", "    ValueError: where y", "", "**Source:** Z.", "",
    ]  # fmt: skip


def test_an_error_of_the_package_is_one_and_a_sentence_that_names_none_stays():
    lines = restructured("Raises KernelMistake as `trace` does.")
    assert lines == ["Raises:", "    KernelMistake: as ``trace`` does", ""]
    assert restructured("Raises what the reader raises.") == ["Raises what the reader raises.", ""]


def test_a_name_of_the_package_becomes_a_link_and_any_other_is_code():
    (line, _) = restructured("See `nf4lab.dequantize`, `Format` and `n_blocks`.")
    assert ":py:obj:`nf4lab.dequantize <nf4lab.blockwise.dequantize>`" in line
    assert ":py:obj:`Format <nf4lab.formats.format.Format>`" in line
    assert "``n_blocks``" in line


def test_columns_become_a_list():
    assert restructured("v1      the first\nload(x)  loads,\n         slowly") == [
        "- ``v1``: the first", "- ``load(x)``: loads, slowly", "",
    ]  # fmt: skip


def test_every_module_of_the_package_is_on_the_api_page():
    listed = set(re.findall(r"automodule:: (\S+)", (ROOT / "book" / "api.rst").read_text()))
    modules = {found.name for found in pkgutil.walk_packages(nf4lab.__path__, "nf4lab.")}
    inside = ("nf4lab.__main__", "nf4lab.commands", "nf4lab.labs", "nf4lab.explore.", "nf4lab.kernels.cuda.")
    missing = {name for name in modules - listed if not name.startswith(inside)} - {"nf4lab.kernels"}
    assert not missing, "add `.. automodule:: NAME` to book/api.rst"
    assert listed <= modules


@built
def test_the_api_page_explains_whatever_the_package_exports():
    page = (SITE / "book" / "api.html").read_text()
    for name in nf4lab.__all__:
        thing = getattr(nf4lab, name)
        if hasattr(thing, "__qualname__"):
            assert f'id="{thing.__module__}.{thing.__qualname__}"' in page, name


@built
def test_the_api_page_has_no_section_without_content():
    page = (SITE / "book" / "api.html").read_text()
    assert "Alias for field number" not in page
    assert not re.search(r'<dd class="field-(odd|even)">\s*(<p>\s*</p>)?\s*</dd>|Raises:\s*</p>', page)


def test_the_inventories_are_what_sphinx_reads():
    inventory = pytest.importorskip("sphinx.util.inventory").InventoryFile
    found = outside.projects(outside.LIST.read_text())
    assert set(found) == {"python", "torch", "numpy", "matplotlib"}
    head = b"# Sphinx inventory version 2\n# Project: x\n# Version: \n# compressed with zlib\n"
    packed = head + outside.zlib.compress("\n".join(found["torch"][1]).encode() + b"\n")
    items = inventory.load(io.BytesIO(packed), "https://x/", lambda base, path: base + path)
    assert items["py:class"]["torch.Tensor"][2] == "https://x/tensors.html#torch.Tensor"


def test_a_rule_for_a_class_that_no_page_has_is_dropped_and_no_other():
    def kept(css):
        rules = weight.tinycss2.parse_stylesheet(css, skip_whitespace=True)
        return "".join(weight._used(rule, {"here"}) for rule in rules)

    assert kept(".here a,.gone a{color:red}") == ".here a{color:red}"
    assert kept(".gone{color:red}") == ""
    assert kept("p:not(.gone){color:red}") == "p:not(.gone){color:red}"
    assert kept("@media print{.gone{color:red}.here{color:blue}}") == "@media print{.here{color:blue}}"
    assert kept(":root{--x:1}") == ":root{--x:1}"


def test_a_figure_with_a_palette_looks_the_same(tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    fig, ax = plt.subplots(figsize=(3, 2), dpi=120)
    ax.plot([0, 1, 0.5], color="#0072b2")
    ax.hist(np.linspace(-1, 1, 50), color="#d55e00")
    fig.savefig(tmp_path / "figure.png")
    plt.close(fig)
    before = np.asarray(Image.open(tmp_path / "figure.png").convert("RGB"), dtype=int)
    size = (tmp_path / "figure.png").stat().st_size
    weight.slim_image(tmp_path / "figure.png")
    after = np.asarray(Image.open(tmp_path / "figure.png").convert("RGB"), dtype=int)
    assert (tmp_path / "figure.png").stat().st_size < size
    assert np.abs(after - before).max() < 32  # an eighth of the range, at the soft edge of a line
    assert np.abs(after - before).mean() < 0.5


def test_the_status_names_what_is_installed_here():
    assert dict(status.versions())["numpy"] == importlib.metadata.version("numpy")
    assert f"Python {sys.version.split()[0]}" in status.machine(ROOT)["system"]


@pytest.mark.parametrize(("says", "name"), [("echo NVIDIA T4; echo NVIDIA L4", "NVIDIA T4"), ("exit 9", "")])
def test_the_status_names_the_first_gpu_that_the_driver_knows(tmp_path, monkeypatch, says, name):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{says}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert status.gpu() == name


@built
def test_the_status_page_has_the_time_of_every_page_that_ran():
    page = (SITE / "book" / "status.html").read_text()
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    files = [toc["root"], *(entry["file"] for part in toc["parts"] for entry in part["chapters"])]
    ran = [file for file in files if (ROOT / f"{file}.ipynb").exists()]
    rows = re.findall(r'href="([\w-]+)\.html"[^>]*>.*?</a></p></td>\s*<td><p>([\d.]+)</p></td>', page)
    assert [f"book/{name}" for name, _ in rows] == ran
    assert all(float(seconds) > 0 for _, seconds in rows)


@built
@pytest.mark.parametrize("path", sorted((ROOT / "book").glob("*.ipynb")), ids=lambda path: path.stem)
def test_the_notebook_of_a_page_is_in_its_download_menu(path):
    page = (SITE / "book" / f"{path.stem}.html").read_text()
    assert f'href="../book/{path.name}"' in page or f'href="{path.name}"' in page
    assert (SITE / "book" / path.name).read_bytes() == path.read_bytes()


def test_the_version_is_the_same_wherever_it_stands():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == nf4lab.__version__
    assert f"Version {nf4lab.__version__}" in (ROOT / "book" / "citing.md").read_text()
    assert f"## {nf4lab.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_a_number_stays_with_its_noun_its_unit_and_its_factor():
    bound = spaces.bind("chapter 5 has 16 GB at 3.35 TB/s for 384 × 1,536 weights, 4 bits each; a bit is 12 signs.")
    assert bound.replace("\N{NO-BREAK SPACE}", "~") == (
        "chapter~5 has 16~GB at 3.35~TB/s for 384~×~1,536 weights, 4~bits each; a bit is 12 signs."
    )


@built
def test_the_build_binds_numbers_in_prose_and_leaves_code_alone():
    page = (SITE / "book" / "04-blocks.html").read_text()
    assert "chapter\N{NO-BREAK SPACE}1" in page
    assert not re.search(r"<pre>[^<]*\N{NO-BREAK SPACE}", page)


def test_links_to_the_project_take_its_address_from_one_place():
    theme = {"repository_url": "https://github.com/you/nf4lab", "repository_branch": "main"}
    config = types.SimpleNamespace(html_theme_options=theme)
    addresses.add_schemes(None, config)
    assert config.myst_url_schemes["repo"] == "https://github.com/you/nf4lab/blob/main/{{path}}"
    assert config.myst_url_schemes["colab"] == (
        "https://colab.research.google.com/github/you/nf4lab/blob/main/{{path}}"
    )


@built
def test_the_teaching_page_names_every_lab_and_the_guide():
    page, text = (SITE / "book" / "teaching.html").read_text(), (ROOT / "book" / "teaching.md").read_text()
    assert "labs/README.md" in page
    for path in (ROOT / "labs").glob("lab?/lab?.ipynb"):
        assert f"colab:{path.relative_to(ROOT)}" in text, path


@built
def test_no_link_of_the_built_book_leads_to_an_address_that_is_not_there_yet():
    pages = [path.read_text() for path in SITE.rglob("*.html")]
    assert not [link for page in pages for link in re.findall(r'(?:href|src)="([^"]*YOUR_ORG[^"]*)"', page)]


@built
def test_the_api_page_has_no_words_of_torch():
    page = (SITE / "book" / "api.html").read_text()
    assert not re.search("Define the computation performed at every call|To print customized extra information", page)


@pytest.mark.parametrize("sheet", ['.fa-house:before{content:"\\f015"}', '.fa-house{--fa:"\\f015 "}'])
@pytest.mark.parametrize("fonts", [["fa-solid-900.woff2"], []])
def test_a_theme_that_keeps_its_icons_otherwise_is_an_error_and_loses_none(tmp_path, sheet, fonts):
    # pydata-sphinx-theme 0.24.0 has WOFF2 fonts alone, and names its icons in another way.
    static = tmp_path / "_static"
    for folder in ("scripts", "styles", "vendor/fontawesome/webfonts"):
        (static / folder).mkdir(parents=True)
    (static / "styles" / "pydata-sphinx-theme.css").write_text(sheet)
    (static / "scripts" / "fontawesome.js").write_text("draw()")
    (tmp_path / "index.html").write_text("<i class='fa-house'></i>")
    for name in fonts:
        (static / "vendor" / "fontawesome" / "webfonts" / name).write_bytes(b"font")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ExtensionError, match="knows this theme's icons no more: found are 0 TrueType fonts"):
        weight.slim_icons(tmp_path, static)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_source_is_shown_anew_only_where_it_is_newer_than_its_page(tmp_path):
    sources = pytest.importorskip("sources")
    app = types.SimpleNamespace(srcdir=tmp_path, outdir=tmp_path / "html", env=types.SimpleNamespace())
    entry = ("code", {}, {}, "book/api")
    app.env._viewcode_modules = dict.fromkeys(("nf4lab", "nf4lab.old", "nf4lab.new", "nf4lab.unseen"), entry)
    times = {"nf4lab/__init__.py": 100, "nf4lab/old.py": 100, "nf4lab/new.py": 300, "nf4lab/unseen.py": 100}
    for name, time in times.items() | {(f"html/_modules/nf4lab{end}.html", 200) for end in ("", "/old", "/new")}:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (time, time))
    assert sources.leave(app) == ()
    assert [name for name, kept in app.env._viewcode_modules.items() if kept] == ["nf4lab.new", "nf4lab.unseen"]
