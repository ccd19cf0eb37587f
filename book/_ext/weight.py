"""Less to load: what a page needs comes with it, and nothing else.

The theme brings every icon of Font Awesome three times (1.5 MB of script and two fonts), MathJax a menu and a speech
engine, matplotlib 24 bits a pixel. After the build, the icons that the pages use stay, as one small font; MathJax is
loaded in parts, and only by pages with formulas; figures keep the 256 colours that they need. Scripts no longer hold
up the text.

Themes, tried in November 2026: jupyter-book 1.0.4.post1 wants Sphinx 7, and the newest theme that wants no more than
that is sphinx-book-theme 1.3.0 with pydata-sphinx-theme 0.17.1; `slim_icons` cuts its icons down as it does those of
0.16.1, which is pinned. 0.20.0 (sphinx-book-theme 1.4.0, which wants Sphinx 8.2) and 0.24.0 have WOFF2 fonts alone, and
name icons by `--fa`: `slim_icons` refuses both. CONTRIBUTING.md says how to raise the theme.
"""

import logging
import re
import shutil
from pathlib import Path

import tinycss2
from fontTools import subset
from fontTools.ttLib import TTFont
from PIL import Image
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.logging import getLogger

logger = getLogger(__name__)
logging.getLogger("fontTools.subset").setLevel(logging.WARNING)  # it tells what it does, glyph by glyph
MATHJAX = ("core", "input/tex", "output/chtml", "a11y/assistive-mml")
MATHJAX_FONT = "output/chtml/fonts/tex"  # output/chtml asks for it itself, when it is ready
FIRST = "documentation_options.js"  # the one script that an inline script after it needs at once
COLOURS = 256
NO_SCRIPT = "// The icons come from a font: see book/_ext/weight.py.\n"
CLASS = re.compile(r"\.(-?[A-Za-z_][\w-]*)")
OPTIONAL = re.compile(r":(?:not|is|where)\([^()]*\)")  # a class in these need not be there
# What the scripts of the theme insert, beyond the icons that stand in the pages.
ICONS = {"fa-xmark", "fa-circle-half-stroke", "fa-sun", "fa-moon", "fa-arrow-up", "fa-bars", "fa-list"}


def choose_mathjax(app: Sphinx, config) -> None:
    """MathJax in parts, after sphinx-mathjax-offline chose its largest whole."""
    config.mathjax_path = "mathjax/startup.js"
    config.mathjax3_config = {
        "loader": {"load": list(MATHJAX)},
        "options": {"processHtmlClass": "tex2jax_process|mathjax_process|math|output_area"},
    }


def thin_scripts(app: Sphinx, pagename: str, templatename: str, context: dict, doctree) -> None:
    """Scripts wait until the text is there, but on the search page, whose own do not; no formulas, no MathJax."""
    formulas = app.env.get_domain("math").has_equations(pagename) if pagename in app.env.found_docs else False
    kept = []
    for script in context.get("script_files", []):
        name = str(getattr(script, "filename", "") or "")
        if "mathjax" in name and not (formulas and doctree is not None and _has_math(doctree)):
            continue
        later = name and not name.endswith(FIRST) and templatename != "search.html"
        kept.append(_deferred(script) if later else script)
    context["script_files"] = kept


def _deferred(script):
    """A copy of Sphinx's entry for a script, which all pages share, that is run when the text is there."""
    return type(script)(script.filename, priority=script.priority, **{**script.attributes, "defer": "defer"})


def _has_math(doctree) -> bool:
    from docutils import nodes

    return any(True for _ in doctree.findall(lambda node: isinstance(node, nodes.math | nodes.math_block)))


def slim(app: Sphinx, error: Exception | None) -> None:
    """The built site's assets, cut down to what its pages use."""
    if error or app.builder.format != "html":
        return
    static = Path(app.outdir) / "_static"
    if (static / "scripts" / "fontawesome.js").read_text() == NO_SCRIPT:
        return  # nothing has changed: Sphinx copied no assets, and those that are there have been cut down
    before = _size(Path(app.outdir))
    slim_icons(Path(app.outdir), static)
    slim_styles(Path(app.outdir), static)
    slim_mathjax(static / "mathjax")
    for image in (Path(app.outdir) / "_images").glob("*.png"):
        slim_image(image)
    logger.info(f"site: {before / 1e6:.1f} MB, slimmed to {_size(Path(app.outdir)) / 1e6:.1f} MB")


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def slim_icons(site: Path, static: Path) -> None:
    """The theme's style sheet and fonts with the icons that the pages show, and no script that draws them again.

    Raises ExtensionError, before anything is deleted, where the theme keeps its icons in another way: pages without
    icons look like pages.
    """
    fonts = static / "vendor" / "fontawesome" / "webfonts"
    kept = sorted(fonts.glob("*.ttf"))
    used = ICONS | {name for page in site.rglob("*.html") for name in re.findall(r"\bfa-[a-z0-9-]+", page.read_text())}
    sheet = static / "styles" / "pydata-sphinx-theme.css"
    css = sheet.read_text()
    own = {ord(icon) for icon in re.findall(r"--pst-icon-[a-z-]+:\"(.)\"", css)}  # in the theme's rules, as characters
    glyphs: set[int] = set()

    def keep(rule: re.Match) -> str:
        names = set(re.findall(r"\.(fa-[a-z0-9-]+)", rule[1]))
        if not names & used:
            return ""
        glyphs.add(int(rule[2], 16))
        return rule[0]

    css = re.sub(r"((?:,?\.fa-[a-z0-9-]+:before)+)\{content:\"\\([0-9a-f]+)\"\}", keep, css)
    if not kept or not glyphs:
        found = f"{len(kept)} TrueType fonts in {fonts.relative_to(static.parent)}, {len(glyphs)} icons in {sheet.name}"
        raise ExtensionError(f"slim_icons of book/_ext/weight.py knows this theme's icons no more: found are {found}")
    (static / "scripts" / "fontawesome.js").write_text(NO_SCRIPT)
    css = re.sub(r"url\([^)]*\.woff2\) format\(\"woff2\"\),", "", css)
    sheet.write_text(css)
    for path in fonts.glob("*.woff2"):
        path.unlink()
    for path in kept:
        _keep_glyphs(path, glyphs | own)


def _keep_glyphs(path: Path, glyphs: set[int]) -> None:
    options = subset.Options(notdef_outline=True, drop_tables=["GSUB", "GPOS", "GDEF"])
    font = TTFont(path, recalcTimestamp=False)
    subsetter = subset.Subsetter(options)
    subsetter.populate(unicodes=glyphs)
    subsetter.subset(font)
    font.save(path)


def slim_styles(site: Path, static: Path) -> None:
    """The theme's style sheet without the rules for classes that occur neither in a page nor in a script."""
    sources = [*site.rglob("*.html"), *static.glob("*.js"), *(static / "scripts").glob("*.js")]
    words = set(re.findall(r"[\w-]+", " ".join(path.read_text() for path in sources)))
    for sheet in (static / "styles" / "pydata-sphinx-theme.css", *static.glob("mystnb.*.css")):
        rules = tinycss2.parse_stylesheet(sheet.read_text(), skip_comments=False, skip_whitespace=True)
        sheet.write_text("".join(_used(rule, words) for rule in rules))


def _used(rule, words: set[str]) -> str:
    """The rule as text, with those of its selectors that can match; nothing if none can."""
    if rule.type == "at-rule" and rule.lower_at_keyword in ("media", "supports") and rule.content:
        inner = tinycss2.parse_rule_list(rule.content, skip_comments=True, skip_whitespace=True)
        kept = "".join(_used(part, words) for part in inner)
        return f"@{rule.at_keyword}{tinycss2.serialize(rule.prelude)}{{{kept}}}" if kept else ""
    if rule.type != "qualified-rule":
        return rule.serialize()
    selectors = [text for text in _selectors(rule.prelude) if set(CLASS.findall(OPTIONAL.sub("", text))) <= words]
    return f"{','.join(selectors)}{{{tinycss2.serialize(rule.content).strip()}}}" if selectors else ""


def _selectors(prelude: list) -> list[str]:
    """A rule's selectors, split at the commas between them (those inside brackets are part of one token)."""
    texts = [""]
    for token in prelude:
        if token.type == "literal" and token.value == ",":
            texts.append("")
        else:
            texts[-1] += token.serialize()
    return [text.strip() for text in texts]


def slim_mathjax(folder: Path) -> None:
    """The parts that pages load, and the extensions of TeX that formulas may ask for."""
    if not folder.exists():
        return
    kept = {folder / f"{part}.js" for part in ("startup", *MATHJAX, MATHJAX_FONT)}
    for path in list(folder.rglob("*")):
        extension = path.is_relative_to(folder / "input" / "tex" / "extensions")
        font = path.suffix == ".woff"
        if path.is_file() and not (path in kept or extension or font):
            path.unlink()
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            shutil.rmtree(path)


def slim_image(path: Path) -> None:
    """A figure with a palette, where that makes it smaller."""
    with Image.open(path) as image:
        if image.mode == "P":  # by an earlier build
            return
        flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")
        dpi = image.info.get("dpi")
    smaller = path.with_suffix(".tmp")
    flat.quantize(COLOURS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(
        smaller, "PNG", optimize=True, **({"dpi": dpi} if dpi else {})
    )
    if smaller.stat().st_size < path.stat().st_size:
        smaller.replace(path)
    else:
        smaller.unlink()


def setup(app: Sphinx) -> dict:
    app.connect("config-inited", choose_mathjax, priority=900)
    app.connect("html-page-context", thin_scripts, priority=900)
    app.connect("build-finished", slim, priority=900)  # after everything else is copied
    return {"parallel_read_safe": True, "parallel_write_safe": True}
