"""The browser that the page is looked at with: the system's Chromium, or Playwright's own."""

import os
import shutil

from playwright.sync_api import Browser, Playwright


def launch(playwright: Playwright) -> Browser:
    """Start Chromium without a window; as root it cannot have its sandbox."""
    return playwright.chromium.launch(
        executable_path=shutil.which("chromium") or shutil.which("google-chrome"),
        args=["--no-sandbox"] if os.geteuid() == 0 else [],
    )
