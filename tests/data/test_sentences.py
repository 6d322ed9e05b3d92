"""Generated sentences; labels are found anew from the words."""

import collections
import datetime
import re

import jax
import numpy as np
import pytest
from scipy import stats

import data
from data import sentences

KEY = jax.random.key(0)
ARTICLES = {"el": 0, "la": 0, "los": 1, "las": 1}
PREPOSITIONS = {"con", "sobre", "tras", "bajo", "ante", "para", "sin"}


def numbers(dataset, num_sequences=1000, split="train"):
    draw = jax.jit(dataset.sample, static_argnums=(1, 2))
    batch = draw(KEY, num_sequences, split, dataset.arrays)
    return jax.tree.map(np.asarray, batch)


# Agreement.


def articles(words):
    """The numbers that the articles of a sentence tell, in their order."""
    return [ARTICLES[word] for word in words if word in ARTICLES]


def test_the_verb_agrees_with_the_first_noun():
    dataset = data.NumberAgreement()
    batch = numbers(dataset)
    names = ("inputs", "lengths", "targets", "attractors")
    for ids, length, target, attractors in zip(*map(batch.get, names), strict=True):
        words = dataset.decode(ids).split()
        assert len(words) == length and ids[length - 1 :].any() and "<unk>" not in words
        assert (
            words[0] in ARTICLES
            and words[1].endswith("s") == bool(target)
            or (words[1] == "reloj" and target == 0)
        )
        found = articles(words)
        assert found[0] == target
        assert len(found) == 1 + attractors
        assert sum(w == "que" or w in PREPOSITIONS for w in words) == attractors
        # The verb of a clause agrees with the people behind it.
        for place in np.flatnonzero(np.array(words) == "que"):
            verb, article = words[place + 1], words[place + 2]
            assert verb.endswith("ron") == ARTICLES[article]
    assert dataset.spec.class_names == ("es", "son")
    assert stats.chisquare(np.bincount(batch["attractors"])).pvalue > 1e-4
    assert stats.binomtest(int(batch["targets"].sum()), 1000).pvalue > 1e-4


def test_attractors_say_nothing_about_the_verb():
    dataset = data.NumberAgreement(min_attractors=1)
    batch = numbers(dataset, 2000)
    last = [articles(dataset.decode(ids).split())[-1] for ids in batch["inputs"]]
    right = int((np.array(last) == batch["targets"]).sum())
    assert stats.binomtest(right, 2000).pvalue > 1e-4  # one half
    plural = [
        np.mean(articles(dataset.decode(ids).split())[1:]) for ids in batch["inputs"]
    ]
    assert abs(np.corrcoef(plural, batch["targets"])[0, 1]) < 0.09  # 4 deviations


def test_the_test_split_has_the_distance_asked_for():
    dataset = data.NumberAgreement(test_attractors=6, test_adverbs=2)
    batch = numbers(dataset, 50, "test")
    assert (batch["attractors"] == 6).all()
    adverbs = set(sentences._ADVERBS)
    for ids in batch["inputs"]:
        assert sum(word in adverbs for word in dataset.decode(ids).split()) == 2
    # Clauses have four words, phrases three.
    assert (batch["lengths"] >= 2 + 2 + 18).all()
    assert (batch["lengths"] <= 2 + 2 + 24).all()
    assert set(numbers(dataset, 300)["attractors"]) == set(range(5))


def test_no_attractors_and_no_adverbs_leave_the_subject():
    batch = numbers(data.NumberAgreement(max_attractors=0, max_adverbs=0), 10)
    assert batch["inputs"].shape == (10, 2) and (batch["lengths"] == 2).all()


def test_sentences_are_too_many_to_be_learned_by_heart():
    batch = numbers(data.NumberAgreement(min_attractors=2), 2000)
    assert len(np.unique(batch["inputs"], axis=0)) == 2000
    assert set(batch["inputs"].ravel()) <= set(range(93))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: data.NumberAgreement(-1), "min_attractors must be 0 or more, not -1"),
        (lambda: data.NumberAgreement(3, 2), "max_attractors must be 3 or more, not 2"),
        (lambda: data.NumberAgreement(test_adverbs=-2), "test_adverbs must be 0"),
        (lambda: data.RomaDisambiguation(-1), "max_gap must be 0 or more, not -1"),
    ],
)
def test_impossible_values_are_named(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


# Roma.


def test_only_what_follows_tells_the_class():
    dataset = data.RomaDisambiguation(max_gap=2)
    batch = numbers(dataset, 4000)
    before, behind = collections.defaultdict(lambda: [0, 0]), [set(), set()]
    classes = []
    names = ("inputs", "lengths", "targets", "target_mask")
    for ids, length, target, mask in zip(*map(batch.get, names), strict=True):
        words = dataset.decode(ids).split()
        assert len(words) == length
        place = words.index("Roma")
        assert np.flatnonzero(mask).tolist() == [place]
        assert not np.delete(target, place).any()
        label = target[place]
        classes.append(label)
        rest = words[place + 2 :]
        gap = [word for word in rest if word in sentences._GAP]
        assert len(gap) <= 2 and rest[: len(gap)] == gap
        before[" ".join(words[:place]), len(gap)][label] += 1
        behind[label].add(" ".join(rest[len(gap) :]))
    assert stats.binomtest(sum(classes), 4000).pvalue > 1e-4
    # What comes before, and how long the gap is, is independent of the class:
    prefixes = collections.defaultdict(lambda: np.zeros(2))
    gaps = collections.defaultdict(lambda: np.zeros(2))
    for (prefix, gap), counts in before.items():
        prefixes[prefix] += counts
        gaps[gap] += counts
    assert len(prefixes) > 40
    for table in (prefixes, gaps):
        assert stats.chi2_contingency(np.array(list(table.values()))).pvalue > 1e-4
    # The endings of the two classes have nothing in common.
    assert not behind[0] & behind[1]
    assert any("ciudad" in ending for ending in behind[0])
    assert any("Cuarón" in ending for ending in behind[1])


def test_changing_the_class_changes_nothing_before_the_ending():
    """With the same random numbers, the two classes begin alike, exactly."""
    dataset = data.RomaDisambiguation()
    draw = jax.random.randint
    batches = []
    for label in (0, 1):
        with pytest.MonkeyPatch.context() as patch:
            first = []

            def randint(key, shape, low, high, first=first, label=label, **kwargs):
                drawn = draw(key, shape, low, high, **kwargs)
                if not first:  # the class is drawn first
                    first.append(key)
                    return drawn * 0 + label
                return drawn

            patch.setattr(jax.random, "randint", randint)
            batches.append(dataset.sample(KEY, 200, "train", {}))
    city, film = (jax.tree.map(np.asarray, batch) for batch in batches)
    np.testing.assert_array_equal(city["target_mask"], film["target_mask"])
    place = city["target_mask"].argmax(1)
    until = np.arange(city["inputs"].shape[1]) <= place[:, None]
    np.testing.assert_array_equal(city["inputs"][until], film["inputs"][until])
    assert (city["inputs"] != film["inputs"]).any(1).all()
    assert (city["targets"].max(1) == 0).all() and (film["targets"].max(1) == 1).all()


# Dates.

MONTHS = ("enero", "febrero", "marzo", "abril", "mayo", "junio", "julio", "agosto")
MONTHS += ("septiembre", "octubre", "noviembre", "diciembre")


def parse(text):
    """The date that a text tells; a reader written for this test."""
    month = [m for m in re.findall("[a-z]{3,}", text) if m[:3] in SHORT]
    found = [int(number) for number in re.findall(r"\d+", text)]
    year = next(number for number in found if number >= 1900)
    found.remove(year)
    if month:
        return datetime.date(year, SHORT[month[-1][:3]], found[0])
    if text.startswith(str(year)):
        found = found[::-1]
    day, number = found
    return datetime.date(year, number, day)


def shape(text):
    """A date with other words and numbers in their places."""
    return re.sub(r"\d+", "0", re.sub("[a-záé]{3,}", "x", text))


SHORT = {month[:3]: i + 1 for i, month in enumerate(MONTHS)}
WEEKDAYS = ("lunes", "martes", "miércoles", "jueves", "viernes", "sábado", "domingo")


def test_dates_are_translated():
    dataset = data.DateTranslation()
    batch = numbers(dataset, 3000)
    shapes = set()
    for source, target in zip(batch["inputs"], batch["targets"], strict=True):
        text, translation = dataset.decode_source(source), dataset.decode(target)
        # "martes" would be read as "mar(zo)".
        weekday = next((day for day in WEEKDAYS if text.startswith(day)), "")
        date = parse(text[len(weekday) :])
        assert date.isoformat() == translation
        assert not weekday or WEEKDAYS[date.weekday()] == weekday
        shapes.add(shape(text))
        length = np.flatnonzero(source == 2)[0] + 1
        assert not source[length:].any()
    fields = dict.fromkeys(("year", "day", "day2", "number", "number2"), "1")
    fields |= {"month": "mayo", "short": "may", "weekday": "lunes"}
    assert shapes == {shape(form.format(**fields)) for form in sentences.DATE_FORMATS}
    np.testing.assert_array_equal(batch["targets"][:, [0, -1]], [[1, 2]] * 3000)
    assert dataset.spec.num_classes == dataset.spec.vocabulary_size == 15
    assert batch["inputs"].max() < dataset.spec.source_vocabulary_size


@pytest.mark.parametrize(
    "dataset", [data.NumberAgreement(), data.RomaDisambiguation(), data.EmbeddedReber()]
)
def test_tokens_are_those_of_the_text(dataset):
    batch = numbers(dataset, 5, "test")
    for ids, length in zip(batch["inputs"], batch["lengths"], strict=True):
        tokens = [dataset.token(i) for i in ids]
        text = dataset.decode(ids)
        assert "".join(tokens[:length]) == text.replace(" ", "")
        assert set(tokens[length:]) <= {"<pad>"}


def test_tokens_of_source_and_target_have_their_own_names():
    dataset = data.DateTranslation()
    batch = numbers(dataset, 5, "test")
    for source, target in zip(batch["inputs"], batch["targets"], strict=True):
        text = "".join(dataset.source_token(i) for i in source)
        assert text.startswith(dataset.decode_source(source) + "</s>")
        text = "".join(dataset.token(i) for i in target)
        assert text.startswith("<s>" + dataset.decode(target) + "</s>")


def test_no_date_is_in_two_splits():
    dataset = data.DateTranslation(split_seed=1)
    parts = {
        split: {tuple(date[:3]) for date in np.asarray(arrays["dates"]).tolist()}
        for split, arrays in dataset.arrays.items()
    }
    assert len(set.union(*parts.values())) == sum(map(len, parts.values())) == 73_049
    assert dataset.spec.sizes == {s: len(dates) for s, dates in parts.items()}
    batch = numbers(dataset, 200, "test")
    dates = {tuple(map(int, dataset.decode(t).split("-"))) for t in batch["targets"]}
    assert dates <= parts["test"]
