"""Arithmetic word problems with worked solutions in the format of GSM8K (arXiv:2110.14168), as many as are asked for.

A story is a template: phrasings of a question, the steps of its solution, and the range of each number. Training and
validation problems tell the same stories with different numbers; test problems tell stories that occur in neither. No number
has more than two digits: sums of three digits are beyond what a nano model learns in its curriculum.

    from word_problems import problems
    list(problems("train", 2))     # [{"question": "...", "answer": "14 + 18 = <<14+18=32>>32 trees a day. ...\n#### 64"}, ...]
"""

import operator
import random
import re
import zlib
from collections.abc import Iterator
from typing import NamedTuple

Problem = dict[str, str]  # {"question": ..., "answer": ...}


class Story(NamedTuple):
    phrasings: tuple[str, ...]  # of the question; braces hold a number of `ranges` or a word of draw_words
    steps: list[str]  # "total - sold = left {cakes} are left.": two numbers or earlier results, the result, the rest of the line
    ranges: dict[str, tuple[int, int]]  # least and greatest value of each number


STORIES: list[Story] = []  # for training and validation
HELD_OUT: list[Story] = []  # for the test split only: new stories, the same operations


def story(*phrasings: str, steps: list[str], into: list[Story] = STORIES, **ranges: tuple[int, int]) -> None:
    into.append(Story(phrasings, steps, ranges))


# {fruits} and {fruits2} are two words of that list, {fruit} and {fruit2} their singulars: every plural is the singular and an s
PLURALS = {key: words.split() for key, words in {
    "fruits": "apples pears plums lemons oranges mangos bananas melons apricots figs limes coconuts",
    "toys": "marbles stickers stamps seashells postcards beads coins buttons badges comics magnets stones",
    "cakes": "cookies muffins cupcakes pies scones pancakes waffles bagels brownies tarts",
    "flowers": "roses tulips orchids sunflowers violets daffodils carnations marigolds",
    "animals": "cows goats ducks chickens rabbits horses pigs llamas",
    "items": "pencils pens notebooks erasers markers rulers folders crayons",
    "bags": "bags baskets crates jars trays packs cartons bowls",
    "shops": "stores markets shops stands kiosks"}.items()}
WORDS = {key: words.split(", ") for key, words in {
    "relation": "brother, sister, cousin, friend, neighbor, uncle, aunt, grandfather, grandmother, teacher",
    "place": "the park, the beach, the fair, the market, school, the harbor, the station, the playground",
    "day": "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday",
    "month": "January, February, March, April, May, June, July, August, September, October, November, December",
    "color": "red, blue, green, yellow, white, black, purple, pink",
    "town": "Lakewood, Milton, Ashford, Riverside, Oakdale, Kingston, Fairview, Brookfield"}.items()}
NAMES = {pronoun: names.split() for pronoun, names in {
    "she": "Anna Maria Sofia Emma Olivia Mia Chloe Zoe Lily Grace Ruth Nina Clara Elena Priya Aisha Mei Yuki Fatima Leila Rosa Hannah",
    "he": "Tom Ben Sam Jack Leo Max Adam Noah Liam Omar Ivan Hugo Paul David Carlos Diego Ravi Kofi Kenji Wei Ali Yusuf"}.items()}

# One step
story("{name} has {a} {toys} and finds {b} more at {place}. How many {toys} does {name} have now?",
      "There were {a} {toys} in {name}'s collection. Then {he} got {b} more from {his} {relation}. How many {toys} are there now?",
      "{name} keeps {a} {toys} in a box. On {day} {he} adds {b} {toys}. How many {toys} are in the box?",
      steps=["a + b = all {toys} in all."], a=(3, 95), b=(2, 90))
story("{name} baked {a} {cakes} and sold {b} of them at {place}. How many {cakes} are left?",
      "On {day} a bakery made {a} {cakes}. By the evening {b} {cakes} had been sold. How many {cakes} had not been sold?",
      steps=["a - b = left {cakes} are left."], a=(8, 99), b=(2, 95))
story("{name} buys {k} {bags} of {fruits}. There are {n} {fruits} in each. How many {fruits} does {he} buy?",
      "A {shop} sells {fruits} in {bags} of {n}. How many {fruits} are in {k} {bags}?",
      steps=["k * n = all {fruits} in all."], k=(2, 12), n=(3, 48))
story("{name} shares {a} {toys} equally among {k} children. How many {toys} does each child get?",
      "{k} children divide {a} {toys} so that each has the same number. How many {toys} does one child have?",
      steps=["a / k = each {toys} for each child."], a=(6, 99), k=(2, 12))
story("{name} scored {a} points in a game and {friend} scored {b} points. How many more points did {name} score?",
      "The {color} team has {a} points. The other team has {b} points. By how many points does the {color} team lead?",
      steps=["a - b = more points more."], a=(8, 99), b=(2, 95))

# Two steps
story("{name} sold {a} {fruits} in {month} and half as many in the month after. How many {fruits} did {he} sell altogether?",
      "On {day} {name} picked {a} {fruits}. On the next day {he} picked only half as many. How many {fruits} did {he} pick in all?",
      steps=["a / 2 = half {fruits} the second time.", "a + half = all {fruits} in all."], a=(4, 66))
story("{name} has {a} {toys}. {friend} has twice as many. How many {toys} do they have together?",
      "{friend} owns twice as many {toys} as {name}, who owns {a}. How many {toys} do the two of them own?",
      steps=["a * 2 = twice {toys} for {friend}.", "a + twice = all {toys} together."], a=(2, 33))
story("{name} had {a} {toys} and gave a third of them to {friend}. How many {toys} does {name} have left?",
      "A third of the {a} {toys} in a box are {color}. How many {toys} in the box are not {color}?",
      steps=["a / 3 = third {toys} are a third.", "a - third = rest {toys} are the rest."], a=(6, 99))
story("{name} has ${s} and buys {k} {items} for ${p} each. How many dollars are left?",
      "One {item} costs ${p}. {name} takes {k} of them and had ${s} before. How many dollars does {he} have now?",
      steps=["k * p = $cost for the {items}.", "s - cost = $left left."], k=(2, 12), p=(2, 9), s=(10, 99))
story("{name} works {h} hours for ${p} an hour and then spends ${s} at {place}. How many dollars of the pay are left?",
      "{name} earns ${p} per hour. {He} works {h} hours on {day} and buys a gift for ${s}. How many dollars of the pay remain?",
      steps=["h * p = $pay earned.", "pay - s = $left left."], h=(2, 9), p=(8, 30), s=(5, 90))
story("{name} reads a book of {a} pages. {He} reads {p} pages a day for {d} days. How many pages are left to read?",
      "A book has {a} pages. If {name} reads {p} pages every day, how many pages will {he} still have to read after {d} days?",
      steps=["d * p = read pages in {d} days.", "a - read = left pages are left."], a=(30, 99), p=(3, 30), d=(2, 9))
story("In a hall there are {r} rows of {n} chairs. {m} chairs are taken. How many chairs are free?",
      "{name} sets up {r} rows with {n} chairs each for a concert. {m} people sit down. How many chairs stay empty?",
      steps=["r * n = all chairs.", "all - m = free chairs are free."], r=(3, 12), n=(4, 30), m=(5, 90))
story("{name} had {a} {fruits}. {He} gave {b} to {his} {relation} and put the rest into {bags} of {k}. How many {bags} did {he} fill?",
      "Of {a} {fruits} on a farm, {b} are eaten. The others go into {bags} that hold {k} {fruits} each. How many {bags} are needed?",
      steps=["a - b = rest {fruits} remain.", "rest / k = n {bags}."], a=(10, 99), b=(3, 60), k=(2, 12))
story("{name} has {a} {toys} and {friend} has {b}. {k} children share all of them equally. How many {toys} does each child get?",
      "{k} children get {a} {toys} from {name} and {b} from {friend} and divide them equally. How many {toys} does each child get?",
      steps=["a + b = all {toys} in all.", "all / k = each {toys} for each child."], a=(4, 80), b=(4, 80), k=(2, 12))
story("A bus leaves {town} with {a} passengers. At the next stop {b} get off and {c} get on. How many passengers are on the bus now?",
      "There are {a} people on a train. In {town} {b} people leave it and {c} people board it. How many people are on the train then?",
      steps=["a - b = stay people stay.", "stay + c = now people."], a=(10, 99), b=(3, 60), c=(3, 60))
story("{name} picked {a} {flowers}. {friend} picked {b} more than {name}. How many {flowers} did they pick together?",
      "{name}'s garden has {a} {flowers}. {friend}'s garden has {b} more. How many {flowers} are in both gardens?",
      steps=["a + b = more {flowers} for {friend}.", "a + more = all {flowers} together."], a=(4, 48), b=(2, 60))
story("A farm has {a} {animals} and {b} fewer {animals2}. How many {animals} and {animals2} does the farm have altogether?",
      "{name} counts {a} {animals} in a field. There are {b} fewer {animals2} than {animals}. How many animals are there in all?",
      steps=["a - b = other {animals2}.", "a + other = all animals in all."], a=(8, 90), b=(2, 80))
story("{name} drives at {v} miles per hour for {h} hours and then {m} more miles to {town}. How many miles does {he} drive?",
      "A truck covers {v} miles every hour. After {h} hours it still has {m} miles to go to {town}. How many miles is the whole trip?",
      steps=["h * v = first miles in {h} hours.", "first + m = all miles in all."], v=(8, 45), h=(2, 9), m=(3, 60))
story("{name} saves ${s} every week. How many more dollars does {he} need after {w} weeks to buy a bicycle for ${p}?",
      "A bicycle costs ${p}. {name} puts aside ${s} a week for {w} weeks. How many dollars are still missing?",
      steps=["w * s = $saved saved.", "p - saved = $more still needed."], s=(2, 30), w=(2, 12), p=(30, 99))
story("{name} collects {n} eggs from {his} hens every day. After a week {he} sells {s} eggs. How many eggs does {he} have left?",
      "The hens on a farm lay {n} eggs a day. How many eggs remain from one week if {s} of them are sold?",
      steps=["n * 7 = week eggs in a week.", "week - s = left eggs are left."], n=(3, 14), s=(4, 90))
story("One team plants {a} trees a day and another team plants {b} trees a day. How many trees do the two teams plant in {d} days?",
      "Every day {name} plants {a} trees and {friend} plants {b} trees. How many trees do they plant together in {d} days?",
      steps=["a + b = both trees a day.", "both * d = all trees in {d} days."], a=(2, 30), b=(2, 30), d=(2, 9))
story("{name} is {a} years old. {His} grandmother is {k} times as old. How old will {his} grandmother be in {b} years?",
      "A tree in {town} was {a} feet tall. It grew to {k} times that height and then {b} feet more. How many feet tall is it now?",
      steps=["a * k = first at first.", "first + b = then after that."], a=(9, 18), k=(3, 6), b=(2, 25))

# Three steps
story("{name} buys {k} {items} for ${p} each and {m} {items2} for ${q} each. How many dollars does {he} pay in all?",
      "One {item} costs ${p} and one {item2} costs ${q}. How many dollars do {k} {items} and {m} {items2} cost together?",
      steps=["k * p = $first for the {items}.", "m * q = $second for the {items2}.", "first + second = $all in all."],
      k=(2, 12), p=(2, 9), m=(2, 12), q=(2, 9))
story("{name} orders {n} pizzas, each cut into {s} slices. {k} friends eat {e} slices each. How many slices are left?",
      "{n} pizzas are cut into {s} slices each for a party. {k} guests eat {e} slices each. How many slices does nobody eat?",
      steps=["n * s = all slices.", "k * e = eaten slices are eaten.", "all - eaten = left slices are left."],
      n=(2, 12), s=(6, 12), k=(3, 20), e=(2, 5))
story("{name} cycles {a} miles a day for {k} days and then {b} miles a day for {m} days. How many miles does {he} cycle in all?",
      "For {k} days {name} rides {a} miles a day. For the next {m} days {he} rides {b} miles a day. How many miles does {he} ride in all?",
      steps=["k * a = first miles at first.", "m * b = then miles after that.", "first + then = all miles in all."],
      a=(3, 20), k=(2, 9), b=(3, 20), m=(2, 9))
story("{g} girls and {b} boys work in groups of {k}, and each group gets {m} sheets of paper. How many sheets do they get in all?",
      "{g} girls and {b} boys visit {town}. They walk in groups of {k}, and every group gets {m} maps. How many maps do they get in all?",
      steps=["g + b = all children.", "all / k = groups groups.", "groups * m = given in all."], g=(4, 40), b=(4, 40), k=(2, 6), m=(2, 12))
story("A lot holds {a} cars with four wheels each and {b} motorcycles with two wheels each. How many wheels are there?",
      "{name} counts {a} cars and {b} bicycles near {place}. A car has four wheels and a bicycle has two. How many wheels are there?",
      steps=["a * 4 = first wheels on the cars.", "b * 2 = second wheels on the others.", "first + second = all wheels."],
      a=(2, 22), b=(2, 45))
story("A bakery makes {n} {cakes} a day for {d} days. It sells {s} and packs the rest in boxes of {k}. How many boxes does it fill?",
      "{name} bakes {n} {cakes} on each of {d} days, sells {s} and packs the others in boxes of {k}. How many boxes does {he} fill?",
      steps=["d * n = all {cakes} in {d} days.", "all - s = rest {cakes} are not sold.", "rest / k = boxes boxes."],
      n=(6, 48), d=(2, 7), s=(5, 80), k=(2, 12))
story("{name} earns ${w} a week for {k} weeks, pays ${s} for rent and saves half of the rest. How many dollars does {he} save?",
      "A stand takes in ${w} a day for {k} days. After costs of ${s}, {name} gets half of the money. How many dollars does {name} get?",
      steps=["k * w = $pay in all.", "pay - s = $rest left.", "rest / 2 = $half is half of it."], w=(10, 48), k=(2, 6), s=(8, 80))
story("A library has {s} shelves with {n} books each. {b} books are lent out and {r} come back. How many books are there now?",
      "{name} has {s} shelves of {n} books each. {He} lends {b} books to {friend} and gets {r} back. How many books does {he} have now?",
      steps=["s * n = all books.", "all - b = stay books stay.", "stay + r = now books."], s=(2, 9), n=(8, 40), b=(5, 80), r=(2, 60))

# Four steps
story("{name} has ${s}. {He} buys {k} {items} for ${p} each and {m} {items2} for ${q} each. How many dollars does {he} have left?",
      "At a {shop} {name} takes {k} {items} at ${p} each and {m} {items2} at ${q} each. How many of {his} ${s} are left?",
      steps=["k * p = $first for the {items}.", "m * q = $second for the {items2}.", "first + second = $all in all.",
             "s - all = $left left."], k=(2, 9), p=(2, 9), m=(2, 9), q=(2, 9), s=(20, 99))
story("A class needs ${g}. It sells {n} tickets for ${p} each and {m} {cakes} for ${q} each. How many more dollars does it need?",
      "{name} needs ${g}. {He} washes {n} cars for ${p} each and sells {m} {cakes} for ${q} each. How many dollars are still missing?",
      steps=["n * p = $first at first.", "m * q = $second for the {cakes}.", "first + second = $all in all.",
             "g - all = $more still needed."], g=(40, 99), n=(3, 20), p=(2, 9), m=(3, 20), q=(2, 6))
story("{k} adults and {m} children visit a zoo. Adults pay ${p}, children pay ${q}, and parking costs ${s}. How many dollars do they pay?",
      "{k} adults pay ${p} each for a film and {m} children pay ${q} each. Snacks cost ${s}. How many dollars do they spend in all?",
      steps=["k * p = $first for the adults.", "m * q = $second for the children.", "first + second = $both for all of them.",
             "both + s = $all in all."], k=(2, 6), p=(5, 20), m=(2, 9), q=(3, 9), s=(2, 40))
story("{name} has {a} {toys}. {friend} has {k} times as many, and {third} has {b} fewer than {friend}. How many {toys} do the three have?",
      "{name} found {a} {toys}, {friend} {k} times as many, and {third} {b} fewer than {friend}. How many {toys} did the three find?",
      steps=["a * k = second {toys} for {friend}.", "second - b = other {toys} for {third}.",
             "a + second = two {toys} for {name} and {friend}.", "two + other = all {toys} in all."], a=(3, 18), k=(3, 5), b=(2, 40))

# Held out
story("An aquarium has {n} tanks with {f} fish each. {s} fish are moved to another aquarium. How many fish stay?",
      "{name} looks after {n} tanks with {f} fish each. {He} sells {s} of the fish. How many fish does {he} still have?",
      steps=["n * f = all fish.", "all - s = left fish are left."], n=(3, 12), f=(4, 30), s=(5, 80), into=HELD_OUT)
story("A choir has {a} women and {b} men. They stand in {k} equal rows. How many singers stand in each row?",
      "{a} adults and {b} children go sailing in {k} boats, the same number in each. How many people are in each boat?",
      steps=["a + b = all people.", "all / k = each in each."], a=(6, 60), b=(6, 60), k=(3, 9), into=HELD_OUT)
story("A sunflower is {h} inches tall and grows {g} inches a week. How many inches tall is it after {w} weeks?",
      "There are {h} inches of snow in {town}. {g} more inches fall every day. How many inches are there after {w} days?",
      steps=["g * w = more inches more.", "h + more = all inches."], h=(4, 60), g=(2, 9), w=(3, 12), into=HELD_OUT)
story("An orchestra has {c} flutes and twice as many violins. There are also {d} drums. How many instruments are there in all?",
      "{name}'s train has {c} gray wagons, twice as many {color} ones and {d} brown ones. How many wagons does it have in all?",
      steps=["c * 2 = twice of the second kind.", "c + twice = both of the first two kinds.", "both + d = all in all."],
      c=(3, 30), d=(3, 30), into=HELD_OUT)
story("{k} cows give {n} liters of milk each. {name} sells {u} liters and fills cans of {m} liters with the rest. How many cans are full?",
      "{k} people make {n} candles each. {u} candles break, and the others are packed in boxes of {m}. How many boxes are there?",
      steps=["k * n = all in all.", "all - u = rest remain.", "rest / m = full are full."],
      k=(3, 12), n=(4, 30), u=(3, 40), m=(3, 12), into=HELD_OUT)
story("A tent costs ${p} a night and a boat ${q} a day. {name} pays for {k} nights and {m} days. How many of {his} ${s} are left?",
      "A mechanic pays ${p} for each of {k} tires and ${q} for each of {m} lamps and charges ${s}. How many dollars is the profit?",
      steps=["k * p = $first at first.", "m * q = $second after that.", "first + second = $cost in all.", "s - cost = $left left."],
      k=(2, 6), p=(6, 30), m=(2, 5), q=(5, 20), s=(50, 99), into=HELD_OUT)


def draw_words(rng: random.Random) -> dict[str, str]:
    """The words of one problem: three people, the pronouns of the first, things in the plural and singular, places and so on."""
    he = rng.choice(["she", "he"])
    his = {"she": "her", "he": "his"}[he]
    name = rng.choice(NAMES[he])
    friend, third = rng.sample([other for other in NAMES["she"] + NAMES["he"] if other != name], 2)
    words = {"name": name, "friend": friend, "third": third, "he": he, "He": he.title(), "his": his, "His": his.title()}
    for key, choices in PLURALS.items():
        first, second = rng.sample(choices, 2)
        words |= {key: first, key[:-1]: first[:-1], f"{key}2": second, f"{key[:-1]}2": second[:-1]}
    return words | {key: rng.choice(choices) for key, choices in WORDS.items()}


STEP = re.compile(r"(\w+) ([-+*/]) (\w+) = (\$?)(\w+)(.*)")
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


def solve(steps: list[str], numbers: dict[str, int]) -> str | None:
    """The worked solution with GSM8K's calculator notes; None if a step is no easy sum. Every result must be a whole number from 2
    (so that plurals are right) to 99, and one factor, or the divisor, at most 12."""
    values = dict(numbers)
    lines = []
    for step in steps:
        left, sign, right, dollar, result, rest = STEP.fullmatch(step).groups()
        x, y = (values[term] if term in values else int(term) for term in (left, right))
        z = values[result] = OPERATORS[sign](x, y)
        if not 2 <= z <= 99 or sign == "*" and min(x, y) > 12 or sign == "/" and (y > 12 or z * y != x):
            return None
        lines.append(f"{x} {sign} {y} = {dollar}<<{x}{sign}{y}={z}>>{z}{rest}")
    return "\n".join([*lines, f"#### {z}"])


def examples(split: str, seed: int) -> Iterator[tuple[int, tuple[int, ...], Problem]]:
    """Endless (number of the story, its numbers, problem) for problems(). The same numbers in the same story are either in the
    training or in the validation split, whatever the seed."""
    rng = random.Random(f"{split} {seed}")
    stories = HELD_OUT if split == "test" else STORIES
    while True:
        index = rng.randrange(len(stories))
        phrasings, steps, ranges = stories[index]
        solution = None
        while solution is None:
            numbers = {name: rng.randint(*bounds) for name, bounds in ranges.items()}
            in_val = zlib.crc32(f"{index} {tuple(numbers.values())}".encode()) % 10 == 0
            if split == "test" or in_val == (split == "val"):
                solution = solve(steps, numbers)
        fields = draw_words(rng) | numbers
        yield index, tuple(numbers.values()), {"question": rng.choice(phrasings).format(**fields), "answer": solution.format(**fields)}


def problems(split: str, count: int, seed: int = 0) -> Iterator[Problem]:
    """`count` different word problems {"question", "answer"} of a split: "train", "val" (the same stories, other numbers) or "test"
    (stories that occur in neither). A larger count continues a smaller one. Raises ValueError for another split."""
    if split not in ("train", "val", "test"):
        raise ValueError(f"there are no word problems of split {split!r}: train, val or test")
    asked: set[str] = set()
    for *_, problem in examples(split, seed):
        if len(asked) >= count:
            return
        if problem["question"] not in asked:
            asked.add(problem["question"])
            yield problem
