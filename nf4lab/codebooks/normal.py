"""The standard normal density as every function here takes it by default: scipy.stats.norm, loaded when it is used.

scipy.stats takes longer to import than all the rest of nf4lab, and quantizing needs nothing of it.
"""


class _Normal:
    """scipy.stats.norm. Its quantiles come from scipy.special, which is there at once, and are the same to the bit."""

    def ppf(self, p):
        """The quantile at p."""
        import scipy.special

        return scipy.special.ndtri(p)

    def __getattr__(self, name: str):
        import scipy.stats

        return getattr(scipy.stats.norm, name)

    def __repr__(self) -> str:
        return "scipy.stats.norm"


NORMAL = _Normal()
