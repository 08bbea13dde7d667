"""The report page of `kvpack eval`: one self-contained HTML file from one results document.

rows.py reads the document, wording.py says in words what it means, plots.py (with labels.py and svg.py) draws, style.py
holds colours and CSS, page.py puts the page together. Nothing here measures anything.
"""

from kvpack.report.page import render_report, write_report

__all__ = ["render_report", "write_report"]
