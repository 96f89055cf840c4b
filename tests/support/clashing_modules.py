"""A user's modules that have the names of the project's packages."""


def write_clashing_modules(directory, *, jobs):
    """Writes them.

    Args:
        jobs: the text of `jobs/__init__.py`; the others raise where they are imported.
    """
    for name in ("pipeline", "actors", "cluster"):
        (directory / f"{name}.py").write_text(f"raise RuntimeError('{name}.py of the user was imported')\n")
    (directory / "jobs").mkdir()
    (directory / "jobs" / "__init__.py").write_text(jobs)
