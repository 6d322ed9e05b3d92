"""Shipped configs of stored sequences, in short, on tiny files of the same form."""

import dataclasses
import gzip
import hashlib
import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from data import chorales, multi30k, texts

SHIPPED = Path(__file__).parents[2] / "experiments" / "configs"
SHORT = [
    "--config.training.num_steps=4",
    "--config.training.steps_per_call=2",
    "--config.training.log_every=2",
    "--config.training.eval_every=4",
]
RNG = np.random.default_rng(0)


def words(vocabulary: str, low: int, high: int) -> str:
    return " ".join(RNG.choice(vocabulary.split(), RNG.integers(low, high)))


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A folder with a tiny file for each published one, and its checksums in place."""
    folder = tmp_path_factory.mktemp("originals")
    with pytest.MonkeyPatch.context() as patch:

        def accept(originals, name, content):
            changed = dataclasses.replace(
                originals[name], sha256=hashlib.sha256(content).hexdigest()
            )
            patch.setitem(originals, name, changed)

        cells = {}
        for name, count in (("traindata", 20), ("validdata", 4), ("testdata", 4)):
            cells[name] = np.empty((1, count), object)
            for i in range(count):
                roll = RNG.random((RNG.integers(5, 20), 88)) < 0.05
                cells[name][0, i] = roll.astype(np.uint8)
        path = folder / "JSB_Chorales.mat"
        scipy.io.savemat(path, cells)
        accept(chorales.ORIGINALS, "jsb", path.read_bytes())

        for split, size in (("train", 60), ("val", 8), ("test_2016_flickr", 8)):
            for language, vocabulary in (
                ("en", "a dog runs over green grass"),
                ("de", "ein Hund rennt über grünes Gras"),
            ):
                # A sign that no sub-word has.
                end = "." if split != "test_2016_flickr" else " Ω."
                lines = [words(vocabulary, 2, 9) + end for _ in range(size)]
                content = "".join(f"{line}\n" for line in lines).encode()
                (folder / f"{split}.{language}.gz").write_bytes(gzip.compress(content))
                accept(multi30k.ORIGINALS, f"{split}.{language}", content)

        with zipfile.ZipFile(folder / "sentence_polarity.zip", "w") as archive:
            for name, original in texts.POLARITIES.items():
                lines = [f"{name} {words('a b c d', 1, 9)} {i} ." for i in range(60)]
                content = "".join(f"{line} \n" for line in lines).encode()
                archive.writestr(original.name, content)
                accept(texts.POLARITIES, name, content)

        content = "".join(f"{words('to be or not', 2, 9)}.\n" for _ in range(80))
        (folder / "input.txt").write_text(content)
        play = dataclasses.replace(
            texts.SHAKESPEARE, sha256=hashlib.sha256(content.encode()).hexdigest()
        )
        patch.setattr(texts, "SHAKESPEARE", play)
        yield folder


def run(main, workdir, config, *overrides):
    done = main(f"--config={SHIPPED}/{config}", f"--workdir={workdir}", *overrides)
    assert done.code == 0, done.err
    measured = json.loads((workdir / "evaluation.json").read_text())["test"]
    assert np.isfinite(list(measured.values())).all()
    return measured, (workdir / "report.html").read_text()


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_chorales(cell, main, originals, tmp_path):
    measured, report = run(
        main,
        tmp_path,
        f"chorales.py:{cell}_jsb",
        *SHORT,
        f"--config.dataset.source_dir={originals}",
        "--config.dataset.min_bucket_size=4",
        "--config.dataset.num_buckets=2",
        "--config.model.stack.cell.hidden_size=8",
        "--config.task.num_sequences=4",
    )
    assert set(measured) == {"frame_nll", "later_frame_nll", "sequence_nll"}
    assert (tmp_path / "music.mid").exists() and (tmp_path / "music.wav").exists()


@pytest.mark.parametrize("model", ["lstm", "transformer"])
def test_sentiment(model, main, originals, tmp_path):
    width = "stack.cell.hidden_size" if model == "lstm" else "hidden_size"
    measured, report = run(
        main,
        tmp_path,
        f"sentiment.py:{model}",
        *SHORT,
        f"--config.dataset.source_dir={originals}",
        "--config.dataset.min_bucket_size=8",
        "--config.dataset.num_buckets=2",
        f"--config.model.{width}=8",
        "--config.task.num_sequences=8",
    )
    assert set(measured) == {"cross_entropy", "accuracy"}
    assert "negative" in report  # sentences with the names of their classes


@pytest.mark.parametrize("model", ["lstm", "transformer"])
def test_next_word(model, main, tmp_path):
    text = tmp_path / "text.txt"
    lines = [f"{words('uno dos tres cuatro', 1, 12)} {i}.\n" for i in range(200)]
    text.write_text("".join(lines))
    width = "stack.cell.hidden_size" if model == "lstm" else "hidden_size"
    _, report = run(
        main,
        tmp_path / "run",
        f"next_word.py:{model}",
        *SHORT,
        f"--config.dataset.path={text}",
        "--config.dataset.min_bucket_size=8",
        "--config.dataset.num_buckets=2",
        f"--config.model.{width}=8",
        "--config.task.num_sequences=8",
        "--config.task.top_p=0.5",
    )
    written = report.split("Sentences the model writes", 1)[1].split("</table>")[0]
    assert "the probability 0.5 together" in written
    sentences = re.findall("<td>(.*?)</td>", written)
    assert len(sentences) == 8
    known = {"uno", "dos", "tres", "cuatro", ".", "&lt;unk&gt;", *map(str, range(200))}
    assert {word for sentence in sentences for word in sentence.split()} <= known


LANGUAGE = [
    "--config.task.num_windows=3",
    "--config.task.window=10",
    "--config.task.evaluation_batch=2",
    "--config.task.sample_length=20",
]


@pytest.mark.parametrize("model", ["lstm", "min_gru", "linear", "transformer"])
def test_shakespeare(model, main, originals, tmp_path):
    width = "hidden_size" if model == "transformer" else "stack.cell.hidden_size"
    measured, report = run(
        main,
        tmp_path,
        f"shakespeare.py:{model}",
        *SHORT,
        *LANGUAGE,
        f"--config.dataset.source_dir={originals}",
        f"--config.model.{width}=8",
    )
    ratio = measured["bits_per_token"] / measured["cross_entropy"]
    assert ratio == pytest.approx(1 / np.log(2), rel=1e-4)
    assert "A text at temperature 0.8" in report
    told = (tmp_path / "samples.txt").read_text()
    text = (originals / "input.txt").read_text()
    prompt = text[int(0.9 * len(text)) :][:32]  # the first of the test split
    for temperature in (0.5, 0.8, 1.0):
        assert f"temperature {temperature}:\n{prompt}" in told


@pytest.mark.parametrize("model", ["gru", "seq2seq", "transformer"])
def test_multi30k(model, main, originals, tmp_path):
    fields = (
        ["hidden_size", "feedforward_size"]
        if model == "transformer"
        else ["encoder.cell.hidden_size", "decoder.cell.hidden_size"]
    )
    measured, report = run(
        main,
        tmp_path,
        f"translation.py:{model}_multi30k",
        *SHORT,
        f"--config.dataset.source_dir={originals}",
        f"--config.dataset.data_dir={tmp_path}/cache",
        "--config.dataset.vocabulary_limit=60",
        "--config.dataset.min_bucket_size=8",
        "--config.dataset.num_buckets=2",
        *(f"--config.model.{field}=8" for field in fields),
        "--config.task.num_pairs=8",
        "--config.task.evaluation_batch=8",
        "--config.task.beam_size=2",
    )
    assert set(measured) == {"cross_entropy", "token_accuracy", "bleu", "exact"}
    lines = (tmp_path / "translations.tsv").read_text().splitlines()
    assert len(lines) == 1 + 8
    rows = [line.split("\t") for line in lines[1:]]
    assert all(row[0].endswith("ω.") and row[1].endswith("ω.") for row in rows)
    assert lines[0].split("\t") == [
        "source",
        "reference",
        "translation",
        "log probability",
    ]
    assert "Translations" in report
    assert ("Attention" in report) == (model != "seq2seq")


def test_a_text_that_is_not_there_is_a_sentence(refused, tmp_path):
    message = refused(
        f"--config={SHIPPED}/next_word.py",
        f"--config.dataset.path={tmp_path}/none.txt",
    )
    assert "none.txt" in message


@pytest.mark.parametrize("model", ["histnetq", "emqnet"])
def test_prevalences_of_sentences(model, main, originals, tmp_path):
    measured, report = run(
        main,
        tmp_path,
        f"quantify.py:{model}_sentences",
        *SHORT,
        f"--config.dataset.source_dir={originals}",
        "--config.dataset.min_bucket_size=8",
        "--config.model.encoder.network.stack.cell.hidden_size=4",
        "--config.task.num_bags=8",
        "--config.task.mixed_bags=2",
        "--config.task.evaluation_bag_size=5",
        "--config.task.validation_bags=4",
        "--config.task.test_bags=4",
        "--config.task.baseline_steps=4",
    )
    assert set(measured) == {"absolute_error", "relative_absolute_error"}
    assert "EMQ" in report
