"""Text from files and of names, as a terminal may be given it."""


def shown(text: str) -> str:
    r"""The text in one line, with what a terminal would obey or hide written out, as Python writes it.

    >>> print(shown("a\x1b[2J.weight"))
    a\x1b[2J.weight
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
