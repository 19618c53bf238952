"""The kinds of word problem that ``word_problems`` makes: words, templates, and sentences that do not matter.

A template is a story, a question and a worked answer, written in one small notation:

- ``{boxes:3-9}`` draws a number, ``{pages:120-300:20}`` one in steps of 20; later ``{boxes}`` names the same number;
- ``{name}``, ``{other}``, ``{fruit}`` … draw a word, the same one for the whole problem;
- ``[total = boxes * each]`` computes ``total`` and writes the arithmetic out: ``6 * 7 = 42``.
"""

from dataclasses import dataclass

WORDS = {
    "name": (
        "Ada Amir Bella Ben Chloe Dan Elif Emma Felix Grace Hana Ivan Jade Jonas Kofi Lena Leo Maya Mei Nadia "
        "Noah Olga Omar Paula Priya Quinn Rosa Sam Sofia Tariq Theo Uma Victor Wendy Yuki Zoe"
    ).split(),
    "fruit": ["apples", "pears", "plums", "oranges", "peaches", "lemons", "mangoes", "apricots"],
    "sweet": ["cookies", "muffins", "cupcakes", "doughnuts", "brownies", "pancakes"],
    "toy": ["marbles", "stickers", "cards", "beads", "buttons", "shells"],
    "plant": ["tulips", "roses", "sunflowers", "daisies", "cabbages", "tomatoes"],
    "animal": ["chickens", "goats", "sheep", "ducks", "rabbits"],
    "thing": ["notebooks", "candles", "mugs", "caps", "posters", "lamps"],
    "place": ["village", "town", "harbour", "valley", "mountain", "island"],
    "day": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"],
}

DISTRACTORS = (
    "{name} has a dog that turned {years:2-12} last month.",
    "It is {degrees:8-29} degrees outside on {day}.",
    "The {place} where {name} lives has {houses:110-980:10} houses.",
    "{name} has a cousin who lives {away:12-90} kilometres away.",
    "Last year {name} read {books:5-30} books about animals.",
    "The radio plays {songs:3-12} songs in the meantime.",
    "{name} wakes up at {hour:5-9} o'clock every morning.",
    "A neighbour owns {cats:2-6} cats and a very old bicycle.",
    "On {day} the bus was {late:4-25} minutes late.",
    "{name}'s favourite number is {favourite:11-99}.",
)


@dataclass(frozen=True)
class Template:
    """One kind of problem; the notation is in the module's docstring. Every line of ``answer`` holds one step."""

    name: str
    story: str
    question: str
    answer: tuple[str, ...]


TEMPLATES = (
    Template(
        "boxes",
        "{name} packs {boxes:4-12} boxes with {each:6-15} {fruit} in each box. While the boxes are carried to the van,"
        " {lost:3-9} {fruit} roll out and are lost.",
        "How many {fruit} arrive at the market?",
        ("{name} packs [total = boxes * each] {fruit}.", "After the loss, [left = total - lost] {fruit} arrive."),
    ),
    Template(
        "bakery",
        "{name} bakes {trays:3-9} trays of {sweet} with {each:8-16} on every tray. In the morning {sold:10-30} {sweet}"
        " are sold. The remaining {sweet} are shared equally among {friends:2-6} neighbours.",
        "How many {sweet} does each neighbour get?",
        (
            "There are [total = trays * each] {sweet} at first.",
            "After the morning, [rest = total - sold] {sweet} are left.",
            "Each neighbour gets [share = rest / friends] {sweet}.",
        ),
    ),
    Template(
        "savings",
        "{name} earns {wage:8-15} dollars an hour and works {hours:3-8} hours on each of {days:3-6} days. Out of the"
        " wages {name} spends {food:20-60} dollars on food and {rent:15-45} dollars on a bus pass.",
        "How many dollars does {name} have left?",
        (
            "{name} works [time = hours * days] hours.",
            "That earns [pay = time * wage] dollars.",
            "The costs are [cost = food + rent] dollars.",
            "So [left = pay - cost] dollars are left.",
        ),
    ),
    Template(
        "collection",
        "{name} has {mine:20-60} {toy}. {other} has {times:2-4} times as many {toy} as {name}. Then {other} gives"
        " {given:5-18} {toy} away to a younger sister.",
        "How many {toy} do {name} and {other} have together now?",
        (
            "{other} starts with [theirs = times * mine] {toy}.",
            "After the gift {other} has [kept = theirs - given] {toy}.",
            "Together they have [both = kept + mine] {toy}.",
        ),
    ),
    Template(
        "reading",
        "{name} wants to finish a book of {pages:180-420:20} pages. On the first {days:4-9} days {name} reads"
        " {rate:12-24} pages a day. The rest of the book is to be read in {rest:2-6} days, the same number of pages"
        " each day.",
        "How many pages a day must {name} read at the end?",
        (
            "In the first days {name} reads [done = days * rate] pages.",
            "That leaves [left = pages - done] pages.",
            "So {name} must read [per = left / rest] pages a day.",
        ),
    ),
    Template(
        "garden",
        "A gardener plants {rows:4-11} rows of {plant} with {each:7-14} in a row. A storm destroys {dead:5-25} of the"
        " {plant}. The gardener then buys {packs:2-5} packs of {size:6-12} {plant} to fill the gaps.",
        "How many {plant} are in the garden now?",
        (
            "At first there are [total = rows * each] {plant}.",
            "The storm leaves [left = total - dead] {plant}.",
            "The packs hold [new = packs * size] {plant}.",
            "Now there are [sum = left + new] {plant}.",
        ),
    ),
    Template(
        "farm",
        "{name} keeps {hens:12-40} hens and every hen lays {eggs:3-6} eggs a week. The family eats {eaten:10-25} eggs"
        " a week. The others are sold in cartons of {carton:4-10} eggs.",
        "How many cartons does {name} fill in a week?",
        (
            "The hens lay [total = hens * eggs] eggs a week.",
            "The family leaves [rest = total - eaten] eggs.",
            "They fill [full = rest / carton] cartons.",
        ),
    ),
    Template(
        "train",
        "A train leaves with {start:60-180} passengers. At the first stop {off:12-40} people get off and {on:8-35} get"
        " on. At the second stop {off_too:10-30} people get off.",
        "How many passengers are on the train after the second stop?",
        (
            "After people get off at the first stop, [a = start - off] passengers remain.",
            "With the new ones there are [b = a + on] passengers.",
            "After the second stop there are [c = b - off_too] passengers.",
        ),
    ),
    Template(
        "shopping",
        "{name} buys {count:3-8} {thing} at {price:4-12} dollars each and {more:2-5} kilograms of {fruit} at"
        " {kilo:2-6} dollars a kilogram. {name} pays with {notes:2-6} notes of {note:50-50} dollars.",
        "How many dollars does {name} get back?",
        (
            "The {thing} cost [a = count * price] dollars.",
            "The {fruit} cost [b = more * kilo] dollars.",
            "Together that is [c = a + b] dollars.",
            "{name} pays with [d = notes * note] dollars.",
            "The change is [e = d - c] dollars.",
        ),
    ),
    Template(
        "pool",
        "A pool holds {full:600-1500:50} litres and already has {now:100-400:50} litres in it. One hose brings"
        " {first:8-18} litres a minute and a second hose brings {second:5-12} litres a minute.",
        "How many minutes do both hoses together need to fill the pool?",
        (
            "The pool lacks [lack = full - now] litres.",
            "Both hoses bring [both = first + second] litres a minute.",
            "They need [time = lack / both] minutes.",
        ),
    ),
    Template(
        "class_trip",
        "A school takes {groups:3-7} classes of {pupils:18-28} pupils and {adults:6-14} adults on a trip. One bus has"
        " {seats:20-50} seats and all the buses are full.",
        "How many buses does the school need?",
        (
            "There are [a = groups * pupils] pupils.",
            "With the adults there are [b = a + adults] people.",
            "The school needs [c = b / seats] buses.",
        ),
    ),
    Template(
        "runner",
        "{name} runs {km:4-9} kilometres on each of {days:3-5} days in a week and {long:10-21} kilometres on Sunday."
        " {name} keeps to this plan for {weeks:3-8} weeks.",
        "How many kilometres does {name} run in all?",
        (
            "On the short days {name} runs [a = km * days] kilometres a week.",
            "With Sunday that is [b = a + long] kilometres a week.",
            "In all, {name} runs [c = b * weeks] kilometres.",
        ),
    ),
    Template(
        "library",
        "A library in the {place} has {shelves:6-15} shelves with {each:24-45} books on each. {lent:40-120} books are"
        " lent out at the moment, and {broken:5-20} books are at the binder's.",
        "How many books stand on the shelves now?",
        (
            "The shelves hold [a = shelves * each] books in all.",
            "Missing are [b = lent + broken] books.",
            "On the shelves stand [c = a - b] books.",
        ),
    ),
    Template(
        "half_price",
        "A shop sells {thing} at {price:12-40:2} dollars each. On {day} everything costs half. {name} buys"
        " {count:3-9} {thing} at half price and also pays {post:4-15} dollars for delivery.",
        "How many dollars does {name} pay?",
        (
            "At half price one costs [a = price / two] dollars.",
            "The {thing} cost [b = count * a] dollars.",
            "With delivery {name} pays [c = b + post] dollars.",
        ),
    ),
    Template(
        "beads",
        "{name} makes necklaces. One necklace takes {red:8-20} red and {blue:6-18} blue beads. {name} has a bag of"
        " {bag:300-700:10} beads and makes {count:6-12} necklaces.",
        "How many beads are left in the bag?",
        (
            "One necklace takes [a = red + blue] beads.",
            "All necklaces take [b = count * a] beads.",
            "In the bag [c = bag - b] beads are left.",
        ),
    ),
    Template(
        "water",
        "A family of {people:3-7} drinks {cups:5-9} cups of water per person every day. A cup takes {ml:2-3} spoons of"
        " syrup. One bottle holds {bottle:30-90:5} spoons of syrup, and the family plans for {days:5-20} days.",
        "How many bottles of syrup does the family use up?",
        (
            "In a day they drink [a = people * cups] cups.",
            "That takes [b = a * ml] spoons a day.",
            "For all days it takes [c = b * days] spoons.",
            "That is [d = c / bottle] bottles.",
        ),
    ),
    Template(
        "age",
        "{other} is {years:3-9} years old. {name} is {times:3-5} times as old as {other}. Their aunt is {more:4-15}"
        " years older than {name}.",
        "How old will the aunt be in {later:2-12} years?",
        (
            "{name} is [a = times * years] years old.",
            "The aunt is [b = a + more] years old.",
            "In {later} years she will be [c = b + later] years old.",
        ),
    ),
    Template(
        "builder",
        "A wall needs {rows:12-30} rows of {each:18-40} bricks. A worker has laid {done:80-220:10} bricks already and"
        " lays {speed:20-60:5} bricks an hour.",
        "How many more hours will the worker need?",
        (
            "The wall needs [a = rows * each] bricks.",
            "Still missing are [b = a - done] bricks.",
            "The worker needs [c = b / speed] hours.",
        ),
    ),
    Template(
        "tickets",
        "For a play, {adults:25-80} adults pay {price:7-14} dollars each and {children:20-70} children pay"
        " {small:3-6} dollars each. The hall costs {hall:90-240:10} dollars for the evening.",
        "How many dollars does the theatre earn after paying for the hall?",
        (
            "The adults pay [a = adults * price] dollars.",
            "The children pay [b = children * small] dollars.",
            "Together that is [c = a + b] dollars.",
            "After the hall, [d = c - hall] dollars remain.",
        ),
    ),
    Template(
        "candle_shop",
        "{name} makes {made:15-40} {thing} a day for {days:4-8} days. {bad:3-15} of the {thing} break and cannot be"
        " sold. {name} sells all the others for {price:3-9} dollars each.",
        "How many dollars does {name} take in?",
        (
            "{name} makes [a = made * days] {thing}.",
            "Without the broken ones there are [b = a - bad] {thing}.",
            "They bring in [c = b * price] dollars.",
        ),
    ),
    Template(
        "sharing",
        "{name} collects {mine:30-80} {toy} and {other} collects {theirs:30-80} {toy}. {name} and {other} put all"
        " of it together, keep {kept:6-20} {toy} for themselves, and give the rest in equal parts to {kids:3-9}"
        " children.",
        "How many {toy} does each child get?",
        (
            "Together they have [a = mine + theirs] {toy}.",
            "To give away there are [b = a - kept] {toy}.",
            "Each child gets [c = b / kids] {toy}.",
        ),
    ),
    Template(
        "fence",
        "A meadow for {animal} is {length:20-60} metres long and {width:10-40} metres wide. The gate is {gate:3-6}"
        " metres wide and needs no fence. One metre of fence costs {price:4-9} dollars.",
        "How many dollars does the fence cost?",
        (
            "Length and width make [a = length + width] metres.",
            "All the way around it is [b = two * a] metres.",
            "Without the gate it is [c = b - gate] metres.",
            "The fence costs [d = c * price] dollars.",
        ),
    ),
    Template(
        "feeding",
        "On a farm in the {place} there are {count:8-25} {animal}. Each of the {animal} eats {food:2-5} kilograms of"
        " feed a day. The farmer has {stock:300-900:20} kilograms in the barn and feeds the {animal} for"
        " {days:5-14} days.",
        "How many kilograms of feed will be left over?",
        (
            "In a day the {animal} eat [a = count * food] kilograms.",
            "In all days they eat [b = a * days] kilograms.",
            "In the barn [c = stock - b] kilograms are left over.",
        ),
    ),
    Template(
        "game",
        "In a game {name} scores {rounds:4-9} times {points:6-15} points and loses {minus:5-20} points for a mistake."
        " {other} scores {theirs:20-50} points.",
        "By how many points does {name} beat {other}?",
        (
            "{name} scores [a = rounds * points] points.",
            "After the mistake that is [b = a - minus] points.",
            "{name} is ahead by [c = b - theirs] points.",
        ),
    ),
    Template(
        "video",
        "{name} watches {shows:3-6} episodes of {minutes:20-50:5} minutes each and a film of {film:80-140:10} minutes."
        " There are {breaks:2-5} breaks of {pause:5-15:5} minutes.",
        "How many minutes pass from the beginning to the end?",
        (
            "The episodes take [a = shows * minutes] minutes.",
            "With the film it is [b = a + film] minutes.",
            "The breaks take [c = breaks * pause] minutes.",
            "In all, [d = b + c] minutes pass.",
        ),
    ),
)

# What an answer may name without the story giving it a range ("half", "twice").
CONSTANTS = {"two": 2}
