"""What unit tests share: the synthetic base's tensors."""

import pytest


@pytest.fixture(scope="session")
def base(tiny):
    """The tensors of the synthetic SDXL checkpoint, by our names."""
    from export.checkpoint.checkpoint import open_sdxl

    return open_sdxl(tiny.sdxl).tensors


@pytest.fixture(scope="session")
def shapes(base):
    return {name: tensor.shape for name, tensor in base.items()}
