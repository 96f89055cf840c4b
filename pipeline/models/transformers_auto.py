"""The Auto classes of transformers, in less time.

For a kind of decoding that is not used here, transformers imports scikit-learn, and that pandas: a fifth of what a
process needs to start, and a job starts a dozen of them.
"""

from __future__ import annotations

import sys

_LOADED = "sklearn" in sys.modules
if not _LOADED:
    sys.modules["sklearn"] = None  # type: ignore[assignment]  # how Python writes "not installed"
try:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
finally:
    if not _LOADED:
        del sys.modules["sklearn"]

__all__ = ["AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer"]
