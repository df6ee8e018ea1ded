"""The report in a real browser: it loads without an error, sorts, and shows every figure. Needs Chromium and its driver."""

import shutil

import numpy as np
import pytest

from echelon.compare import recommend, write_report
from rigged import rigged

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}", "--window-size=1400,1000"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(DRIVER))
    base = np.random.default_rng(0).normal(1, 0.3, 60)
    summary = rigged({"base": base, "good": base + 0.5, "bad": base - 0.2}, failed=["dead"], costs={"base": 1.0, "good": 30.0, "bad": 2.0})
    driver.get(write_report(summary, recommend(summary, "score"), tmp_path_factory.mktemp("report")).as_uri())
    yield driver
    driver.quit()


def methods(browser):
    return [row.find_element("tag name", "td").text.split()[0] for row in browser.find_elements("css selector", "tbody tr")]


def test_it_loads_without_a_console_error_and_nothing_is_faint(browser):
    assert browser.get_log("browser") == []
    faint = "return [...document.querySelectorAll('main div, main figure, main table')].filter(e => getComputedStyle(e).opacity < 1).length"
    assert browser.execute_script(faint) == 0
    assert len(browser.find_elements("css selector", "figure svg")) == 3  # quality against cost, and two metrics


def test_a_click_on_a_heading_sorts_and_another_turns_it_round(browser):
    assert methods(browser) == ["good", "base", "bad", "dead"]
    score = next(b for b in browser.find_elements("css selector", "th button") if b.text.startswith("seconds"))
    score.click()
    assert methods(browser) == ["good", "bad", "base", "dead"]
    score.click()
    assert methods(browser) == ["base", "bad", "good", "dead"]
