"""Turns a matplotlib figure into an SVG that can stand inside an HTML page next to others."""

from __future__ import annotations

import io
import re
from xml.etree import ElementTree

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from kvpack.report.style import SHADES, STAND_INS

_VARIABLES = {STAND_INS[shade.name]: f"var(--{shade.name})" for shade in SHADES}
_STAND_IN_PATTERN = re.compile("|".join(map(re.escape, _VARIABLES)), re.IGNORECASE)
_DROPPED = {"metadata", "style"}


def to_inline_svg(figure: Figure, identifier: str, title: str, description: str) -> str:
    """Renders a figure drawn in STAND_INS.

    Args:
        figure: the drawing; 72 dots per inch, so that its text sizes are units of the viewBox.
        identifier: letters and digits, unique in the page: every id in the SVG starts with it.
        title: what a screen reader says first.
        description: what the figure shows, in words.

    Returns:
        An `svg` element without width, height, namespaces, metadata or style element (matplotlib's would apply to the
        whole page), whose colours are CSS variables.
    """
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": identifier}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    _clean(root, identifier)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{identifier}-title {identifier}-desc")
    for position, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(tag, {"id": f"{identifier}-{tag}"})
        element.text = text
        root.insert(position, element)
    return ElementTree.tostring(root, encoding="unicode")


def _clean(element: ElementTree.Element, identifier: str) -> None:
    """Drops namespaces and foreign parts, makes ids unique, puts variables in place of the stand-in colours."""
    element.tag = _local_name(element.tag)
    attributes = {_local_name(name): value for name, value in element.attrib.items()}
    element.attrib.clear()
    for name, value in attributes.items():
        if name == "id":
            value = f"{identifier}-{value}"
        elif name == "href":
            value = f"#{identifier}-{value.removeprefix('#')}"
        value = value.replace("url(#", f"url(#{identifier}-")
        element.set(name, _STAND_IN_PATTERN.sub(lambda match: _VARIABLES[match.group().lower()], value))
    for child in list(element):
        if _local_name(child.tag) in _DROPPED:
            element.remove(child)
        else:
            _clean(child, identifier)


def _local_name(name: str) -> str:
    return name.rpartition("}")[2]
