"""Music that a model writes from one note, and what its likelihood is to be held to."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import mido
import numpy as np
import scipy.io.wavfile

from archs import generate
from data import chorales
from experiments import figures
from experiments.report import Section

NUM_FRAMES = 64
TEMPO = 100  # quarter notes a minute
SAMPLE_RATE = 22_050
# What a frame is, in quarter notes.
QUARTERS = {"jsb": 1.0, "nottingham": 0.5}
WORDS = {"jsb": "quarter notes", "nottingham": "eighth notes"}


def sections(task: Any, state: Any, workdir: Path, seed: int) -> list[Section]:
    """What the model writes; writes `music.mid` and `music.wav`.

    Args:
      task: a `SequencePrediction` of `data.Chorales` with the objective
        frame_likelihood.
      state: the trained state.
      workdir: the run's; `test_sequences.npz` is there.
      seed: of the music.
    """
    dataset = task.dataset
    found = [_likelihoods(task, workdir)]
    if not hasattr(task.model, "decode_step"):
        return found
    key = jax.random.key(seed)
    roll = np.asarray(
        compose(task.model, state.variables, key, task.first_note, task.temperature)
    )
    quarters, words = QUARTERS[dataset.collection], WORDS[dataset.collection]
    notes = held_notes(roll)
    write_midi(workdir / "music.mid", notes, quarters)
    samples = synthesize(notes, 60 / TEMPO * quarters)
    scipy.io.wavfile.write(workdir / "music.wav", SAMPLE_RATE, samples)
    test = dataset.arrays["test"]
    # The piece of the test split whose length is the nearest.
    nearest = np.abs(np.asarray(test["lengths"]) - NUM_FRAMES).argmin()
    true = np.asarray(test["frames"][nearest, :NUM_FRAMES])
    return [
        *found,
        Section(
            title="Music from one note",
            text=f"From {note_name(task.first_note)} on, {NUM_FRAMES} {words}: each "
            "frame is drawn from what the model expects after the frames before, every "
            f"key by itself at temperature {task.temperature:g}. To be heard in "
            "music.wav and music.mid. Below it a piece of the test split.",
            figure=figures.piano_roll(
                {"written by the model": notes, "of the test split": held_notes(true)},
                words,
            ),
            alt="Piano rolls of generated music and of a test piece",
        ),
    ]


def compose(
    model: Any,
    variables: Any,
    key: jax.Array,
    first_note: int,
    temperature: float,
    num_frames: int = NUM_FRAMES,
) -> jax.Array:
    """1 to N: the model's own frames fed back, from one note on.

    Each key is drawn from Bernoulli(σ(logit / temperature)).

    Args:
      model: predicts 88 logits a frame, with `init_cache` and `decode_step`.
      variables: the model's.
      key: of the draws.
      first_note: its MIDI number; alone in the first frame.
      temperature: above 0; below 1 the likely becomes likelier.
      num_frames: frames in all.

    Returns:
      bool [frame, 88].
    """

    @jax.jit
    def write(variables, key):
        def step(cache, frame):
            return model.apply(variables, cache, frame, method="decode_step")

        def sample(key, logits):
            return jax.random.bernoulli(key, jax.nn.sigmoid(logits / temperature))

        cache = model.apply(variables, 1, num_frames, method="init_cache")
        # Pieces begin after an empty frame, as in training.
        silence = jnp.zeros((1, chorales.NUM_KEYS))
        _, cache = step(cache, silence)
        first = silence.at[0, first_note - chorales.LOWEST_NOTE].set(1)
        frames = generate(step, cache, first, num_frames - 1, sample, key)
        return jnp.concatenate([first, frames[0]]) > 0

    return write(variables, key)


def note_name(note: int) -> str:
    """The name of a MIDI number: 60, middle C, is C4."""
    names = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
    return f"{names[note % 12]}{note // 12 - 1}"


def held_notes(roll: np.ndarray) -> np.ndarray:
    """Notes of a piano roll: a key that is down in successive frames is one note.

    Args:
      roll: [frame, 88], of 0 and 1 or bool.

    Returns:
      int [note, 3]: the MIDI number, the first frame and the frame after the last; by
      first frame, then by key.
    """
    change = np.diff(np.pad(roll.astype(np.int8), ((1, 1), (0, 0))), axis=0)
    # By key, then by frame: starts and stops of a key take turns.
    keys, starts = np.nonzero(change.T == 1)
    _, stops = np.nonzero(change.T == -1)
    notes = np.stack([keys + chorales.LOWEST_NOTE, starts, stops], axis=1)
    return notes[np.lexsort((keys, starts))]


def write_midi(path: Path, notes: np.ndarray, quarters: float) -> None:
    """Writes notes as a standard MIDI file of one track.

    Args:
      path: of the file.
      notes: of `held_notes`.
      quarters: how many quarter notes a frame is.
    """
    file = mido.MidiFile(type=0)
    ticks = round(quarters * file.ticks_per_beat)  # of a frame
    track = file.add_track()
    track.append(mido.MetaMessage("set_tempo", tempo=mido.bpm2tempo(TEMPO)))
    # What ends comes before what begins, so that a key can be struck again.
    events = [(stop, "note_off", note) for note, _, stop in notes.tolist()]
    events += [(start, "note_on", note) for note, start, _ in notes.tolist()]
    now = 0
    for frame, kind, note in sorted(events):
        time = (frame - now) * ticks
        track.append(mido.Message(kind, note=note, velocity=64, time=time))
        now = frame
    file.save(path)


def synthesize(notes: np.ndarray, seconds: float) -> np.ndarray:
    """Sound of notes: harmonics 1 to 6, of which the higher are softer and die sooner.

        sum_k k^(-3/2) exp(-k t / 0.8 s) sin(2π k f t),  f = 440 Hz * 2^((note - 69)/12)

    Every note swells for 10 ms and fades for 60 ms after its end.

    Args:
      notes: of `held_notes`.
      seconds: the time of a frame.

    Returns:
      int16 [sample], the loudest at 80 % of what the format can hold; `SAMPLE_RATE`.
    """
    attack, release = 0.01, 0.06
    end = notes[:, 2].max(initial=0) * seconds + release
    sound = np.zeros(int(np.ceil(end * SAMPLE_RATE)))
    for note, start, stop in notes.tolist():
        begin = round(start * seconds * SAMPLE_RATE)
        size = int(((stop - start) * seconds + release) * SAMPLE_RATE)
        time = np.arange(size) / SAMPLE_RATE
        envelope = np.minimum(time / attack, (time[-1] - time) / release).clip(0, 1)
        frequency = 440 * 2 ** ((note - 69) / 12)
        for k in range(1, 7):
            if k * frequency < SAMPLE_RATE / 2:
                wave = np.sin(2 * np.pi * k * frequency * time)
                volume = k**-1.5 * np.exp(-k * time / 0.8) * envelope
                sound[begin : begin + size] += volume * wave
    loudest = np.abs(sound).max(initial=1e-9)
    return np.round(0.8 * np.iinfo(np.int16).max * sound / loudest).astype(np.int16)


def marginal_nll(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Negative log-likelihoods of frames when keys keep to their frequencies.

    A key is down with the probability (n + 1) / (N + 2), where it was down in n of N
    frames of training.

    Args:
      train: frames [N, key], of 0 and 1.
      test: frames [M, key].

    Returns:
      Nats, [M].
    """
    frequency = (train.sum(0, dtype=float) + 1) / (len(train) + 2)
    return -(test @ np.log(frequency) + (1.0 - test) @ np.log1p(-frequency))


def _likelihoods(task: Any, workdir: Path) -> Section:
    frames, pieces = {}, {}
    for split in ("train", "test"):
        arrays = {k: np.asarray(v) for k, v in task.dataset.arrays[split].items()}
        time = np.arange(arrays["frames"].shape[1])
        real = time < arrays["lengths"][:, None]
        frames[split], pieces[split] = arrays["frames"][real], np.nonzero(real)[0]
    floor = marginal_nll(frames["train"], frames["test"])
    by_piece = np.bincount(pieces["test"], floor) / np.bincount(pieces["test"])
    with np.load(workdir / "test_sequences.npz") as saved:
        model, lengths = saved["frame_nll"], saved["lengths"]
    names = ("independent keys", type(task.model).__name__)
    nats = (floor.mean(), np.average(model, weights=lengths))
    nats_by_piece = (by_piece.mean(), model.mean())
    return Section(
        title="Negative log-likelihood of the test split",
        text="Independent keys sound as often as in the train split (add-one "
        f"smoothing), whatever came before. {len(floor):,} frames; means over all of "
        "them, and over pieces of the means over their frames.",
        table=[
            {"model": name, "nats a frame": float(a), "mean over pieces": float(b)}
            for name, a, b in zip(names, nats, nats_by_piece, strict=True)
        ],
    )
