"""Fixtures of the tests of data."""

import os
from pathlib import Path

import pytest


@pytest.fixture
def originals():
    """A folder of published files that cannot be distributed here."""
    folder = os.environ.get("ARCHS_ORIGINALS")
    if not folder:
        pytest.skip("ARCHS_ORIGINALS names no folder with the published files")
    return Path(folder)
