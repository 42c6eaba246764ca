"""Numbers of things agree with their nouns and verbs; every sentence with a number in it goes through one function."""

import re
from pathlib import Path

import pytest

import lightning_influence
from lightning_influence.wording import counted


@pytest.mark.parametrize(
    ("number", "what", "then", "said"),
    [
        (1, "query", "", "1 query"),
        (2, "query", "has", "2 queries have"),
        (1000, "training example", "", "1,000 training examples"),
        (0, "day", "", "0 days"),
        (2, "loss", "", "2 losses"),
        (1, "batch", "is", "1 batch is"),
        (3, "batch", "is", "3 batches are"),
        (2, "subset", "holds", "2 subsets hold"),
    ],
)
def test_a_number_of_things(number, what, then, said):
    assert counted(number, what, then) == said


def test_no_sentence_makes_a_plural_of_its_own():
    own = re.compile(r"[a-z]\{'(s|ies)' |\((s|es)\) |\{'y' if | if \w+ == 1 else 's'|'s' \* \(")
    files = Path(lightning_influence.__file__).parent.rglob("*.py")
    assert [(file.name, found.group()) for file in files for found in own.finditer(file.read_text())] == []
