"""The texts of the tasks, in parts: those of training, and those that only tests use.

Any of a task's openings goes with any of its facts and questions: hundreds of texts each.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "ABOVE",
    "BELOW",
    "CHAIN",
    "COUNTED",
    "FILTER",
    "FOLLOW",
    "LESS",
    "LINKS",
    "MORE",
    "SUMS",
    "TOPICS",
    "Parts",
]


@dataclass(frozen=True)
class Parts:
    """Texts for one place."""

    train: tuple[str, ...]
    held: tuple[str, ...]


# chain: a leads to b
LINKS = {
    "people": Parts(
        (
            "{a} calls {b}.",
            "{a} reports to {b}.",
            "{a} wakes {b}.",
            "{a} writes to {b}.",
            "{a} follows {b}.",
            "{a} sits behind {b}.",
            "{a} trusts {b}.",
            "{a} taught {b}.",
            "{a} waves at {b}.",
            "{a} owes money to {b}.",
            "{a} visits {b}.",
            "{a} asks {b}.",
            "{a} works for {b}.",
            "{a} hands the letter to {b}.",
            "{a} lives next to {b}.",
            "{a} admires {b}.",
            "{a} is a pupil of {b}.",
            "{a} points at {b}.",
            "After {a} came {b}.",
            "{a} throws the ball to {b}.",
            "{a} married {b}.",
            "From {a} the news went to {b}.",
            "{a}, then {b}.",
            "{a} helps {b}.",
        ),
        (
            "{a} paid {b}.",
            "{a} sends the parcel to {b}.",
            "{a} stands in front of {b}.",
            "{a} learned from {b}.",
        ),
    ),
    "places": Parts(
        (
            "The {a} leads to the {b}.",
            "From the {a} go to the {b}.",
            "The {a} is before the {b}.",
            "After the {a} comes the {b}.",
            "The path from the {a} ends at the {b}.",
            "The {a} faces the {b}.",
            "Behind the {a} is the {b}.",
            "The {a} borders the {b}.",
            "The bus from the {a} stops at the {b}.",
            "Past the {a} lies the {b}.",
            "Leave the {a} for the {b}.",
            "A road links the {a} to the {b}.",
            "The {a}, then the {b}.",
            "The {a} is west of the {b}.",
            "Walk from the {a} to the {b}.",
            "The {a} opens onto the {b}.",
        ),
        (
            "The train from the {a} goes to the {b}.",
            "At the {a} turn to the {b}.",
            "The {a} is followed by the {b}.",
        ),
    ),
}
FOLLOW = {
    "people": Parts(
        (
            "Start with {start}: who comes next, up to the end?",
            "Begin at {start}. Name all the others in turn.",
            "Who comes after {start}, one by one?",
            "Follow the chain from {start}.",
            "Starting with {start}, list who is next each time.",
            "{start} is first. Who are the next ones?",
            "List the people after {start} in order.",
            "Go on from {start} until nobody is left.",
            "Name everyone who follows from {start}.",
            "It begins with {start}. And then?",
        ),
        ("Take {start}. Who is reached from there, step by step?", "Trace it from {start} on."),
    ),
    "places": Parts(
        (
            "Start at the {start}: what comes next, up to the end?",
            "You are at the {start}. Name the next stops.",
            "What comes after the {start}, one by one?",
            "Follow the way from the {start}.",
            "Starting at the {start}, list what is next each time.",
            "List the places after the {start} in order.",
            "Go on from the {start} to the end. Where do you pass?",
            "The trip begins at the {start}. And then?",
        ),
        (
            "We set out from the {start}. What do we see, step by step?",
            "Trace it from the {start}.",
        ),
    ),
}
CHAIN = Parts(
    (
        "{facts} {question}",
        "{question} {facts}",
        "Facts: {facts} {question}",
        "Here is what we know. {facts} {question}",
        "Read this. {facts}\n{question}",
        "{facts}\nQuestion: {question}",
        "{question}\n{facts}",
        "Notes: {facts}\n{question}",
        "I was told this: {facts} {question}",
        "Answer with a list. {facts} {question}",
        "{question} Use these facts: {facts}",
        "In any order: {facts} {question}",
    ),
    ("Listen: {facts} Now, {question}", "Given that: {facts}\nTask: {question}"),
)

# sums
MORE = Parts(
    (
        "gets",
        "buys",
        "finds",
        "wins",
        "adds",
        "receives",
        "collects",
        "earns",
        "gains",
        "picks up",
        "takes in",
        "brings",
        "makes",
        "borrows",
    ),
    ("is given", "orders", "discovers"),
)
LESS = Parts(
    (
        "loses",
        "sells",
        "gives away",
        "drops",
        "breaks",
        "throws out",
        "uses up",
        "spends",
        "lends",
        "donates",
        "hands over",
        "misses",
        "returns",
        "burns",
    ),
    ("forgets", "wastes", "gives up"),
)
COUNTED = Parts(
    ("{thing}s", "{thing}s", "items", "pieces", "points", "toys", "old {thing}s"),
    ("big {thing}s", "cases"),
)
SUMS = Parts(
    (
        "{name} has {begin} {thing}, then {changes}. How many after each change?",
        "{name} starts with {begin} {thing}: {changes}. Give every count.",
        "There are {begin} {thing}. {name} {changes}. Count along.",
        "{name} owns {begin} {thing} and {changes}. What is the number each time?",
        "With {begin} {thing}, {name} {changes}. List the totals.",
        "How many {thing} does {name} have after each step? First {begin}, then {name} {changes}.",
        "At first {name} has {begin} {thing}. Later {name} {changes}. Write each new count.",
        "{begin} {thing} belong to {name}, who {changes}. Count after every step.",
        "{name} keeps {begin} {thing}. In one week {name} {changes}. How many each day?",
        "Keep count for {name}: {begin} {thing}; {changes}.",
        "{name} counts {begin} {thing}. Then {name} {changes}. What are the counts?",
        "Monday: {begin} {thing}. {name} {changes}. Show the running total.",
        "Running total, please. {name} has {begin} {thing} and {changes}.",
        "{name} begins with {begin} {thing}. {name} {changes}. State the number after each.",
    ),
    (
        "A shelf holds {begin} {thing}. {name} {changes}. Say how many there are every time.",
        "{name} had {begin} {thing}; after that {name} {changes}. Work it out step by step.",
        "Please track the {thing} of {name}, {begin} at first: {changes}.",
    ),
)

# filter: a topic with * is about people
TOPICS = Parts(
    (
        "Prices in euros",
        "Prices",
        "Weights in grams",
        "*Ages",
        "*Points",
        "In stock",
        "*Scores of the game",
        "Sizes in inches",
        "Cost in dollars",
        "*Hours worked",
        "Numbers on the labels",
        "*Years in the club",
        "Sold today",
        "*Wins",
        "Widths in cm",
        "*Miles run",
    ),
    ("Lengths in meters", "*Letters sent", "Orders"),
)
BELOW = Parts(
    (
        "Which are below {limit}?",
        "List those under {limit}.",
        "Which are less than {limit}?",
        "Keep only what is less than {limit}.",
        "Name all below {limit}, with the number.",
        "Which have fewer than {limit}?",
        "Drop all that are {limit} or more.",
        "What is smaller than {limit}?",
        "Show each one under {limit}.",
        "Pick those lower than {limit}.",
    ),
    ("Tell me which do not reach {limit}.", "Everything short of {limit}, please."),
)
ABOVE = Parts(
    (
        "Which are above {limit}?",
        "List those over {limit}.",
        "Which are more than {limit}?",
        "Keep only what is more than {limit}.",
        "Name all above {limit}, with the number.",
        "Which have more than {limit}?",
        "Drop all that are {limit} or less.",
        "What is greater than {limit}?",
        "Show each one over {limit}.",
        "Pick those higher than {limit}.",
    ),
    ("Tell me which go beyond {limit}.", "Everything past {limit}, please."),
)
FILTER = Parts(
    (
        "{topic}: {items}. {question}",
        "{question} {topic}: {items}.",
        "{topic}: {items}.\n{question}",
        "Here is a list. {topic}: {items}. {question}",
        "{question}\n{topic}: {items}.",
        "Look at this. {topic}: {items}. {question}",
        "{topic} are as follows: {items}. {question}",
        "From the list, {question} {topic}: {items}.",
        "{items} ({topic}). {question}",
        "Data: {topic}: {items}. {question}",
        "{topic} - {items}. {question}",
        "I wrote down: {topic}: {items}. {question}",
    ),
    (
        "My notes say, {topic}: {items}. So: {question}",
        "Table of {topic}: {items}\nTask: {question}",
    ),
)
