"""The tests' small bundle on the host, and on a device whose memory is the host's."""

import pytest
from stand_in import HostBackend, HostDevice

from engine import Restorer
from engine.backends.ort import OrtBackend
from engine.bundle.manifest import open_bundle


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the sampler's kernels are compiled to."""
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def device(folder):
    return HostDevice(folder)


@pytest.fixture
def on_device(bundle_fp32, device):
    with Restorer(open_bundle(bundle_fp32), HostBackend(device)) as restorer:
        yield restorer


@pytest.fixture(scope="module")
def on_host(bundle_fp32):
    with Restorer(open_bundle(bundle_fp32), OrtBackend(1)) as restorer:
        yield restorer
