"""The command `vrm`: one name for every job, with the options of the job's own file."""

import os
import subprocess
import sys

import pytest

from jobs import full_pipeline
from jobs.commands import COMMANDS, GROUPS, command_tree, named_command, vrm_command
from jobs.exit_codes import BAD_INPUT, PREEMPTED, exit_codes
from jobs.run_job import job_command
from pipeline.config.load import recipe_names
from pipeline.errors import ConfigError, Preempted
from tests.support.paths import ROOT
from vrm import command_line

HEAVY = ("torch", "ray", "transformers", "deepspeed", "vllm")
SCREEN_LINES, SCREEN_COLUMNS = 25, 100


def option_strings(parser):
    return {option for action in parser._actions for option in action.option_strings or [action.dest]}


# ----------------------------------------------------------------------------- help


@pytest.mark.parametrize("words", ["", "benchmark", *COMMANDS])
def test_help_fits_a_screen(words, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(SCREEN_COLUMNS))
    with pytest.raises(SystemExit) as left:
        vrm_command([*words.split(), "--help"])
    assert left.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"usage: vrm {words}".rstrip())
    assert len(lines) <= SCREEN_LINES
    assert max(map(len, lines)) <= SCREEN_COLUMNS


def test_help_lists_every_command_with_one_line(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    listed = []
    for arguments in ([], *([group, "--help"] for group in GROUPS)):
        with pytest.raises(SystemExit):
            vrm_command(arguments)
        listed += [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("    ")]
    summaries = {name.split()[-1]: entry.summary for name, entry in COMMANDS.items()}
    assert summaries.items() <= {line[0]: line[1] for line in listed if len(line) == 2}.items()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runn"], "invalid choice: 'runn' (choose from 'run', 'recipes'"),
        (["benchmark"], "vrm benchmark: error: the following arguments are required: COMMAND"),
        (["benchmark", "jugde"], "invalid choice: 'jugde'"),
        (["run"], "vrm run: error: the following arguments are required: recipe\n"),
        (["scale", "--workers", "2"], "vrm scale: error: name the running job once"),
    ],
)
def test_a_command_that_is_not_there_or_not_whole_is_an_error(arguments, message, capsys):
    with pytest.raises(SystemExit) as left:
        vrm_command(arguments)
    assert left.value.code == BAD_INPUT
    assert message in capsys.readouterr().err


# ----------------------------------------------------------------------------- one definition of every option


@pytest.mark.parametrize("name", COMMANDS)
def test_completion_knows_the_options_that_the_command_takes(name):
    command = COMMANDS[name].load()
    assert named_command([*name.split(), "more"]) == name
    branch = command_tree(name.split())
    for word in name.split():
        [commands] = [action for action in branch._actions if action.dest == "==SUPPRESS=="]
        branch = commands.choices[word]
    assert option_strings(branch) == option_strings(command.parser())


def test_run_takes_what_the_job_takes_and_the_recipe_as_its_first_word(monkeypatch):
    job = job_command("", full_pipeline.run_pipeline)
    of_vrm, of_job = (option_strings(command.parser()) for command in (COMMANDS["run"].load(), job))
    assert of_vrm - of_job == {"recipe"}
    assert of_job - of_vrm == {"--recipe"}


def test_run_passes_overrides_and_options_in_any_order(tmp_path, capsys):
    vrm_command(["run", "--dry-run", "tiny", "seed=4", "--workspace", str(tmp_path), "alignment.num_steps=7"])
    printed = capsys.readouterr().out
    assert f"workspace: {tmp_path}" in printed
    assert "\nseed: 4\n" in printed
    assert "num_steps: 7" in printed


# ----------------------------------------------------------------------------- recipes


def test_recipes_are_listed_with_what_they_are_and_what_they_need(capsys):
    vrm_command(["recipes"])
    rows = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    rows = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert [row[0] for row in rows] == recipe_names()
    assert all(len(row) == 3 for row in rows), "the first comment of a recipe says: what it is. Needs this."
    assert rows[-1] == [
        "tiny",
        "A tiny model from scratch in the planted world, a test world with known truth",
        "2 cores, 5 minutes, no download",
    ]


# ----------------------------------------------------------------------------- what is loaded


@pytest.mark.parametrize("arguments", [["--help"], ["recipes"], ["run", "tiny", "--dry-run"], ["serve", "--help"]])
def test_commands_that_only_answer_load_nothing_heavy(arguments):
    code = (
        "import sys; from jobs.commands import vrm_command\n"
        f"try: vrm_command({arguments!r})\nexcept SystemExit: pass\n"
        f"print('loaded', *[name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded"


# ----------------------------------------------------------------------------- completion


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("vrm r", {"run", "recipes", "rollouts"}),
        ("vrm run smol", {"smollm2_cpu "}),
        ("vrm run tiny alignment.num", {"alignment.num_steps="}),
        ("vrm run tiny --dr", {"--dry-run "}),
        ("vrm benchmark ", {"generate", "judge", "score", "compare", "-h", "--help"}),
        ("vrm benchmark judge --benchmark a", {"alpaca_eval", "arena_hard"}),
        ("vrm run 'tin", {"tiny"}),
    ],
)
def test_the_shell_completes_commands_recipes_keys_and_options(line, words, tmp_path):
    """As the function that `register-python-argcomplete vrm` defines asks for it."""
    answers = tmp_path / "answers"
    environment = os.environ | {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answers),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "COMP_TYPE": "9",
    }
    subprocess.run([sys.executable, "-m", "vrm.command_line"], cwd=ROOT, env=environment, timeout=60, check=True)
    assert set(answers.read_text().splitlines()) == words


def test_the_entry_point_is_marked_for_global_completion():
    with open(command_line.__file__) as file:
        assert "PYTHON_ARGCOMPLETE_OK" in file.read(1024)


# ----------------------------------------------------------------------------- one way to end


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigError("seed = x is no number"), BAD_INPUT, "ConfigError: seed = x is no number\n"),
        (Preempted("left behind step 3"), PREEMPTED, "left behind step 3\n"),
    ],
)
def test_an_error_ends_the_process_with_its_message_and_code(error, code, message, capsys):
    with pytest.raises(SystemExit) as left, exit_codes():
        raise error
    assert left.value.code == code
    assert capsys.readouterr().err == message


def test_an_unexpected_error_travels():
    with pytest.raises(KeyError), exit_codes():
        raise KeyError("a bug")
