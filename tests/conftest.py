"""What all tests share: one thread per torch operation, repeatable Hypothesis runs, and the UNets of tests/support."""

import gc

import pytest
import torch
from hypothesis import HealthCheck, settings
from support import unets

torch.set_num_threads(1)
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("repeatable")


def pytest_collection_finish():
    """Keeps the imported libraries out of later garbage collections, which copying UNets sets off all the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_gradients():
    """Sampling needs none; without them the tests are faster."""
    with torch.no_grad():
        yield


@pytest.fixture(params=unets.KINDS)
def kind(request):
    """Each of the four real UNets in turn."""
    return request.param


@pytest.fixture
def unet(kind):
    """A fresh UNet of `kind`."""
    return unets.build(kind)
