"""People, titles, sentences, amounts, times and dates of the tiny tasks, without overlap between splits. Imports no AppWorld.

Disjoint by construction: every pool of words below is dealt out once among the splits, so that no word of one split's names and titles
occurs in another's, and every number is drawn from the class of its split modulo len(SPLITS). A sum of n amounts stays in that class
when n leaves 1 modulo len(SPLITS). The split "base" is the population of the base databases.
"""

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from random import Random
from typing import TypeVar

T = TypeVar("T")

SPLITS = ("base", "train", "dev", "test")
DAY_MINUTES = 24 * 60
FIRST_BIRTHDAY, LAST_BIRTHDAY = datetime.date(1960, 1, 1), datetime.date(2000, 1, 1)

FIRST_NAMES = """
Abrel Anvi Arlo Bexley Brisa Calder Cosima Corvin Dalia Denholm Doria Edmar Elowen Evander Faris Fenna Finola Garrick Ginevra Greta
Hadley Halina Hesper Idris Ilka Imara Jorah Juno Jessamy Kaveh Kerstin Koa Leda Linus Lorcan Maelis Marek Mirela Nadir Nell Noor
Odell Oriel Osric Petra Pascoe Quill Quenna Ravi Rhoswen Rufus Saskia Sorrel Stellan Tamsin Thea Torin Ulric Una Vesna Viggo Wilka
Xanthe Yara
""".split()
LAST_NAMES = """
Achterberg Alderway Ambrick Bellhouse Birchall Brackwell Calloway Carnmore Coldstone Danforth Deepdale Dunmarsh Eastgate Elmhurst Fallow
Farrant Fernsby Gallimore Glasswell Greenacre Hartwood Hazelby Holloway Inchfield Ironside Ivywell Jardine Jessop Kelbrook Kirkwall
Langmere Larkfield Lockhart Marchbank Merriden Millgate Netherby Norwick Nunnery Oakhanger Orchardson Overbeck Penhallow Pinewell
Quarrington Quickley Ravenhall Redfern Rookwood Sandilands Silverdale Stanmore Tanglewood Thistleton Underhill Upwell Valebrook
Vinter Wainwright Westerby Whitlock Yarrowby Yewdale Zellweger
""".split()
ADJECTIVES = """
amber ancient arctic blazing bold brisk bronze calm cedar clever cobalt copper coral crimson crooked distant dusty early electric
emerald fading faithful feral flying foggy frosty gentle gilded golden hidden hollow humble indigo ivory jolly jagged kindly lazy lively
lonely lunar marble mellow midnight misty mossy nimble northern orange pale patient polished quiet rapid rusty scarlet silent silver
sleepy solar spare tender velvet
""".split()
NOUNS = """
acorn anchor anvil apron atlas basket beacon bicycle blanket bridge bucket candle canoe carpet castle chimney compass cradle curtain
drum engine falcon feather fiddle garden glacier hammer harbour helmet island jacket kettle kite ladder lantern lighthouse locket
magnet mirror mitten needle oar orchard paddle parcel pebble piano pillow pitcher pond quilt raft ribbon saddle sail shovel sparrow
teapot thimble trumpet tunnel umbrella violin wagon
""".split()
SENTENCES = (
    "Bring the {0} to the {1} before noon",
    "Ask about the {0} and the {1}",
    "The {0} goes next to the {1}",
    "Repair the {0}, then paint the {1}",
    "Do not forget the {0} or the {1}",
)


@dataclass(frozen=True)
class Person:
    """One of our own invention: the address is in example.com and the number in the 555 range, which belong to nobody."""

    first_name: str
    last_name: str
    phone_number: str
    birthday: str
    """YYYY-MM-DD"""

    @property
    def name(self) -> str:
        return f"{self.first_name} {self.last_name}"

    @property
    def email(self) -> str:
        return f"{self.first_name}.{self.last_name}@example.com".lower()

    def password(self, app: str) -> str:
        return f"{self.last_name[:4]}-{blake2b(f'{app} {self.email}'.encode(), digest_size=5).hexdigest()}"


def deal(pool: Sequence[str], seed: int) -> dict[str, list[str]]:
    """The words of `pool` dealt out among the splits in an order fixed by `seed`: {split: words}, no word twice."""
    order = Random(f"{seed} {pool[0]}")
    shuffled = [word for _, word in sorted((order.random(), word) for word in pool)]
    return {split: shuffled[i :: len(SPLITS)] for i, split in enumerate(SPLITS)}


class Content:
    """What one task draws. Two draws of one task never give the same person, title, sentence or date.

    `drawn` collects every value: the generator checks that no two splits share one.
    """

    def __init__(self, seed: int, split: str, task: str) -> None:
        """`task` is any key that differs between the tasks of a seed. Raises ValueError if `split` is not one of SPLITS."""
        self.residue = SPLITS.index(split)
        self._random = Random(f"{seed} {split} {task}")
        self._first, self._last, self._adjectives, self._nouns = (
            deal(pool, seed)[split] for pool in (FIRST_NAMES, LAST_NAMES, ADJECTIVES, NOUNS)
        )
        self.drawn: set[str] = set()

    def below(self, n: int) -> int:
        """An integer in [0, n) that answers nothing: a position, a choice."""
        return int(self._random.random() * n)

    def choice(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        return [items[i] for _, i in sorted((self._random.random(), i) for i in range(len(items)))]

    def number(self, low: int, high: int) -> int:
        """An integer in [low, high] of the split's class: what a task pays, counts or answers."""
        first = low + (self.residue - low) % len(SPLITS)
        value = first + len(SPLITS) * self.below((high - first) // len(SPLITS) + 1)
        self.drawn.add(str(value))
        return value

    def title(self) -> str:
        """Two capitalised words, such as "Amber Lantern"."""
        return self._new(lambda: self._words().title())

    def titles(self, n: int) -> list[str]:
        return [self.title() for _ in range(n)]

    def sentence(self) -> str:
        """A short sentence without a full stop, so that quoting it in an instruction leaves no doubt about its end."""
        return self._new(lambda: self.choice(SENTENCES).format(self.choice(self._nouns), self._words()))

    def time(self) -> str:
        """HH:MM."""
        return self._new(lambda: "{:02d}:{:02d}".format(*divmod(self._of_class(DAY_MINUTES), 60)))

    def date(self) -> str:
        """YYYY-MM-DD, between 1960 and 2000."""
        days = (LAST_BIRTHDAY - FIRST_BIRTHDAY).days
        return self._new(lambda: (FIRST_BIRTHDAY + datetime.timedelta(days=self._of_class(days))).isoformat())

    def person(self) -> Person:
        first_name, last_name = self._new(lambda: f"{self.choice(self._first)} {self.choice(self._last)}").split()
        phone_number = self._new(lambda: f"555{self.residue}{self.below(10**6):06d}")
        return Person(first_name, last_name, phone_number, self.date())

    def people(self, n: int) -> list[Person]:
        return [self.person() for _ in range(n)]

    def _words(self) -> str:
        return f"{self.choice(self._adjectives)} {self.choice(self._nouns)}"

    def _of_class(self, n: int) -> int:
        return self.residue + len(SPLITS) * self.below(n // len(SPLITS))

    def _new(self, draw: Callable[[], str]) -> str:
        while (value := draw()) in self.drawn:
            pass
        self.drawn.add(value)
        return value
