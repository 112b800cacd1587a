"""What people look at: curves, pictures, cards, pages, and the machine.

- `sampling`, `pictures`, `grid`: pictures from prompts, at the end and on the way, and their files
- `held_out`: held-out pictures whose holes are filled, or that are drawn by hints, on the way
- drawn/: what they are drawn with, and how large; samples decoded from their rows; what a report shows of them
- `figures`: curves and histograms, in one look
- `page`, `write`, `run`, `cache`: a run or a cache as one HTML file, by the template page.html
- likeness/: what a cache's embeddings say of it
- `neighbours`: the samples that are nearest to what a run drew
- `model_card`: the README.md of a run
- `doctor`: the machine
"""

from kcache.report.figures import plot_run
from kcache.report.write import write_report

__all__ = ["plot_run", "write_report"]
