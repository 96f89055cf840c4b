"""Decoders and the heads on them.

Whoever imports a model gets transformers with it, in less time: for what is not used here transformers imports
scikit-learn, and that pandas, a fifth of what a process needs to start; and a job starts a dozen of them.
"""

import sys

_LOADED = "sklearn" in sys.modules
if not _LOADED:
    sys.modules["sklearn"] = None  # type: ignore[assignment]  # how Python writes "not installed"
try:
    from transformers import AutoModelForCausalLM as _Loads  # noqa: F401
finally:
    if not _LOADED:
        del sys.modules["sklearn"]
