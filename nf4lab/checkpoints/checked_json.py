"""JSON from a file that nobody vouches for."""

import json
from pathlib import Path

from nf4lab.checkpoints.beginnings import kind_of


def read_json(path: Path, name: object, **how) -> object:
    """What a file says in JSON. how: for json.loads. Raises ValueError, with `name`, where it is not JSON."""
    raw = path.read_bytes()
    try:
        return json.loads(raw.decode("utf-8"), **how)
    except (ValueError, RecursionError) as error:
        what = kind_of(raw[:64])
        raise ValueError(f"{name} is not JSON{f' but {what}' if what not in ('', 'JSON') else f': {error}'}") from None


def without_duplicates(pairs: list[tuple[str, object]]) -> dict:
    """The dict of a JSON object's pairs. Raises ValueError where a name occurs twice: readers disagree on those."""
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"the name {next(key for key in names if names.count(key) > 1)!r} occurs twice")
    return result


def is_shape(value: object) -> bool:
    """Whether a JSON value is a list of integers from 0 up; a bool is not one."""
    return isinstance(value, list) and {*map(type, value)} <= {int} and min(value, default=0) >= 0
