"""The pictures' legends lie within them, however many arms and however long their names."""

import pytest
from matplotlib.figure import Figure

from emarecipes.comparison import page_plots


@pytest.mark.parametrize(
    ("labels", "columns"),
    [
        (["kl"], 1),
        (["undefended", "kl", "half good answers"], 2),
        (["a defense whose name is long, at a dose that is said"] * 3, 1),
        (["one" + " that is longer than a line of the picture" * 4, "kl"], 2),
        ([f"defense {number} of many" for number in range(30)], 2),
    ],
)
def test_a_legend_lies_within_its_figure(labels: list[str], columns: int) -> None:
    figure = Figure(figsize=(page_plots.WIDTH, 4.4), layout="constrained")
    axes = figure.subplots()
    for label in labels:
        axes.plot([0, 1], [0, 1], label=label)
    page_plots._finish(figure, axes)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert legend._ncols == columns
    assert [text.get_text().replace("\n", " ") for text in legend.texts] == labels
    box, whole = legend.get_window_extent(), figure.bbox
    assert box.x0 >= 0 and box.x1 <= whole.width and box.y0 >= 0 and box.y1 <= whole.height
    drawn = axes.get_window_extent()
    assert drawn.y0 >= box.y1, "it hides nothing"
    assert drawn.height > 0.4 * 4.4 * figure.dpi
