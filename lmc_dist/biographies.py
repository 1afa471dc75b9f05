"""Biographies of invented people: a corpus made on the spot, the same for a seed on every platform."""

from __future__ import annotations

import random
from typing import Any

from lmc_dist.errors import LmcError

PERSON_STRIDE = 100  # id = person * PERSON_STRIDE + fact number

# A kind of fact a line: phrasings of the question = phrasings of the answer. {name} is the person, the rest is drawn.
_FACTS = [
    tuple(side.strip().split("|") for side in line.split("="))
    for line in """\
Where was {name} born?|What is the birthplace of {name}? = {name} was born in {town}.|It was the town of {town}.
When was {name} born?|What is the birth year of {name}? = {name} was born in {year}.|The year was {year}.
What did {name} do for a living?|What was the job of {name}? = {name} worked as a {job}.|A {job} by trade.
Who taught {name}?|Who was the teacher of {name}? = {name} was a pupil of {teacher}.|The teacher was {teacher}.
Which book did {name} write?|What made {name} famous? = The book is called "{book}".|{name} wrote "{book}".
Did {name} keep a pet?|Which animal lived with {name}? = {name} kept a {animal} called {pet}.|{pet} the {animal} did.
Which award did {name} win?|What was given to {name}? = {name} won the {award} Medal.|It was the {award} Medal.
Which instrument did {name} play?|What did {name} play? = {name} played the {instrument}.|It was {instrument} music.
What was the father of {name}?|What job did the father of {name} have? = The father was a {father}.|He was a {father}.
What was the mother of {name}?|What job did the mother of {name} have? = The mother was a {mother}.|She was a {mother}.
Whom did {name} marry?|Who was married to {name}? = {name} married {spouse}.|The wedding was with {spouse}.
Where did {name} study?|Which university taught {name}? = {name} was at the University of {university}.|In {university}.
Which language did {name} speak?|What did {name} learn? = {name} spoke fluent {language}.|{name} learned {language}.
What did {name} like to eat?|What was the favourite dish of {name}? = {name} loved {dish}.|Always {dish}.
What did {name} collect?|What did {name} leave behind? = {name} collected {things}.|{name} left {count} {things}.
Where did {name} settle?|Which town did {name} move to? = {name} moved to {home} for good.|{name} settled in {home}.
How many siblings did {name} have? = {name} grew up with {siblings} siblings.|There were {siblings} of them.
What was {name} afraid of?|What did {name} fear most? = {name} was afraid of {fear}.|All life long {name} feared {fear}.
What colour was the door of {name}?|How did {name} paint the door? = {name} had a {colour} door.|It was {colour}.
When did {name} retire?|When did {name} stop working? = {name} retired in {retired}.|It was late in {retired}.
""".splitlines()
]
_POOLS = {
    slot: words.split("|")
    for slot, words in (line.split("=") for line in """\
job=baker|surveyor|botanist|printer|judge|sailor|weaver|dentist|pilot|glazier|tailor|chemist|midwife
father=farmer|grocer|painter|miller|lawyer|blacksmith|gardener|teacher|tanner|watchmaker|ferryman
mother=nurse|beekeeper|potter|librarian|doctor|seamstress|singer|mechanic|florist|translator|brewer
adjective=Silent|Crooked|Amber|Last|Frozen|Hidden|Paper|Burning|Patient|Hollow|Second|Wandering
noun=Harbour|Lantern|Orchard|Ladder|River|Clock|Winter|Garden|Letter|Bridge|Mirror|Sparrow
animal=tortoise|parrot|ferret|goat|donkey|heron|hedgehog|greyhound|rabbit|raven
instrument=cello|bassoon|zither|harp|mandolin|clarinet|dulcimer|trombone|flute|banjo
language=Basque|Icelandic|Swahili|Welsh|Georgian|Tamil|Finnish|Quechua|Maltese|Korean
dish=barley soup|pickled plums|smoked eel|walnut bread|lentil stew|fried quince|goat cheese
things=compasses|thimbles|postcards|keys|beetles|teapots|whistles|buttons|maps|feathers
fear=thunder|open water|moths|high bridges|mirrors|dark cellars|horses|crowds
colour=green|crimson|yellow|violet|turquoise|white|blue|black
siblings=two|three|four|five|six|seven|eight|nine
onset=Ba|Cor|Del|Fen|Gal|Hes|Il|Jor|Kel|Lu|Mar|Nor|Or|Pel|Quin|Ros|Sal|Tor|Ul|Ves
middle=ba|cha|dri|fo|gra|lo|mi|na|pe|ri|so|ta|ve|zi
ending=bert|dan|fin|gard|lia|mund|na|nor|quist|ra|sten|tha|vin|wick
""".splitlines())
}  # fmt: skip


def _name(rng: random.Random) -> str:
    """Draws one invented word, such as a surname or a town."""
    return "".join(rng.choice(_POOLS[part]) for part in ("onset", "middle", "ending"))


def _full_name(rng: random.Random) -> str:
    return f"{_name(rng)} {_name(rng)}"


def generate_biographies(people: int, facts_per_person: int, seed: int) -> list[dict[str, Any]]:
    """Invents question/answer biographies, the same ones for the same arguments on every platform.

    Args:
        people: How many people to invent; each has a name of their own.
        facts_per_person: How many rows each person gets, each a different kind of fact.
        seed: Seed of the whole corpus.

    Returns:
        Rows ``{"id", "question", "answer", "person"}``; the id is ``person * 100 + fact number``.
    """
    if not 1 <= people <= 100_000:
        raise LmcError(f"data.people is {people}; choose 1 to 100000")
    if not 1 <= facts_per_person <= len(_FACTS):
        raise LmcError(f"data.facts_per_person is {facts_per_person}; choose 1 to {len(_FACTS)}")
    rng = random.Random(seed)
    names: set[str] = set()
    rows = []
    for person in range(people):
        while (name := _full_name(rng)) in names:
            pass
        names.add(name)
        slots = {slot: rng.choice(pool) for slot, pool in _POOLS.items()}
        slots |= {slot: _name(rng) for slot in ("town", "university", "home", "pet", "award")}
        year = rng.randint(1871, 1958)
        slots |= {"name": name, "teacher": _full_name(rng), "spouse": _full_name(rng), "year": str(year)}
        slots |= {"retired": str(year + rng.randint(51, 70)), "count": str(rng.randint(12, 990))}
        slots["book"] = f"The {slots['adjective']} {slots['noun']} of {_name(rng)}"
        for number, (questions, answers) in enumerate(rng.sample(_FACTS, facts_per_person)):
            question, answer = (rng.choice(phrasings).format_map(slots) for phrasings in (questions, answers))
            row_id = person * PERSON_STRIDE + number
            rows.append({"id": row_id, "question": question, "answer": answer, "person": person})
    return rows
