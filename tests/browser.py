"""A browser for pages' tests: the machine's own, or Debian's package."""

import os
import shutil
import subprocess

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 600


class NoBrowserError(Exception):
    """There is none, and none could be installed."""


def browser_path() -> str:
    """The path of a Chromium or Chrome; installs one where this is root's Debian or Ubuntu.

    Raises:
      NoBrowserError: there is none, and the package could not be installed.
    """
    if found := next(filter(None, map(shutil.which, NAMES)), None):
        return found
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise NoBrowserError(f"none of {', '.join(NAMES)} is installed, and only root may install it, by apt-get")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "-qq", "update"], ["apt-get", "-qq", "install", "-y", "chromium"]):
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=SECONDS, env=environment)
        except (OSError, subprocess.SubprocessError) as error:
            raise NoBrowserError(f"{' '.join(command)}: {error}") from error
    if (found := shutil.which("chromium")) is None:
        raise NoBrowserError("apt-get installed chromium, but there is no such command")
    return found
