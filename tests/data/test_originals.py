import dataclasses
import gzip
import hashlib
import io
import zipfile

import numpy as np
import pytest
import requests

import data
from data import builders, originals

CONTENT = b"Ser, o no ser.\n"
# The time is fixed: pytest names tests by these bytes, and all processes of
# pytest-xdist must find the same names.
GZIPPED = gzip.compress(CONTENT, mtime=0)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
FILE = originals.Original("play.txt", SHA256, "https://example.org/raw/input.txt")
MEMBER = originals.Original(
    "plays/one.txt", SHA256, "https://example.org/plays.zip", "plays.zip"
)


def zipped(name="plays/one.txt"):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(name, CONTENT)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("original", "name", "content"),
    [
        (FILE, "play.txt", CONTENT),
        (FILE, "play.txt.gz", GZIPPED),
        (FILE, "input.txt", CONTENT),
        (MEMBER, "plays.zip", zipped()),
        (MEMBER, "one.txt", CONTENT),
        (MEMBER, "plays/one.txt", CONTENT),
    ],
)
def test_a_file_is_found_in_a_folder_under_any_of_its_names(
    original, name, content, tmp_path
):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    found, source = originals.read(original, "plays", source_dir=tmp_path)
    assert found == CONTENT and source == f"folder {tmp_path}"


@pytest.mark.parametrize(
    ("original", "name", "content", "reason"),
    [
        (FILE, "play.txt", b"Ser.", "content's sha256 is"),
        (FILE, "play.txt.gz", GZIPPED[:-9], "cannot be read"),
        (MEMBER, "plays.zip", zipped("other.txt"), "cannot be read"),
        (MEMBER, "plays.zip", zipped()[:-30], "content's sha256 is"),
    ],
)
def test_what_is_not_the_published_file_is_refused(
    original, name, content, reason, tmp_path
):
    (tmp_path / name).write_bytes(content)
    message = f"{name} is damaged or not the published file: expected.*{reason}"
    with pytest.raises(data.DataError, match=message):
        originals.read(original, "plays", source_dir=tmp_path)


def test_a_missing_file_says_what_to_do(tmp_path):
    message = "plays needs play.txt: allow download=True, or put input.txt of https.*"
    with pytest.raises(data.DataError, match=message + str(tmp_path)):
        originals.read(FILE, "plays", data_dir=tmp_path)
    with pytest.raises(data.DataError, match="one.txt: put plays.zip of") as error:
        originals.read(MEMBER, "plays", source_dir=tmp_path, download=True)
    assert "download=True" not in str(error.value)


class Response(io.BytesIO):
    def iter_content(self, size):
        yield from iter(lambda: self.read(size), b"")


@pytest.mark.parametrize(("original", "content"), [(FILE, GZIPPED), (MEMBER, zipped())])
def test_a_download_is_kept(original, content, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        builders, "connect", lambda url: asked.append(url) or Response(content)
    )
    for source in (f"downloaded from {original.url}", f"folder {tmp_path}"):
        found, told = originals.read(
            original, "plays", data_dir=tmp_path, download=True
        )
        assert found == CONTENT and told.startswith(source)
    assert asked == [original.url]
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1


def test_a_damaged_download_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(builders, "connect", lambda url: Response(b"<html>"))
    with pytest.raises(data.DataError, match="not the published file"):
        originals.read(FILE, "plays", data_dir=tmp_path, download=True)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_no_network_says_what_to_do_instead(tmp_path, monkeypatch):
    def fail(url):
        raise requests.ConnectTimeout("no answer")

    monkeypatch.setattr(builders, "connect", fail)
    with pytest.raises(data.DataError, match="no answer.*Instead, put input.txt"):
        originals.read(FILE, "plays", data_dir=tmp_path, download=True)


def parse(contents):
    text = contents["play"].decode()
    rows = [
        {"text": word, "letters": len(word), "matrix": np.full((i, 2), i, np.uint8)}
        for i, word in enumerate(text.split())
    ]
    return {"train": rows, "test": rows[:1]}


EXAMPLE = {"text": str, "letters": int, "matrix": np.ndarray}


def prepare(tmp_path, original=FILE, parse=parse, **arguments):
    return originals.examples(
        "plays",
        {"play": original},
        parse,
        EXAMPLE,
        data_dir=tmp_path / "prepared",
        **{"source_dir": tmp_path, **arguments},
    )


def same(found, expected):
    assert found.keys() == expected.keys()
    for split, rows in expected.items():
        for row, other in zip(rows, found[split], strict=True):
            assert row["text"] == other["text"] and row["letters"] == other["letters"]
            np.testing.assert_array_equal(row["matrix"], other["matrix"])


def test_examples_are_prepared_once(tmp_path):
    path = tmp_path / "play.txt"
    path.write_bytes(CONTENT)
    found, source = prepare(tmp_path)
    same(found, parse({"play": CONTENT}))
    assert source == f"folder {tmp_path}"
    path.unlink()  # not needed any more
    again, source = prepare(tmp_path, parse=None, source_dir=None)
    same(again, found)
    assert source == f"folder {tmp_path}"


def test_other_contents_have_a_folder_of_their_own(tmp_path):
    (tmp_path / "play.txt").write_bytes(CONTENT)
    prepare(tmp_path)
    content = "¿Qué es la vida?".encode()
    other = dataclasses.replace(FILE, sha256=hashlib.sha256(content).hexdigest())
    with pytest.raises(data.DataError, match="play.txt is damaged or not"):
        prepare(tmp_path, other)
    (tmp_path / "play.txt").write_bytes(content)
    found, _ = prepare(tmp_path, other)
    assert [row["text"] for row in found["train"]] == ["¿Qué", "es", "la", "vida?"]
    same(prepare(tmp_path)[0], parse({"play": CONTENT}))


def test_what_a_killed_process_left_is_no_dataset(tmp_path):
    (tmp_path / "play.txt").write_bytes(CONTENT)

    def killed(contents):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path, parse=killed)
    same(prepare(tmp_path)[0], parse({"play": CONTENT}))


def test_damaged_examples_are_a_sentence(tmp_path):
    (tmp_path / "play.txt").write_bytes(CONTENT)
    prepare(tmp_path)
    (file,) = (tmp_path / "prepared").rglob("*train.array_record*")
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(data.DataError, match="delete the folder and load again"):
        prepare(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "play.txt").write_bytes(CONTENT)
    (tmp_path / "prepared").write_text("a file")
    with pytest.raises(data.DataError, match="Another folder may be given"):
        prepare(tmp_path)
