"""Links to the documentation of other projects without the network: intersphinx reads inventories made from a list.

`outside.txt` has the few names that the API pages use; a name that it lacks stays text.
"""

import zlib
from pathlib import Path

from sphinx.application import Sphinx

LIST = Path(__file__).with_name("outside.txt")


def projects(text: str) -> dict[str, tuple[str, list[str]]]:
    """{project: (address, inventory lines)} of the list."""
    found: dict[str, tuple[str, list[str]]] = {}
    for line in text.splitlines():
        words = line.split()
        if not words or words[0] == "#":
            continue
        if len(words) == 2:
            found[words[0]] = (words[1], [])
        else:
            name, kind, page = words
            list(found.values())[-1][1].append(f"{name} py:{kind} 1 {page} -")
    return found


def write_inventories(app: Sphinx, config) -> None:
    """One inventory a project, beside the build, for intersphinx to find."""
    folder = Path(app.doctreedir) / "inventories"
    folder.mkdir(parents=True, exist_ok=True)
    config.intersphinx_mapping = {}
    for project, (address, lines) in projects(LIST.read_text()).items():
        head = f"# Sphinx inventory version 2\n# Project: {project}\n# Version: \n# compressed with zlib\n"
        path = folder / f"{project}.inv"
        path.write_bytes(head.encode() + zlib.compress("\n".join(lines).encode() + b"\n"))
        config.intersphinx_mapping[project] = (address, (str(path),))


def setup(app: Sphinx) -> dict:
    app.setup_extension("sphinx.ext.intersphinx")
    app.connect("config-inited", write_inventories, priority=100)  # before intersphinx reads its mapping
    return {"parallel_read_safe": True}
