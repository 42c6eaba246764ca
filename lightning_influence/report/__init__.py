"""The page on which to review scores: tensors and ids go in, an HTML file that needs no network comes out."""

from lightning_influence.report.album import Album, Opinion, Opinions, Showing, collect
from lightning_influence.report.decisions import Decisions, read_decisions
from lightning_influence.report.page import Page, write_page
from lightning_influence.report.snippet import snippet

__all__ = [
    "Album",
    "Decisions",
    "Opinion",
    "Opinions",
    "Page",
    "Showing",
    "collect",
    "read_decisions",
    "snippet",
    "write_page",
]
