"""A format: how a block is normalised, which levels it is rounded to, how its constants are stored."""

from nf4lab.formats.format import *  # noqa: F403
