"""Every example of the README and the pages works: commands parse, recipes load, Python runs."""

import re
import shlex
import subprocess
from contextlib import suppress
from importlib import import_module

import pytest

from jobs.command_line import Command
from jobs.commands import COMMANDS, named_command
from jobs.run_job import job_command
from pipeline.config.load import load_recipe, recipe_names
from pipeline.errors import ConfigError
from tests.support.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OTHER_PROGRAMS = {"ray", "docker", "kubectl", "sbatch", "source", "ln", "kill", "pip", "serve", ".venv/bin/mkdocs"}
"""Not ours: their own help says what they take."""
SEPARATORS = {"|", "||", "&&", "&", ";"}
MODEL_OF_THE_README = "runs/tiny"


def blocks(language):
    return [
        pytest.param(block, id=f"{page.stem}-{number}")
        for page in PAGES
        for number, (name, block) in enumerate(BLOCK.findall(page.read_text()))
        if name == language
    ]


def commands(block):
    """The commands of a shell block, as lists of words."""
    for line in block.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
        lexer.whitespace_split = True
        words = []
        for word in [*lexer, ";"]:
            if word not in SEPARATORS:
                words.append(word)
            elif words:
                yield [word for word in words if not re.match("[A-Z_]+=", word)]
                words = []


def check(words):
    """Fails if the command is not one that this project, or a program it names, has."""
    program, *arguments = words
    if program == "vrm":
        name = named_command(arguments)
        assert name is not None, f"no command: {shlex.join(words)}"
        parse(COMMANDS[name].load(), arguments[len(name.split()) :])
    elif program == "python" and arguments[0].startswith("jobs/"):
        parse(command_of(arguments[0]), arguments[1:])
    elif program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in arguments if "=" not in word} <= {*targets}
    elif program == "bash":
        assert (ROOT / arguments[0]).exists()
    else:
        assert program in OTHER_PROGRAMS, shlex.join(words)
        if "--" in arguments:  # ray job submit
            check(arguments[arguments.index("--") + 1 :])


def command_of(script):
    """The command line of a file in jobs/."""
    assert (ROOT / script).exists()
    module = import_module(script.removesuffix(".py").replace("/", "."))
    found = [value for value in vars(module).values() if isinstance(value, Command)]
    return found[0] if found else job_command(module.__doc__ or "", lambda job: None)


def parse(command, arguments):
    if "--help" in arguments:
        with suppress(SystemExit):
            command.parser().parse_args(["--help"])
        return
    try:
        options = vars(command.parser().parse_intermixed_args(arguments))
    except SystemExit:
        pytest.fail(f"does not parse: {shlex.join(arguments)}")
    if options.get("recipe") in recipe_names():
        load_recipe(options["recipe"], options.get("overrides", ()))


@pytest.mark.parametrize("block", blocks("sh"))
def test_every_command_parses_and_its_settings_exist(block):
    subprocess.run(["bash", "-n"], input=block, text=True, check=True)
    found = list(commands(block))
    assert found
    for words in found:
        check(words)


@pytest.mark.parametrize("block", blocks("yaml"))
def test_every_piece_of_a_recipe_loads_on_top_of_tiny(block, tmp_path):
    recipe = tmp_path / "example.yaml"
    recipe.write_text(f"extends: tiny\n{block}")
    load_recipe(str(recipe))


@pytest.mark.parametrize("block", blocks("python"))
def test_every_piece_of_python_runs(block, trained_reward_model, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names = {
        "directory": trained_reward_model,
        "messages": [{"role": "user", "content": "Plan my week."}, {"role": "assistant", "content": "First rest."}],
        "token": "secret",
    }
    exec(compile(block.replace(MODEL_OF_THE_README, trained_reward_model), "example", "exec"), names)


def test_there_are_examples_of_each_kind():
    assert [len(blocks(language)) > 1 for language in ("sh", "yaml", "python")] == [True] * 3


@pytest.mark.parametrize(
    "words",
    ["vrm fly", "vrm run tiny alignment.num_stps=3", "vrm status", "python jobs/nothing.py", "make coffee", "rm x"],
)
def test_a_wrong_example_is_found(words):
    with pytest.raises((AssertionError, ConfigError, pytest.fail.Exception)):
        check(words.split())


def test_a_block_is_cut_into_its_commands():
    block = 'vrm run tiny \\\n    --dry-run a=1 | kubectl apply -f -   # why\nX=1 make test ARGS="a b"\n'
    assert list(commands(block)) == [
        ["vrm", "run", "tiny", "--dry-run", "a=1"],
        ["kubectl", "apply", "-f", "-"],
        ["make", "test"],
    ]
