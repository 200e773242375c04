"""Two real texts that come with Python: its library's source code, and the names of Unicode's characters."""

import sys
import sysconfig
import unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from learning.sizes import END

from jmoe.finetune.examples import Example

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data"}
"""What is not the library's own, and encodings, whose comments name characters."""

CATEGORIES = ("Lu", "Ll", "Lo", "Mn", "Nd", "No", "Po", "Sm", "So")
"""Unicode's general categories with at least 600 characters of short and different names."""

LISTED = ("CJK ", "HANGUL SYLLABLE", "TANGUT ", "NUSHU ", "KHITAN ")
"""Beginnings of names that say a number or a sound alone."""

LONGEST = 48
"""Of names."""


class Question(NamedTuple):
    """A character's name, and its category."""

    name: str
    category: str

    @property
    def prompt(self) -> list[int]:
        """What the model is given."""
        return [END, *f"{self.name} = ".encode()]

    @property
    def answer(self) -> list[int]:
        """What it is to write."""
        return [*self.category.encode(), END]

    @property
    def example(self) -> Example:
        """The answer to be learnt."""
        tokens = np.array(self.prompt + self.answer, np.int32)
        return Example(tokens, np.arange(len(tokens)) >= len(self.prompt))


def source_code() -> tuple[UInt8[np.ndarray, " N"], UInt8[np.ndarray, " M"]]:
    """(bytes of most files of Python's library, bytes of every twentieth).

    Raises:
      FileNotFoundError: this Python has its library without source.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in sorted(library.rglob("*.py")) if not LEFT_OUT & set(file.relative_to(library).parts)]
    if len(files) < 100:
        raise FileNotFoundError(f"Python's library in {library} must have its source code, found {len(files)} files")
    held_out = files[::20]
    parts = [file for file in files if file not in set(held_out)], held_out
    train, held = (np.frombuffer(b"\n".join(file.read_bytes() for file in part), np.uint8) for part in parts)
    return train, held


def pieces(
    text: UInt8[np.ndarray, " N"], rng: np.random.Generator, count: int, length: int
) -> UInt8[np.ndarray, "count length"]:
    """Random pieces of the text."""
    starts = rng.integers(0, len(text) - length, count)
    return text[starts[:, None] + np.arange(length)]


def questions(per_category: int) -> tuple[list[Question], list[Question]]:
    """(to train on, held out): so many characters of each category, drawn once, one in eight of them held out."""
    of_category: dict[str, list[Question]] = {category: [] for category in CATEGORIES}
    for character in map(chr, range(sys.maxunicode + 1)):
        name, category = unicodedata.name(character, ""), unicodedata.category(character)
        if name and len(name) <= LONGEST and category in of_category and not name.startswith(LISTED):
            of_category[category].append(Question(name, category))
    rng = np.random.default_rng(0)
    train, held_out = [], []
    for found in of_category.values():
        drawn = [found[i] for i in rng.permutation(len(found))[:per_category]]
        held_out += drawn[: per_category // 8]
        train += drawn[per_category // 8 :]
    return train, held_out
