"""What every test shares: one hypothesis profile, and a quiet bitsandbytes."""

import logging

import hypothesis
import pytest

hypothesis.settings.register_profile("nf4lab", deadline=None, derandomize=True)
hypothesis.settings.load_profile("nf4lab")
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # it asks for an optional kernel package


@pytest.fixture
def bitsandbytes():
    """The library's functional module, with its torch.compile fall-backs run plainly: they compile for a minute."""
    torch_dynamo = pytest.importorskip("torch._dynamo")
    functional = pytest.importorskip("bitsandbytes.functional")
    with torch_dynamo.config.patch(disable=True):
        yield functional
