"""One look for the axes of all figures."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def style_axis(axis: Axes, title: str) -> None:
    """Gives an axis its title, horizontal grid lines and no frame on top and right."""
    axis.set_title(title, fontsize=10, loc="left")
    axis.grid(axis="y", color="#e6e8eb")
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
