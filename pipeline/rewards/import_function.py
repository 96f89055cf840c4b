"""Imports a user's function and says what is wrong with it, for the preflight: python -m ... PATH NAME."""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.rewards.function_calls import load_function
from pipeline.rewards.function_spec import UserFunction


def main(path: str, name: str) -> int:
    try:
        load_function(UserFunction(path=path, name=name, text=Path(path).read_text(encoding="utf-8")))
    except ConfigError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
