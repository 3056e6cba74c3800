"""Pictures of a generation: the story of its threads in a terminal, its score card, and its timeline as a page."""

from anabranch.viz.html import save_html
from anabranch.viz.perfetto import save_perfetto
from anabranch.viz.timeline import timeline

__all__ = ["save_html", "save_perfetto", "timeline"]
