import logging
import shutil
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.checkpoints import Checkpoints
from experiments.errors import UserError


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    # As `runner.main` does.
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
    for name in ("absl", "asyncio"):
        logger = logging.getLogger(name)
        monkeypatch.setattr(logger, "level", logging.CRITICAL)
        logger.manager._clear_cache()


def state_of(step):
    return {
        "kernel": step * jnp.arange(3000.0).reshape(30, 100),
        "count": jnp.int32(step),
        "flags": jnp.array([True, False]),
        "half": jnp.full(3, step, jnp.bfloat16),
        "key": jax.random.key(step),
        "nothing": None,
    }


def notes_of(step):
    return {
        "best": {"value": 0.1 / step, "step": step},
        "sums": {"loss": (0.1 * step, 3.0)},
        "position": 100 * step,
    }


TEMPLATE = jax.eval_shape(lambda: state_of(1))


def same(state, other):
    def array(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key_data(leaf)
        return leaf

    leaves, others = jax.tree.leaves(state), jax.tree.leaves(other)
    return jax.tree.structure(state) == jax.tree.structure(other) and all(
        a.dtype == b.dtype and np.array_equal(array(a), array(b))
        for a, b in zip(leaves, others, strict=True)
    )


def saved(directory, measures, keep_best=1):
    checkpoints = Checkpoints(directory, keep_best)
    for step, measure in measures.items():
        checkpoints.save(step, state_of(step), notes_of(step), measure)
    checkpoints.close()
    return directory


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoints") / "checkpoints"
    return saved(directory, {1: 0.3, 2: 0.2, 3: 0.1}, keep_best=3)


@pytest.fixture
def copy(three, tmp_path):
    return shutil.copytree(three, tmp_path / "checkpoints")


def latest(directory):
    checkpoints = Checkpoints(directory)
    restored = checkpoints.restore_latest(TEMPLATE)
    checkpoints.close()
    return restored


def test_state_and_notes_come_back_bit_for_bit(copy):
    step, state, notes = latest(copy)
    assert step == 3
    assert same(state, state_of(3))
    sums = {name: tuple(pair) for name, pair in notes["sums"].items()}
    assert notes | {"sums": sums} == notes_of(3)


def test_a_state_that_was_donated_after_saving_is_saved_as_it_was(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    overwrite = jax.jit(
        lambda state: jax.tree.map(jnp.zeros_like, state), donate_argnums=0
    )
    state = {"kernel": jnp.ones((500, 500))}
    expected = np.asarray(state["kernel"]).copy()
    checkpoints.save(1, state, {}, None)
    overwrite(state)
    checkpoints.wait()
    restored, _ = checkpoints.restore(1, {"kernel": jnp.zeros((500, 500))})
    checkpoints.close()
    np.testing.assert_array_equal(restored["kernel"], expected)


def test_without_a_checkpoint_there_is_nothing_to_restore(tmp_path):
    assert latest(tmp_path / "checkpoints") is None


def test_the_two_latest_and_the_best_are_kept(tmp_path):
    directory = tmp_path / "checkpoints"
    measures = {1: 0.3, 2: 0.1, 3: 0.2, 4: None, 5: 0.4, 6: 0.5}
    checkpoints = Checkpoints(saved(directory, measures))
    assert checkpoints.steps() == [2, 5, 6]
    assert checkpoints.best_step() == 2
    checkpoints.close()
    checkpoints = Checkpoints(saved(tmp_path / "more", measures, keep_best=2))
    assert checkpoints.steps() == [2, 3, 5, 6]
    checkpoints.close()


def test_unmeasured_the_latest_is_the_best(tmp_path):
    checkpoints = Checkpoints(saved(tmp_path / "c", {1: None, 2: None}))
    assert checkpoints.best_step() == 2
    checkpoints.close()


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    directory = saved(tmp_path / "c", {1: None})
    checkpoints = Checkpoints(directory)
    checkpoints.save(1, state_of(7), notes_of(7), 0.5)
    checkpoints.close()
    checkpoints = Checkpoints(directory)
    state, notes = checkpoints.restore(1, TEMPLATE)
    assert same(state, state_of(7)) and notes["position"] == 700
    checkpoints.save(2, state_of(2), notes_of(2), 0.6)
    checkpoints.wait()
    assert checkpoints.best_step() == 1
    checkpoints.close()


def files():
    """What a checkpoint consists of; data files have random names."""
    return [
        "metrics/metrics",
        "progress/metadata",
        "state/_METADATA",
        "state/manifest.ocdbt",
        "state/d/*",
        "state/ocdbt.process_0/d/*",
    ]


def flipped(content, position):
    return (
        content[:position] + bytes([content[position] ^ 0x41]) + content[position + 1 :]
    )


@pytest.mark.parametrize(
    "damage",
    [
        None,
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: flipped(content, 0),
        lambda content: flipped(content, len(content) // 2),
        lambda content: flipped(content, len(content) - 1),
    ],
    ids=["deleted", "emptied", "truncated", "first", "middle", "last"],
)
@pytest.mark.parametrize("pattern", files())
def test_no_damaged_file_is_ever_taken_for_the_state(copy, pattern, damage):
    path = max((copy / "3").glob(pattern), key=lambda path: path.stat().st_size)
    content = path.read_bytes()
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(content))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step, state, notes = latest(copy)
    caught = [str(w.message) for w in caught if w.category is UserWarning]
    assert same(state, state_of(step))
    assert notes["position"] == 100 * step
    if step == 2:
        (message,) = caught
        assert message.startswith("The checkpoint of step 3 cannot be read (")
        assert message.endswith("Falling back to the one before.")
        assert (copy.parent / "damaged_checkpoints" / "3" / "state").is_dir()
        assert latest(copy)[0] == 2  # and it stays so, without a warning
    else:
        assert step == 3


def test_every_single_byte_of_the_data_is_guarded(copy):
    path = max((copy / "3").rglob("*"), key=lambda p: p.is_file() and p.stat().st_size)
    content = path.read_bytes()
    checkpoints = Checkpoints(copy, read_only=True)
    for position in np.linspace(0, len(content) - 1, 25).astype(int):
        path.write_bytes(flipped(content, position))
        try:
            state, _ = checkpoints.restore(3, TEMPLATE)
        except Exception:
            continue
        assert same(state, state_of(3))  # a byte that means nothing
    checkpoints.close()


def test_of_two_damaged_ones_the_third_serves(copy):
    for step in (2, 3):
        (copy / str(step) / "progress" / "metadata").unlink()
    with pytest.warns() as caught:
        assert latest(copy)[0] == 1
    assert len(caught) == 2


def test_when_all_are_damaged_nothing_is_guessed(copy):
    for step in (1, 2, 3):
        (copy / str(step) / "progress" / "metadata").write_text("{")
    with pytest.warns(), pytest.raises(UserError, match="None of the checkpoints"):
        latest(copy)
    kept = copy.parent / "damaged_checkpoints"
    assert sorted(path.name for path in kept.iterdir()) == ["1", "2", "3"]


def test_another_model_does_not_fit(copy):
    checkpoints = Checkpoints(copy, read_only=True)
    with pytest.raises(Exception, match="shape"):
        checkpoints.restore(3, state_of(3) | {"kernel": jnp.zeros((30, 99))})
    checkpoints.close()


def test_reading_leaves_a_save_at_work_alone(copy):
    half_written = copy / "4.orbax-checkpoint-tmp-0"
    half_written.mkdir()
    checkpoints = Checkpoints(copy, read_only=True)
    assert checkpoints.best_step() == 3
    checkpoints.close()
    assert half_written.exists()
    assert latest(copy)[0] == 3  # the run itself clears it away


def test_a_folder_that_cannot_be_written_is_a_sentence(copy):
    checkpoints = Checkpoints(copy)
    shutil.rmtree(copy)
    copy.write_text("in the way")
    with pytest.raises(UserError, match="Could not write a checkpoint to"):
        checkpoints.save(4, state_of(4), notes_of(4), None)
        checkpoints.wait()
