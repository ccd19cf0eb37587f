"""The bar for work that takes long, the same everywhere, in a terminal or a notebook."""


def progress_bar(what: str, total: int, unit: str, show: bool = True, delay: float = 0):
    """A tqdm bar up to `total`, as a context; `update(n)` moves it. It appears after `delay` seconds, if at all."""
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=what, unit=unit, unit_scale=total > 10_000, delay=delay, disable=not show)
