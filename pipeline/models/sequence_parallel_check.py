"""Which models n ranks can compute together. Imports no torch: a recipe is refused before anything starts."""

from __future__ import annotations

from pipeline.errors import ConfigError


def check_sequence_parallel(ranks: int, heads: int, *, model: str, setting: str = "sequence_parallel") -> None:
    """Checks that the attention heads of a decoder can be divided among the ranks of a sequence group.

    Fewer key-value heads than ranks, or a number that the ranks do not divide, are no obstacle: each is sent to all
    ranks that need it.

    Args:
        model: the decoder, for the message.
        setting: the setting's full name, for the message.

    Raises:
        ConfigError: the ranks do not divide the heads; the message names the numbers that do.
    """
    if heads % ranks:
        possible = ", ".join(str(number) for number in range(1, heads + 1) if heads % number == 0)
        raise ConfigError(
            f"{setting} = {ranks} ranks cannot divide the {heads} attention heads of {model}. Possible are {possible}."
        )
