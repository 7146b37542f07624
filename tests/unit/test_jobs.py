"""Which photos names stand for, and what is said of those that cannot be looked at."""

import os

import pytest

from engine.cli.jobs import Placement, find_photos
from engine.errors import InputError


@pytest.fixture
def as_nobody(tmp_path, monkeypatch):
    """Run as a user whom permissions stop, in a folder with one that is closed."""
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed" / "photo.png").touch()
    (tmp_path / "closed").chmod(0)
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield tmp_path
    if root:
        os.seteuid(0)
    (tmp_path / "closed").chmod(0o700)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions as Unix has them")
@pytest.mark.parametrize("name", ["closed", "closed/photo.png"])
def test_what_may_not_be_read_is_told_as_that(as_nobody, name):
    with pytest.raises(InputError, match="closed.*: no permission") as caught:
        find_photos([as_nobody.joinpath(name).relative_to(as_nobody)], Placement(None))
    assert "read" in caught.value.fix
    assert "write" not in caught.value.fix
