"""Generated music: the files are parsed here from their published forms."""

import dataclasses
import hashlib
import io
import json
import struct
import wave

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.io
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as np_st

import archs
from data import chorales
from experiments.tasks import music_report

CONFIG = "experiments/configs/chorales.py"
ROLLS = np_st.arrays(
    np.uint8,
    st.tuples(st.integers(1, 12), st.just(88)),
    elements=st.integers(0, 1),
    fill=st.just(0),
)


def roll_of(notes, num_frames):
    roll = np.zeros((num_frames, 88), np.uint8)
    for note, start, stop in notes:
        assert not roll[start:stop, note - 21].any()
        roll[start:stop, note - 21] = 1
    return roll


@settings(max_examples=30, deadline=None)
@given(ROLLS)
def test_held_notes_are_the_roll(roll):
    notes = music_report.held_notes(roll)
    np.testing.assert_array_equal(roll_of(notes, len(roll)), roll)
    # No note goes on as another one.
    ends = {(note, stop) for note, _, stop in notes.tolist()}
    assert not ends & {(note, start) for note, start, _ in notes.tolist()}


def read_midi(content):
    """(microseconds a quarter, ticks a quarter, {(note, start, stop)}) of one track."""
    stream = io.BytesIO(content)
    assert stream.read(4) == b"MThd"
    size, kind, tracks, division = struct.unpack(">IHHH", stream.read(10))
    assert (size, kind, tracks) == (6, 0, 1)
    assert stream.read(4) == b"MTrk"
    body = io.BytesIO(stream.read(struct.unpack(">I", stream.read(4))[0]))
    assert not stream.read()

    def number():
        value = 0
        while True:
            (byte,) = body.read(1)
            value = value << 7 | byte & 0x7F
            if not byte & 0x80:
                return value

    now, tempo, status, down, notes = 0, None, None, {}, set()
    while True:
        now += number()
        (byte,) = body.read(1)
        if byte == 0xFF:
            (kind,) = body.read(1)
            value = body.read(number())
            if kind == 0x2F:
                assert not body.read() and not down
                return tempo, division, notes
            if kind == 0x51:
                tempo = int.from_bytes(value)
            continue
        if byte & 0x80:
            status, byte = byte >> 4, body.read(1)[0]
        (velocity,) = body.read(1)
        assert status in (8, 9)
        if status == 9 and velocity:
            assert byte not in down
            down[byte] = now
        else:
            notes.add((byte, down.pop(byte), now))


@settings(max_examples=20, deadline=None)
@given(ROLLS, st.sampled_from([1.0, 0.5]))
def test_the_midi_file_has_the_notes(tmp_path_factory, roll, quarters):
    path = tmp_path_factory.getbasetemp() / "music.mid"
    notes = music_report.held_notes(roll)
    music_report.write_midi(path, notes, quarters)
    tempo, division, found = read_midi(path.read_bytes())
    assert tempo == 600_000
    frame = int(division * quarters)
    assert {(n, a / frame, b / frame) for n, a, b in found} == set(
        map(tuple, notes.tolist())
    )


def test_the_sound_is_of_the_notes():
    notes = np.array([[57, 0, 2], [81, 3, 4]])
    sound = music_report.synthesize(notes, 0.5)
    rate = music_report.SAMPLE_RATE
    assert sound.dtype == np.int16
    assert len(sound) == pytest.approx(2.06 * rate, abs=1)
    assert np.abs(sound.astype(int)).max() == round(0.8 * 32767)
    for part, frequency in ((slice(0, rate), 220), (slice(rate * 3 // 2, None), 880)):
        spectrum = np.abs(np.fft.rfft(sound[part]))
        top = np.fft.rfftfreq(len(sound[part]), 1 / rate)[spectrum.argmax()]
        assert top == pytest.approx(frequency, abs=2)
    # Between the notes there is silence, and no note starts or ends at once.
    assert not sound[int(1.07 * rate) : int(1.49 * rate)].any()
    steps = np.abs(np.diff(sound.astype(int)))
    beginning = steps[: rate // 1000]
    assert beginning.max() < steps.max() / 4
    assert abs(int(sound[0])) == 0 and abs(int(sound[-1])) < 100


def test_many_notes_do_not_clip():
    notes = music_report.held_notes(np.ones((3, 88), np.uint8))
    sound = music_report.synthesize(notes, 0.1).astype(int)
    assert np.abs(sound).max() == round(0.8 * 32767)
    assert not music_report.synthesize(notes[:0], 0.1).any()


def test_independent_keys_of_known_frequencies():
    train = np.array([[1, 0], [1, 0], [0, 0], [1, 0]])
    test = np.array([[1, 0], [0, 1]])
    found = music_report.marginal_nll(train, test)
    np.testing.assert_allclose(
        found, -np.log([4 / 6 * 5 / 6, 2 / 6 * 1 / 6]), rtol=1e-12
    )


class Echo:
    """Is sure of the keys above those of the frame before."""

    def apply(self, variables, *arguments, method):
        if method == "init_cache":
            return ()
        cache, frame = arguments
        return 40 * (2 * jnp.roll(frame, 1, -1) - 1), cache


def test_what_is_written_is_fed_back():
    roll = np.asarray(music_report.compose(Echo(), {}, jax.random.key(0), 60, 1.0, 5))
    assert roll.shape == (5, 88)
    np.testing.assert_array_equal(roll, np.eye(88, dtype=bool)[39:44])
    low = music_report.compose(Echo(), {}, jax.random.key(0), 21, 1.0, 3)
    np.testing.assert_array_equal(low, np.eye(88, dtype=bool)[:3])


def test_notes_have_names():
    names = {21: "A0", 60: "C4", 61: "C#4", 69: "A4", 108: "C8"}
    assert {note: music_report.note_name(note) for note in names} == names


def test_a_low_temperature_decides():
    model = archs.SequenceModel(archs.RecurrentStack(archs.GRUCell(4)), 88)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 1, 88)))
    cold = [
        music_report.compose(model, variables, jax.random.key(seed), 60, 1e-6, 4)
        for seed in (0, 1)
    ]
    np.testing.assert_array_equal(*cold)
    warm = music_report.compose(model, variables, jax.random.key(0), 60, 1e6, 4)
    assert 0.3 < np.mean(warm[1:]) < 0.7


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A folder with a file of a few pieces in the published form."""
    rng = np.random.default_rng(0)
    cells = {}
    for name, count in (("traindata", 6), ("validdata", 2), ("testdata", 3)):
        cells[name] = np.empty((1, count), object)
        for i in range(count):
            cells[name][0, i] = (rng.random((4 + i, 88)) < 0.05).astype(np.uint8)
    folder = tmp_path / "source"
    folder.mkdir()
    path = folder / "JSB_Chorales.mat"
    scipy.io.savemat(path, cells)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    original = dataclasses.replace(chorales.ORIGINALS["jsb"], sha256=sha256)
    monkeypatch.setitem(chorales.ORIGINALS, "jsb", original)
    return folder


def test_the_report_of_a_run_has_the_music(main, source, tmp_path):
    workdir = tmp_path / "run"
    outcome = main(
        f"--config={CONFIG}:gru_jsb",
        f"--workdir={workdir}",
        f"--config.dataset.source_dir={source}",
        "--config.dataset.min_bucket_size=2",
        "--config.model.stack.cell.hidden_size=4",
        "--config.task.num_sequences=2",
        "--config.task.first_note=64",
        "--config.task.temperature=0.9",
        "--config.training.num_steps=2",
        "--config.training.steps_per_call=1",
        "--config.training.eval_every=2",
    )
    assert outcome.code == 0, outcome.err
    _, _, notes = read_midi((workdir / "music.mid").read_bytes())
    assert (64, 0) in {(note, start) for note, start, _ in notes}
    last = max(stop for _, _, stop in notes) / 480
    with wave.open(str(workdir / "music.wav")) as sound:
        seconds = sound.getnframes() / sound.getframerate()
        assert (sound.getnchannels(), sound.getsampwidth()) == (1, 2)
    assert seconds == pytest.approx(0.6 * last + 0.06, abs=0.01)
    page = (workdir / "report.html").read_text()
    assert "Music from one note" in page
    assert "From E4 on" in page and "at temperature 0.9" in page
    test = json.loads((workdir / "evaluation.json").read_text())["test"]
    row = page.split("<td>SequenceModel</td>")[1].split("</tr>")[0]
    assert f"{test['frame_nll']:.4g}</td>" in row
