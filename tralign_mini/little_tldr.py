"""little-tldr: Reddit-like posts to be summed up in one line, with an exact gold reward.

A post tells three facts (two things that people did, one thing that the writer decided) among asides. Only
the wording tells them apart: "Yesterday my boss sold my guitar." matters, "I dreamed that my boss sold my
guitar." and "By the way, my boss sold my guitar." do not. A good summary names each fact and says no more.

Gold reward of a completion, clause by clause (`explain` gives the parts, `gold_reward` their sum):

    +1    facts: a fact of the post, in the post's words
    -1    invented: somebody did something that the post does not tell
    -0.5  filler: an aside of the post, an empty phrase ("long story short"), an empty clause;
          in anything else that is no clause, every four words begun
    -0.5  repetition: a clause said before, a word said twice in a row

The optimum is 3; below -6 the sum is cut off (part `floor`). The reward is a pure function of the two texts:
both are parsed with the generator's own templates.
"""
from __future__ import annotations

import math
import random
import re
from functools import lru_cache
from typing import NamedTuple

OPTIMUM, LOWEST = 3.0, -6.0  # the bound below keeps one runaway text from deciding a mean


def _split(text: str) -> tuple[str, ...]:
    return tuple(" ".join(part.split()) for part in text.split(","))


PEOPLE = _split("""my roommate, my boss, my sister, my brother, my cousin, my neighbor, my landlord,
                   my girlfriend, my uncle, my aunt, my mother, my father, my friend, my coworker,
                   my teacher, my husband, my coach, my grandma, my nephew, my barber""")
EVENTS = {  # kind -> (verbs, objects); any person can do any of these
    "things": (_split("broke, stole, sold, borrowed, lost, hid, painted, dropped"),
               _split("""my laptop, my bike, my guitar, my phone, my camera, my jacket, my wallet, my tent,
                         the car, the sofa, the ladder, the television, the mirror, the key""")),
    "food": (_split("ate, burned, spilled, cooked, ordered, tasted"),
             _split("""my lasagna, my sandwich, my soup, my pizza, the cake, the turkey, the pancakes,
                       the chili, the curry, the noodles""")),
    "strangers": (_split("insulted, ignored, kissed, sued, fired, blamed, tricked, hugged"),
                  _split("""the waiter, the dentist, the mayor, the priest, the plumber, the doctor,
                            the judge, the nurse, the pilot, the clown""")),
    "events": (_split("cancelled, ruined, missed, forgot, planned, left"),
               _split("""my birthday, my graduation, my interview, the wedding, the funeral, the concert,
                         the meeting, the picnic, the parade, the exam""")),
    "pets": (_split("washed, chased, fed, adopted, shaved, walked"),
             _split("my dog, my cat, my parrot, my hamster, my rabbit, the goat, the pony, the ferret")),
}
DECISIONS = _split("""moved out, quit, hired a lawyer, called the police, changed the locks, blocked everyone,
                      went home, said nothing, apologized, demanded money, wrote a letter, started therapy,
                      bought a boat, joined a gym, left town, cried, laughed, asked for help, took a nap,
                      told everyone""")
SUBREDDITS = {  # name -> the two kinds of event that its facts are about, one each
    "roommates": ("things", "food"), "family": ("food", "events"), "work": ("strangers", "events"),
    "pets": ("pets", "things"), "tifu": ("pets", "strangers"), "legaladvice": ("things", "strangers"),
    "cooking": ("food", "pets"), "relationships": ("events", "things"),
}
TITLES = _split("""Trouble with {}, Advice about {}, Is {} wrong?, Long day with {}, How to forgive {},
                   {} again""")

# What matters: what happened, and what the writer did about it. "" is the bare sentence.
FACT_OPENINGS = ("", "", "Yesterday ", "Last week ", "Then ", "It turns out ", "Worst of all, ",
                 "The problem is that ", "This morning ", "Without asking, ")
DECISION_OPENINGS = ("", "So ", "In the end ", "Finally ", "Today ", "Because of this ")

# What does not matter: something beside the point, long past, or that never happened.
ASIDE_OPENINGS = ("By the way, ", "Not that it matters, but ", "Unrelated, but ", "Fun fact: ", "Side note: ",
                  "Years ago ", "I dreamed that ", "I was joking that ", "In a movie I saw, ")
IDLE_OPENINGS = ("By the way, ", "Years ago ", "I dreamed that ", "Side note: ", "Nobody believes that ")
CHATTER = ("It was raining.", "Sorry for the length.", "I am on mobile.", "I like coffee.",
           "Thanks for reading.", "This is a throwaway.", "First post here.", "The weather was nice.",
           "I love this sub.", "Be kind please.")
EMPTY_WORDS = _split("long story short, basically, anyway, so yeah, not sure what to do, it is complicated")

_PROMPT = re.compile(r"SUBREDDIT: r/(\S+)\n\nTITLE: ([^\n]+)\n\nPOST: ([^\n]+)\n\nTL;DR:")
_SEPARATOR = re.compile(r",?\s*\band\b|[;,.:!?\n]")
_VERBS, _OBJECTS = (sum(words, ()) for words in zip(*EVENTS.values()))
# somebody did something, in this world's words; kinds may be mixed
_EVENT = re.compile("({}) ({}) ({})|i ({})".format(*map("|".join, (PEOPLE, _VERBS, _OBJECTS, DECISIONS))))
_SAYABLE = {line.rstrip(".").lower() for line in CHATTER} | set(EMPTY_WORDS)


class Post(NamedTuple):
    """What a prompt says: the clauses that matter and those that do not, in lower case, in order."""

    facts: tuple[str, ...]
    asides: tuple[str, ...]


def make_prompt(rng: random.Random) -> str:
    """A post in the form of the TL;DR data set, ending in "TL;DR:"."""
    subreddit = rng.choice(tuple(SUBREDDITS))
    kinds = list(SUBREDDITS[subreddit])
    rng.shuffle(kinds)
    others = [kind for kind in EVENTS if kind not in kinds]
    people = rng.sample(PEOPLE, 4)
    decision, idle = rng.sample(DECISIONS, 2)
    facts = [_sentence(rng.choice(FACT_OPENINGS), _event(who, kind, rng)) for who, kind in zip(people, kinds)]
    facts.append(_sentence(rng.choice(DECISION_OPENINGS), "I " + decision))
    asides = [_sentence(rng.choice(ASIDE_OPENINGS), _event(people[2], rng.choice(others), rng))]
    if rng.random() < 0.5:
        asides.append(_sentence(rng.choice(IDLE_OPENINGS), "I " + idle))
    asides += rng.sample(CHATTER, rng.choice((1, 1, 2)))
    rng.shuffle(asides)
    order = [True] * len(facts) + [False] * len(asides)
    rng.shuffle(order)
    post = " ".join((facts if matters else asides).pop(0) for matters in order)
    title = rng.choice(TITLES).format(people[rng.choice((0, 1, 3))])
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title[0].upper() + title[1:]}\n\nPOST: {post}\n\nTL;DR:"


def ideal(prompt: str) -> str:
    """The summary with gold reward `OPTIMUM`: each fact once, in order, nothing else."""
    return _summary(list(parse_prompt(prompt).facts))


def demonstration(prompt: str, rng: random.Random) -> str:
    """A summary as a careless person writes it, what the SFT model imitates: about half of the optimum."""
    post = parse_prompt(prompt)
    clauses = [fact for fact in post.facts if rng.random() < 0.72]
    if rng.random() < 0.30:
        clauses.insert(rng.randint(0, len(clauses)), rng.choice(post.asides))
    if rng.random() < 0.25 or not clauses:
        invented = _event(rng.choice(PEOPLE), rng.choice(tuple(EVENTS)), rng)
        clauses.insert(rng.randint(0, len(clauses)), invented)
    if rng.random() < 0.10:
        clauses.append(rng.choice(clauses))
    if rng.random() < 0.30:
        clauses.insert(0, rng.choice(EMPTY_WORDS))
    return _summary(clauses)


def gold_reward(prompt: str, completion: str) -> float:
    """The true quality of a completion, in [-6, 3]. ValueError if the prompt is not of this world."""
    return sum(explain(prompt, completion).values())


def explain(prompt: str, completion: str) -> dict[str, float]:
    """The parts of the gold reward (module docstring), which sum to it. ValueError as for `gold_reward`."""
    post = parse_prompt(prompt)
    facts = invented = filler = repetition = 0
    seen = set()
    for clause in _clauses(completion):
        words = clause.split()
        once = [word for i, word in enumerate(words) if i == 0 or word != words[i - 1]]
        repetition += len(words) - len(once)
        clause = " ".join(once)
        if clause and clause in seen:
            repetition += 1
        elif clause in post.facts:
            facts += 1
        elif clause in post.asides or clause in _SAYABLE or not clause:
            filler += 1
        elif _EVENT.fullmatch(clause):
            invented += 1
        else:
            filler += math.ceil(len(once) / 4)
        seen.add(clause)
    parts = {"facts": 1.0 * facts, "invented": 0.0 - invented, "filler": 0.0 - 0.5 * filler,
             "repetition": 0.0 - 0.5 * repetition}
    return parts | {"floor": max(0.0, LOWEST - sum(parts.values()))}


@lru_cache(maxsize=65536)
def parse_prompt(prompt: str) -> Post:
    """Read a prompt back with the generator's templates; ValueError where it is not one of this world's."""
    match = _PROMPT.fullmatch(prompt)
    if not match:
        raise ValueError(f"No prompt of little-tldr: {prompt[:80]!r}. One reads 'SUBREDDIT: r/<name>', "
                         "'TITLE: <title>', 'POST: <one line>', 'TL;DR:', with empty lines between them.")
    facts, asides = [], []
    for sentence in re.split(r"(?<=\.) ", match[3]):
        clause = _after(sentence, FACT_OPENINGS + DECISION_OPENINGS)
        aside = _after(sentence, ASIDE_OPENINGS + IDLE_OPENINGS)
        if clause:
            facts.append(clause)
        elif aside or sentence in CHATTER:
            asides.append(aside or sentence.rstrip(".").lower())
        else:
            raise ValueError(f"little-tldr cannot read the sentence {sentence!r}: a post has the generator's "
                             "wordings, for example 'Yesterday my boss sold my guitar.'")
    return Post(tuple(facts), tuple(asides))


def distinct_prompts() -> int:
    """How many distinct sets of three facts a post can tell: a lower bound on the number of posts."""
    pairs = len(PEOPLE) * (len(PEOPLE) - 1) * len(DECISIONS)
    size = {kind: len(verbs) * len(things) for kind, (verbs, things) in EVENTS.items()}
    # no two subreddits have the same two kinds, so nothing is counted twice
    return sum(pairs * size[first] * size[second] for first, second in SUBREDDITS.values())


def _event(who: str, kind: str, rng: random.Random) -> str:
    return " ".join([who, *map(rng.choice, EVENTS[kind])])


def _sentence(opening: str, clause: str) -> str:
    sentence = opening + clause + "."
    return sentence[0].upper() + sentence[1:]


def _summary(clauses: list[str]) -> str:
    return " " + "; ".join(re.sub(r"^i ", "I ", clause) for clause in clauses) + "."


def _clauses(completion: str) -> list[str]:
    """Clauses of a completion in lower case; "" stands for an empty clause between two separators."""
    text = completion.strip().lower().removesuffix(".")
    return [" ".join(clause.split()) for clause in _SEPARATOR.split(text)] if text else []


def _after(sentence: str, openings: tuple[str, ...]) -> str | None:
    """The event that follows one of these openings, in lower case; None if there is none."""
    for opening in openings:
        clause = sentence.removeprefix(opening).removesuffix(".").lower()
        if sentence.startswith(opening) and sentence.endswith(".") and _EVENT.fullmatch(clause):
            return clause
    return None
