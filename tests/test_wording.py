"""Numbers of things agree with their nouns and verbs; a missing attribute says where to look."""

import re
from pathlib import Path

import pytest
import torch

import lightning_influence
from lightning_influence.callback.results import Results
from lightning_influence.hints import ELSEWHERE
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
    own = re.compile(r"""[a-z]\{'(s|ies)' |"[^"\n]*[a-z]\((s|es)\)[ ,."]|\{'y' if | if \w+ == 1 else 's'|'s' \* \(""")
    files = Path(lightning_influence.__file__).parent.rglob("*.py")
    assert [(file.name, found.group()) for file in files for found in own.finditer(file.read_text())] == []


SCORES = lightning_influence.Scores(torch.eye(3), None, torch.arange(3), torch.arange(3), method="M")
ITSELF = lightning_influence.SelfScores(torch.arange(3), torch.arange(3.0), "M")


@pytest.mark.parametrize(
    ("owner", "name", "hint"),
    [
        (SCORES, "top", "Use `proponents(k)` and `opponents(k)`"),
        (SCORES, "proponent", "Did you mean `proponents`"),
        (SCORES, "values_", "Did you mean `values`"),
        (ITSELF, "proponents", "Use `top(k)`"),
        (ITSELF, "to_csv", "`to_pandas()`.to_csv(path)"),
        (ITSELF.top(2), "indices", "Use `train_ids`"),
        (Results(), "report", "Use that of one method"),
    ],
)
def test_a_missing_attribute_says_where_to_look(owner, name, hint):
    with pytest.raises(AttributeError, match=re.escape(hint)):
        getattr(owner, name)


def test_hints_are_about_attributes_that_do_not_exist():
    kinds = {"Results": Results}
    for kind, names in ELSEWHERE.items():
        owner = kinds.get(kind) or getattr(lightning_influence, kind)
        assert [name for name in names if hasattr(owner, name)] == []


def test_an_error_of_a_property_is_its_own():
    class Broken(lightning_influence.SelfScores):
        @property
        def worth(self):
            raise AttributeError("its own")

    with pytest.raises(AttributeError, match="its own"):
        _ = Broken(torch.arange(3), torch.arange(3.0), "M").worth
