"""Generated sentences in Spanish: agreement, words told by what follows, dates."""

import dataclasses
import functools
import string
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from data import sequences
from data.datasets import Spec
from data.sequences import Vocabulary


def _table(vocabulary: Vocabulary, phrases: Sequence[str]) -> np.ndarray:
    """Ids of phrases, int32 [phrase, longest], zero at padding."""
    return sequences.pad([vocabulary.encode(phrase.split()) for phrase in phrases])[0]


def _vocabulary(*phrases: str) -> Vocabulary:
    return Vocabulary(tuple(sorted({w for p in phrases for w in p.split()})))


def _optional(key: jax.Array, words: np.ndarray, count: jax.Array, places: int):
    """`count` [n, 1] of `places` words each drawn from `words`, int32 [n, places]."""
    shape = (len(count), places)
    drawn = jnp.asarray(words)[jax.random.randint(key, shape, 0, len(words))]
    return jnp.where(jnp.arange(places) < count, drawn, sequences.PADDING)


# (article, noun) in singular and plural. None of them but their articles and endings
# tells the number, and both genders are there.
_SUBJECTS = (
    "la bicicleta/las bicicletas",
    "la casa/las casas",
    "la silla/las sillas",
    "la camisa/las camisas",
    "la puerta/las puertas",
    "la novela/las novelas",
    "la guitarra/las guitarras",
    "la lámpara/las lámparas",
    "el coche/los coches",
    "el libro/los libros",
    "el cuadro/los cuadros",
    "el barco/los barcos",
    "el piano/los pianos",
    "el zapato/los zapatos",
    "el vestido/los vestidos",
    "el reloj/los relojes",
)
_PEOPLE = (
    "la vecina/las vecinas",
    "la maestra/las maestras",
    "la niña/las niñas",
    "la doctora/las doctoras",
    "la prima/las primas",
    "el vecino/los vecinos",
    "el maestro/los maestros",
    "el niño/los niños",
    "el pintor/los pintores",
    "el abuelo/los abuelos",
)
_VERBS = (
    "compró/compraron",
    "vendió/vendieron",
    "pintó/pintaron",
    "perdió/perdieron",
    "encontró/encontraron",
    "regaló/regalaron",
    "vio/vieron",
    "limpió/limpiaron",
)
_PREPOSITIONS = ("con", "sobre", "tras", "bajo", "ante", "para", "sin")
_ADVERBS = ("ayer", "hoy", "siempre", "además", "aquí", "también", "entonces", "allí")


@dataclasses.dataclass(frozen=True)
class NumberAgreement:
    """Whether a sentence goes on with "es" or "son", which its first noun decides.

        la bicicleta que compraron los vecinos ayer sobre el barco -> es
        las bicicletas con el piano también -> son

    Between subject and verb there are k attractors, each "que" with a verb and people
    or a preposition with a thing, and some adverbs. The subject and every attractor
    have numbers of their own, singular or plural with the probability 1/2 each, so
    that nothing but the subject tells the number of the verb.

    Chance: one half. To go by the noun next to the verb is right whenever k = 0, and
    half of the times else.

    After Linzen, Dupoux and Goldberg, "Assessing the ability of LSTMs to learn
    syntax-sensitive dependencies", TACL 2016. Generated, so there is no licence.

    Attributes:
        min_attractors: fewest attractors of train and validation.
        max_attractors: most attractors.
        max_adverbs: most adverbs; their number is uniform, and so are their places
            behind the subject and the attractors.
        test_attractors: the number of attractors in the test split; None: as in train.
        test_adverbs: the number of adverbs in the test split; None: as in train.
    """

    min_attractors: int = 0
    max_attractors: int = 4
    max_adverbs: int = 3
    test_attractors: int | None = None
    test_adverbs: int | None = None

    arrays: ClassVar[dict] = {"train": {}, "validation": {}, "test": {}}

    def __post_init__(self):
        for name in ("min_attractors", "max_adverbs"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)}")
        for name in ("test_attractors", "test_adverbs"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)}")
        if self.max_attractors < self.min_attractors:
            raise ValueError(
                f"max_attractors must be {self.min_attractors} or more, not "
                f"{self.max_attractors}"
            )

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """All words."""
        pairs = (*_SUBJECTS, *_PEOPLE, *_VERBS)
        words = (*_PREPOSITIONS, *_ADVERBS, "que")
        return _vocabulary(*words, *(p.replace("/", " ") for p in pairs))

    @property
    def spec(self) -> Spec:
        """Two classes of sentences."""
        return sequences.spec(
            "number_agreement",
            2,
            class_names=("es", "son"),
            vocabulary_size=len(self.vocabulary),
        )

    def _forms(self, pairs: Sequence[str]) -> jax.Array:
        """Ids [pair, number, word]."""
        forms = [_table(self.vocabulary, p.split("/")) for p in pairs]
        return jnp.asarray(np.stack(forms))

    def sample(
        self, key: jax.Array, num_sequences: int, split: str, arrays: dict
    ) -> dict:
        """Draws sentences up to the verb.

        Args:
            key: PRNG key.
            num_sequences: how many.
            split: "train", "validation" or "test".
            arrays: not used.

        Returns:
            "inputs" int32 [n, time], ids of words; "lengths" int32 [n]; "targets" int32
            [n], 0 for "es" and 1 for "son"; "attractors" int32 [n], how many.
        """
        del arrays
        attractors = (self.min_attractors, self.max_attractors)
        adverbs = (0, self.max_adverbs)
        if split == "test" and self.test_attractors is not None:
            attractors = (self.test_attractors,) * 2
        if split == "test" and self.test_adverbs is not None:
            adverbs = (self.test_adverbs,) * 2
        keys = jax.random.split(key, 10)
        column, places = (num_sequences, 1), (num_sequences, attractors[1])

        def draw(key, forms, shape, number):
            which = jax.random.randint(key, shape, 0, len(forms))
            return forms[which, number]

        # The subject.
        number = jax.random.randint(keys[0], column, 0, 2)
        things, people, verbs = map(self._forms, (_SUBJECTS, _PEOPLE, _VERBS))
        subject = draw(keys[1], things, column, number)  # [n, 1, 2]
        # Attractors, of four words at most.
        numbers = jax.random.randint(keys[2], places, 0, 2)
        que = jnp.full((*places, 1), self.vocabulary.encode(["que"])[0])
        verb = draw(keys[3], verbs, places, numbers)
        clause = jnp.concatenate(
            [que, verb, draw(keys[4], people, places, numbers)], axis=-1
        )
        prepositions = jnp.asarray(_table(self.vocabulary, _PREPOSITIONS))
        which = jax.random.randint(keys[5], places, 0, len(prepositions))
        phrase = jnp.concatenate(
            [prepositions[which], draw(keys[6], things, places, numbers)], axis=-1
        )
        phrase = jnp.pad(phrase, ((0, 0), (0, 0), (0, 1)))
        is_clause = jax.random.bernoulli(keys[7], 0.5, (*places, 1))
        words = jnp.where(is_clause, clause, phrase)  # [n, attractor, 4]
        count_key, adverb_key, place_key = jax.random.split(keys[8], 3)
        count = jax.random.randint(count_key, column, attractors[0], attractors[1] + 1)
        real = jnp.arange(attractors[1]) < count
        words = jnp.where(real[..., None], words, sequences.PADDING)
        # Each adverb behind the subject or behind one of the attractors.
        num_adverbs = jax.random.randint(keys[9], column, adverbs[0], adverbs[1] + 1)
        adverb = _optional(
            adverb_key,
            _table(self.vocabulary, _ADVERBS)[:, 0],
            num_adverbs,
            adverbs[1],
        )
        place = jax.random.randint(place_key, adverb.shape, 0, count + 1)
        behind = place[:, None, :] == jnp.arange(attractors[1] + 1)[:, None]
        adverb = jnp.where(behind, adverb[:, None], sequences.PADDING)
        subject = jnp.pad(subject, ((0, 0), (0, 0), (0, 2)))
        blocks = jnp.concatenate([subject, words], axis=1)  # [n, 1 + attractor, 4]
        blocks = jnp.concatenate([blocks, adverb], axis=-1)
        width = 2 + 4 * attractors[1] + adverbs[1]
        inputs, lengths = sequences.compact(blocks.reshape(num_sequences, -1))
        return {
            "inputs": inputs[:, :width].astype(jnp.int32),
            "lengths": lengths,
            "targets": number[:, 0],
            "attractors": count[:, 0],
        }

    def decode(self, ids: np.ndarray) -> str:
        """The words of ids."""
        return " ".join(self.vocabulary.decode(ids))

    def token(self, token_id: int) -> str:
        """The word of an id."""
        return self.vocabulary.token(token_id)


_OPENERS = ("ayer", "hoy", "mañana", "esta tarde", "el lunes", "un día")
_SEEING = (
    "deberías ver",
    "me gustó",
    "quiero ver",
    "recordamos",
    "echo de menos",
    "nos hablaron de",
    "estuve pensando en",
    "vimos",
)
_GAP = ("quizás", "seguro", "creo", "dicen", "además", "claro", "siempre", "también")
_ENDINGS = (
    (
        "es una ciudad con gran cantidad de monumentos",
        "es una ciudad a orillas de un río",
        "es una capital con mucha historia",
        "tiene un coliseo y muchas plazas",
        "está llena de turistas y de fuentes",
    ),
    (
        "es una película de Alfonso Cuarón",
        "es una película que te va a encantar",
        "es una cinta en blanco y negro",
        "tiene un guion y una fotografía excelentes",
        "está rodada en México y ganó tres premios",
    ),
)


@dataclasses.dataclass(frozen=True)
class RomaDisambiguation:
    """Whether "Roma" is the city or the film, which only the words behind it tell.

        deberías ver Roma , es una ciudad con gran cantidad de monumentos -> city
        deberías ver Roma , es una película de Alfonso Cuarón -> film

    The class is drawn with the probability 1/2 and has a part in nothing but the
    ending. The words before "Roma", and those of the gap behind it, are drawn from the
    same words for both.

    Chance: exactly one half, and no network that reads forwards only can do better,
    since what it has seen at "Roma" is independent of the class.

    Generated, so there is no licence.

    Attributes:
        max_gap: most words between the comma and the ending.
    """

    max_gap: int = 3

    arrays: ClassVar[dict] = {"train": {}, "validation": {}, "test": {}}

    def __post_init__(self):
        if self.max_gap < 0:
            raise ValueError(f"max_gap must be 0 or more, not {self.max_gap}")

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """All words."""
        endings = (ending for endings in _ENDINGS for ending in endings)
        return _vocabulary("Roma ,", *_OPENERS, *_SEEING, *_GAP, *endings)

    @property
    def spec(self) -> Spec:
        """Two classes at one word of a sentence."""
        return sequences.spec(
            "roma_disambiguation",
            2,
            class_names=("city", "film"),
            vocabulary_size=len(self.vocabulary),
        )

    def sample(
        self, key: jax.Array, num_sequences: int, split: str, arrays: dict
    ) -> dict:
        """Draws sentences.

        Args:
            key: PRNG key.
            num_sequences: how many.
            split: all splits are alike.
            arrays: not used.

        Returns:
            "inputs" int32 [n, time], ids of words; "lengths" int32 [n]; "targets" int32
            [n, time], the class at "Roma" and 0 elsewhere; "target_mask" bool
            [n, time], True at "Roma" alone.
        """
        del split, arrays
        keys = jax.random.split(key, 6)
        label = jax.random.randint(keys[0], (num_sequences,), 0, 2)

        def draw(key, phrases):
            table = jnp.asarray(_table(self.vocabulary, phrases))
            return table[jax.random.randint(key, (num_sequences,), 0, len(table))]

        gap = jax.random.randint(keys[3], (num_sequences, 1), 0, self.max_gap + 1)
        gap_words = _table(self.vocabulary, _GAP)[:, 0]
        endings = _table(self.vocabulary, [e for kind in _ENDINGS for e in kind])
        endings = jnp.asarray(endings).reshape(2, len(_ENDINGS[0]), -1)
        which = jax.random.randint(keys[5], (num_sequences,), 0, endings.shape[1])
        roma = jnp.asarray(self.vocabulary.encode(["Roma", ","]))
        words = jnp.concatenate(
            [
                draw(keys[1], ["", *_OPENERS]),
                draw(keys[2], _SEEING),
                jnp.broadcast_to(roma, (num_sequences, 2)),
                _optional(keys[4], gap_words, gap, self.max_gap),
                endings[label, which],
            ],
            axis=1,
        )
        inputs, lengths = sequences.compact(words)
        mask = inputs == roma[0]
        return {
            "inputs": inputs.astype(jnp.int32),
            "lengths": lengths,
            "targets": jnp.where(mask, label[:, None], 0),
            "target_mask": mask,
        }

    def decode(self, ids: np.ndarray) -> str:
        """The words of ids."""
        return " ".join(self.vocabulary.decode(ids))

    def token(self, token_id: int) -> str:
        """The word of an id."""
        return self.vocabulary.token(token_id)


_MONTHS = ("enero", "febrero", "marzo", "abril", "mayo", "junio", "julio", "agosto")
_MONTHS += ("septiembre", "octubre", "noviembre", "diciembre")
_WEEKDAYS = ("lunes", "martes", "miércoles", "jueves", "viernes", "sábado", "domingo")
DATE_FORMATS = (
    "{day} de {month} de {year}",
    "{day} de {month} del {year}",
    "el {day} de {month} de {year}",
    "{weekday}, {day} de {month} de {year}",
    "{weekday} {day} de {month}, {year}",
    "{day} {month} {year}",
    "{day} {short}. {year}",
    "{month} {day}, {year}",
    "{month} de {year}, día {day}",
    "{day}/{number}/{year}",
    "{day2}/{number2}/{year}",
    "{day}-{short}-{year}",
    "{day2}.{number2}.{year}",
    "{year}/{number2}/{day2}",
    "{year}, {day} de {month}",
)
"""How dates are written; all put the day before the month's number, or year first."""


@dataclasses.dataclass(frozen=True)
class DateTranslation:
    """Dates as people write them in Spanish, to be written as in ISO 8601.

        3 de mayo de 2021 -> 2021-05-03
        lunes, 3 de mayo de 2021 -> 2021-05-03

    Characters are the tokens. A date has one translation, and no two share one, so
    that every date can be right. The dates of 1900 to 2099 are divided into splits of
    80, 10 and 10 %, so that no date of the test split is ever trained on.

    Chance: one date of 7,305 in the test split. Generated, so there is no licence.

    Attributes:
        split_seed: seed of the splits.
    """

    split_seed: int = 0

    @functools.cached_property
    def source_vocabulary(self) -> Vocabulary:
        """All characters of the inputs."""
        text = "".join((*_MONTHS, *_WEEKDAYS, string.digits))
        for form in DATE_FORMATS:
            text += "".join(literal for literal, *_ in string.Formatter().parse(form))
        return Vocabulary(tuple(sorted(set(text))))

    @property
    def vocabulary(self) -> Vocabulary:
        """All characters of the targets."""
        return Vocabulary(tuple("-" + string.digits))

    @property
    def spec(self) -> Spec:
        """A character a step, given a date in other characters."""
        size = len(self.vocabulary)
        return sequences.spec(
            "date_translation",
            size,
            class_names=(*sequences.SPECIAL_TOKENS, *self.vocabulary.words),
            sizes={split: len(a["dates"]) for split, a in self.arrays.items()},
            vocabulary_size=size,
            source_vocabulary_size=len(self.source_vocabulary),
        )

    @functools.cached_property
    def arrays(self) -> dict:
        """{split: {"dates": int32 [n, 4]}}: year, month, day, weekday from 0."""
        days = np.arange("1900-01-01", "2100-01-01", dtype="datetime64[D]")
        months = days.astype("datetime64[M]")
        dates = np.stack(
            [
                days.astype("datetime64[Y]").astype(int) + 1970,
                months.astype(int) % 12 + 1,
                (days - months).astype(int) + 1,
                (days.astype(int) + 3) % 7,  # the first of 1970 was a Thursday
            ],
            axis=1,
        ).astype(np.int32)
        dates = dates[np.random.default_rng(self.split_seed).permutation(len(dates))]
        ends = [round(0.8 * len(dates)), round(0.9 * len(dates))]
        parts = np.split(dates, ends)
        splits = ("train", "validation", "test")
        return {
            s: {"dates": jnp.asarray(p)} for s, p in zip(splits, parts, strict=True)
        }

    @functools.cached_property
    def _pieces(self) -> dict[str, tuple[int, np.ndarray]]:
        """Field -> (column of `dates`, ids of what each value is written as)."""
        numbers = [f"{i:02}" for i in range(100)]
        written = {
            "year": (0, [str(year) for year in range(2100)]),
            "month": (1, ["", *_MONTHS]),
            "short": (1, ["", *(month[:3] for month in _MONTHS)]),
            "number": (1, [str(i) for i in range(13)]),
            "number2": (1, numbers),
            "day": (2, [str(i) for i in range(32)]),
            "day2": (2, numbers),
            "weekday": (3, _WEEKDAYS),
        }
        encode = self.source_vocabulary.encode
        return {
            name: (column, sequences.pad([encode(text) for text in texts])[0])
            for name, (column, texts) in written.items()
        }

    def _write(self, form: str, dates: jax.Array) -> jax.Array:
        """Dates [n, 4] in one form, ids [n, width] with padding anywhere."""
        parts = []
        for literal, field, *_ in string.Formatter().parse(form):
            ids = jnp.asarray(self.source_vocabulary.encode(literal), jnp.int32)
            parts.append(jnp.broadcast_to(ids, (len(dates), len(ids))))
            if field:
                column, table = self._pieces[field]
                parts.append(jnp.asarray(table)[dates[:, column]])
        parts.append(jnp.full((len(dates), 1), sequences.EOS))
        return jnp.concatenate(parts, axis=1)

    def sample(
        self, key: jax.Array, num_sequences: int, split: str, arrays: dict
    ) -> dict:
        """Draws dates and how they are written.

        Args:
            key: PRNG key.
            num_sequences: how many.
            split: "train", "validation" or "test".
            arrays: `self.arrays`.

        Returns:
            "inputs" int32 [n, time], characters and EOS; "lengths" int32 [n]; "targets"
            int32 [n, 12], BOS, ten characters and EOS; "target_lengths" int32 [n], all
            12.
        """
        date_key, form_key = jax.random.split(key)
        dates = arrays[split]["dates"]
        dates = dates[jax.random.randint(date_key, (num_sequences,), 0, len(dates))]
        forms = [self._write(form, dates) for form in DATE_FORMATS]
        width = max(form.shape[1] for form in forms)
        forms = jnp.stack(
            [jnp.pad(f, ((0, 0), (0, width - f.shape[1]))) for f in forms]
        )
        which = jax.random.randint(form_key, (num_sequences,), 0, len(forms))
        inputs, lengths = sequences.compact(forms[which, jnp.arange(num_sequences)])
        year, month, day = dates[:, 0], dates[:, 1], dates[:, 2]
        dash, zero = self.vocabulary.encode("-0")
        digits = [year // 1000, year // 100, year // 10, year, None]
        digits += [month // 10, month, None, day // 10, day]
        targets = [
            jnp.full(num_sequences, dash) if digit is None else zero + digit % 10
            for digit in digits
        ]
        ends = [jnp.full(num_sequences, i) for i in (sequences.BOS, sequences.EOS)]
        return {
            "inputs": inputs.astype(jnp.int32),
            "lengths": lengths,
            "targets": jnp.stack([ends[0], *targets, ends[1]], 1).astype(jnp.int32),
            "target_lengths": jnp.full(num_sequences, 12, jnp.int32),
        }

    def decode(self, ids: np.ndarray) -> str:
        """The characters of targets' ids."""
        return "".join(self.vocabulary.decode(ids))

    def token(self, token_id: int) -> str:
        """The character of a target's id."""
        return self.vocabulary.token(token_id)

    def decode_source(self, ids: np.ndarray) -> str:
        """The characters of inputs' ids."""
        return "".join(self.source_vocabulary.decode(ids))

    def source_token(self, token_id: int) -> str:
        """The character of an input's id."""
        return self.source_vocabulary.token(token_id)
