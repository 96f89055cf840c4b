"""What a setting of a recipe means: its values, its default, a sentence.

    python jobs/explain_settings.py alignment.ppo.lcb_coefficient

Takes a setting, a section, or the last word of a setting; without one it lists all.
"""

from __future__ import annotations

import argparse
import textwrap

from jobs.command_line import Command


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="alignment.kl.coefficient, alignment.kl or coefficient; default all")


def explain(options: argparse.Namespace) -> None:
    from pipeline.config.reference import explained, settings

    for setting in settings() if options.name is None else explained(options.name):
        is_section = setting.values == "section"
        print(setting.path if is_section else f"{setting.path} = {setting.default}    {setting.values}")
        print(textwrap.indent(textwrap.fill(setting.text, 96), "    "))


explain_command = Command(documentation=__doc__, add_options=add_options, run=explain)

if __name__ == "__main__":
    explain_command()
