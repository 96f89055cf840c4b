"""Names of direct alignment are values of one section; what a method does not use is refused."""

import pytest

from pipeline.config.algorithms import DIRECT
from pipeline.config.alignment import AlignmentConfig
from pipeline.config.direct_alignment import DirectConfig
from pipeline.config.load import load_recipe
from pipeline.errors import ConfigError


def direct(algorithm, **written):
    config = {"algorithm": algorithm, "direct": written, "samples_per_prompt": 2}
    return AlignmentConfig.model_validate(config).direct


def test_a_method_is_a_name_for_values():
    assert direct("dpo") == DirectConfig()
    weights = {name: {k: v for k, v in direct(name).losses.model_dump().items() if v} for name in DIRECT}
    assert weights == {
        "dpo": {"sigmoid": 1},
        "ipo": {"squared": 1},
        "kto": {"kto": 1},
        "simpo": {"sigmoid": 1},
        "cpo": {"sigmoid": 1, "likelihood": 1},
        "orpo": {"odds_ratio": 0.1, "likelihood": 1},
        "wpo": {"sigmoid": 1},
        "selective_dpo": {"sigmoid": 1},
        "beta_dpo": {"sigmoid": 1},
        "raft": {"likelihood": 1},
    }
    assert {name for name in DIRECT if not direct(name).reference} == {"simpo", "cpo", "orpo", "raft"}
    simpo = direct("simpo")
    assert (simpo.beta, simpo.target_margin, simpo.length_normalised) == (2.5, 1.25, True)
    selective = direct("selective_dpo")
    assert (selective.order, selective.keep_easiest, selective.difficulty.seeds) == ("easy_first", 0.5, 3)
    assert direct("wpo").weighting == "policy"
    assert direct("beta_dpo").dynamic_beta.keep_share == 0.8


def test_what_is_written_wins_and_a_term_can_be_added():
    mixture = direct("dpo", losses={"likelihood": 0.2}, beta=0.3)
    assert (mixture.losses.sigmoid, mixture.losses.likelihood, mixture.beta) == (1.0, 0.2, 0.3)
    assert direct("simpo", optimiser={"weight_decay": 0.0}).optimiser.learning_rate == 6e-7


def test_the_recipe_of_another_algorithm_serves_a_direct_method_too():
    tiny = load_recipe("tiny", ["alignment.algorithm=simpo"]).alignment
    assert tiny.is_direct
    assert (tiny.direct.beta, tiny.direct.batch_pairs) == (2.5, 64)
    assert not load_recipe("tiny").alignment.is_direct


@pytest.mark.parametrize(
    ("algorithm", "written", "message"),
    [
        ("dpo", {"beta": 0.0}, "0 would make all implicit rewards 0; 0.1 is usual"),
        ("dpo", {"beta": -1.0}, "greater than 0"),
        ("ipo", {"target_margin": 1.0}, "target_margin means nothing without losses.sigmoid"),
        ("ipo", {"label_smoothing": 0.1}, "label_smoothing means nothing without losses.sigmoid"),
        ("dpo", {"losses": {"robust": 1.0}}, "losses.robust means nothing without label_smoothing"),
        ("dpo", {"wpo_clamp": True}, "wpo_clamp means nothing without weighting = policy"),
        ("kto", {"weighting": "policy"}, "weighting = policy means nothing without losses.sigmoid"),
        ("dpo", {"likelihood_average": "none"}, "likelihood_average means nothing without losses.likelihood"),
        ("simpo", {"dynamic_beta": {}}, "dynamic_beta means nothing without reference = true"),
        ("dpo", {"desirable_weight": 2.0}, "desirable_weight means nothing without losses.kto"),
        ("dpo", {"labelled_responses": ["a.jsonl"]}, "labelled_responses means nothing without losses.kto"),
        ("simpo", {"reference_checkpoint": "x"}, "reference_checkpoint means nothing without reference = true"),
        ("kto", {"reference": False}, "losses.kto means nothing without reference = true"),
        ("kto", {"batch_pairs": 1}, "needs 2 at least"),
        ("kto", {"labelled_responses": ["a.jsonl"], "losses": {"sigmoid": 1.0}}, "labelled_responses are no pairs"),
        ("kto", {"labelled_responses": ["a.jsonl"], "keep_easiest": 0.5}, "have no difficulty"),
        ("orpo", {"beta": 0.1}, "the strength of ORPO is losses.odds_ratio"),
        (
            "dpo",
            {"losses": {"sigmoid": 0.0, "likelihood": 1.0}, "beta": 1.0},
            "no term with a weight above 0 compares responses",
        ),
        ("dpo", {"keep_best": "eval/accuracy", "eval_every": 40}, "no multiple of eval_every = 40"),
        ("dpo", {"trainable_layers": 1, "lora": {}}, "exclude each other"),
        ("dpo", {"epochs": 2, "num_steps": 10}, "epochs = 2 and num_steps = 10 both say how long to train"),
    ],
)
def test_settings_that_a_method_does_not_use_are_refused(algorithm, written, message):
    with pytest.raises(ValueError, match=message):
        direct(algorithm, **written)


def test_steps_that_are_written_replace_the_epochs_of_the_algorithm():
    assert (direct("wpo").epochs, direct("wpo", num_steps=10).epochs) == (2, None)
    assert direct("wpo", num_steps=None).epochs == 2
    assert load_recipe("tiny", ["alignment.algorithm=wpo"]).alignment.direct.num_steps == 120


def test_the_error_names_the_section():
    with pytest.raises(ConfigError, match=r"alignment\.direct: wpo_clamp means nothing without weighting = policy"):
        load_recipe("tiny", ["alignment.algorithm=dpo", "alignment.direct.wpo_clamp=true"])
    with pytest.raises(ConfigError, match=r"alignment\.direct\.beta: 0 would make all implicit rewards 0"):
        load_recipe("tiny", ["alignment.algorithm=dpo", "alignment.direct.beta=0"])
