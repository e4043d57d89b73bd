"""The offline instruction corpus of the quickstart: Dolly-shaped rows from a small grammar.

Every response is copied or composed from its prompt, or states a record of the tables below, and
each record is asked in many phrasings. A held-out row is therefore answerable from the other rows:
exact match on held-out prompts measures what a model of a few million parameters has learned. The
price is narrowness: under 1,000 words, and one answer per record.
"""

import random
import re
from collections.abc import Iterator
from functools import partial
from itertools import chain, zip_longest

KEYS = ("instruction", "context", "response", "category")
OPENERS = ("", "Quick question: ", "Can you tell me: ", "Please answer in one sentence: ",
           "Please tell me: ", "Here is a question: ", "A short question: ",
           "I would like to know: ")  # fmt: skip
MAX_MISSES = 5_000  # so many repeated prompts in a row: the grammar counts as used up

Table = list[tuple[str, ...]]
Entry = tuple[Table, str, str]  # table, response, "|"-separated instructions
Prompted = tuple[str, ...]  # instruction, context, response


def _table(text: str) -> Table:
    return [tuple(" ".join(cell.split()) for cell in row.split("|")) for row in text.split(";")]


def _named(name: str) -> str:
    return name if name[0].isupper() else f"a {name}"


# name | class | home | food | legs | sound ("-" for none), smallest first: size questions compare
# the positions of two animals in this table.
ANIMALS = _table("""
    ant|insect|in a nest|crumbs|six|-; bee|insect|in a hive|nectar|six|buzzes; mouse|mammal|in a
    hole|seeds|four|squeaks; frog|amphibian|in a pond|flies|four|croaks; owl|bird|in the
    forest|mice|two|hoots; duck|bird|on a lake|snails|two|quacks; cat|mammal|in a
    house|fish|four|meows; dog|mammal|in a kennel|bones|four|barks; sheep|mammal|in a
    meadow|clover|four|bleats; lion|mammal|on the savanna|meat|four|roars; cow|mammal|on a
    farm|grass|four|moos; horse|mammal|in a stable|hay|four|neighs; whale|mammal|in the
    sea|krill|no|sings""")
COUNTRIES = [(*pair.split(), continent) for continent, pairs in _table("""
    Europe|France Paris, Spain Madrid, Italy Rome, Norway Oslo, Greece Athens, Poland Warsaw;
    Asia|Japan Tokyo, China Beijing, Nepal Kathmandu, Vietnam Hanoi; Africa|Egypt Cairo, Kenya
    Nairobi, Ghana Accra; America|Canada Ottawa, Cuba Havana, Peru
    Lima""") for pair in pairs.split(", ")]  # fmt: skip
FRUITS = _table("""
    apple|green|tree; apricot|orange|tree; banana|yellow|tall plant; blackberry|black|bush;
    blueberry|blue|bush; cherry|red|tree; kiwi|brown|vine; plum|purple|tree""")
TOOLS = _table("""
    hammer|drive nails; saw|cut wood; spade|dig in the garden; rake|gather leaves; broom|sweep the
    floor; needle|sew clothes; brush|paint walls; ladder|reach high places""")
JOBS = _table("""
    baker|in a bakery|bakes bread; nurse|in a hospital|cares for patients; teacher|in a
    school|teaches children; farmer|on a farm|grows crops; pilot|at an airport|flies planes;
    waiter|in a restaurant|serves meals; painter|in a studio|paints pictures; gardener|in a
    garden|plants flowers; chef|in a kitchen|cooks meals; mechanic|in a garage|repairs cars""")
OPPOSITES = _table("""
    hot|cold; big|small; fast|slow; wet|dry; heavy|light; early|late; open|closed; full|empty;
    happy|sad; long|short""")
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
NUMBERS = _table("one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen")[0]
MONTHS = _table("""
    January|first|winter; February|second|winter; March|third|spring; April|fourth|spring;
    May|fifth|spring; June|sixth|summer; July|seventh|summer; August|eighth|summer;
    September|ninth|autumn; October|tenth|autumn; November|eleventh|autumn;
    December|twelfth|winter""")
ADVICE = _table("""
    it is raining|Take an umbrella.; I am tired|Go to bed early.; I am hungry|Eat some bread and an
    apple.; I am thirsty|Drink a glass of water.; it is very cold|Wear a warm coat and a scarf.; it
    is very hot|Stay in the shade.; I feel sick|See a doctor and rest.""")

_CYCLES = (DAYS, [month[0] for month in MONTHS], ["spring", "summer", "autumn", "winter"])
_NEXT = [(cycle[i - 1], name) for cycle in _CYCLES for i, name in enumerate(cycle)]
_OPS = (("plus", "buys", 1), ("minus", "sells", -1))
_SUMS = [(NUMBERS[a - 1], f"{sign} {NUMBERS[b - 1]}", f"{verb} {NUMBERS[b - 1]}", NUMBERS[n - 1])
         for a in range(2, 11) for b in range(1, 4) for sign, verb, step in _OPS
         if (n := a + step * b) > 1]  # fmt: skip
_SHIFTS = [(f"two days {way} {DAYS[i]}", DAYS[(i + n) % 7])
           for i in range(7) for way, n in (("before", -2), ("after", 2))]  # fmt: skip
_SPANS = [(DAYS[i], DAYS[(i + n) % 7], NUMBERS[n - 1]) for i in range(7) for n in range(2, 7)]
# Four places apart in the table is a difference in size that nobody would dispute.
_SIZES = [(a[0], b[0]) for i, a in enumerate(ANIMALS) for b in ANIMALS[i + 4 :]]


def _guesses(table: Table, column: int) -> Table:
    """Name, guess, verdict and value: each record against its own value and two of others."""
    pairs = [(r, table[i - n][column]) for i, r in enumerate(table) for n in (0, 3, 7)]
    return [(r[0], g, "Yes" if g == r[column] else "No", r[column]) for r, g in pairs]


# {0} is the first cell of a record. A question with two answers ("Which animal eats grass?") is
# dropped by _listed(), so a reversed question is written as if every cell were unique.
FACTS: list[Entry] = [
    (ANIMALS, "A {0} is a {1}.", "What kind of animal is a {0}?|What is a {0}?"),
    (ANIMALS, "A {0} lives {2}.", """Where does a {0} live?|What is the home of a {0}?|Where can you
        find a {0}?|Which animal lives {2}?|Where does the animal that {5} live?"""),
    (ANIMALS, "A {0} eats {3}.", """What does a {0} eat?|What is the food of a {0}?|Which animal
        eats {3}?|What does the animal that {5} eat?"""),
    (ANIMALS, "A {0} has {4} legs.", """How many legs does a {0} have?|What number of legs does a
        {0} have?|How many legs does the animal that {5} have?"""),
    (ANIMALS, "A {0} {5}.", "What sound does a {0} make?|Which animal {5}?"),
    (COUNTRIES, "{1} is the capital of {0}.", """What is the capital of {0}?|Which city is the
        capital of {0}?|Which country has the capital {1}?|{1} is the capital of which country?"""),
    ([(c[0], c[2]) for c in COUNTRIES] + [c[1:] for c in COUNTRIES], "{0} is in {1}.", """On which
        continent is {0}?|Which continent does {0} belong to?|What continent is {0} in?"""),
    (FRUITS, "A ripe {0} is {1}.", "What colour is a ripe {0}?|Which colour does a ripe {0} have?"),
    (FRUITS, "A {0} grows on a {2}.", "What does a {0} grow on?|Where does a {0} grow?"),
    (TOOLS, "You use a {0} to {1}.", """What is a {0} used for?|What do you use to {1}?|What do you
        need to {1}?|Why do people use a {0}?"""),
    (JOBS, "A {0} {2}.", "What does a {0} do?|Who {2}?|What is the job of a {0}?"),
    (JOBS, "A {0} works {1}.", "Where does a {0} work?|Who works {1}?|Where can you meet a {0}?"),
    (OPPOSITES + [(b, a) for a, b in OPPOSITES], "The opposite of {0} is {1}.", """What is the
        opposite of {0}?|Which word is the opposite of {0}?"""),
    (_NEXT, "{1} comes after {0}.", "What comes after {0}?|What follows {0}?"),
    (_NEXT, "{0} comes before {1}.", "What comes before {1}?|What is just before {1}?"),
    (MONTHS, "{0} is the {1} month of the year.", """Which month of the year is {0}?|What is the {1}
        month of the year?|Which month is the {1} one?"""),
    (MONTHS, "In Europe, {0} is in {2}.", "In Europe, which season is {0} in?"),
]  # fmt: skip

GENERAL: list[Entry] = [
    (_SUMS, "The answer is {3}.", "What is {0} {1}?|How much is {0} {1}?"),
    (_SHIFTS, "It is {1}.", "Which day is {0}?|What day is {0}?|Which day comes {0}?"),
    (_SPANS, "There are {2} days.", "How many days are there from {0} to {1}?"),
    (_guesses(ANIMALS, 1), "{2}, a {0} is a {3}.", "Is a {0} a {1}?|Would you call a {0} a {1}?"),
    (_guesses(ANIMALS, 4), "{2}, a {0} has {3} legs.", "Is it true that a {0} has {1} legs?"),
    (_guesses(COUNTRIES, 1), "{2}, {3} is the capital of {0}.", "Is {1} the capital of {0}?"),
    (_SIZES, "A {1} is bigger than a {0}.", """Which is bigger, a {0} or a {1}?|Which is bigger, a
        {1} or a {0}?"""),
    (ADVICE, "{1}", "What should I do when {0}?|What can I do if {0}?"),
]  # fmt: skip

NAMES = _table("Mara|Lena|Nora|Ida|Rosa|Anna|Clara|Ella|Tom|Paul|Hugo|Ben|Leo|Karl|Omar|Finn")[0]
POOLS = {name: words.split() for name, words in _table("""
    age|two three four five six seven eight nine ten; people|two three four five six seven eight;
    hour|six seven eight nine ten eleven; fur|white black brown grey; colour|red blue green yellow
    white black brown grey; minutes|ten twenty thirty forty; wind|north south east west;
    forecast|sunny rainy windy cloudy warm foggy stormy; product|bread apples cheese flowers books
    lamps shoes honey tea eggs hats; things|apples books coins eggs cakes; favourite|apples music
    rain snow honey; dish|soup pie stew salad; food|rice cheese spinach corn pumpkin chicken cabbage
    potato tomato pasta fish; place|park station school library market beach museum bridge;
    transport|train bus car taxi bicycle; event|concert party picnic meeting festival race fair;
    pet|dog cat rabbit horse mouse; pet_name|Bobo Pip Rex Luna Max Daisy Milo Coco; thing|rain moon
    snow sea wind sun river garden; adjective|quiet brave happy old clever shy lazy tiny
    hungry""")}  # fmt: skip
POOLS |= {"name": NAMES, "day": DAYS, "job": [job[0] for job in JOBS]}
POOLS |= {"town": [c[1] for c in COUNTRIES], "animal": ["fox", *(a[0] for a in ANIMALS)]}

# texts, question=answer;..., summary. {town2} is a second town. The slots of the texts are also the
# fields that can be extracted, under the name of the slot.
STORIES = [
    ("""{name} works as a {job} in {town}. {She} starts at {hour} and rides a {colour} bicycle to
        work.|In {town}, {name} is a {job}, starts at {hour} and has a {colour} bicycle.""",
     """Where does {name} work?=In {town};What is {name}'s job?=A {job};When does {name} start
        work?=At {hour};What colour is {name}'s bicycle?=It is {colour}.""",
     "{name} is a {job} in {town} and starts at {hour}."),
    ("""{name} is a {job} and lives in {town}. {name2} is a {job2} and lives in {town2}.|{name}
        lives in {town} and works as a {job}. {name2} lives in {town2} and works as a {job2}.""",
     """Where does {name} live?=In {town};Where does {name2} live?=In {town2};What is {name}'s
        job?=A {job};What is {name2}'s job?=A {job2};Who lives in {town}?={name};Who lives in
        {town2}?={name2};Who is a {job}?={name};Who is a {job2}?={name2}""",
     "{name} is a {job} in {town}, and {name2} is a {job2} in {town2}."),
    ("""{name} has a shop in {town} that sells {product} and {product2}. It opens at {hour}, but not
        on {day}.|{name} sells {product} and {product2} in {town} from {hour}, but not on {day}.""",
     """What does the shop sell?=It sells {product} and {product2}.;When does it open?=At
        {hour};When is it closed?=On {day};Who has the shop?={name};Where is the shop?=In {town}""",
     "{name} sells {product} and {product2} in {town}."),
    ("""On {day}, {name} goes from the {place} to the {place2} by {transport}. It takes {minutes}
        minutes.|{name} takes a {transport} from the {place} to the {place2} on {day}. It takes
        {minutes} minutes.""",
     """Where does the trip begin?=At the {place};Where does the trip end?=At the {place2};How does
        {name} travel?=By {transport};On which day does {name} travel?=On {day};How long is the
        trip?=It takes {minutes} minutes.""",
     "{name} goes from the {place} to the {place2} by {transport}."),
    ("""The {event} in {town} is on {day} at {hour}. {name} will bring {product}.|On {day} there
        will be a {event} in {town}. It begins at {hour}, and {name} will bring {product}.""",
     """Where is the {event}?=In {town};What day is the {event}?=On {day};When does it begin?=At
        {hour};Who brings {product}?={name};What does {name} bring?={She} brings {product}.""",
     "The {event} in {town} is on {day} at {hour}."),
    ("""{name} has a {fur} {pet} called {pet_name}. It is {age} years old and likes
        {favourite}.|{pet_name}, the {fur} {pet} of {name}, is {age} and likes {favourite}.""",
     """What is {name}'s {pet} called?={pet_name};How old is {pet_name}?=It is {age} years old.;What
        does {pet_name} like?=It likes {favourite}.;Who has a {pet}?={name};What kind of animal is
        {pet_name}?=A {pet};What colour is {pet_name}?=It is {fur}.""",
     "{name} has a {fur} {pet} called {pet_name} that likes {favourite}."),
    ("""In {town}, {day} will be {forecast} and {day2} will be {forecast2}. The wind comes from the
        {wind}.|{town}: {forecast} on {day}, {forecast2} on {day2}, with {wind} wind.""",
     """How will the weather be on {day}?=It will be {forecast}.;How will the weather be on
        {day2}?=It will be {forecast2}.;Where does the wind come from?=From the {wind};When will it
        be {forecast}?=On {day};When will it be {forecast2}?=On {day2}""",
     "In {town} it will be {forecast} on {day} and {forecast2} on {day2}."),
    ("""For the {dish}, mix {food} with {food2} and cook for {minutes} minutes. It serves {people}.|
        The {dish} for {people} has {food} and {food2}. It cooks for {minutes} minutes.""",
     """What does the recipe make?=A {dish};What is in the {dish}?=It has {food} and {food2}.;How
        long does the {dish} cook?=For {minutes} minutes;How many people is it for?=For {people}""",
     "The {dish} of {food} and {food2} cooks for {minutes} minutes."),
]  # fmt: skip
READ = ("", "Answer from the text: ", "Read the note and answer: ")
EXTRACT = ("Extract {} from the text.", "Find {} in the text.", "Write down {} given in the text.")
SUMMARISE = ("Summarise the note in one sentence.", "Sum up the text.", "Write a short summary.")

# subject | said in a good review | said in a bad one
REVIEWS = _table("""
    the soup was|tasty|cold; the staff were|friendly|rude; the room was|clean|dirty; the film
    was|funny|boring; the bed was|soft|broken; the bus was|on time|late; the music was|beautiful|too
    loud; the guide was|helpful|careless; the cake was|fresh|dry""")
_REVIEWS = [(f"{a[0]} {a[n]} and {b[0]} {b[n]}", mood) for a in REVIEWS for b in REVIEWS if a != b
            for n, mood in ((1, "Positive"), (2, "Negative"))]  # fmt: skip
CLASSES = {kind: [a for a in ANIMALS if a[1] == kind] for kind in ("mammal", "bird", "insect")}
GROUPS = {"animal": ANIMALS, "tool": TOOLS, "fruit": FRUITS, "worker": JOBS, "month": MONTHS}
GROUPS["capital"] = [(country[1],) for country in COUNTRIES]

IDEAS = _table("""
    things to take to the beach|a towel, a hat and a ball; things to take to a picnic|a blanket, a
    basket and some juice; things to take to school|a pen, a book and a ruler; things to take to a
    party|a cake, a card and a gift; things to take to the market|a bag, a list and some coins;
    things to take on a camping trip|a tent, a lamp and a blanket; things to do on a rainy day|read
    a book and bake a cake; things to do in summer|swim in the lake and eat ice cream; things to do
    in winter|build a snowman and drink hot tea; things to do with a dog|throw a ball and walk in
    the park; things to do in the evening|watch a film and play cards; gifts for a friend who likes
    cooking|a pan and a recipe book; gifts for a friend who likes reading|a book and a lamp""")
IDEAS += [(f"two {kind}s", " and ".join(_named(record[0]) for record in table[:2]))
          for kind, table in (GROUPS | CLASSES).items()]  # fmt: skip
# Instructions with {slots} to be filled from POOLS; each entry is a kind of its own.
BRAINSTORMING: list[Entry] = [
    (IDEAS, "{1}.", """Suggest {0}.|Name {0}.|Please list {0}.|Help {name} to think of {0}.|{name}
        is looking for ideas. Suggest {0}."""),
    ([()], "{food} soup with {food2} and {food2} salad with {food}.", """Suggest two dishes with
        {food} and {food2}.|I have {food} and {food2}. Give me two ideas for dinner.|{name} has
        {food} and {food2}. What two dishes can {name} cook?"""),
]  # fmt: skip
CREATIVE: list[Entry] = [
    ([()], "The {adjective} {animal} sang a soft song to the {thing}.", """Write one line about a
        {adjective} {animal} who loves the {thing}.|Invent a line about a {adjective} {animal} and
        the {thing}."""),
    ([()], "The {adjective} {animal} and the {thing}", """Write a title for a story about a
        {adjective} {animal} and the {thing}."""),
    ([()], "Once upon a time, a {adjective} {job} called {name} lived in {town}.", """Begin a fairy
        tale about {name}, a {adjective} {job} in {town}.|Write the first sentence of a story about
        a {adjective} {job} called {name} in {town}."""),
]  # fmt: skip
PUZZLE: Entry = (_SUMS, "{name} has {3} {things}.", """{name} has {0} {things} and {2}. How many
    {things} does {name} have now?""")  # fmt: skip
REVIEW: Entry = (_REVIEWS, "{1}", """Is this review positive or negative: {0}?|Classify this review
    as positive or negative: {0}.""")  # fmt: skip
FORMS = (
    ("Which is a {kind}, {two}?", "{name} is a {kind}."),
    ("Is {name} a {kinds}?", "{name} is a {kind}."),
    ("Which one is not a {kind}: {three}?", "{odd} is not a {kind}."),
    ("Sort into {kind}s and {other}s: {four}.", "{kind}s: {ours}; {other}s: {theirs}"),
)


def _tidy(text: str) -> str:
    """Return `text` on one line with a capital at the start and "an" before a vowel."""
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", " ".join(text.split()))
    return text[:1].upper() + text[1:]


def _slots(rng: random.Random, template: str) -> dict[str, str]:
    slots: dict[str, str] = {}
    for slot in dict.fromkeys(re.findall(r"{([a-z_]+)", template)):
        slots[slot], slots[f"{slot}2"] = rng.sample(POOLS[slot], 2)
    return slots | {"She": "She" if slots.get("name") in NAMES[:8] else "He"}


def _listed(entries: list[Entry], rng: random.Random) -> Iterator[Prompted]:
    """Yield every question of the entries, once with each opener, in random order."""
    answers: dict[str, str] = {}
    for table, response, questions in entries:
        for record in table:
            answer = _tidy(response.format(*record))
            for question in questions.split("|"):
                question = _tidy(question.format(*record))
                answers[question] = answer if answers.get(question, answer) == answer else "-"
    rows = [(o + q, "", a) for q, a in answers.items() if "-" not in q + a for o in OPENERS]
    rng.shuffle(rows)
    yield from rows


def _drawn(entry: Entry, rng: random.Random) -> Iterator[Prompted]:
    """Yield a random instruction of the entry for a random record, for ever."""
    table, response, instructions = entry
    while True:
        record, instruction = rng.choice(table), rng.choice(instructions.split("|"))
        slots = _slots(rng, instruction + response)
        yield tuple(_tidy(t.format(*record, **slots)) for t in (instruction, "", response))


def _classified(form: tuple[str, str], rng: random.Random) -> Iterator[Prompted]:
    while True:
        groups = rng.choice([GROUPS, CLASSES])
        kind, other = rng.sample(list(groups), 2)
        ours, theirs = ([r[0] for r in rng.sample(groups[k], 2)] for k in (kind, other))
        name, name2, odd = (_named(n) for n in (*ours, theirs[0]))
        four = rng.sample(ours + theirs, 4)
        slots = {"kind": kind, "other": other, "name": name, "odd": odd, "four": ", ".join(four)}
        slots["two"] = " or ".join(rng.sample([name, odd], 2))
        slots["kinds"] = " or a ".join(rng.sample([kind, other], 2))
        slots["three"] = ", ".join(rng.sample([name, name2, odd], 3))
        slots["ours"] = ", ".join(n for n in four if n in ours)
        slots["theirs"] = ", ".join(n for n in four if n in theirs)
        yield tuple(_tidy(template.format(**slots)) for template in (form[0], "", form[1]))


def _story(category: str, rng: random.Random) -> Iterator[Prompted]:
    while True:
        texts, questions, response = rng.choice(STORIES)
        instruction = rng.choice(SUMMARISE)
        if category == "closed_qa":
            question, response = rng.choice(questions.split(";")).split("=")
            instruction = rng.choice(READ) + question
        elif category == "information_extraction":
            fields = {}
            for slot in re.findall(r"{([a-z_]+)}", texts):
                twin = f"{{{slot}2}}" in texts
                label = slot.replace("_", " ") + "s" * twin
                fields[f"the {label}"] = f"{label}: {{{slot}}}" + f" and {{{slot}2}}" * twin
            wanted = rng.sample(list(fields), rng.choice([1, 2]))
            instruction = rng.choice(EXTRACT).format(" and ".join(wanted))
            response = "; ".join(fields[field] for field in wanted)
        slots = _slots(rng, texts)
        templates = (instruction, rng.choice(texts.split("|")), response)
        yield tuple(_tidy(template.format(**slots)) for template in templates)


# category -> (per cent of rows, kinds to draw from in turn). The shares of databricks-dolly-15k,
# rounded, creative_writing (4.7) raised to 6. open_qa comes first as it is the first to run out.
GRAMMAR = {
    "open_qa": (24, [partial(_listed, FACTS)]),
    "brainstorming": (12, [partial(_drawn, entry) for entry in BRAINSTORMING]),
    "general_qa": (14, [*(partial(_listed, [e]) for e in GENERAL), partial(_drawn, PUZZLE)]),
    "classification": (14, [partial(_drawn, REVIEW), *(partial(_classified, f) for f in FORMS)]),
    "closed_qa": (12, [partial(_story, "closed_qa")]),
    "information_extraction": (10, [partial(_story, "information_extraction")]),
    "summarization": (8, [partial(_story, "summarization")]),
    "creative_writing": (6, [partial(_drawn, entry) for entry in CREATIVE]),
}  # fmt: skip


def generate_rows(num_rows: int = 12_000, seed: int = 17) -> list[dict[str, str]]:
    """Return `num_rows` rows in the layout of databricks-dolly-15k, shuffled.

    No two rows share (instruction, context), also after lower-casing and folding of white space;
    the same arguments give the same rows on every Python version. Raises ValueError if the grammar
    cannot write that many.
    """
    if num_rows < 1:
        raise ValueError(f"num_rows must be at least 1, not {num_rows}.")
    rng = random.Random(seed)
    rows: list[dict[str, str]] = []
    seen = {""}  # the prompt of the filler that stands in for a used-up kind
    counts = {category: num_rows * share // 100 for category, (share, _) in GRAMMAR.items()}
    counts["open_qa"] += num_rows - sum(counts.values())
    for category, count in counts.items():
        left, misses = count, 0
        kinds = (kind(rng) for kind in GRAMMAR[category][1])
        for row in chain.from_iterable(zip_longest(*kinds, fillvalue=("", ""))):
            if left == 0 or misses > MAX_MISSES:
                break
            prompt = " ".join(f"{row[0]} {row[1]}".lower().split())
            if prompt in seen:
                misses += 1
                continue
            seen.add(prompt)
            rows.append(dict(zip(KEYS, (*row, category), strict=True)))
            left, misses = left - 1, 0
        if left:
            raise ValueError(
                f"num_rows={num_rows} needs {count} different {category} rows, but the grammar "
                f"has only about {count - left}; ask for fewer rows."
            )
    rng.shuffle(rows)
    return rows
