"""Texts: which sentences influenced a classifier, and which of their labels are wrong.

Sentences of the language reference that ships with Python, labelled by chapter; a tenth of the labels are wrong. Or
your own corpus, a parquet file with the columns `text` and `label`:

    python examples/texts.py
    python examples/texts.py --path sms_spam.parquet
"""

import argparse
import re
from pathlib import Path
from zlib import crc32

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_influence import Influence, TracInCP

WORDS, LENGTH, OUT = 4096, 40, Path("texts_output")
CHAPTERS = ("debugger", "formatstrings", "specialnames")


class Classifier(pl.LightningModule):
    """A linear layer on the mean of the word vectors."""

    def __init__(self, n_classes):
        super().__init__()
        self.words = nn.EmbeddingBag(WORDS, 32, padding_idx=0)
        self.head = nn.Linear(32, n_classes)

    def forward(self, texts):
        return self.head(self.words(torch.stack([numbers(text) for text in texts]).to(self.device)))

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch["text"]), batch["label"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0, momentum=0.9)


def numbers(text):
    """The words of a text as hashed ids, padded with zeros."""
    found = [1 + crc32(word.encode()) % (WORDS - 1) for word in re.findall(r"\w+", text.lower())[:LENGTH]]
    return torch.tensor(found + [0] * (LENGTH - len(found)))


def python_reference():
    from pydoc_data.topics import topics

    for label, chapter in enumerate(CHAPTERS):
        for sentence in re.split(r"(?<=[.:])\s+|\n\n+", topics[chapter]):
            text = " ".join(sentence.split())
            if 40 <= len(text) <= 300 and not re.search(r"[-*+=|]{3}", text):
                yield {"text": text, "label": label}


def corpus(path):
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=["text", "label"]).slice(0, 4000).to_pylist()
    names = sorted({str(row["label"]) for row in table})
    return [{"text": row["text"], "label": names.index(str(row["label"]))} for row in table], names


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", help="a parquet file with the columns `text` and `label`")
    path = parser.parse_args().path
    examples, names = corpus(path) if path else (list(python_reference()), list(CHAPTERS))

    pl.seed_everything(0, verbose=False)
    examples = [examples[i] for i in torch.randperm(len(examples)).tolist()]
    train, test = examples[len(examples) // 5 :], examples[: len(examples) // 5]
    flipped = torch.randperm(len(train))[: len(train) // 10]
    for i in flipped.tolist():
        train[i] = train[i] | {"label": (train[i]["label"] + 1) % len(names)}

    influence = Influence([TracInCP()], queries=test, self_influence=True, dirpath=OUT)
    trainer = pl.Trainer(max_epochs=15, callbacks=[influence], logger=False, enable_checkpointing=False)
    model = Classifier(len(names))
    trainer.fit(model, DataLoader(train, batch_size=32, shuffle=True))
    scores, itself = influence.scores["TracInCP"], influence.self_scores["TracInCP"]

    with torch.no_grad():
        logits = model.cpu().eval()([example["text"] for example in test])
    labels, predictions = torch.tensor([example["label"] for example in test]), logits.argmax(1)
    losses = cross_entropy(logits, labels, reduction="none")
    query = int(torch.where(predictions == labels, 0.0, losses).argmax())
    figure, _ = scores.plot(query, k=4, labels=names, predictions=predictions)
    figure.savefig(OUT / "sentence.png", dpi=80)
    page = scores.report(OUT / "influence.html", self_scores=itself, labels=names, predictions=predictions)

    found = torch.isin(flipped, itself.top(len(train) // 5).train_ids).double().mean().item()
    print(f"{len(train)} texts, {(predictions == labels).double().mean():.0%} of the queries are classified correctly.")
    print(f"{found:.0%} of the flipped labels are in the first fifth by self-influence.")
    print(f"Written: {OUT / 'sentence.png'}, and a page to review the labels on: {page}")
    assert found >= 0.65


if __name__ == "__main__":
    main()
