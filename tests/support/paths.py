"""Where the checkout lies, and the public data beside it, which a fresh clone may lack."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED_DATA = ROOT.parent / "shared" / "data"

needs_public_data = pytest.mark.skipif(
    not SHARED_DATA.exists(), reason="needs the public data folder beside the checkout"
)
