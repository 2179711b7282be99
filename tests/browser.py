"""A headless Chromium without network access."""

import os
import shutil
from contextlib import contextmanager

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

_NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def chromium(width=1400, height=900):
    """Yield a driver, and check at the end that the browser's console is empty.

    Without Chromium the test is skipped, or fails if ``CI`` is set.
    """
    program = next(filter(None, map(shutil.which, _NAMES)), None)
    driver_program = shutil.which("chromedriver")
    if program is None or driver_program is None:
        say = pytest.fail if os.environ.get("CI") else pytest.skip
        say("needs Chromium and its driver (Debian: apt install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in (
        *("headless=new", "no-sandbox", "disable-gpu", "no-first-run", "disable-sync"),
        *("disable-background-networking", "disable-component-update"),
        f"window-size={width},{height}",
    ):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(driver_program))
    try:
        yield driver
        assert driver.get_log("browser") == []
    finally:
        driver.quit()
