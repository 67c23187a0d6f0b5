"""What the tests of tuning have in common: a small job, and a cache of each test's own."""

import pytest

SIZES = {"replay": {"batch": 4, "length": 8}}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """What is found is remembered in the test's own folder, and no backend is forced. For a module that imports it."""
    monkeypatch.setenv("HDFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HDFAST_BACKEND", raising=False)
