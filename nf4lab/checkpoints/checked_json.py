"""JSON from a file that nobody vouches for."""


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
