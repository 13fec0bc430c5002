"""What a test needs that the oldest versions which the package allows do not have."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from packaging.version import Version


def needs(project: str, oldest: str, why: str) -> pytest.MarkDecorator:
    """Skips below a version of the reference; the package itself runs with it."""
    return pytest.mark.skipif(Version(version(project)) < Version(oldest), reason=f"{project} {oldest}: {why}")
