from pipeline.evaluation.alarms import Alarm
from pipeline.reporting.alarm_history import alarm_histories

FAR = Alarm("far", ("kl", "steps"), lambda kl, steps: kl > 10, "the `KL` is above 10", "stop earlier.")
NEVER = Alarm("never_checked", ("x",), lambda x: x > 1, "x is above 1", "look at x.")
ROWS = [
    {"step": 0, "kl": 1.0, "alarm/far": 0.0},
    {"step": 1, "kl": 12.0, "alarm/far": 1.0},
    {"step": 2, "steps": 3.0},
    {"step": 2, "kl": 14.0, "alarm/far": 1.0},
]


def test_a_history_tells_where_the_alarm_was_raised_and_what_it_measures_now():
    [far] = alarm_histories(ROWS, {"kl": 14.0, "alarm/far": 1.0}, [FAR, NEVER], are_pairs_scored=True)
    assert (far.is_raised, far.checked, far.raised_at) == (True, 3, (2, 3))
    assert far.times == "in 2 of 3 checks, in steps 2 to 3"
    assert far.values == "kl = 14, steps = 3"  # a signal that the finished metrics lack
    assert far.message == "alarm far (kl = 14, steps = 3): stop earlier."
    assert far.raised_when == "the KL is above 10"


def test_the_finished_model_decides_whether_an_alarm_is_raised():
    [far] = alarm_histories(ROWS, {"kl": 1.0, "alarm/far": 0.0}, [FAR], are_pairs_scored=True)
    assert (far.is_raised, far.message, far.raised_at) == (False, "", (2, 3))
    [unseen] = alarm_histories([], {"kl": 1.0, "alarm/far": 0.0}, [FAR], are_pairs_scored=True)
    assert (unseen.checked, unseen.times) == (0, "never")
