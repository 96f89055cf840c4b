"""What a dry run says of memory and time, what it refuses, and what it advises."""

import re
from dataclasses import replace

import pytest

from cluster.planning import hardware
from cluster.planning.plan_text import check_memory, memory_and_time
from cluster.rollout_plan import plan_rollouts
from pipeline.config.load import load_recipe, recipe_names
from pipeline.errors import ConfigError, ResourceError


def planned(name, *overrides):
    recipe = load_recipe(name, overrides)
    return memory_and_time(recipe, plan_rollouts(recipe, []))


def refusal(name, *overrides):
    with pytest.raises(ResourceError) as error:
        planned(name, *overrides)
    return str(error.value)


@pytest.mark.parametrize("name", [name for name in recipe_names() if not name.startswith("experiments")])
def test_every_recipe_fits_what_it_says_it_needs(name):
    text = planned(name)
    assert re.search(r"align_policy +training rank", text)
    assert "A checkpoint takes" in text


def test_a_plan_says_where_its_numbers_come_from():
    text = planned("paper_qwen3_8b", "cluster.accelerator=H200")
    assert "Planned for h200 (cluster.accelerator): 989 TFLOP/s in bfloat16, 4.80 TB/s, 141 GB" in text
    assert "Policy: 8.19B parameters, by the published config.json of Qwen/Qwen3-8B" in text
    assert "(assumed; set cluster.accelerator)" in planned("paper_qwen3_8b")


def test_the_best_change_of_a_disaggregated_layout_is_all_gpus_in_every_phase():
    apart = ("cluster.rollout.placement=disaggregated", "cluster.alignment.ranks=4", "cluster.rollout.workers=3")
    *_, advice = planned("paper_qwen3_8b", *apart).splitlines()
    shared = "cluster.alignment.ranks=7 cluster.rollout.workers=7 cluster.rollout.placement=colocated"
    assert advice.startswith(f"{shared} would save most")


def test_a_rank_that_exceeds_its_gpu_is_refused_with_its_largest_part_and_the_cure():
    wide = "cluster.alignment={ranks: 7, gpus_per_rank: 1, zero_stage: 2, offload_optimiser: false}"
    message = refusal("paper_qwen2.5_7b", wide)
    start = r"a training rank of stage align_policy needs \d+ GB of a h100 with 80 GB: parameters 46\.6,"
    assert re.match(start, message)
    assert message.endswith("cluster.alignment.zero_stage=3 cluster.alignment.offload_optimiser=true would fit.")


def test_a_setting_that_would_fit_is_named_once():
    message = refusal("paper_qwen3_8b", "cluster.accelerator=l40s", "alignment.max_tokens_per_micro_batch=131072")
    assert message.endswith(" alignment.max_tokens_per_micro_batch=16384 would fit.")
    assert message.count("max_tokens_per_micro_batch") == 1


def test_an_engine_of_more_gpus_than_a_node_has_is_refused():
    wide = ("cluster.rollout.gpus_per_worker=16", "cluster.rollout.placement=disaggregated")
    message = refusal("paper_qwen3_8b", *wide, "cluster.rollout.workers=1")
    start = "a rollout worker of stage align_policy takes 16 GPUs and never spans nodes; a node of h100 has 8."
    assert message.startswith(start)
    assert message.endswith(" cluster.rollout.gpus_per_worker=8 would fit.")
    # Nodes that Ray knows may have more.
    recipe = load_recipe("paper_qwen3_8b", [*wide, "cluster.rollout.workers=1"])
    check_memory(recipe, plan_rollouts(recipe, []), [{"GPU": 16.0, "accelerator_type:H100": 1.0}])


def test_engines_too_large_for_a_part_of_a_gpu_are_given_two_of_their_own():
    message = refusal("paper_qwen3_32b", "cluster.accelerator=h100")
    assert message.startswith("a rollout worker of stage align_policy needs 68 GB for weights and work")
    cure = ("cluster.rollout.placement=disaggregated", "cluster.rollout.gpus_per_worker=2")
    assert message.endswith(f" {' '.join(cure)} would fit.")
    assert "Policy: 32.8B" in planned("paper_qwen3_32b", "cluster.accelerator=h100", *cure)


def test_a_plan_for_this_machine_has_its_memory(monkeypatch):
    monkeypatch.setattr(hardware, "gpus_of_this_machine", lambda: ("NVIDIA H100 80GB HBM3",) * 8)
    monkeypatch.setattr(hardware, "host_memory_bytes", lambda: 200 * 2**30)
    with pytest.raises(ResourceError, match=r"host memory on each of 1 node\(s\) with 214\.7 GB"):
        planned("paper_qwen3_8b")


def test_an_engine_whose_weights_exceed_its_share_of_the_gpu_is_refused():
    message = refusal("paper_qwen3_8b", "cluster.rollout.gpu_memory_fraction=0.1")
    assert "a rollout worker of stage align_policy needs 18 GB for weights and work, more than its share" in message


WIDE_32B = (
    "policy.checkpoint=Qwen/Qwen3-32B",
    "cluster.accelerator=h200",
    "cluster.rollout.placement=disaggregated",
    "cluster.alignment.ranks=21",
    "cluster.rollout.workers=2",
)


def test_ranks_that_split_a_policy_of_32b_while_they_load_it_fit_their_hosts():
    """Whole, policy, critic and reference would take 213 GB of each of the eight ranks of a node: 1.7 of its 1.5 TB."""
    assert "models at the start" not in planned("paper_qwen3_8b", *WIDE_32B)


def test_roles_that_exceed_the_hosts_memory_are_refused(monkeypatch):
    monkeypatch.setitem(hardware.MACHINES, "h200", replace(hardware.MACHINES["h200"], memory_gib=400))
    message = refusal("paper_qwen3_8b", *WIDE_32B)
    assert "GB of host memory on each of 3 node(s)" in message
    assert "optimiser" in message


def test_an_unknown_accelerator_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"knows no accelerator 'h10'\. Did you mean h100"):
        load_recipe("tiny", ["cluster.accelerator=h10"])
    with pytest.raises(ConfigError, match="Known are h200, h100, a100, l40s, cpu"):
        load_recipe("tiny", ["cluster.accelerator=b300"])
    with pytest.raises(ConfigError, match="accelerator = cpu, but the recipe gives GPUs"):
        load_recipe("paper_qwen3_8b", ["cluster.accelerator=cpu"])


def test_a_checkpoint_that_nobody_knows_is_not_planned_and_not_refused():
    recipe = load_recipe("paper_qwen3_8b", ["policy.checkpoint=somebody/some-model"])
    rollouts = plan_rollouts(recipe, [])
    assert memory_and_time(recipe, rollouts) == (
        "Memory and time are not planned: this machine has no config.json of somebody/some-model whose family the plan "
        "knows. Set cluster.plan.policy_config to one."
    )
    check_memory(recipe, rollouts, [])


def test_the_gpu_of_the_cluster_decides_before_a_job_starts():
    recipe = load_recipe("paper_qwen3_8b", ["alignment.max_tokens_per_micro_batch=32768"])
    rollouts = plan_rollouts(recipe, [])
    check_memory(recipe, rollouts, [{"GPU": 8.0, "accelerator_type:H100": 1.0}])
    with pytest.raises(ResourceError, match="of a l40s with 48 GB"):
        check_memory(recipe, rollouts, [{"GPU": 8.0, "accelerator_type:L40S": 1.0}])
    with pytest.raises(ConfigError, match="knows no accelerator 'B300'"):
        check_memory(recipe, rollouts, [{"GPU": 8.0, "accelerator_type:B300": 1.0}])
