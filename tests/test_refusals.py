"""Arguments that are nearly right are refused with what to write instead."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import Attributor, ExactGGN, GradientDot, Influence, InfluenceFunction, Scores, TracInCP
from lightning_influence.callback.queries import check_queries
from lightning_influence.data.source import source_of
from lightning_influence.report.album import Showing

FEATURES = torch.zeros(4, 8)
DATA = TensorDataset(FEATURES, torch.tensor([0, 1, 2, 1]))


class Table:
    """As a DataFrame is indexed."""

    columns, iloc = ["a"], {}

    def __len__(self):
        return 1

    def __getitem__(self, name):
        return []


def attributor():
    return Attributor(nn.Linear(8, 3), DATA)


@pytest.mark.parametrize(
    ("queries", "said"),
    [
        ({"text": "a", "label": 1}, r"keys 'text', 'label', which looks like one example or batch\. Pass `\[example"),
        (next(iter(DataLoader(DATA))), r"looks like one batch or example\. Pass the Dataset"),
        (dict.fromkeys(("train", "test"), DATA), r"of several datasets\. Pass one of them, such as `\['train'\]"),
        (Table(), r"its rows are `\.iloc\[i\]`\. Wrap it in a Dataset"),
        ([0, 1, 2], r"got \[0, 1, 2\], which looks like ids\. Pass `torch\.utils\.data\.Subset\(dataset, \[0, 1, 2\]"),
        (3, r"got 3, which looks like an id\. Pass `torch\.utils\.data\.Subset\(dataset, \[3\]\)"),
    ],
)
def test_queries_that_are_no_dataset(queries, said):
    with pytest.raises(TypeError, match=said):
        check_queries(queries)
    with pytest.raises(TypeError, match=said):
        attributor()._queries(queries)


def test_an_id_in_the_place_of_queries():
    with pytest.raises(TypeError, match=r"Subset\(dataset, \[3\]\)"):
        Influence(queries=3)


def test_lists_that_are_datasets():
    for data in ([{"x": 1}], {0: 1, 1: 2}, FEATURES, [FEATURES, FEATURES], ["a", "b"]):
        assert len(source_of(data, "queries").dataset) == len(data)
    assert len(source_of([1, 2], "train").dataset) == 2


def test_a_bank_without_refit():
    with pytest.raises(AttributeError, match=r"no attribute 'refit'\. Use `Attributor\(\.\.\., refit=Refit\(\)\)`"):
        _ = attributor().refit.bank


def test_names_of_scores():
    influence = Influence()
    for _ in range(2):
        with pytest.raises(KeyError, match=r"\(none yet\), got 'TracInCP'\. No fit has run yet\. Call `trainer\.fit`"):
            influence.scores["TracInCP"]
        influence = copy.deepcopy(influence)
    influence._forget()
    influence.scores["TracInCP"], influence.self_scores["labels"] = 1, 2
    influence = pickle.loads(pickle.dumps(influence))
    with pytest.raises(KeyError, match=r"\('TracInCP'\), got 'TracinCP'\. Did you mean 'TracInCP'\?"):
        influence.scores["TracinCP"]
    with pytest.raises(KeyError, match=r"got 'labels'\. It is in `influence\.self_scores\['labels'\]`\."):
        influence.scores["labels"]


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        (TracInCP(), r"got TracInCP\(\)\. Write `\[TracInCP\(\)\]`\."),
        (
            InfluenceFunction(ExactGGN(damping=0.5)),
            r"`\[InfluenceFunction\(curvature=ExactGGN\(damping=0\.5\)\)\]`",
        ),
        (["TracInCP"], r"got 'TracInCP' as 'str'\. Write `TracInCP\(\)`, without quotes\."),
        (["tracin"], r"got 'tracin'"),
    ],
)
def test_methods_in_another_form(methods, said):
    with pytest.raises(TypeError, match=said):
        Influence(methods)


def test_class_names_in_the_place_of_a_flag():
    with pytest.raises(TypeError, match=r"'spam'\]\. Names of classes go to `report\(labels=\)` or `album="):
        Influence(labels=["ham", "spam"])


@pytest.mark.parametrize(
    ("error", "said", "given"),
    [
        (ValueError, r"Expected `columns` to have 8 names, got 2\.", {"columns": ["a", "b"]}),
        (ValueError, r"a name for each class, got 2 for class 2\.", {"labels": ["no", "yes"]}),
        (TypeError, r"Expected `labels` to be a list of names, got 'yes'", {"labels": "yes"}),
    ],
)
def test_names_of_classes_and_columns(error, said, given, tmp_path):
    scores = Scores(torch.ones(4, 4), None, torch.arange(4), torch.arange(4), method="M")
    for ask in (scores.plot, partial(scores.report, tmp_path / "page.html")):
        with pytest.raises(error, match=said):
            ask(train=DATA, queries=DATA, **given)


def test_fewer_names_than_classes_in_a_dict():
    shown = Showing(labels={0: "no"}).entry((FEATURES[0], 2))
    assert (shown["class"], Showing().entry((FEATURES[0], 2))["class"]) == ("2", "2")


def test_a_name_of_the_data_of_losses():
    for name, said in (("val", r"got 'val'\. Names of other"), ("vals", "got 'vals'")):
        with pytest.raises(ValueError, match=f"Expected `data` to be .*{said}"):
            attributor().losses(name)
        with pytest.raises(ValueError, match="Expected `queries` to be "):
            attributor().score(GradientDot(), name)


def test_attributes_of_other_libraries():
    with pytest.raises(AttributeError, match=r"Use `values\.shape`"):
        _ = Scores(torch.ones(4, 4), None, torch.arange(4), torch.arange(4), method="M").shape
    with pytest.raises(AttributeError, match=r"Use `losses\(checkpoints='all'\)`"):
        _ = attributor().labels
