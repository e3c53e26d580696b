"""What the tests of captures share."""

import pytest
import torch


@pytest.fixture
def alone():
    """For tests whose sizes would make Dynamo trace later models with dynamic ones."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
