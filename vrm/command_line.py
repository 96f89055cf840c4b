# PYTHON_ARGCOMPLETE_OK
"""The installed command `vrm`. Its commands stand in `jobs/commands.py`."""

from vrm.own_packages import find_own_packages_first


def main() -> None:
    """Runs the command that the arguments of this process name."""
    find_own_packages_first()
    from jobs.commands import vrm_command

    vrm_command()


if __name__ == "__main__":
    main()
