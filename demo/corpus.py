"""The demo's synthetic corpus: word problems, small Python functions, an invented world.

Each problem comes with every right solution.

A solution is a tree: a tuple is a sequence, a str is itself, a `Pick` is a choice between wordings.
One tree renders training text in either model's habits and is the exact checker as well:
`first_error` finds the first character of an answer that no right solution has there. Splits are
disjoint by a hash of the prompt.

What makes the tree worth judging: the target and the draft prefer different wordings at every Pick,
drawn anew each time, and the target's text holds mistakes that are taken back at once ("52 -- no,
54"), as web text does.
"""
import random
import re
import zlib
from dataclasses import dataclass

TASKS = ("maths", "code", "facts")
SPLITS = {"eval": (0,), "judge": (1,), "train": range(2, 16)}  # crc32(prompt) % 16


class Pick:
    """One of `options`, all of them right.

    wrong: mistakes that one could make here. name: binds the choice for a `Ref`.
    """

    def __init__(self, *options, wrong=(), name=None):
        self.options, self.wrong, self.name = options, wrong, name
        site = re.sub(r"\d+", "0", _first(options[0]))  # the same habit whatever the numbers are
        self.shift = 1 + zlib.crc32(site.encode()) % max(1, min(3, len(options) - 1))

    def order(self, habit):
        """The options by falling preference; the draft's favourite is not the target's."""
        shift = self.shift if habit == "draft" else 0
        return self.options[shift:] + self.options[:shift]


def _first(node) -> str:
    """The first option's text all the way down: what tells one place in a solution from another."""
    if isinstance(node, str):
        return node
    return _first(node.options[0]) if isinstance(node, Pick) else "".join(map(_first, node))


class Ref(str):
    """Stands for what the Pick of that name chose."""


@dataclass
class Problem:
    task: str
    prompt: str
    solution: tuple
    answer: object  # maths: int; facts: letter; code: [(argument, result), ...]


def render(node, rng, habit, mistakes=0.0, env=None) -> str:
    """Text of a right solution in a model's habit, "target" or "draft".

    mistakes: share of the possible mistakes that are made, and taken back at once.
    """
    env = {} if env is None else env
    if isinstance(node, Ref):
        return env[node]
    if isinstance(node, str):
        return node
    if isinstance(node, tuple):
        return "".join(render(part, rng, habit, mistakes, env) for part in node)
    # Each is half as probable as the one before.
    rank = min(int(rng.expovariate(0.7)), len(node.options) - 1)
    text = render(node.order(habit)[rank], rng, habit, mistakes, env)
    if node.name:
        env[node.name] = text
    if node.wrong and rng.random() < mistakes:
        wrong = render(rng.choice(node.wrong), rng, habit, 0.0, env)
        return f"{_slip(wrong, text, rng)} -- no,{'' if text[0] == ' ' else ' '}{text}"
    return text


def _slip(wrong, right, rng):
    """The wrong text, half of the time broken off as soon as it is wrong, as people do."""
    if rng.random() >= 0.5:
        return wrong
    i = next((i for i, (a, b) in enumerate(zip(wrong, right)) if a != b),
             min(len(wrong), len(right)))
    return wrong[:i] + re.match(r"\d|[^\W\d]+|.?", wrong[i:]).group()


def first_error(problem, answer):
    """[start, end) of the answer's first wrong word, or None.

    None for a right solution and for the beginning of one.
    """
    reach = 0

    def walk(node, states):
        nonlocal reach
        if isinstance(node, tuple):
            for part in node:
                states = walk(part, states)
            return states
        if isinstance(node, Pick):
            ends = set()
            for option in node.options:
                found = walk(option, states)
                if node.name:
                    found = {(i, env + ((node.name, option),)) for i, env in found}
                ends |= found
            return ends
        ends = set()
        for i, env in states:
            text = dict(env)[node] if isinstance(node, Ref) else node
            n = next((n for n, c in enumerate(text) if answer[i + n:i + n + 1] != c), len(text))
            reach = max(reach, i + n)
            if n == len(text):
                ends.add((i + n, env))
        return ends

    walk(problem.solution, {(0, ())})
    if reach == len(answer):
        return None
    return [reach, reach + max(1, len(re.match(r"\w*", answer[reach:]).group()))]


# ---------------------------------------------------------------- maths

NAMES = ("Mira Tom Lena Omar Ada Ben Cora Dan Eva Finn Gita Hugo Iris Jon Kira Leo Nora Paul Rosa "
         "Sam").split()
ITEMS = ("apples books coins pens shells stones cards beads stamps plums roses cups keys nuts eggs "
         "buttons").split()
CONTAINERS = "bags boxes jars crates baskets sacks tins trays".split()


def number(n, rng):
    """A number that could be got wrong: by one, by ten, by a digit."""
    near = {n + 1, n - 1, n + 10, n - 10, n + 2, int(str(n)[::-1]), rng.randrange(1, 100)} - {n}
    return Pick(str(n), wrong=tuple(str(m) for m in sorted(near) if m >= 0))


def word(text, others):
    return Pick(text, wrong=tuple(o for o in others if o != text))


def maths(rng):
    name, other = rng.sample(NAMES, 2)
    item, box = rng.choice(ITEMS), rng.choice(CONTAINERS)
    n = rng.randrange(5, 40)
    num = lambda k: number(k, rng)
    who, what = word(name, NAMES), word(item, ITEMS)
    then = Pick(" Then", " Next,", " After that,", " Now", " Later")
    gain_verbs = "gets", "adds", "gains", "receives", "picks up"
    lose_verbs = "gives away", "hands over", "parts with", "loses", "drops"
    keeps = Pick("keeps", "has", "is left with", "holds", "retains", "ends with")
    story = [rng.choice([f"{name} has {n} {item}.", f"At first {name} owns {n} {item}.",
                         f"There are {n} {item} on {name}'s table."])]
    steps = [(Pick(" First", " At the start", " To begin,", " Initially,", " At the outset"), " ",
              who, " ", Pick("has", "owns", "holds", "starts with", "counts"), " ", num(n), " ",
              what, ".")]
    for _ in range(rng.randrange(2, 5)):
        kinds = {"more": n < 90, "boxes": n < 80, "less": n > 12, "half": n % 2 == 0 and n > 9,
                 "double": n < 45}
        kind = rng.choice([k for k, fits in kinds.items() if fits])
        before = n
        if kind == "more":
            c = rng.randrange(3, min(50, 100 - n))
            n += c
            story.append(rng.choice([f"{name} buys {c} more.", f"{other} brings {name} {c} more.",
                                     f"{name} finds {c} more {item}."]))
            act, sign, last = (Pick(*gain_verbs, wrong=lose_verbs), " ", num(c)), "+", c
        elif kind == "less":
            c = rng.randrange(3, n - 3)
            n -= c
            story.append(rng.choice([f"{name} gives {c} to {other}.", f"{name} loses {c} of them.",
                                     f"{name} sells {c} {item}."]))
            act, sign, last = (Pick(*lose_verbs, wrong=gain_verbs), " ", num(c)), "-", c
        elif kind == "half":
            n //= 2
            story.append(rng.choice([f"{name} gives half of the {item} to {other}.",
                                     f"Half of them go to {other}."]))
            act, sign, last = (Pick("shares", "halves", "splits", "divides", "cuts",
                                    wrong=("doubles",)), " the ", what), "/", 2
        elif kind == "double":
            n *= 2
            story.append(rng.choice([f"{name} doubles the number of {item}.",
                                     f"{other} brings {name} as many {item} again."]))
            act, sign, last = (Pick("doubles", "repeats", "twins", "copies", "matches",
                                    wrong=("halves",)), " the ", what), "*", 2
        else:
            a = rng.randrange(2, 10)
            b = rng.randrange(2, min(10, (98 - n) // a + 1)) if (98 - n) // a >= 2 else 2
            if n + a * b > 99:
                a, b = 2, 5
            n += a * b
            story.append(rng.choice([f"{name} gets {a} {box} with {b} {item} each.",
                                     f"{other} hands {name} {a} {box} of {b} {item} each."]))
            steps.append((then, " the ", num(a), " ", word(box, CONTAINERS), " ",
                          Pick("hold", "contain", "carry", "bring", "have"), " ",
                          num(a), " * ", num(b), " = ", num(a * b), " ", what, "."))
            act, sign, last = (Pick(*gain_verbs, wrong=lose_verbs), " ", num(a * b)), "+", a * b
        steps.append((then, " ", who, " ", *act, Pick(" and", ", so", ", then", "; now", ", thus"),
                      " ", who, " ", keeps, " ", num(before), f" {sign} ", num(last), " = ",
                      num(n), " ", what, "."))
    story.append(rng.choice([f"How many {item} does {name} have now?",
                             f"How many {item} are left with {name}?"]))
    close = (Pick(" So", " Hence", " Thus", " Therefore", " In the end"), " ", who, " ", keeps, " ",
             num(n), " ", what, ".\n#### ", num(n), "\n")
    return Problem("maths", f"Question: {' '.join(story)}\nAnswer:", (*steps, close), n)


def drill(rng):
    """Bare sums for training: the arithmetic of the word problems, many to a document."""
    def one():
        kind, a, c = rng.choice("+-*+-*2/"), rng.randrange(4, 99), rng.randrange(2, 10)
        if kind == "+":
            c = rng.randrange(2, 100 - a) if a < 98 else 1
            return a, "+", c, a + c
        if kind == "-":
            c = rng.randrange(1, a)
            return a, "-", c, a - c
        if kind == "*":
            b = rng.randrange(2, 10)
            return b, "*", c, b * c
        return (a // 2, "*", 2, a // 2 * 2) if kind == "2" else (a // 2 * 2, "/", 2, a // 2)
    sums = [one() for _ in range(12)]
    return Problem("drill", "Sums:",
                   tuple(part for a, sign, b, c in sums
                         for part in (f" {a} {sign} {b} = ", number(c, rng), ".")), None)


# ---------------------------------------------------------------- code

def _limits(k, x):
    """Conditions on x with a constant: (docstring phrase, ways to write it, the test itself)."""
    return [
        ("at least {}", (f"{x} >= {k}", f"{k} <= {x}", f"{x} > {k - 1}", f"not {x} < {k}"),
         lambda v: v >= k),
        ("more than {}", (f"{x} > {k}", f"{k} < {x}", f"{x} >= {k + 1}", f"not {x} <= {k}"),
         lambda v: v > k),
        ("at most {}", (f"{x} <= {k}", f"{k} >= {x}", f"{x} < {k + 1}", f"not {x} > {k}"),
         lambda v: v <= k),
        ("less than {}", (f"{x} < {k}", f"{k} > {x}", f"{x} <= {k - 1}", f"not {x} >= {k}"),
         lambda v: v < k),
        ("not {}", (f"{x} != {k}", f"{k} != {x}", f"not {x} == {k}"), lambda v: v != k),
    ]


def _parities(x):
    return [
        ("even", (f"{x} % 2 == 0", f"not {x} % 2", f"0 == {x} % 2", f"{x} % 2 != 1"),
         lambda v: v % 2 == 0),
        ("odd", (f"{x} % 2 == 1", f"not {x} % 2 == 0", f"1 == {x} % 2", f"{x} % 2 != 0"),
         lambda v: v % 2 == 1),
        ("a multiple of 3", (f"{x} % 3 == 0", f"not {x} % 3", f"0 == {x} % 3"),
         lambda v: v % 3 == 0),
        ("a multiple of 5", (f"{x} % 5 == 0", f"not {x} % 5", f"0 == {x} % 5"),
         lambda v: v % 5 == 0),
    ]


def _maps(k, m, x):
    return [
        (f"{k} times each", (f"{k} * {x}", f"{x} * {k}", f"({x} * {k})", f"({k} * {x})"),
         lambda v: k * v),
        (f"each plus {k}", (f"{x} + {k}", f"{k} + {x}", f"({k} + {x})", f"({x} + {k})"),
         lambda v: v + k),
        (f"{k} times each plus {m}",
         (f"{k} * {x} + {m}", f"{m} + {k} * {x}", f"({x} * {k} + {m})", f"{x} * {k} + {m}"),
         lambda v: k * v + m),
        (f"{k} times each minus {m}",
         (f"{k} * {x} - {m}", f"-{m} + {k} * {x}", f"({x} * {k} - {m})", f"{x} * {k} - {m}"),
         lambda v: k * v - m),
        (f"{m} minus each", (f"{m} - {x}", f"-{x} + {m}", f"({m} - {x})"), lambda v: m - v),
        ("the square of each", (f"{x} * {x}", f"pow({x}, 2)", f"({x} * {x})"), lambda v: v * v),
    ]


def _choice(options, pool):
    """A Pick of equal expressions; its mistakes are others of `pool`, or a number that is off."""
    wrong = {re.sub(r"\d+", str(int(n) + d), options[0], count=1)
             for n in re.findall(r"\d+", options[0])[:1] for d in (-2, 3, 7) if int(n) + d > 0}
    wrong |= {p[0] for p in pool if p[0] != options[0]}
    return Pick(*options, wrong=tuple(sorted(wrong - set(options)))[:8])


LOOP_VARS = ("x", "n", "v", "item", "k")
ACCUMULATORS = ("total", "result", "acc", "out", "value")


def code(rng):
    k, m = rng.randrange(2, 10), rng.randrange(2, 20)
    k2, start = rng.randrange(3, 40), rng.randrange(1, 10)
    x = "\0"  # stands for the loop variable until the tree is built
    limits, parities, maps = _limits(k2, x), _parities(x), _maps(k, m, x)
    limit, parity = rng.choice(limits), rng.choice(parities)
    map_words, map_forms, map_f = rng.choice(maps)
    tests = rng.choice([[limit], [parity], [limit, parity], [parity, limit], [limit, parity]])
    how = rng.choice(["sum", "list", "count", "sum", "list", "start"])
    expression = _choice(map_forms, [e for _, e, _ in maps])
    acc = Ref("acc")
    if how == "count":
        expression, map_words = "1", None
    wants = {"sum": f"the sum of {map_words}", "list": f"the list of {map_words}",
             "count": "how many there are", "start": f"{start} plus the sum of {map_words}"}[how]
    first = {"sum": number(0, rng), "count": number(0, rng),
             "list": Pick("[]", "list()", wrong=("0",)), "start": number(start, rng)}[how]
    if how == "list":
        update = Pick((acc, ".append(", expression, ")"), (acc, " += [", expression, "]"),
                      (acc, " = ", acc, " + [", expression, "]"))
    else:
        update = Pick((acc, " += ", expression), (acc, " = ", acc, " + ", expression),
                      (acc, " = ", expression, " + ", acc))
    conditions = [_choice(forms, [f for _, f, _ in limits + parities]) for _, forms, _ in tests]
    condition = tuple(part for c in conditions for part in (" and ", c))[1:]
    loop = Ref("loop")
    solution = (
        "    # ", Pick("Start with", "Begin with", "Set up", "Prepare", "First take"), " ",
        Pick("an empty list", "the empty list", "a new list", "a fresh list") if how == "list"
        else Pick("the first value", "the start value", "the initial value", "our start"), "\n",
        "    ", Pick(*ACCUMULATORS, name="acc"), " = ", first, "\n",
        "    # ", Pick("Go through", "Walk over", "Look at", "Visit", "Scan"), " ",
        Pick("the numbers", "every number", "each number", "all of xs"), "\n",
        "    for ", Pick(*LOOP_VARS, name="loop"), " in xs:\n        if ", condition, ":\n",
        "            # ",
        Pick("this one counts", "keep this one", "it passes", "take it", "a match"), "\n",
        "            ", update, "\n",
        "    # ", Pick("all done", "the end", "that is all", "finished", "hand it back"), "\n",
        "    return ", acc, "\n")
    words = " and ".join(phrase.format(k2) for phrase, _, _ in tests)
    doc = rng.choice([f"Take the numbers of xs that are {words} and return {wants}.",
                      f"Return {wants}, over the numbers in xs that are {words}.",
                      f"Of the numbers in xs, use those that are {words}: return {wants}."])
    picked = lambda xs: [map_f(v) for v in xs if all(f(v) for _, _, f in tests)]
    solve = {"sum": lambda xs: sum(picked(xs)), "list": picked, "count": lambda xs: len(picked(xs)),
             "start": lambda xs: start + sum(picked(xs))}[how]
    inputs = [[rng.randrange(-5, 60) for _ in range(12)] + [k2 - 1, k2, k2 + 1, 30, 15]
              for _ in range(3)] + [[]]
    return Problem("code", f'def f(xs):\n    """{doc}"""\n', _bind(solution, x, loop),
                   [(xs, solve(xs)) for xs in inputs])


def _bind(node, mark, ref):
    """The tree with `mark` inside strings replaced by a Ref."""
    if isinstance(node, Ref):
        return node
    if isinstance(node, str):
        parts = node.split(mark)
        return node if len(parts) == 1 else tuple(p for part in parts for p in (ref, part))[1:]
    if isinstance(node, tuple):
        return tuple(_bind(part, mark, ref) for part in node)
    return Pick(*(o if node.name else _bind(o, mark, ref) for o in node.options),
                wrong=tuple(_bind(w, mark, ref) for w in node.wrong), name=node.name)


# ---------------------------------------------------------------- facts

ATTRIBUTES = {  # attribute: (values, question about a town, ways to state it, the same as an aside)
    "craft": ("rope glass salt wool paper silk iron soap wax ink".split(), "What does {} make?",
              (" makes", " produces", " sells", " is known for", " trades in"),
              Pick(" where they make", " home of the", " maker of", " seller of", " place of the")),
    "river": ("Sel Ume Tor Wen Arl Kess Dray Ost".split(), "On which river is {}?",
              (" lies on the river", " is by the river", " stands at the river",
               " borders the river", " sits along the river"),
              Pick(" on the", " beside the", " up the", " along the", " not far from the")),
    "animal": ("bear fox owl wolf crane stag hare pike heron ram".split(),
               "Which animal is on the flag of {}?",
               (" shows the", " flies the", " bears the", " has the", " carries the"),
               Pick(" with the", " under the flag of the", " loyal to the", " proud of the",
                    " sworn to the")),
    "hill": ("Amon Brae Cairn Dunn Fell Garth Howe Knott".split(), "Below which hill is {}?",
             (" is below the hill", " lies under the hill", " stands beneath the hill",
              " rests at the hill", " sits below the hill"),
             Pick(" near", " at the foot of", " in the shade of", " close to", " seen from")),
}
TOWNS = [a + b for a in ("Dor", "Kar", "Bel", "Mon", "Tas", "Vel", "Hul", "Pra")
         for b in ("van", "rik", "mor", "dell", "ost", "una", "gar", "wick")]
_world = random.Random(7)
WORLD = {town: {key: _world.choice(values) for key, (values, *_) in ATTRIBUTES.items()}
         for town in TOWNS}
LETTERS = "ABCD"


def _choices(things):
    return "".join(f"\n{letter}) {thing}" for letter, thing in zip(LETTERS, things)) + "\nAnswer:"


def facts(rng):
    town, key = rng.choice(TOWNS), rng.choice(sorted(ATTRIBUTES))
    values, question, ways, _ = ATTRIBUTES[key]
    about = lambda a: (" ", word(WORLD[town][a], ATTRIBUTES[a][0]))
    value = WORLD[town][key]
    options = rng.sample([v for v in values if v != value], 3) + [value]
    rng.shuffle(options)
    letter = word(LETTERS[options.index(value)], LETTERS)
    asides = [part for a in sorted(set(ATTRIBUTES) - {key})
              for part in (",", ATTRIBUTES[a][3], about(a))]
    solution = (" ", word(town, TOWNS), *asides, ",", Pick(*ways), about(key), ".",
                Pick(" So", " Hence", " Thus", " Therefore", " In the end"),
                # The letter follows the value at once: with a bracket between, a small model had
                # not learned to look it up in 20 million tokens.
                Pick(" the answer is", " the choice is", " it must be", " we choose",
                     " this leaves"), about(key), " ", letter, ".\n#### ", letter, "\n")
    return Problem("facts", f"Question: {question.format(town)}{_choices(options)}", solution,
                   letter.options[0])


def lookups(rng):
    """Bare lookups for training, many to a document: what a small model learns last of `facts`."""
    things = rng.sample([v for values, *_ in ATTRIBUTES.values() for v in values] + ITEMS, 4)
    asked = [rng.randrange(4) for _ in range(12)]
    return Problem("lookups", f"Lookups:{_choices(things)}",
                   tuple(part for i in asked
                         for part in (f" {things[i]} ", word(LETTERS[i], LETTERS), ".")), None)


MAKERS = {"maths": maths, "code": code, "facts": facts, "drill": drill, "lookups": lookups}


def problems(task, split, seed=0):
    """Endless problems of a task, none of whose prompts is in another split."""
    rng = random.Random(f"{task} {split} {seed}")
    while True:
        problem = MAKERS[task](rng)
        if task not in TASKS or zlib.crc32(problem.prompt.encode()) % 16 in SPLITS[split]:
            yield problem
