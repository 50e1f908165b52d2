"""A real headless Chromium for tests of pages, and what to check on any page in it.

Debian and Ubuntu have it as ``chromium`` and ``chromium-driver``; tests skip where it is missing.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

DRIVER = shutil.which("chromedriver")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
REASON = "needs chromium and chromedriver (apt-get install chromium chromium-driver)"

needs_browser = pytest.mark.skipif(not (DRIVER and CHROMIUM), reason=REASON)

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """Starts a browser with a fresh profile and gives Selenium's driver of it.

    Args:
        profile: A directory for the browser's own files.
    """
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.binary_location = str(CHROMIUM)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(60)
    try:
        yield driver
    finally:
        driver.quit()


def look(driver: Any, url: str, *, width: int, dark: bool = False) -> None:
    """Opens a page as a screen of this width shows it.

    Args:
        driver: From ``chromium``.
        url: What to open.
        width: Width of the screen in CSS pixels.
        dark: Whether the reader prefers dark pages.
    """
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    driver.get(url)


def screenshot(driver: Any, target: Path) -> Path:
    """Writes the whole page, also what lies below the screen, as a PNG."""
    import base64

    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
    target.write_bytes(base64.b64decode(shot["data"]))
    return target


OVERFLOW = """
const wide = document.documentElement.clientWidth;
const scrolls = (e) => e && e !== document.body &&
  (['auto', 'scroll'].includes(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
return [...document.body.querySelectorAll('*')]
  .filter((e) => e.checkVisibility({ visibilityProperty: true }))
  .filter((e) => e.getBoundingClientRect().right > wide + 1 && !scrolls(e))
  .map((e) => `${e.tagName} ${e.id} ${e.textContent.slice(0, 40)}`);
"""

OVERLAPS = """
const texts = [...document.querySelectorAll(arguments[0])]
  .filter((e) => e.checkVisibility({ visibilityProperty: true }) && e.textContent.trim());
const boxes = texts.map((e) => e.getBoundingClientRect());
const found = [];
boxes.forEach((a, i) => boxes.slice(i + 1).forEach((b, k) => {
  const x = Math.min(a.right, b.right) - Math.max(a.left, b.left);
  const y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
  const one = texts[i], two = texts[i + 1 + k];
  if (x > 2 && y > 4 && !one.contains(two) && !two.contains(one))
    found.push(`${one.textContent.slice(0, 30)} / ${two.textContent.slice(0, 30)}`);
}));
return found;
"""

CONTRAST = """
const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
const rgba = (text) => {
  canvas.clearRect(0, 0, 1, 1);
  canvas.fillStyle = text;
  canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data].map((v) => v / 255);
};
const over = (top, below) => top.slice(0, 3).map((v, i) => v * top[3] + below[i] * (1 - top[3]));
const ground = (e) => {
  const own = rgba(getComputedStyle(e).backgroundColor);
  if (own[3] === 1) return own;
  return over(own, e.parentElement ? ground(e.parentElement) : [1, 1, 1]);
};
const light = (c) => {
  const [r, g, b] = c.map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const texts = [...document.body.querySelectorAll('*')].filter(
  (e) => e.checkVisibility({ visibilityProperty: true }) &&
    !['SCRIPT', 'STYLE', 'NOSCRIPT'].includes(e.tagName) &&
    [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()));
return texts.map((e) => {
  const style = getComputedStyle(e);
  const below = ground(e.ownerSVGElement || e);
  const text = over(rgba(e.ownerSVGElement ? style.fill : style.color), below);
  const [a, b] = [light(text), light(below)].sort((x, y) => y - x);
  return [(a + 0.05) / (b + 0.05), `${e.tagName} ${e.textContent.trim().slice(0, 40)}`];
}).filter(([ratio]) => ratio < 4.5);
"""


def overflowing(driver: Any) -> list[str]:
    """Elements that reach beyond the screen and cannot be scrolled to on their own."""
    return list(driver.execute_script(OVERFLOW))


def overlapping(driver: Any, selector: str) -> list[str]:
    """Pairs of elements with text that lie over one another."""
    return list(driver.execute_script(OVERLAPS, selector))


def faint_texts(driver: Any) -> list[list[Any]]:
    """Texts with less than WCAG's contrast of 4.5 to their ground, and that contrast."""
    return list(driver.execute_script(CONTRAST))


def requested(driver: Any) -> list[str]:
    """Addresses that the browser asked for since this was last called."""
    import json

    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]


def complaints(driver: Any) -> list[str]:
    """Errors on the browser's console since this was last called."""
    return [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
