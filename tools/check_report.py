#!/usr/bin/env python3
"""Opens a report page in headless Chromium, at phone and desktop width, in light and in dark, and says what is wrong.

Fails (exit 1) on a message or exception in the console, on any request besides the page itself, on a page wider than
the phone, on text too small to read, on text cut off in a figure, and when the dark scheme changes nothing.
"""

from __future__ import annotations

import argparse
import base64
import sys
from pathlib import Path
from typing import Any

from browser import Browser, BrowserError, launch_browser

SECONDS = 60.0
SIZES = {"phone": (360, 780), "phone-wide": (390, 844), "desktop": (1280, 900)}
SCHEMES = ("light", "dark")
SMALLEST_TEXT = 8.5

# What the page is asked: pixels it is too wide, sizes of its text, ground colour, figure texts that leave the figure.
_QUESTIONS = """(() => {
  const root = document.documentElement;
  const shown = [...document.querySelectorAll("svg text")].map(text => ({
    text: text.textContent, box: text.getBoundingClientRect(),
    frame: text.ownerSVGElement.getBoundingClientRect(),
    size: parseFloat(getComputedStyle(text).fontSize) * text.ownerSVGElement.getScreenCTM().a,
  }));
  return {
    overflow: root.scrollWidth - root.clientWidth,
    wide: [...document.querySelectorAll("body *")].filter(e => !e.closest(".table, svg") &&
      e.getBoundingClientRect().right > root.clientWidth + 1).map(e => e.tagName + " " + e.textContent.slice(0, 40)),
    ground: getComputedStyle(document.body).backgroundColor,
    smallest: Math.min(Infinity, ...shown.map(t => t.size)),
    cut: shown.filter(t => t.box.left < 0 || t.box.right > root.clientWidth ||
      t.box.top < t.frame.top - 2 || t.box.bottom > t.frame.bottom + 2).map(t => t.text),
    height: root.scrollHeight,
  };
})()"""


def _problems_of(event: dict[str, Any], page: str) -> str | None:
    """What a DevTools event complains about, None for an ordinary one."""
    method, details = event["method"], event.get("params", {})
    if method == "Runtime.consoleAPICalled" and details["type"] in ("error", "warning", "assert"):
        return f"console {details['type']}: {[a.get('value', a.get('description')) for a in details['args']]}"
    if method == "Runtime.exceptionThrown":
        return f"exception: {details['exceptionDetails'].get('text')}"
    if method == "Log.entryAdded" and details["entry"]["level"] in ("error", "warning"):
        return f"log {details['entry']['level']}: {details['entry']['text']}"
    if method == "Network.loadingFailed":
        return f"a request failed: {details.get('errorText')}"
    if method == "Network.requestWillBeSent" and details["request"]["url"] != page:
        return f"the page asks for {details['request']['url'][:200]}"
    return None


def _check_view(browser: Browser, page: str, size: str, scheme: str, screenshots: Path | None) -> tuple[list[str], str]:
    """Problems of one width and scheme, and the page's ground colour there."""
    width, height = SIZES[size]
    is_phone = size != "desktop"
    browser.events.clear()
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2, mobile=is_phone)
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    failure = browser.call("Page.navigate", url=page).get("errorText")
    if failure:
        return [f"the page does not open: {failure}"], ""
    browser.wait_for("Page.loadEventFired")
    found = browser.evaluate(_QUESTIONS)
    problems = [text for text in (_problems_of(event, page) for event in browser.events) if text]
    if found["overflow"] > 0:
        problems.append(f"the page is {found['overflow']} pixels wider than the screen: {found['wide'][:5]}")
    if found["smallest"] < SMALLEST_TEXT:
        problems.append(f"text in a figure is {found['smallest']:.1f} pixels high, at least {SMALLEST_TEXT} wanted")
    if found["cut"]:
        problems.append(f"text is cut off in a figure: {found['cut'][:5]}")
    if screenshots is not None:
        clip = {"x": 0, "y": 0, "width": width, "height": found["height"], "scale": 1}
        image = browser.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        (screenshots / f"report-{size}-{scheme}.png").write_bytes(base64.b64decode(image["data"]))
    return problems, found["ground"]


def check_report(path: Path, screenshots: Path | None = None) -> list[str]:
    """Everything that is wrong with a page, each with the view it was seen in; empty when all is well.

    Args:
        path: the HTML file.
        screenshots: folder for one PNG per view, or None.
    """
    page = path.resolve().as_uri()
    problems = []
    with launch_browser(SECONDS) as browser:
        browser.open_tab()
        for domain in ("Page", "Runtime", "Log", "Network"):
            browser.call(f"{domain}.enable")
        for size in SIZES:
            grounds = set()
            for scheme in SCHEMES:
                found, ground = _check_view(browser, page, size, scheme, screenshots)
                problems += [f"{size}, {scheme}: {text}" for text in found]
                grounds.add(ground)
            if len(grounds) < len(SCHEMES):
                problems.append(f"{size}: the dark scheme has the ground colour of the light one, {grounds}")
    return problems


def main() -> int:
    """Command line: 0 when the page is sound, 1 when not, 2 when it could not be checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="the HTML file")
    parser.add_argument("--screenshots", type=Path, metavar="DIR", help="write one PNG per view into this folder")
    arguments = parser.parse_args()
    if not arguments.page.is_file():
        print(f"check_report: there is no file {arguments.page}", file=sys.stderr)
        return 2
    if arguments.screenshots is not None:
        arguments.screenshots.mkdir(parents=True, exist_ok=True)
    try:
        problems = check_report(arguments.page, arguments.screenshots)
    except BrowserError as error:
        print(f"check_report: {error}", file=sys.stderr)
        return 2
    for problem in problems:
        print(f"check_report: {problem}", file=sys.stderr)
    if not problems:
        print(f"{arguments.page}: sound at {', '.join(SIZES)} width, light and dark")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
