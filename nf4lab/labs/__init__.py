"""What the labs' notebooks call: where a lab's public checks lie, and the feedback that every check gives."""

from pathlib import Path


def checks(lab: str) -> str:
    """The folder with the public checks of a lab, for `otter.Notebook(tests_dir=...)`.

    Raises ValueError for a lab that does not exist, with those that do.
    """
    here = Path(__file__).parent / "public"
    labs = sorted(path.name for path in here.glob("lab*") if path.is_dir())
    if lab not in labs:
        raise ValueError(f"there is no lab {lab!r}; there are {', '.join(labs)}")
    return str(here / lab)
