"""Makes the training text: short stories and conversations, from grammar.txt and a seed.

A story is a plot filled with words. Whatever a slot such as {treasure} draws first stays for the
whole story, so names, animals, objects and places agree from the first sentence to the last. That
agreement is what the model has to learn; the rest is vocabulary.

    python story_grammar.py --seed 1 --count 3      prints three stories
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple


def read_sections(path: Path) -> dict[str, str]:
    """Splits the file into [name] -> text; what comes before the first section is a comment."""
    parts = re.split(r"^\[(.+)\]\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {name: text.strip() for name, text in zip(parts[1::2], parts[2::2], strict=True)}


SECTIONS = read_sections(Path(__file__).with_name("grammar.txt"))


def entries(section: str) -> list[list[str]]:
    """The lines of a list, each split at its bars."""
    lines = [line for line in SECTIONS[section].splitlines() if line and line[0] != "#"]
    return [line.split(" | ") for line in lines]


@cache
def words(section: str) -> list[Any]:
    """The entries of a list: a string, or a list of strings where there are bars."""
    return [entry if len(entry) > 1 else entry[0] for entry in entries(section)]


class Being(NamedTuple):
    """What the grammar knows about a kind of hero."""

    home: str
    moved: str  # past tense
    gender: str  # "she", "he", or "-" when either will do
    flies: bool


class Plot(NamedTuple):
    """What happens in a story."""

    morals: list[str]
    paragraphs: list[list[list[str]]]  # a paragraph is a list of beats, a beat a list of sentences


def read_plot(text: str) -> Plot:
    """Reads the text of a plot section."""
    morals, *paragraphs = text.split("\n\n")
    return Plot(
        [line.removeprefix("* ") for line in morals.splitlines()],
        [[beat.split("\n/ ") for beat in f"\n{p}".split("\n- ")[1:]] for p in paragraphs],
    )


ADJECTIVES = {adjective: (trait, act) for adjective, trait, act in entries("adjectives")}
ANIMALS = {
    animal: Being(home, moved, gender, wings == "flies")
    for animal, home, moved, gender, wings in entries("animals")
}
PEOPLE = words("people")
NAMES = {gender: words(f"names {gender}") for gender in ("she", "he")}
PLOTS = [read_plot(text) for name, text in SECTIONS.items() if name.startswith("plot ")]

PRONOUNS = {
    "she": {"he": "she", "him": "her", "his": "her"},
    "he": {"he": "he", "him": "him", "his": "his"},
}


class Turn(NamedTuple):
    """One message of a conversation."""

    role: str
    content: str


def mend_articles(text: str) -> str:
    """Turns "a" into "an" where what filled the slot behind it wants that."""
    return re.sub(r"\b([Aa]) (?=(?!uni|one)[aeiou]|honest)", r"\1n ", text)


def is_held_out(adjective: str, animal: str) -> bool:
    """True for a tenth of the pairs: training never shows them, so they measure generalisation."""
    return (list(ADJECTIVES).index(adjective) * 3 + list(ANIMALS).index(animal)) % 10 == 7


class Slots(Mapping[str, Any]):
    """The words of one story: a slot draws from its list when first used, and then stays."""

    def __init__(self, rng: random.Random, fixed: dict[str, Any]) -> None:
        self._rng = rng
        self._drawn = fixed
        self._used: dict[str, list[Any]] = {}

    def __getitem__(self, slot: str) -> Any:
        if slot not in self._drawn:
            family = slot.rstrip("0123456789")
            used = self._used.setdefault(family, [])
            choices = words(family)
            if family == "obstacle" and not self._drawn["flies"]:
                choices = choices + words("obstacle on the ground")
            self._drawn[slot] = self._rng.choice([word for word in choices if word not in used])
            used.append(self._drawn[slot])
        return self._drawn[slot]

    def __iter__(self) -> Iterator[str]:
        return iter(self._drawn)

    def __len__(self) -> int:
        return len(self._drawn)


def fill(template: str, slots: Slots) -> str:
    """Fills a template, and then what its slots brought with them: {act} may hold {his}."""
    while "{" in template:
        template = template.format_map(slots)
    return template


class Hero(NamedTuple):
    """Whom a story is about."""

    adjective: str
    animal: str
    gender: str
    name: str


def make_hero(rng: random.Random, adjective: str | None = None, animal: str | None = None) -> Hero:
    """Draws a hero outside the held-out pairs; what is given stays as it is."""
    while True:
        chosen = adjective or rng.choice(list(ADJECTIVES)), animal or rng.choice(list(ANIMALS))
        if (adjective and animal) or not is_held_out(*chosen):
            break
    gender = ANIMALS[chosen[1]].gender
    if gender == "-":
        gender = rng.choice(["she", "he"])
    return Hero(*chosen, gender, rng.choice(NAMES[gender]))


def pronouns(gender: str, prefix: str = "") -> dict[str, str]:
    """The slots {he} {him} {his} {He} {His}, for a friend {fhe} and so on."""
    forms = PRONOUNS[gender]
    forms = {**forms, "He": forms["he"].capitalize(), "His": forms["his"].capitalize()}
    return {prefix + slot: word for slot, word in forms.items()}


def make_story(rng: random.Random, hero: Hero | None = None) -> str:
    """Writes one story of four to six paragraphs."""
    hero = hero or make_hero(rng)
    being = ANIMALS[hero.animal]
    animals = [a for a in ANIMALS if a not in PEOPLE and a != hero.animal]
    friend_animal, third_animal = rng.sample(animals, 2)
    # Friends that are not of the hero's gender keep "he" and "she" clear; a few stories mix.
    friend_gender = ANIMALS[friend_animal].gender
    if friend_gender == "-":
        others = {"she": "he", "he": "she"}
        friend_gender = others[hero.gender] if rng.random() < 0.8 else hero.gender
    names = [name for name in NAMES["she"] + NAMES["he"] if name != hero.name]
    friend_name = rng.choice([name for name in NAMES[friend_gender] if name != hero.name])
    third_name = rng.choice([name for name in names if name != friend_name])
    plot = rng.choice(PLOTS)
    trait, act = ADJECTIVES[hero.adjective]
    slots = Slots(
        rng,
        {
            **{"N": hero.name, "A": hero.animal, "J": hero.adjective},
            **{"home": being.home, "go": being.moved, "flies": being.flies},
            **{"trait": trait, "act": act},
            **{"F": friend_name, "B": friend_animal, "T": third_name, "C": third_animal},
            **pronouns(hero.gender),
            **pronouns(friend_gender, "f"),
            "moral": rng.choice(plot.morals),
            "look": rng.choice([look for look in words("look") if look != hero.adjective]),
        },
    )
    paragraphs = [[rng.choice(words("openings")), rng.choice(words("traits"))]]
    paragraphs += [[rng.choice(beat) for beat in beats] for beats in plot.paragraphs]
    paragraphs[-1] += [rng.choice(words("morals")), rng.choice(words("closings"))]
    lines = [" ".join(line for line in lines if line != "(nothing)") for lines in paragraphs]
    return mend_articles("\n\n".join(fill(line, slots) for line in lines))


def make_request(rng: random.Random, hero: Hero, templates: list[str]) -> str:
    """Asks for a story about the hero, in one of many ways."""
    what = f"a {hero.adjective} {hero.animal}"
    if rng.random() < 0.1:
        what = f"a {hero.animal}"
    if rng.random() < 0.1:
        what += f" named {hero.name}"
    request = mend_articles(rng.choice(templates).format(what=what))
    if rng.random() < 0.2:
        request = request[0].lower() + request[1:]
    if request[-1].isalpha() and rng.random() < 0.5:
        request += rng.choice(".!..")
    return request


def make_conversation(rng: random.Random) -> list[Turn]:
    """Writes a conversation: mostly one request and one story."""
    turns = []
    if rng.random() < 0.1:
        turns.append(Turn("system", rng.choice(words("system prompts"))))
    if rng.random() < 0.02:
        question, answer = rng.choice(words("small talk"))
        return [*turns, Turn("user", question), Turn("assistant", answer)]
    hero = make_hero(rng)
    request = make_request(rng, hero, words("requests"))
    if rng.random() < 0.06:
        request = rng.choice(words("open requests"))
    turns += [Turn("user", request), Turn("assistant", make_story(rng, hero))]
    if rng.random() < 0.15:
        hero = make_hero(rng)
        request = make_request(rng, hero, words("follow-ups"))
        turns += [Turn("user", request), Turn("assistant", make_story(rng, hero))]
    return turns


def main() -> None:
    parser = argparse.ArgumentParser(description="Print stories from the grammar.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=3)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    print("\n\n---\n\n".join(make_story(rng) for _ in range(arguments.count)))


if __name__ == "__main__":
    main()
