import html.parser
import json
import re

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments import figures, report

VOID = {"meta", "img", "br", "link", "input", "hr", "wbr"}


class Page(html.parser.HTMLParser):
    """Elements, texts and headings of a page; fails on tags that do not match."""

    def __init__(self, path):
        super().__init__()
        self.open, self.elements, self.texts, self.headings = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.texts.append(data)
        if self.open and self.open[-1] in ("h1", "h2", "summary"):
            self.headings.append(data)

    def tags(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


CONFIG = {
    "model": {"name": "HistNetQ", "head": {"hidden_sizes": [64, 32]}},
    "dataset": {"name": "digits"},
    "seed": 3,
}
ROWS = [
    {"step": 1, "split": "train", "loss": 1.0},
    {"step": 2, "split": "train", "loss": 0.5},
    {"step": 2, "split": "validation", "loss": 0.6, "absolute_error": 0.25},
    {"step": 4, "split": "train", "loss": float("nan")},
    {"step": 4, "split": "validation", "loss": 0.6, "absolute_error": None},
]
TEST = {"step": 4, "test": {"loss": 0.7, "absolute_error": 0.0123456}}


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "versions.json").write_text(
        json.dumps({"jax": "9.8.7", "backend": "cpu", "dataset_source": "a <package>"})
    )
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "metrics.jsonl").write_text(lines)
    (tmp_path / "evaluation.json").write_text(json.dumps(TEST))
    return tmp_path


def opaque_figure():
    figure = Figure(figsize=(2, 2), facecolor="white")
    figure.subplots().imshow(np.eye(3))
    return figure


def test_everything_of_the_run_is_in_the_page(workdir):
    sections = [
        report.Section(
            "Against the baselines",
            "First paragraph.\n\nSecond one.",
            table=[
                {"method": "EMQ", "absolute_error": 0.01234567},
                {"method": "CC", "absolute_error": None, "bags": 5000},
            ],
        ),
        report.Section("Pictures", figure=opaque_figure(), alt="a unit matrix"),
    ]
    path = report.write(workdir, sections)
    assert path == workdir / "report.html"
    page = Page(path)
    assert page.headings == [
        "HistNetQ on digits",
        "Test, step 4",
        "Training",
        "Against the baselines",
        "Pictures",
        "Config",
        "Versions",
    ]
    text = "".join(page.texts)
    for expected in [
        "4 training steps · data: a <package> · seed 3 · jax 9.8.7 on cpu",
        "0.01235",
        "First paragraph.",
        "Second one.",
        "5,000",
        "model.head.hidden_sizes",
        "[64, 32]",
    ]:
        assert expected in text
    # The figures: one curve per metric with more than one point, then the picture.
    labels = [attrs["aria-label"] for attrs in page.tags("svg")]
    assert labels == [
        "loss by training step",
        "absolute error by training step",
        "a unit matrix",
    ]
    assert len(page.tags("table")) == 3
    assert any(attrs.get("name") == "viewport" for attrs in page.tags("meta"))


def test_the_page_loads_nothing(workdir):
    section = report.Section("Picture", figure=opaque_figure())
    page = Page(report.write(workdir, [section]))
    assert not {"script", "link", "iframe", "object"} & {t for t, _ in page.elements}
    targets = [
        value
        for _, attrs in page.elements
        for name, value in attrs.items()
        if name in ("src", "href", "xlink:href", "srcset", "data")
    ]
    assert any(target.startswith("data:image/png") for target in targets)
    assert all(target.startswith(("data:", "#")) for target in targets)
    text = (workdir / "report.html").read_text()
    assert not re.search(r"@import|url\((?!#)", text)
    assert re.search(r"url\(#", text)


def test_only_transparent_figures_take_the_colours_of_the_page(workdir):
    drawn = figures.error_by_shift(np.eye(3), {"m": np.eye(3)}, np.full(3, 1 / 3))
    sections = [
        report.Section("Ours", figure=drawn),
        report.Section("Theirs", figure=opaque_figure()),
    ]
    path = report.write(workdir, sections)
    papers = [attrs.get("class") for attrs in Page(path).tags("figure")]
    assert papers == [None, None, None, "paper"]
    ours = re.search(r"<h2>Ours</h2>.*?</section>", path.read_text(), re.DOTALL)[0]
    assert "currentColor" in ours
    assert figures.INK not in ours


def test_what_the_user_wrote_stays_text(workdir):
    evil = "<script>alert(1)</script>"
    config = {"model": {"name": evil, evil: evil}, "dataset": {"name": '"><b>'}}
    (workdir / "config.json").write_text(json.dumps(config))
    (workdir / "evaluation.json").write_text(
        json.dumps({"step": 4, "test": {evil: 1.0}})
    )
    section = report.Section(
        evil, evil, figure=opaque_figure(), table=[{evil: evil}], alt='"><script>'
    )
    page = Page(report.write(workdir, [section]))
    assert not page.tags("script") and not page.tags("b")
    # Title twice, measure, heading, paragraph, table (2), config (3).
    assert sum(text.count(evil) for text in page.texts) == 10
    assert page.tags("svg")[-1]["aria-label"] == '"><script>'


def test_a_figure_too_large_to_draw_is_a_picture(workdir):
    figure = Figure(figsize=(2, 2), facecolor="none")
    figure.subplots().scatter(*np.random.default_rng(0).random((2, 20_000)))
    page = Page(report.write(workdir, [report.Section("Dots", figure=figure)]))
    (image,) = page.tags("img")
    assert image["alt"] == "Dots"
    assert (workdir / "report.html").stat().st_size < 1_000_000


def test_an_empty_workdir_has_a_report(tmp_path):
    workdir = tmp_path / "my run"
    workdir.mkdir()
    page = Page(report.write(workdir))
    assert page.headings == ["my run"]
    assert "No measures have been written yet." in page.texts


@pytest.mark.parametrize(
    ("splits", "heading", "value"),
    [
        pytest.param(
            ["train", "validation"], "Validation, step 4", "0.6", id="no test"
        ),
        pytest.param(["train"], "Train, step 4", "nan", id="no validation"),
    ],
)
def test_before_the_test_the_last_measures_come_first(workdir, splits, heading, value):
    (workdir / "evaluation.json").unlink()
    lines = [json.dumps(row) for row in ROWS if row["split"] in splits]
    # A killed process leaves half a line.
    (workdir / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 5, "spl')
    page = Page(report.write(workdir))
    assert heading in page.headings
    assert value in page.texts


def test_writing_again_gives_the_same_bytes_and_leaves_nothing_else(workdir):
    first = report.write(workdir).read_bytes()
    before = sorted(workdir.iterdir())
    assert report.write(workdir).read_bytes() == first
    assert sorted(workdir.iterdir()) == before


def test_a_failure_keeps_the_old_report(workdir, monkeypatch):
    old = report.write(workdir).read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(report.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        report.write(workdir, [report.Section("New")])
    assert (workdir / "report.html").read_bytes() == old
