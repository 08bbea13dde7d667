"""How the report looks: one table of colours for light and dark, and the style sheet of the page.

Figures are drawn in stand-in colours that svg.py turns into CSS variables, so that one SVG serves both schemes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


class Shade(NamedTuple):
    """One colour of the page: its CSS variable, and its value on light and on dark ground."""

    name: str
    light: str
    dark: str


# The eight series colours go back to Okabe and Ito's set, which people with any colour blindness can tell apart,
# made darker on white and lighter on black until each has a contrast of 3:1 or more to its ground.
SHADES = (
    Shade("ground", "#ffffff", "#14171a"),
    Shade("raised", "#f4f6f8", "#1e2328"),
    Shade("ink", "#1b1f23", "#e6e9ec"),
    Shade("quiet", "#57606a", "#a3adb8"),
    Shade("rule", "#d5dae0", "#39414a"),
    Shade("link", "#0b5cad", "#7cc0ff"),
    Shade("warn", "#fff3d6", "#3d3113"),
    Shade("series-0", "#0072b2", "#5ab4f0"),
    Shade("series-1", "#d55e00", "#ff8f4d"),
    Shade("series-2", "#00875f", "#35d0a0"),
    Shade("series-3", "#b5478c", "#f08cc6"),
    Shade("series-4", "#a87400", "#eec04e"),
    Shade("series-5", "#4b3fa0", "#a99dff"),
    Shade("series-6", "#7a4a2b", "#d6a07c"),
    Shade("series-7", "#5b6b78", "#b4c3cf"),
)
NUM_SERIES_COLOURS = 8
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif'

# No ordinary drawing uses these, so svg.py can find every one of them again.
_STAND_IN = "#0a0b{:02x}"


@dataclass(frozen=True)
class Theme:
    """The colours of one drawing, by the names of SHADES."""

    values: Mapping[str, str]

    def __getitem__(self, name: str) -> str:
        return self.values[name]

    def series(self, index: int) -> str:
        """Colour of the index-th policy; they repeat after NUM_SERIES_COLOURS."""
        return self.values[f"series-{index % NUM_SERIES_COLOURS}"]


STAND_INS = Theme({shade.name: _STAND_IN.format(i) for i, shade in enumerate(SHADES)})
LIGHT = Theme({shade.name: shade.light for shade in SHADES})


def marker_of(index: int) -> str:
    """Marker of the index-th policy: with its colour, 72 policies stay distinct."""
    return MARKERS[index % len(MARKERS)]


def _variables(values: dict[str, str]) -> str:
    return " ".join(f"--{name}: {value};" for name, value in values.items())


_RULES = """* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0 auto; padding: 1rem; max-width: 68rem; background: var(--ground); color: var(--ink); }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
.note code { white-space: nowrap; }
h1, h2, p, dd, figcaption { overflow-wrap: anywhere; }
p { max-width: 46rem; }
a { color: var(--link); }
.about, .hint, figcaption, footer, caption { color: var(--quiet); font-size: .9rem; }
.about { margin-top: 0; }
.note { background: var(--warn); border-left: 4px solid var(--series-4); padding: .6rem .9rem; max-width: 46rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.5rem; }
figure { margin: .5rem 0; min-width: 0; max-width: 31rem; }
figure svg { display: block; width: 100%; height: auto; overflow: visible; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
.table { overflow-x: auto; margin: .5rem 0; border: 1px solid var(--rule); border-radius: 6px; }
.table:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .5rem .75rem 0; }
caption span { display: block; max-width: calc(100vw - 4rem); }
th, td { padding: .4rem .75rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--rule); }
thead th { border-top: 0; vertical-align: bottom; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--ground); }
th:first-child span.name { display: block; width: max-content; max-width: 9.5rem; white-space: normal;
  overflow-wrap: anywhere; }
.star { color: var(--series-1); }
details { margin: .75rem 0; }
summary { cursor: pointer; color: var(--link); }
dl { display: grid; grid-template-columns: minmax(6rem, 11rem) 1fr; gap: .35rem 1rem; }
dt { color: var(--quiet); }
dd { margin: 0; min-width: 0; max-width: 46rem; }
code { font: .875em ui-monospace, "DejaVu Sans Mono", monospace; background: var(--raised); padding: .1em .3em;
  border-radius: 4px; }
footer { margin-top: 2.5rem; padding-top: .75rem; border-top: 1px solid var(--rule); }
@media (max-width: 30rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin: 0 0 .6rem; } }
@media print { .figures { break-inside: avoid; } .table { overflow: visible; } }
"""

STYLE_SHEET = (
    f":root {{ color-scheme: light dark; {_variables({s.name: s.light for s in SHADES})} }}\n"
    f"@media (prefers-color-scheme: dark) {{ :root {{ {_variables({s.name: s.dark for s in SHADES})} }} }}\n"
    f"body {{ font: 16px/1.5 {FONT}; }}\n"
    f"svg text {{ font-family: {FONT} !important; paint-order: stroke; stroke: var(--ground); stroke-width: 3px; }}\n"
    f"{_RULES}"
)
