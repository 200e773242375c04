"""Packages that parts of jmoe need beside its own dependencies, and the extras that install them."""

import importlib.util


def require(part: str, extra: str, *packages: str) -> None:
    """Says which extra of pyproject.toml a part of jmoe needs, before an import fails that does not.

    Raises:
      ImportError: one of the packages is not installed.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ImportError(f'{part} needs {package}, which is not installed: pip install "jmoe[{extra}]"')
