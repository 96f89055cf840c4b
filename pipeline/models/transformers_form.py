"""What a reward model's checkpoint says to transformers.

It has a `model_type` of its own, so transformers does not load it as a plain decoder, whose weights would be random.
With `trust_remote_code=True` it runs the file beside the weights, a copy of `pipeline/models/modeling_vrm_reward.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.data.chat_rendering import render
from pipeline.data.end_of_turn import turn_end
from pipeline.records import Message

MODEL_TYPE = "vrm_reward_model"
MODELING_FILE = "modeling_vrm_reward.py"


def modeling_source() -> str:
    """The file that transformers runs; needs torch and transformers alone."""
    return Path(__file__).with_name(MODELING_FILE).read_text()


def transformers_config(
    *, backbone: dict[str, Any], head: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """The contents of config.json.

    Args:
        backbone: config of the decoder.
        head: kind, number of objectives and sizes of the head.
    """
    module = MODELING_FILE.removesuffix(".py")
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["VRMRewardModel"],
        "auto_map": {
            "AutoConfig": f"{module}.VRMRewardConfig",
            "AutoModelForSequenceClassification": f"{module}.VRMRewardModel",
        },
        "backbone": backbone,
        "head": head,
        "generation_prompt": _generation_prompt(tokenizer),
        "turn_end": turn_end(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "id2label": {"0": "reward"},
        "label2id": {"reward": 0},
        "problem_type": "regression",
    }


def _generation_prompt(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens with which the template begins the assistant's turn; none if a message could spell them."""
    if tokenizer.chat_template is None:
        return []
    question: Message = {"role": "user", "content": "a question"}
    before, whole = (
        tokenizer(render(tokenizer, [question], add_generation_prompt=begins), add_special_tokens=False)["input_ids"]
        for begins in (False, True)
    )
    # Some templates write more behind a conversation that ends: what both share comes before.
    shared = next((n for n, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
    beginning: list[int] = whole[shared:]
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return beginning if special.intersection(beginning) else []
