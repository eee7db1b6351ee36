"""The picture of a search's path."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sparseft.files import check_folder
from sparseft.pictures import figure

if TYPE_CHECKING:
    from sparseft.design_space.path import Choice


def draw(choices: Sequence[Choice], path: str | os.PathLike[str]) -> None:
    """Draw choices to a file whose name ends in .png, .pdf or .svg.

    Raises:
        FileNotFoundError: the folder of the file is not there.
        RuntimeError: matplotlib is not installed.
    """
    check_folder(path)
    choices = [choice for choice in choices if choice.same_as is None]
    stages = list(dict.fromkeys(choice.stage for choice in choices))
    of_stage = {stage: [choice for choice in choices if choice.stage == stage] for stage in stages}
    titles = [stage.replace("strategies of ", "") for stage in stages]
    # a title takes about as much room as half a choice for each letter
    widths = [max(len(found) + 1, len(title) / 2) for found, title in zip(of_stage.values(), titles, strict=True)]
    canvas = figure(1 + 0.22 * sum(widths), 4.5)
    panels = canvas.subplots(1, len(stages), sharey=True, squeeze=False, width_ratios=widths)[0]
    for panel, title, found in zip(panels, titles, of_stage.values(), strict=True):
        for place, choice in enumerate(found):
            colour = "crimson" if choice.chosen else "0.4"
            panel.scatter([place] * len(choice.figures), choice.figures, s=8, color="0.75")
            if choice.figures:
                panel.hlines(choice.mean, place - 0.4, place + 0.4, color=colour, linewidth=2.5)
        panel.set_xticks(range(len(found)), labels=[choice.label for choice in found], rotation=90)
        panel.set_xlim(-0.7, len(found) - 0.3)
        panel.set_title(title, fontsize="medium")
    panels[0].ticklabel_format(axis="y", useOffset=False)
    panels[0].set_ylabel("figure; a bar is the mean, in red what was kept")
    canvas.savefig(path)
