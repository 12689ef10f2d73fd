"""The web page of a run in a real browser: it shows the state, follows it, and works by keyboard, narrow and in the dark."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from oncofed.deploy.operate.access import token_of
from oncofed.deploy.operate.web import Watched, application
from toy_journal import write_journal

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed"),
]
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
EVIL = "<img src=x onerror=alert(1)>"
PICTURES = os.environ.get("ONCOFED_PICTURES", "")
"""A folder for pictures of the page, for people who change its look."""


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A run with many sites, long names and long reasons."""
    sites = ["Gulf Coast", "North", "Ridge", "Universitätsklinikum an der langen Straße, Abteilung für Pathologie"]
    reasons = [
        ("Ridge", f"no answer within 60 s {EVIL}"),
        ("North", "ValueError: site North, column age: 7 of 90 values are no numbers; correct them, or drop them " * 2),
        (sites[-1], "x" * 300),
    ]
    return write_journal(tmp_path / "out", sites=sites, left_out=reasons, rounds=30, folds=3, done=47)


@pytest.fixture
def page(out: Path) -> Iterator[str]:
    """The page's address; its server ends with the test."""
    app = application(out, token_of(out), Watched(out))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait(lambda: server.started)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture
def browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Chromium with a fresh profile."""
    monkeypatch.setenv("SE_OFFLINE", "true")
    monkeypatch.setenv("SE_AVOID_STATS", "true")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def wait(true: Callable[[], object], seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)


def log_in(browser: Any, page: str, out: Path) -> None:
    browser.get(page)
    assert browser.current_url == f"{page}/login"
    assert browser.switch_to.active_element.get_attribute("id") == "token", "one can type at once"
    browser.switch_to.active_element.send_keys(token_of(out), Keys.ENTER)
    wait(lambda: browser.current_url == f"{page}/")


def text_of(browser: Any) -> str:
    return str(browser.find_element(By.TAG_NAME, "body").text)


def sized(browser: Any, width: int, height: int = 900) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
    )


def picture(browser: Any, name: str) -> None:
    if PICTURES:
        import base64

        taken = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        Path(PICTURES, f"{name}.png").write_bytes(base64.b64decode(taken["data"]))


def errors(browser: Any) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser")]


def test_the_page_shows_the_run_and_follows_it(browser: Any, page: str, out: Path) -> None:
    log_in(browser, page, out)
    text = text_of(browser)
    for shown in ("pan-cancer-1", "running", "47 of 90", "Gulf Coast", EVIL, "fold 1, training, 17 rounds done"):
        assert shown in text
    assert browser.execute_script("return document.querySelectorAll('#curves svg polyline.now').length") == 2
    sized(browser, 1200, 1000)
    picture(browser, "desktop")
    (out / "journal.jsonl").unlink()
    write_journal(out, rounds=30, folds=3, done=90, end="finished", left_out=[("North", f"again {EVIL}")])
    wait(lambda: "90 of 90" in text_of(browser))
    assert f"again {EVIL}" in text_of(browser), "what the script has put there are words too"
    assert not browser.find_elements(By.TAG_NAME, "img")
    assert browser.title.startswith("pan-cancer-1 · finished")
    (out / "report.html").write_text("<style>p{color:red}</style><p>the report</p><script>document.title='x'</script>")
    wait(lambda: browser.find_elements(By.LINK_TEXT, "Read the report"))
    picture(browser, "finished")
    assert errors(browser) == []
    browser.find_element(By.LINK_TEXT, "Read the report").click()
    wait(lambda: "the report" in text_of(browser))
    colour = browser.find_element(By.TAG_NAME, "p").value_of_css_property("color")
    assert colour.startswith("rgba(255, 0, 0"), "its own look is allowed"
    assert browser.title != "x", "scripts are not"


def test_the_page_says_when_it_is_out_of_date(browser: Any, page: str, out: Path) -> None:
    log_in(browser, page, out)
    (out / "journal.jsonl").rename(out / "elsewhere")
    wait(lambda: "out of date" in text_of(browser))
    assert "Gulf Coast" in text_of(browser), "what was shown stays"
    (out / "elsewhere").rename(out / "journal.jsonl")
    wait(lambda: "out of date" not in text_of(browser))


def test_a_session_that_ends_leads_back_to_the_login(browser: Any, page: str, out: Path) -> None:
    log_in(browser, page, out)
    browser.delete_all_cookies()
    wait(lambda: browser.current_url == f"{page}/login")


def test_every_control_is_reached_by_keyboard(browser: Any, page: str, out: Path) -> None:
    log_in(browser, page, out)
    sized(browser, 360)
    wanted = browser.execute_script(
        "return [...document.querySelectorAll('a[href], button, input, [tabindex=\"0\"]')].length"
    )
    assert wanted == 5, "skip link, log out, three tables"
    reached, outlines = [], []
    for _ in range(wanted):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        reached.append(browser.execute_script("return document.activeElement.outerHTML.slice(0, 80)"))
        outlines.append(browser.switch_to.active_element.value_of_css_property("outline-style"))
    assert len(set(reached)) == wanted
    assert "skip" in reached[0]
    assert set(outlines) == {"solid"}, "the focus is seen"
    # the page goes on while one reads: the focus stays where it is
    time.sleep(4)
    assert browser.execute_script("return document.activeElement.outerHTML.slice(0, 80)") == reached[-1]
    logout = browser.find_element(By.CSS_SELECTOR, "header button")
    logout.send_keys(Keys.ENTER)
    wait(lambda: browser.current_url == f"{page}/login")


def test_the_skip_link_leads_to_the_content(browser: Any, page: str, out: Path) -> None:
    log_in(browser, page, out)
    browser.switch_to.active_element.send_keys(Keys.TAB)
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    wait(lambda: browser.switch_to.active_element.get_attribute("id") == "main")


@pytest.mark.parametrize("width", [320, 360, 768, 1280])
def test_nothing_is_wider_than_the_screen(browser: Any, page: str, out: Path, width: int) -> None:
    sized(browser, width)
    browser.get(page)
    picture(browser, f"login-{width}")
    log_in(browser, page, out)
    picture(browser, f"{width}")
    screen, shown, held = browser.execute_script(
        "const root = document.documentElement; return [window.innerWidth, root.clientWidth, root.scrollWidth]"
    )
    assert screen == width
    assert held <= shown, "shown is less than the screen where a browser draws a vertical scroll bar"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(browser: Any, page: str, out: Path, scheme: str) -> None:
    """4.5 to 1 at least (WCAG 2 AA)."""
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    log_in(browser, page, out)
    sized(browser, 1000)
    picture(browser, scheme)
    ground = luminance(browser.find_element(By.TAG_NAME, "body").value_of_css_property("background-color"))
    assert (ground < 0.2) == (scheme == "dark")
    for selector in ("h1", "caption", "thead th", "td.bad", "dt", ".badge", "header button"):
        element = browser.find_element(By.CSS_SELECTOR, selector)
        own = element.value_of_css_property("background-color")
        behind = ground if own.endswith(", 0)") else luminance(own)
        light, dark = sorted((luminance(element.value_of_css_property("color")), behind), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, selector


def luminance(colour: str) -> float:
    """Relative luminance of `rgba(r, g, b, a)` (WCAG 2)."""
    parts = [float(p) / 255 for p in colour.partition("(")[2].rstrip(")").split(",")[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_without_script_the_page_loads_itself_again(browser: Any, page: str, out: Path) -> None:
    log_in(browser, page, out)
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    browser.get(page)
    assert "47 of 90" in text_of(browser)
    refresh = browser.find_element(By.CSS_SELECTOR, "meta[http-equiv=refresh]")
    assert int(refresh.get_attribute("content")) <= 60
