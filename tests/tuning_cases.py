"""What the tests of tuning have in common: sizes of a small job, and a cache for each test."""

import pytest

SIZES = {"replay": {"batch": 4, "length": 8}}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """Importing it gives each test of a module a cache of its own, and no forced backend."""
    monkeypatch.setenv("HDFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HDFAST_BACKEND", raising=False)
