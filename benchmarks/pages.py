"""How heavy are the book's pages, and when can one read them? Chromium's own trace; writes results/pages.json.

    make book && python benchmarks/pages.py

Three pages, each in a browser that has never seen the book, on two connections that Chromium emulates, three times.
The server compresses text with gzip, as GitHub Pages does. "transferred" is what came over the line, headers included;
"unpacked" is the same without compression. "readable" is the first contentful paint: text and code are there;
"formulas" is when MathJax is done; "largest" is the largest contentful paint.
"""

import argparse
import gzip
import json
import os
import statistics
import sys
from pathlib import Path

from provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book"))

from browser import Quiet, chromium, serving  # noqa: E402

SITE = ROOT / "_build" / "html"
PAGES = ("book/index.html", "book/04-blocks.html", "book/api.html")
# Bits a second down and up, and the time that a request waits: Lighthouse's "slow 4G", and a good mobile connection.
LINES = {"slow 4G": (1.6e6, 0.75e6, 150), "4G": (9e6, 3e6, 60)}
TEXT = (".html", ".css", ".js", ".svg", ".json", ".txt", ".md", ".ttf")
WATCH = """
window.largest = 0;
new PerformanceObserver(list => { for (const entry of list.getEntries()) window.largest = entry.startTime; })
  .observe({type: "largest-contentful-paint", buffered: true});
"""
TIMES = """async () => {
  if (window.MathJax?.startup?.promise) await window.MathJax.startup.promise;
  const formulas = document.querySelector("mjx-container") ? performance.now() : null;
  await new Promise(done => setTimeout(done, 500));
  const paint = performance.getEntriesByName("first-contentful-paint")[0];
  return {readable_ms: paint.startTime, largest_ms: window.largest, formulas_ms: formulas};
}"""


class Compressing(Quiet):
    """The site, its text compressed."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        body, packed = path.read_bytes(), path.suffix in TEXT
        body = gzip.compress(body, 6) if packed else body
        self.send_response(200)
        self.send_header("Content-Type", self.guess_type(str(path)))
        self.send_header("Content-Length", str(len(body)))
        if packed:
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        self.wfile.write(body)


def visit(browser, url: str, line: str) -> dict:
    """One first visit: bytes and times."""
    down, up, latency = LINES[line]
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    page = context.new_page()
    page.add_init_script(WATCH)
    session, transferred, unpacked = context.new_cdp_session(page), [], []
    session.send("Network.enable")
    session.send("Network.setCacheDisabled", {"cacheDisabled": True})
    conditions = {"offline": False, "latency": latency, "downloadThroughput": down / 8, "uploadThroughput": up / 8}
    session.send("Network.emulateNetworkConditions", conditions)
    session.on("Network.loadingFinished", lambda event: transferred.append(event["encodedDataLength"]))
    session.on("Network.dataReceived", lambda event: unpacked.append(event["dataLength"]))
    page.goto(url, timeout=120_000)
    times = page.evaluate(TIMES)
    context.close()
    return {
        "transferred_bytes": round(sum(transferred)),
        "unpacked_bytes": sum(unpacked),
        "files": len(transferred),
    } | times


def median_of(visits: list[dict]) -> dict:
    """Each figure's median, and all samples of the times."""
    medians = {key: statistics.median(v[key] for v in visits) for key in visits[0] if visits[0][key] is not None}
    return medians | {"samples_ms": [[v["readable_ms"], v["largest_ms"], v["formulas_ms"]] for v in visits]}


def about(browser) -> dict:
    """What decides the times beside the machine: what else ran on it, the browser, the lines."""
    return {
        "load_before": os.getloadavg()[0],
        "chromium": browser.version,
        "lines": {
            name: dict(zip(("down_bps", "up_bps", "wait_ms"), line, strict=True)) for name, line in LINES.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--visits", type=int, default=3, help="of each page on each line")
    visits = parser.parse_args().visits
    with serving(SITE, Compressing) as address, chromium() as browser:
        packages = ["jupyter-book", "sphinx-book-theme", "playwright"]
        record, rows = provenance("benchmarks/pages.py", packages) | about(browser), []
        for name in PAGES:
            for line in LINES:
                url = address + name
                row = {"page": name, "line": line} | median_of([visit(browser, url, line) for _ in range(visits)])
                rows.append(row)
                print(f"{name:22s} {line:8s} {row['transferred_bytes'] / 1e3:6.0f} kB, unpacked "
                      f"{row['unpacked_bytes'] / 1e3:6.0f} kB, readable {row['readable_ms']:5.0f} ms, "
                      f"largest {row['largest_ms']:5.0f} ms, formulas {row.get('formulas_ms', 0):5.0f} ms")  # fmt: skip
    target = ROOT / "benchmarks" / "results" / "pages.json"
    target.write_text(json.dumps(record | {"load_after": os.getloadavg()[0], "records": rows}, indent=1) + "\n")
    print(f"written: {target.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
