"""The Auto classes of transformers, in less time.

transformers imports scikit-learn, which imports pandas, for a kind of decoding that is not used here. That takes a
fifth of the time in which a process starts, and a job starts a dozen processes.
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
