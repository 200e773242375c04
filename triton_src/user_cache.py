"""Where jmoe keeps what it measured and compiled for a user."""

import os
from pathlib import Path


def user_cache() -> Path:
    """$XDG_CACHE_HOME/jmoe, or ~/.cache/jmoe where that is not set to an absolute path; it need not be there yet."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    home = cache if cache.is_absolute() else Path(os.path.expanduser("~/.cache"))
    return home / "jmoe"
