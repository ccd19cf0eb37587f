"""Every link of the book leads somewhere: inside by looking, outside by a list of when each was last seen."""

import importlib.util
import sys
from pathlib import Path

import pytest
from browser import Quiet, serving

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "_build" / "html"
spec = importlib.util.spec_from_file_location("links", ROOT / "book" / "links.py")
links = importlib.util.module_from_spec(spec)
spec.loader.exec_module(links)

built = pytest.mark.skipif(not SITE.exists(), reason="the book is not built: run `make book`")


@built
@pytest.mark.parametrize("page", links.pages(SITE), ids=lambda path: str(path.relative_to(SITE)))
def test_every_link_inside_the_book_leads_to_a_page_and_a_place_on_it(page):
    broken = []
    for target, fragment in links.inside(page):
        path = page if not target else (page.parent / target).resolve()
        wanted = fragment and fragment != "#" and path.suffix == ".html"
        if not path.is_file() or (wanted and fragment not in links.parse(path).places):
            broken.append(f"{target}#{fragment}")
    assert not broken


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    page = tmp_path / "page.html"
    page.write_text('<a href="gone.html#there">x</a><img src="https://example.org/a.png"><a href="#">y</a>')
    assert links.inside(page) == [("gone.html", "there"), ("", "")]
    assert links.outside(tmp_path) == {"https://example.org/a.png"}


class Half(Quiet):
    """A server on which one address answers and the others do not."""

    def do_GET(self):
        self.send_response(200 if self.path == "/here" else 404)
        self.end_headers()


def test_only_an_address_that_answers_gets_a_new_date():
    with serving(handler=Half) as base:
        seen = links.visit({f"{base}here": "never", f"{base}gone": "2026-01-02"}, today="2026-03-04")
    assert seen == {f"{base}here": "2026-03-04", f"{base}gone": "2026-01-02"}


@built
def test_the_list_names_every_address_outside_the_book_and_no_other(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["links.py", "--check"])
    assert links.main() == 0, capsys.readouterr().out
