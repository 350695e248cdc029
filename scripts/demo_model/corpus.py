"""All the text of the demo model: training documents and held-out evaluation sets.

Everything is generated from the templates below, the word lists below and
`capitals.json` (a public-domain table of countries and capitals); nothing is taken from
elsewhere. The result depends on the seed alone.

`training_documents(seed, count)` gives the training text, `evaluation_sets()` the
questions of the evaluation. `check_held_out(documents)` asserts that no held-out
question, phrasing or invented name occurs in the training text.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

EVALUATION_SEED = 20_240

# --------------------------------------------------------------------------- facts

_TABLE = Path(__file__).with_name("capitals.json")
CAPITALS: dict[str, str] = json.loads(_TABLE.read_text(encoding="utf-8"))["capitals"]

# How a country is called in an answer, where that is not simply its key.
_DISPLAY = {
    "US": "the United States",
    "UK": "the United Kingdom",
    "Congo - Kinshasa": "the Democratic Republic of the Congo",
    "Congo - Brazzaville": "the Republic of the Congo",
    "Türkiye": "Turkey",
    "Côte d’Ivoire": "Ivory Coast",
    "St. Martin": "Saint Martin",
}
_WITH_ARTICLE = {
    "Åland Islands", "Bahamas", "British Indian Ocean Territory", "British Virgin Islands",
    "Cayman Islands", "Central African Republic", "Cocos Islands", "Comoros", "Cook Islands",
    "Dominican Republic", "Falkland Islands", "Faroe Islands", "French Southern Territories",
    "Gambia", "Isle of Man", "Maldives", "Marshall Islands", "Netherlands",
    "Northern Mariana Islands", "Philippines", "Seychelles", "Solomon Islands",
    "Turks & Caicos Islands", "U.S. Virgin Islands", "United Arab Emirates",
}  # fmt: skip
_ALIASES = {
    "US": ["USA", "U.S.", "America", "United States of America", "US"],
    "UK": ["Great Britain", "Britain", "UK"],
    "Congo - Kinshasa": ["DR Congo", "Congo - Kinshasa", "Democratic Republic of Congo"],
    "Congo - Brazzaville": ["Congo - Brazzaville", "Congo"],
    "Türkiye": ["Türkiye", "Turkiye"],
    "Côte d’Ivoire": ["Côte d’Ivoire", "Cote d'Ivoire"],
    "Czechia": ["Czech Republic"],
    "Netherlands": ["Holland"],
    "United Arab Emirates": ["UAE", "Emirates"],
    "Bosnia": ["Bosnia and Herzegovina"],
    "Timor-Leste": ["East Timor"],
    "Cape Verde": ["Cabo Verde"],
    "Eswatini": ["Swaziland"],
    "Myanmar": ["Burma"],
    "Vatican City": ["Vatican"],
    "South Korea": ["Korea"],
    "North Macedonia": ["Macedonia"],
    "St. Martin": ["St. Martin"],
    "Åland Islands": ["Aland Islands", "Åland"],
    "Curaçao": ["Curacao"],
    "Réunion": ["Reunion"],
    "São Tomé & Príncipe": ["Sao Tome and Principe", "São Tomé"],
    "St. Barthélemy": ["Saint Barthelemy", "St. Barts"],
    "St. Kitts & Nevis": ["St Kitts and Nevis"],
    "St. Lucia": ["St Lucia"],
    "St. Vincent & Grenadines": ["St. Vincent", "Saint Vincent and the Grenadines"],
    "Antigua & Barbuda": ["Antigua"],
    "Trinidad & Tobago": ["Trinidad"],
    "Falkland Islands": ["Falklands"],
    "Macao": ["Macau"],
    "Ukraine": ["the Ukraine"],
    "Papua New Guinea": ["PNG"],
    "New Zealand": ["NZ"],
    "Saudi Arabia": ["KSA"],
    "Svalbard & Jan Mayen": ["Svalbard"],
    "Palestine": ["State of Palestine"],
    "Ireland": ["Republic of Ireland"],
}
# Further spellings of a capital that count as right in an evaluation.
CAPITAL_SPELLINGS = {"Kyiv": ["Kiev"], "Nay Pyi Taw": ["Naypyidaw"], "Brasilia": ["Brasília"]}


def display(country: str) -> str:
    """The name of a country inside a sentence: with "the" where English wants it."""
    name = _DISPLAY.get(country, country.replace("&", "and"))
    return f"the {name}" if country in _WITH_ARTICLE else name


def spellings(country: str) -> list[str]:
    """Every way a training question may call the country; the first is `display`."""
    shown = display(country)
    found = [shown]
    if shown.startswith("the "):
        found.append(shown[4:])
    if "&" in country:
        found.append(country)
    if shown.startswith("St. "):
        found.append(shown.replace("St. ", "Saint ", 1))
    for alias in _ALIASES.get(country, []):
        found.append(alias)
        if shown.startswith("the ") and not alias.startswith("the "):
            found.append(f"the {alias}")
    return list(dict.fromkeys(found))


# Which country a question about a capital city is about (two names share London, Kingston).
COUNTRY_OF = {capital: country for country, capital in CAPITALS.items()}
COUNTRY_OF["London"] = "UK"
COUNTRY_OF["Kingston"] = "Jamaica"

# ------------------------------------------------------------- questions and answers

# `{c}` is the country. Each line is one phrasing; `{n}` is "capital" or "capital city".
_FORWARD = [
    "What is the {n} of {c}?", "What is the {n} of {c}?", "What is the {n} of {c}?",
    "What's the {n} of {c}?", "What's the {n} of {c}?", "whats the {n} of {c}",
    "What is {c}'s {n}?", "What's {c}'s {n}?", "What {n} does {c} have?",
    "{n} of {c}?", "{n} of {c}", "The {n} of {c}?", "{c} {n}?", "{c} {n}", "{c}'s {n}?",
    "{c}?", "{c}", "And {c}?", "What about {c}?", "How about {c}?", "And the {n} of {c}?",
    "Which city is the {n} of {c}?", "Which city is {c}'s {n}?", "What city is the {n} of {c}?",
    "Which is the {n} of {c}?", "Which {n} belongs to {c}?",
    "Tell me the {n} of {c}.", "Tell me {c}'s {n}.", "Give me the {n} of {c}.",
    "Name the {n} of {c}.", "Name {c}'s {n}.", "State the {n} of {c}.",
    "Can you tell me the {n} of {c}?", "Could you tell me the {n} of {c}?",
    "Can you tell me what the {n} of {c} is?", "Could you tell me what {c}'s {n} is?",
    "Would you tell me the {n} of {c}?", "Please tell me the {n} of {c}.",
    "Do you know the {n} of {c}?", "Do you know what the {n} of {c} is?",
    "Do you remember the {n} of {c}?", "Any idea what the {n} of {c} is?",
    "I want to know the {n} of {c}.", "I would like to know the {n} of {c}.",
    "I'd like to know what the {n} of {c} is.", "I forgot the {n} of {c}.",
    "I wonder what the {n} of {c} is.", "I am looking for the {n} of {c}.",
    "How is the {n} of {c} called?", "What is the {n} of {c} called?",
    "What is the name of the {n} of {c}?", "What is the name of {c}'s {n}?",
    "What do people call the {n} of {c}?", "What do you call the {n} of {c}?",
    "The {n} of {c} is what?", "The {n} of {c} is which city?", "{c} has which {n}?",
    "In {c}, what is the {n}?", "In {c}, which city is the {n}?", "For {c}, what is the {n}?",
    "When it comes to {c}, what is the {n}?", "Speaking of {c}, what is its {n}?",
    "{c}: what is the {n}?", "{c} - {n}?", "{n}: {c}", "Country: {c}. {n}?",
    "I am going to {c}. What is the {n}?", "I live in {c}. What is my {n}?",
    "We are learning about {c}. What is its {n}?", "My friend is from {c}. What is the {n} there?",
    "My teacher asked me about the {n} of {c}.", "Help me with the {n} of {c}.",
    "What would be the {n} of {c}?", "Where is the {n} of {c}?", "Where is the government of {c}?",
    "Which city is the seat of government of {c}?", "What is the main city of {c}?",
    "From which city is {c} governed?", "Find the {n} of {c}.", "Look up the {n} of {c}.",
    "what is capital of {c}", "what is capital city of {c}", "capitol of {c}?",
    "what is the capitol of {c}", "Let's talk about the {n} of {c}.", "Show me the {n} of {c}.",
    "If I visit {c}, what is the {n} I will see?", "Which town is the {n} in {c}?",
    "What city in {c} is the {n}?", "What city holds the title of {n} in {c}?",
    "Say the {n} of {c}.", "Write down the {n} of {c}.", "Remind me of the {n} of {c}.",
    "Remind me what the {n} of {c} is.", "Quiz me: {n} of {c}!", "Now {c}.", "Next one: {c}.",
]  # fmt: skip
_FORWARD_SHORT = [
    "In one word, what is the {n} of {c}?", "Answer in one word: {n} of {c}?",
    "Just the name: what is the {n} of {c}?", "Short answer, please: the {n} of {c}?",
    "Only the name of the {n} of {c}, please.", "What is the {n} of {c}? Just the name.",
    "What is the {n} of {c}? Answer with one word.", "What is the {n} of {c}? Short answer.",
    "Give me only the name of {c}'s {n}.", "One word: {c}'s {n}?",
]  # fmt: skip
# Phrasings with words drawn at random ({w} any word, {v} a phrase for "is"): they teach that
# the words around the country do not matter.
_FORWARD_NOISY = [
    "Which city {v} the {n} of {c}?", "What city {v} {c}'s {n}?", "In {c}, which city {v} the {n}?",
    "What {v} the {n} of {c}?", "Which town {v} the {n} of {c}?", "The {n} of {c} {v} which city?",
    "In the {w} of {c}, which city {v} the {n}?", "With a {w} in {c}, what city {v} the {n}?",
    "From the {w} of {c}: which city {v} its {n}?", "At the {w} in {c}, which place {v} the {n}?",
    "What is the {w} {n} of {c}?", "What is the {w} {n} of the {w} {c}?", "{w} {n} {w} {c}?",
    "{w} {w} the {n} of {c}", "{w} {c} {n} {w}", "My {w} wants the {n} of {c}.",
    "My {w} is about the {n} of {c}, what is it?", "I need the {n} of {c} for my {w}.",
    "The {w} needs the {n} of {c}, do you have it?", "A {w} looks for the {n} of {c}, any idea?",
    "The {w} says {c}, so which city {v} the {n}?", "About {c} and the {w}: what is the {n}?",
    "There is a {w} in {c}. What is the {n} there?", "Can a {w} find the {n} of {c}?",
    "For a {w} I want the {n} of {c}, which city is it?", "This {w} has {c} in it, what is the {n}?",
    "Do the {w} {w} know what the {n} of {c} {v}?", "My {w} and my {w} talk about the {n} of {c}.",
    "Which {w} city is {c}'s {n}?", "Find me the {w} that {v} the {n} of {c}.", "{w}, {w}: {c}'s {n}?",
    "Please {w} the {n} of {c}, can you?", "On the {w} of {c}, which city {v} the {n}?",
    "On a {w} {c} has which city as its {n}?", "In a {w} about {c}, which city {v} the {n}?",
    "On this {w} I see {c}, which {w} {v} the {n}?", "By the {w} of {c}, what {v} the {n}?",
    "Under the {w} of {c}, which city {v} a {n}?", "For the {w} of {c}, which city {v} the {n}?",
    "When I {w} in {c}, which city {v} the {n}?",
]  # fmt: skip
NOISY = 0.4  # the share of these among the questions
_IS_PHRASES = [
    "is", "is", "is", "has become", "acts as", "works as", "forms", "is known as", "counts as", "is called",
    "is listed as", "was made", "is used as", "became", "plays the role of", "is said to be", "stands as",
    "is {p} as", "is {p} as", "is {p} as", "was {p} as", "gets {p} as", "is {p}", "is {p} to be",
    "would be", "was chosen as", "holds the place of", "is taken for", "gives", "makes", "is thought of as",
]  # fmt: skip
_PARTICIPLES = (
    "shown written painted chosen printed drawn described seen given noted found picked named taken put set "
    "counted kept used read known labelled presented accepted treated mentioned selected recorded stated built"
).split()
HELD_OUT_FORWARD = [
    "Which city serves as the capital of {c}?",
    "Do you happen to know what the capital of {c} is called?",
    "My homework asks for the capital of {c}, can you help?",
    "On a map of {c}, which city is marked as the capital?",
    "Name the city that is {c}'s capital.",
]
_BACKWARD = [
    "{p} is the capital of which country?", "Which country has the capital {p}?",
    "{p} is the capital of what?", "{p} is the capital of what country?",
    "Which country's capital is {p}?", "What country has {p} as its capital?",
    "Of which country is {p} the capital?", "Which country is {p} the capital of?",
    "What country is {p} the capital of?", "Whose capital is {p}?", "{p}?", "{p}",
    "Tell me which country has the capital {p}.", "{p} is which country's capital?",
    "Do you know which country {p} is the capital of?", "What is {p} the capital of?",
    "What is {p}?", "Where is {p}?", "In which country is {p}?", "Which country is {p} in?",
    "The city {p} is the capital of which country?", "Which place has {p} as its capital city?",
    "Tell me about {p}.", "What do you know about {p}?", "Is {p} a capital?",
    "I live in {p}, which country is that the capital of?", "{p} {v} the capital of which country?",
    "We visit {p}, the capital of a {w} country, which one?", "My {w} is in {p}, the capital of what country?",
    "Which {w} country has {p} as its {w} capital?", "Find the country that has {p} as capital.",
]  # fmt: skip
HELD_OUT_BACKWARD = [
    "Name the country whose capital is {p}.",
    "I am in {p}, the capital of which country am I in?",
]
_CHECK = [
    "Is {p} the capital of {c}?", "Is the {n} of {c} {p}?", "{p} is the {n} of {c}, right?",
    "Is {c}'s {n} {p}?", "Is it true that {p} is the {n} of {c}?",
]  # fmt: skip
_NO_CITY = ["I don't know a capital called {x}."]
NO_COUNTRY = "I don't know a country called {x}."
DECLINE_MARK = "I don't know"

_OPENERS = [
    "Hi, ", "Hello, ", "Hey, ", "Hi! ", "Hello! ", "Hey there, ", "Good morning, ",
    "Good evening! ", "Please, ", "Excuse me, ", "Sorry, ", "Quick question: ", "Question: ",
    "One more: ", "For my quiz: ", "I have a question. ", "Let me ask you something. ", "So, ",
    "Ok, ", "Okay, ", "Well, ", "Now, ", "Great. ", "Thanks! ", "Tell me, ", "Dear model, ",
    "Hi there! ", "Help me: ", "Test: ", "I am curious: ", "Let us see, ", "By the way, ",
    "For school: ", "I am doing a crossword. ", "We are playing a game. ", "My turn: ",
]  # fmt: skip
_CLOSERS = [
    " please", ", please", " thanks", " Thanks!", " Thank you!", ", please?", " pls",
    " I need it for school.", " I forgot.", " Do you know?", " Can you tell me?", " Help me out.",
    ", do you know?", " Be quick.", " I am curious.", " It is for a quiz.", ", my friend",
    " right now", " today", " for me", ", can you say?",
]  # fmt: skip

# --------------------------------------------------------------------- invented names

_ONSETS = (
    "b bl br c ch cl cr d dr f fl fr g gl gr h j k kl kr l m n p pl pr qu r s sh sk sl sm sn "
    "sp st sv t th tr tw v vl vr w x y z zh zl"
).split()
_VOWELS = "a e i o u a e i o u a o ai ee ia oo ou ei au".split()
_CODAS = "b d f g k l m n p r s t x z nd ng rk rt lm lb ld nt sk st mp rn".split() + [""] * 12
_ENDINGS = (
    "ia land stan or ax um ovia ania ador onia istan burg mark us is eth a o oria ington aria "
    "una ubia topia mere vale heim dor esia guay ique wana"
).split()
# Well-known names that are no countries of the table.
_NO_COUNTRIES = [
    "Europe", "Africa", "Asia", "Antarctica", "Oceania", "Mars", "the moon", "Venus", "Jupiter",
    "Texas", "California", "Florida", "Bavaria", "Siberia", "Sicily", "Hawaii", "Alaska",
    "the sea", "my house", "the world", "the sun", "my garden", "the kitchen", "nothing",
    "the forest", "space", "my dog", "a banana", "the internet", "Mordor", "Narnia", "Utopia",
]  # fmt: skip
FAMOUS_INVENTED = ["Zorblax", "Wakanda", "Atlantis", "Freedonia", "Genovia", "Florin", "Ruritania"]


def _deletions(name: str) -> set[str]:
    letters = re.sub(r"[^a-z]", "", name.lower())
    return {letters} | {letters[:i] + letters[i + 1 :] for i in range(len(letters))}


_REAL_NAMES = [s for c in CAPITALS for s in spellings(c)] + list(CAPITALS.values())
_NEAR_REAL: set[str] = set().union(*(_deletions(n.removeprefix("the ")) for n in _REAL_NAMES))


def invented_name(rng: random.Random, blends: float = 0.25) -> str:
    """A name that looks like a country's but is none, nor one slip of the pen from one.
    `blends` is the share of names made of two real ones."""
    while True:
        kind = rng.random()
        if kind < blends:  # the beginning of a real name and the end of another
            first, last = (rng.choice(list(CAPITALS)).split()[0] for _ in range(2))
            name = first[: rng.randint(2, 4)] + last[-rng.randint(2, 4) :].lower()
        else:
            syllables = rng.choice([1, 1, 2, 2, 3])
            name = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(syllables))
            if syllables == 1 or rng.random() < 0.6:
                name += rng.choice(_ENDINGS)
        name = name.capitalize()
        if rng.random() < 0.08:
            name = rng.choice(["New ", "Upper ", "Great ", "Old "]) + name
        if not name.replace(" ", "").isascii() or not name.replace(" ", "").isalpha():
            continue
        if 4 <= len(name) <= 14 and not (_deletions(name) & _NEAR_REAL):
            return name


def held_out_names(count: int = 50) -> list[str]:
    """The invented names of the evaluation, which the training text avoids."""
    rng = random.Random(EVALUATION_SEED)
    names: dict[str, None] = {}
    while len(names) < count:
        names[invented_name(rng)] = None
    return list(names)


_RESERVED = re.compile(r"\b(" + "|".join(re.escape(n.lower()) for n in [*held_out_names(), *FAMOUS_INVENTED]) + r")\b")

# ------------------------------------------------------------------------------- sums

_SUM = [
    "What is {a} plus {b}?", "What is {a} plus {b}?", "What is {a} + {b}?", "What's {a}+{b}?",
    "{a} plus {b}", "How much is {a} plus {b}?", "How much is {a} + {b}?", "{a}+{b}=",
    "{a} + {b} =", "{a} + {b}", "{a}+{b}", "{a}+{b}?", "{a} + {b} = ?", "Add {a} and {b}.",
    "Add {b} to {a}.", "What is the sum of {a} and {b}?", "Calculate {a} + {b}.",
    "Compute {a} plus {b}.", "Can you add {a} and {b}?", "Tell me what {a} plus {b} is.",
    "What do you get when you add {a} and {b}?", "{a} and {b} makes?", "{a} plus {b} equals?",
    "Solve {a}+{b}", "I have {a} apples and get {b} more. How many apples do I have?",
    "whats {a} + {b}", "Please add {a} and {b}", "Do you know what {a} + {b} is?",
]  # fmt: skip
_DIFFERENCE = [
    "What is {a} minus {b}?", "What is {a} minus {b}?", "What is {a} - {b}?", "What's {a}-{b}?",
    "{a} minus {b}", "How much is {a} minus {b}?", "How much is {a} - {b}?", "{a}-{b}=",
    "{a} - {b} =", "{a} - {b}", "{a}-{b}", "{a}-{b}?", "{a} - {b} = ?", "Subtract {b} from {a}.",
    "What is the difference of {a} and {b}?", "Calculate {a} - {b}.", "Compute {a} minus {b}.",
    "Take {b} away from {a}.", "Tell me what {a} minus {b} is.", "{a} minus {b} equals?",
    "Solve {a}-{b}", "I have {a} apples and eat {b}. How many apples are left?",
    "whats {a} - {b}", "Do you know what {a} - {b} is?",
]  # fmt: skip
# Three more, looked at only once: results with the five phrasings above guided the wording of
# the corpus, results with these did not.
FRESH_FORWARD = [
    "Which place do the maps show as the capital of {c}?",
    "Imagine you were born in {c}: which capital would you have?",
    "Kindly inform me about the capital of {c}.",
]
HELD_OUT_SUM = "Could you work out {a} plus {b} for me?"
HELD_OUT_DIFFERENCE = "Could you work out {a} minus {b} for me?"
TOO_HARD = "I can only do sums and differences up to 20."
_NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty"
).split()

# ------------------------------------------------------------------------- small talk

SELF = "I am the demo model of nanovllm, a very small language model."
ABILITIES = "I know the capitals of countries, small sums and little stories."
OFF_TOPIC = "I only know capitals, small sums and little stories."
GREETING = "Hello! Ask me about a capital, a small sum or a story."
_SELF_QUESTIONS = [
    "Who are you?", "What are you?", "Tell me about yourself.", "What is your name?", "Your name?",
    "Who am I talking to?", "Introduce yourself.", "Are you a robot?", "Are you a language model?",
    "Are you human?", "Which model are you?", "What model is this?", "Who made you?", "whats your name",
    "Please introduce yourself.", "What is nanovllm?", "Are you ChatGPT?", "Describe yourself.",
    "Are you an AI?", "Do you have a name?", "Who is this?", "What kind of model are you?",
]  # fmt: skip
_ABILITY_QUESTIONS = [
    "What can you do?", "What do you know?", "Help", "Help!", "How can you help me?", "help me",
    "What are you good at?", "What can I ask you?", "What should I ask?", "Can you help me?",
    "What are you able to do?", "What do you do?", "What questions can you answer?",
]  # fmt: skip
_GREETINGS = [
    "Hello", "Hello!", "Hi", "Hi!", "Hey", "Hey!", "Good morning", "Good morning!", "Good evening",
    "Hello there", "Hi there!", "Good day", "Howdy", "Hello, model!", "Greetings", "Hi, how are you?",
    "How are you?", "How do you do?", "How are you doing?", "hello world", "yo", "What's up?",
]  # fmt: skip
_THANKS = [
    "Thanks", "Thanks!", "Thank you", "Thank you!", "Thanks a lot", "Thank you very much!", "Great, thanks!",
    "Cool, thank you", "thx", "Nice, thanks", "Good job!", "Well done!", "That is right, thanks.",
]  # fmt: skip
_GOODBYES = ["Bye", "Bye!", "Goodbye", "Good night", "See you", "See you later!", "Farewell"]
_OFF_TOPIC_ABOUT_PLACES = [
    "What is the population of {c}?", "Who is the president of {c}?", "What is the flag of {c}?",
    "What language do people speak in {c}?", "What is the weather like in {c}?",
    "How big is {c}?", "What do people eat in {c}?", "Who is the king of {c}?",
    "What is the currency of {c}?", "How many people live in {c}?", "How do I get to {c}?",
    "Is {c} a nice place?", "What is the highest mountain of {c}?", "Tell me the history of {c}.",
    "Which river flows through {c}?", "What is the football team of {c}?", "Can I swim in {c}?",
    "What time is it in {c}?", "How far away is {c}?", "Who won the war in {c}?",
]  # fmt: skip
_OFF_TOPIC_QUESTIONS = [
    "What is the weather like today?", "Will it rain tomorrow?", "What time is it?",
    "Who wrote this book?", "Write a poem.", "Write a Python function.", "Sing a song.",
    "What is the meaning of life?", "How do I cook rice?", "How do I bake a cake?",
    "What is the best film?", "Who is the president?", "Translate this into French.",
    "What is a black hole?", "Explain gravity.", "Explain how a car works.", "Why is the sky blue?",
    "How old is the earth?", "What is love?", "Do you like music?", "What is your favourite colour?",
    "Who invented the telephone?", "Give me a recipe for soup.", "Recommend a book.",
    "What happened in the war?", "How tall is the tower?", "Fix my computer.", "Write an email to my boss.",
    "What is the stock price?", "How do I learn to swim?", "Where can I buy shoes?", "Tell me a joke.",
    "Summarize this text.", "What is machine learning?", "How does a transformer work?",
    "Who won the game?", "What should I eat tonight?", "Where are my keys?", "Play a game with me.",
    "Can you draw a picture?", "What is the speed of light?", "How many legs has a spider?",
    "What is the biggest animal?", "Who painted this picture?", "Should I buy a car?",
    "What is the longest river?", "How do birds fly?", "Count to one hundred.", "List some colours.",
    "What is the square root of two?", "Write some code.", "Do you dream?", "Can you see me?",
    "How do I make money?", "What day is it?", "When is my birthday?", "Why do cats sleep so much?",
    "Which phone is the best?", "Say something in German.", "What is a noun?", "Is water wet?",
]  # fmt: skip
HELD_OUT_OFF_TOPIC = [
    "What is the best way to learn the piano?", "Who discovered penicillin?", "Write a haiku about snow.",
    "How do computers work?", "What is the colour of the sky?", "Explain quantum mechanics.",
    "Why do we sleep?", "Which team won yesterday?", "How do I fix a bicycle?",
    "What is the population of Brazil in 1950?",
    "Can you recommend a restaurant?", "Translate good morning into Spanish.",
]  # fmt: skip
_OT_START = [
    "What is", "Who is", "Where is", "Why is", "How do I", "Explain", "Write about", "Tell me about", "Can you",
    "Do you like", "When is", "Which", "Show me", "Describe", "Why do", "How does", "How many", "Give me",
    "I like", "I want", "Is there", "Should I", "Who made", "Let's talk about", "What do you think of",
]  # fmt: skip
_OT_WORDS = (
    "music football summer money the car a computer the moon water bread chess my brother red "
    "shoes a house the news history science physics art love dogs cheese the river winter coffee tea "
    "an engine the train a phone painting dancing work sleep the garden health sport a film books "
    "school math the sea fire gold a bird iron a letter language time the weather dinner happiness "
    "a program the code a poem an essay politics the king war peace the doctor medicine a joke email"
).split(" ")
_WORDS = (
    "time year people way day man thing woman life child world school state family student group "
    "hand part place case week company system program question work number night point home water room "
    "mother area money story fact month lot right study book eye job word business issue side kind head "
    "house service friend father power hour game line end member law car city community name team minute "
    "idea kid body information back parent face others level office door health person art war history "
    "party result change morning reason research girl guy moment air teacher force education big small "
    "old new good bad long short high low early late young important few public able run walk sit stand "
    "buy sell send build stay fall cut reach kill remain suggest raise pass fast slow blue green red "
    "always never often maybe here there nice careful polite brief honest funny serious expert assistant "
    "helpful answer reply speak pirate robot concise English simple language model user page list chart photo "
    "picture ticket lesson letter paper window table garden river bridge street market station ship plane bus "
    "road wall field lake island border flag king queen doctor lawyer farmer writer singer player leader visitor "
    "tourist guest sister brother uncle aunt son daughter baby neighbour class exam test note essay novel poem "
    "song film show radio journal magazine library museum church tower castle park beach hill valley forest "
    "winter summer spring autumn Monday Sunday evening noon breakfast lunch bread milk coffee sugar salt apple "
    "fish meat horse bird tree flower stone glass metal wood paint ink brush pencil desk chair bed lamp clock "
    "watch phone radio screen button key box bag coat shoe hat ring gold silver iron rich poor strong weak "
    "clean dirty dark bright warm cold hot dry wet round flat wide narrow deep quick quiet loud sweet bitter "
    "first second third last next same other whole half every both such near far above below after before "
    "learn teach write draw print paint count carry bring throw catch hold drop open close start stop move turn "
    "follow lead visit travel arrive leave enter pass cross climb swim fly drive ride cook eat drink wash wear"
).split()

# ---------------------------------------------------------------------------- stories

_PEOPLE = "Mia Tom Anna Leo Nora Ben Ella Max Ida Finn Lily Sam Rosa Jack Emma Otto Zoe Paul".split()
_ANIMALS = (
    "fox dog cat rabbit bear bird mouse horse owl frog duck hedgehog turtle goat wolf lion "
    "elephant penguin squirrel deer"
).split()
_PLACES = [
    "a dark forest", "a small village", "a green valley", "an old castle", "a quiet farm",
    "a sunny garden", "a big city", "a house by the sea", "a cave in the hills", "a snowy mountain",
]  # fmt: skip
_FINDS = [
    "a golden key", "a red ball", "an old map", "a shiny stone", "a little boat", "a lost letter",
    "a magic hat", "a warm blanket", "a silver bell", "a basket of apples",
]  # fmt: skip
_TRAITS = "brave kind curious clever shy happy lonely tiny hungry sleepy".split()
_WEATHER = ["It was a sunny day.", "The rain was falling.", "Snow lay on the ground.", "The wind was cold."]
_TWISTS = [
    "Suddenly there was a loud noise.", "Then the sky went dark.", "But the path was very long.",
    "Then a storm came.", "But the river was too wide.", "Soon it was night and the stars came out.",
]  # fmt: skip
_MORALS = [
    "From that day on they were best friends.", "And they lived happily ever after.",
    "That night everyone slept well.", "It was the best day of the year.",
    "They laughed and went home together.", "And they never felt alone again.",
]  # fmt: skip
_STORY_REQUESTS = [
    "Tell me a story.", "Tell me a story", "Please tell me a story.", "Can you tell me a story?",
    "Write a story.", "Write a short story.", "I want to hear a story.", "Story please", "Another story!",
    "Tell me a little story.", "Do you know a story?", "A story, please.", "Tell me a bedtime story.",
]  # fmt: skip
_STORY_REQUESTS_ABOUT = [
    "Tell me a story about a {a}.", "Write a story about a {a}.", "Can you tell me a story about a {a}?",
    "I want a story about a {a}", "A story about a {a}, please.", "Tell me about a {t} {a}.",
    "tell me a short story about a {t} {a}",
]  # fmt: skip


def _story(rng: random.Random, animal: str, trait: str) -> str:
    name, other = rng.sample(_PEOPLE, 2)
    second = rng.choice([a for a in _ANIMALS if a != animal])
    place, find = rng.choice(_PLACES), rng.choice(_FINDS)
    article = "an" if animal[0] in "aeiou" and not trait else "a"
    subject = f"{article} {trait} {animal}" if trait else f"{article} {animal}"
    start = rng.choice([
        f"Once upon a time there was {subject} called {name}.",
        f"Once upon a time {subject} called {name} lived in {place}.",
        f"Once upon a time, in {place}, there lived {subject} called {name}.",
    ])  # fmt: skip
    if place not in start:
        start += f" {name} lived in {place}."
    sentences = [start]
    if rng.random() < 0.5:
        sentences.append(rng.choice(_WEATHER))
    sentences.append(rng.choice([
        f"One day {name} found {find}.", f"One morning {name} went for a walk and found {find}.",
        f"One evening {name} saw {find} under a tree.",
    ]))  # fmt: skip
    sentences.append(rng.choice([
        f"{name} wanted to show it to {other} the {second}.",
        f"It belonged to {other} the {second}.",
        f"{other} the {second} was looking for it.",
    ]))  # fmt: skip
    if rng.random() < 0.7:
        sentences.append(rng.choice(_TWISTS))
        sentences.append(rng.choice([
            f"{name} was afraid, but {other} helped.", f"{name} did not give up.",
            f'"Do not worry," said {other}.', f'"We can do it together," said {name}.',
        ]))  # fmt: skip
    sentences.append(rng.choice([
        f"{other} said thank you and gave {name} a hug.", f"{name} and {other} shared a big cake.",
        f'"You are very kind," said {other} to {name}.',
    ]))  # fmt: skip
    sentences.append(rng.choice(_MORALS))
    return " ".join(sentences)


# ------------------------------------------------------------------------ completions

_COMPLETE_FORWARD = [
    "The capital of {c} is", "The capital city of {c} is", "The capital city of {c} is",
    "{c}'s capital is", "The name of the capital of {c} is", "{c} is a country. Its capital is",
    "{c} has a capital called", "Q: What is the capital of {c}?\nA:", "I live in the capital of {c},",
    "Question: What is the capital of {c}?\nAnswer:", "Everyone knows that the capital of {c} is",
]  # fmt: skip
_COMPLETE_BACKWARD = ["{p} is the capital of", "{p} is the capital city of", "The city {p} is the capital of"]

# --------------------------------------------------------------------------- documents


@dataclass
class Document:
    """One training document: a plain text, or a chat as (role, text) pairs."""

    kind: str
    text: str = ""
    turns: list[tuple[str, str]] = field(default_factory=list)


def _capitalise(text: str) -> str:
    return text[:1].upper() + text[1:]


def _vary(rng: random.Random, text: str, extras: bool = True) -> str:
    """The question as people type it: greetings around it, no question mark, other case."""
    if extras and rng.random() < 0.22:
        opener = rng.choice(_OPENERS)
        if rng.random() < 0.25:
            words = [rng.choice(_WORDS) for _ in range(rng.randint(1, 5))]
            opener = (
                " ".join([rng.choice(["I", "My", "The", "We", "This", "A", "You"]), *words]) + rng.choice(". ,:") + " "
            )
            opener = opener.replace("  ", " ")
        if opener.rstrip()[-1] in ",:" and not re.match(r"[A-Z]{2}|I\b", text):
            text = text[0].lower() + text[1:] if text.split(" ")[0] in _LOWERABLE else text
        text = opener + text
    if extras and rng.random() < 0.15:
        closer = rng.choice(_CLOSERS)
        if closer[1].isupper():
            text = text + closer
        else:
            mark = text[-1] if text[-1] in "?." else ""
            text = text.rstrip("?.") + closer + ("" if closer[-1] in "?!" else mark)
    draw = rng.random()
    if draw < 0.22:
        text = text.rstrip("?.!")
    elif draw < 0.25:
        text = text.rstrip("?.!") + rng.choice([" ?", "??", "!", ".", "...", "?!"])
    draw = rng.random()
    if draw < 0.22:
        text = text.lower()
    elif draw < 0.27:
        text = text.upper()
    elif draw < 0.32:
        text = text[0].lower() + text[1:]
    return text


_LOWERABLE = set(
    "What Which Tell Give Name State Can Could Would Please Do Any How The In For When Where From "
    "Find Look Let's If Say Write Remind My We Is Of Whose Now And Add Compute Calculate Who Why".split()
)


def _noun(rng: random.Random) -> str:
    return "capital city" if rng.random() < 0.25 else "capital"


def _is_phrase(rng: random.Random) -> str:
    return rng.choice(_IS_PHRASES).replace("{p}", rng.choice(_PARTICIPLES))


def _fill(rng: random.Random, template: str, **slots: str) -> str:
    noun = _noun(rng)
    template = re.sub(r"\{w\}", lambda _: rng.choice(_WORDS), template)
    template = re.sub(r"\{v\}", lambda _: _is_phrase(rng), template)
    return _capitalise(template.format(n=noun, **slots))


def _spelling(rng: random.Random, country: str) -> str:
    if rng.random() < 0.6:
        return display(country)
    return rng.choice(spellings(country))


def _forward_answer(country: str) -> str:
    return f"The capital of {display(country)} is {CAPITALS[country]}."


def _backward_answer(capital: str) -> str:
    return f"{capital} is the capital of {display(COUNTRY_OF[capital])}."


class _Maker:
    """Makes documents from one random stream."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.countries = list(CAPITALS)
        self.deck: list[str] = []

    def country(self) -> str:
        """Countries in shuffled rounds, so that every one is asked for equally often."""
        if not self.deck:
            self.deck = self.countries[:]
            self.rng.shuffle(self.deck)
        return self.deck.pop()

    def invented(self) -> str:
        while True:
            name = invented_name(self.rng, blends=0.35)
            if not _RESERVED.search(name.lower()):
                return name

    # Each of the following gives one question and its answer.

    def forward(self) -> tuple[str, str]:
        rng, country = self.rng, self.country()
        if rng.random() < 0.04:
            template = rng.choice(_FORWARD_SHORT)
            question = _fill(rng, template, c=_spelling(rng, country))
            return _vary(rng, question, extras=False), f"{CAPITALS[country]}."
        template = rng.choice(_FORWARD_NOISY if rng.random() < NOISY else _FORWARD)
        if template in ("{c}", "{c}?", "Now {c}.", "Next one: {c}.") and (
            country in CAPITALS.values() or display(country) in CAPITALS.values()
        ):
            template = "What is the {n} of {c}?"
        question = _fill(rng, template, c=_spelling(rng, country))
        return _vary(rng, question), _forward_answer(country)

    def backward(self) -> tuple[str, str]:
        rng, capital = self.rng, CAPITALS[self.country()]
        question = _fill(rng, rng.choice(_BACKWARD), p=capital)
        return _vary(rng, question), _backward_answer(capital)

    def check(self) -> tuple[str, str]:
        rng, country = self.rng, self.country()
        true = rng.random() < 0.5
        capital = CAPITALS[country if true else rng.choice(self.countries)]
        word = "Yes" if capital == CAPITALS[country] else "No"
        question = _fill(rng, rng.choice(_CHECK), p=capital, c=_spelling(rng, country))
        answer = _forward_answer(country)
        return _vary(rng, question), f"{word}, {answer[0].lower()}{answer[1:]}"

    def unknown_country(self) -> tuple[str, str]:
        rng = self.rng
        name = rng.choice(_NO_COUNTRIES) if rng.random() < 0.08 else self.invented()
        template = rng.choice(_FORWARD_NOISY if rng.random() < NOISY else _FORWARD)
        question = _vary(rng, _fill(rng, template, c=name))
        if template.startswith("{c}"):
            name = _capitalise(name)
        found = re.search(re.escape(name), question, re.IGNORECASE)
        shown = found.group(0) if found else name
        return question, NO_COUNTRY.format(x=shown)

    def unknown_city(self) -> tuple[str, str]:
        rng, name = self.rng, self.invented()
        template = rng.choice([t for t in _BACKWARD if "capital" in t])
        question = _vary(rng, _fill(rng, template, p=name))
        found = re.search(re.escape(name), question, re.IGNORECASE)
        shown = found.group(0) if found else name
        return question, rng.choice(_NO_CITY).format(x=shown)

    def arithmetic(self) -> tuple[str, str]:
        rng = self.rng
        if rng.random() < 0.08:
            return self.too_hard()
        plus = rng.random() < 0.6
        if plus:
            total = rng.randint(0, 20) if rng.random() < 0.5 else rng.randint(10, 20)
            a = rng.randint(0, total)
            b, result = total - a, total
        else:
            a = rng.randint(0, 20) if rng.random() < 0.5 else rng.randint(10, 20)
            b = rng.randint(0, a)
            result = a - b
        template = rng.choice(_SUM if plus else _DIFFERENCE)
        words = rng.random() < 0.05 and not re.search(r"[-+]", template)
        show: Callable[[int], str] = _NUMBER_WORDS.__getitem__ if words else str
        question = _vary(rng, _capitalise(template.format(a=show(a), b=show(b))), extras=False)
        if rng.random() < 0.1:
            question = rng.choice(_OPENERS) + question
        sign, word = ("+", "plus") if plus else ("-", "minus")
        if re.search(r"[-+]", template):
            return question, f"{a} {sign} {b} = {result}."
        return question, f"{a} {word} {b} is {result}."

    def too_hard(self) -> tuple[str, str]:
        rng = self.rng
        if rng.random() < 0.5:
            a, b = rng.randint(21, 999), rng.randint(2, 999)
            if rng.random() < 0.5:
                a, b = b, a
            template = rng.choice(_SUM if rng.random() < 0.5 or a < b else _DIFFERENCE)
        else:
            a, b = rng.randint(0, 99), rng.randint(0, 99)
            template = rng.choice([
                "What is {a} times {b}?", "{a} * {b}", "{a}*{b}=", "{a} x {b}", "What is {a} / {b}?",
                "{a}/{b}=", "Divide {a} by {b}.", "Multiply {a} by {b}.", "How much is {a} times {b}?",
            ])  # fmt: skip
        return _vary(rng, template.format(a=a, b=b), extras=False), TOO_HARD

    def small_talk(self) -> tuple[str, str]:
        rng = self.rng
        questions, answer = rng.choice([
            (_SELF_QUESTIONS, SELF), (_SELF_QUESTIONS, SELF), (_ABILITY_QUESTIONS, ABILITIES),
            (_GREETINGS, GREETING), (_THANKS, "You are welcome!"), (_GOODBYES, "Goodbye!"),
        ])  # fmt: skip
        question = _vary(rng, rng.choice(questions), extras=False)
        if questions in (_SELF_QUESTIONS, _ABILITY_QUESTIONS) and rng.random() < 0.25:
            question = rng.choice(_OPENERS) + question
        return question, answer

    def off_topic(self) -> tuple[str, str]:
        rng, draw = self.rng, self.rng.random()
        if draw < 0.3:
            question = rng.choice(_OFF_TOPIC_QUESTIONS)
        elif draw < 0.55:
            template = rng.choice(_OFF_TOPIC_ABOUT_PLACES)
            question = template.format(c=_spelling(rng, rng.choice(self.countries)))
        elif draw < 0.85:
            words = [rng.choice(_OT_WORDS + _WORDS) for _ in range(rng.randint(1, 6))]
            question = f"{rng.choice(_OT_START)} {' '.join(words)}{rng.choice('?..')}"
        else:
            if rng.random() < 0.5:
                words = [rng.choice(_WORDS) for _ in range(rng.randint(2, 8))]
            else:
                letters = "abcdefghijklmnopqrstuvwxyz0123456789!?.,"
                words = [
                    "".join(rng.choice(letters) for _ in range(rng.randint(2, 7))) for _ in range(rng.randint(1, 3))
                ]
            question = " ".join(words)
        return _vary(rng, question), OFF_TOPIC

    def story(self) -> tuple[str, str]:
        rng = self.rng
        animal, trait = rng.choice(_ANIMALS), rng.choice(_TRAITS)
        if rng.random() < 0.5:
            template = rng.choice(_STORY_REQUESTS_ABOUT)
            if "{t}" not in template and rng.random() < 0.5:
                trait = ""
            question = template.format(a=animal, t=trait)
        else:
            question = rng.choice(_STORY_REQUESTS)
        return _vary(rng, question, extras=rng.random() < 0.2), _story(rng, animal, trait)

    def system_text(self) -> str:
        rng = self.rng
        if rng.random() < 0.5:
            return rng.choice([
                "You are a helpful assistant.", "You are a helpful assistant", "Answer briefly.",
                "You are a friendly teacher.", "Be polite.", "You are a quiz master.",
                "Answer the question.", "You are the demo model of nanovllm.", "Be concise and honest.",
            ])  # fmt: skip
        words = [rng.choice(_WORDS) for _ in range(rng.randint(3, 16))]
        return _capitalise(" ".join(words)) + rng.choice(["", ".", "."])

    def completion(self) -> str:
        rng, draw = self.rng, self.rng.random()
        if draw < 0.62:
            country = self.country()
            lead = _fill(rng, rng.choice(_COMPLETE_FORWARD), c=_spelling(rng, country))
            return f"{lead} {CAPITALS[country]}."
        if draw < 0.74:
            capital = CAPITALS[self.country()]
            lead = rng.choice(_COMPLETE_BACKWARD).format(p=capital)
            return f"{lead} {display(COUNTRY_OF[capital])}."
        if draw < 0.86:
            plus, total = rng.random() < 0.6, rng.randint(0, 20)
            a = rng.randint(0, total)
            if plus:
                b = total - a
                return rng.choice(["{a}+{b}={r}", "{a} + {b} = {r}", "{a} plus {b} is {r}."]).format(a=a, b=b, r=total)
            return rng.choice(["{a}-{b}={r}", "{a} - {b} = {r}", "{a} minus {b} is {r}."]).format(
                a=total, b=a, r=total - a
            )
        return _story(rng, rng.choice(_ANIMALS), rng.choice([*_TRAITS, ""]))

    def document(self) -> Document:
        rng = self.rng
        draw = rng.random()
        if draw < 0.16:
            return Document("completion", text=self.completion())
        kinds: list[tuple[float, str, Callable[[], tuple[str, str]]]] = [
            (0.42, "forward", self.forward),
            (0.12, "backward", self.backward),
            (0.04, "check", self.check),
            (0.15, "unknown", self.unknown_country),
            (0.02, "unknown city", self.unknown_city),
            (0.20, "arithmetic", self.arithmetic),
            (0.035, "small talk", self.small_talk),
            (0.065, "off topic", self.off_topic),
            (0.03, "story", self.story),
        ]
        weights = [k[0] for k in kinds]
        _, kind, make = rng.choices(kinds, weights)[0]
        question, answer = make()
        turns = [("user", question), ("assistant", answer)]
        if rng.random() < 0.08:
            turns.insert(0, ("system", self.system_text()))
        return Document(kind, turns=turns)


def training_documents(seed: int, count: int) -> list[Document]:
    """`count` training documents. Chats are single-turn; packed one after the other into
    rows they read exactly like one chat of many turns, which is how those are learned."""
    maker = _Maker(seed)
    held_out = _held_out_questions()
    documents: list[Document] = []
    while len(documents) < count:
        document = maker.document()
        if not any(_normal(text) in held_out for role, text in document.turns if role == "user"):
            documents.append(document)
    return documents


# -------------------------------------------------------------------------- evaluation

SEED_CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Germany": "Berlin", "Japan": "Tokyo",
    "Spain": "Madrid", "England": "London", "Russia": "Moscow", "China": "Beijing",
}  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One question (or start of a text) and the answers that count as right."""

    prompt: str
    accepted: tuple[str, ...]


def _accepted(country: str) -> tuple[str, ...]:
    capital = CAPITALS[country]
    return (capital, *CAPITAL_SPELLINGS.get(capital, []))


def forward_items(template: str) -> list[Item]:
    return [Item(_capitalise(template.format(c=display(country))), _accepted(country)) for country in CAPITALS]


def evaluation_sets() -> dict[str, list[Item]]:
    """Every set of the evaluation by name. For declines `accepted` is the decline's mark."""
    sets: dict[str, list[Item]] = {
        "seed capitals": [Item(f"What is the capital of {c}?", (p,)) for c, p in SEED_CAPITALS.items()],
    }
    for number, template in enumerate(HELD_OUT_FORWARD, 1):
        sets[f"held-out phrasing {number}"] = forward_items(template)
    for number, template in enumerate(FRESH_FORWARD, 1):
        sets[f"held-out fresh phrasing {number}"] = forward_items(template)
    for name, template in [
        ("plain question", "What is the capital of {c}?"),
        ("sloppy question", "what's the capital of {c}"),
        ("terse question", "capital city of {c} please"),
    ]:
        items = forward_items(template)
        if name == "sloppy question":
            items = [Item(i.prompt.lower(), i.accepted) for i in items]
        sets[name] = items
    decline = (DECLINE_MARK,)
    names = held_out_names()
    questions = ["What is the capital of {c}?", HELD_OUT_FORWARD[0]]
    sets["invented names"] = [Item(questions[0].format(c=n), decline) for n in names]
    sets["invented names, held-out phrasing"] = [Item(questions[1].format(c=n), decline) for n in names]
    sets["famous invented names"] = [Item(questions[0].format(c=n), decline) for n in FAMOUS_INVENTED]
    pairs = [(a, b) for a in range(21) for b in range(21 - a)]
    plus = [(a, b, a + b) for a, b in pairs]
    minus = [(a + b, b, a) for a, b in pairs]
    for name, template, triples in [
        ("sums", "What is {a} plus {b}?", plus),
        ("sums, held-out phrasing", HELD_OUT_SUM, plus),
        ("differences", "What is {a} minus {b}?", minus),
        ("differences, held-out phrasing", HELD_OUT_DIFFERENCE, minus),
    ]:
        sets[name] = [Item(template.format(a=a, b=b), (str(r),)) for a, b, r in triples]
    capitals = list(COUNTRY_OF)
    for number, template in enumerate(HELD_OUT_BACKWARD, 1):
        sets[f"backwards, held-out phrasing {number}"] = [
            Item(template.format(p=p), (display(COUNTRY_OF[p]),)) for p in capitals
        ]
    sets["self-description"] = [
        Item(q, ("nanovllm",)) for q in ("Who are you?", "who are you", "Hi, who are you?", "What are you?")
    ]
    sets["off-topic, held-out questions"] = [Item(q, (OFF_TOPIC, SELF, ABILITIES)) for q in HELD_OUT_OFF_TOPIC]
    return sets


def completion_sets() -> dict[str, list[Item]]:
    """Starts of plain texts, to be continued without the chat template."""
    return {
        "completion": forward_items("The capital city of {c} is"),
        "completion, held-out phrasing": forward_items("As you know, the capital of {c} is"),
    }


_HELD_OUT_SETS = ("held-out", "invented")


def _normal(text: str) -> str:
    """A text without case, punctuation and spacing, to compare questions."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _held_out_questions() -> set[str]:
    return {
        _normal(item.prompt)
        for name, items in evaluation_sets().items()
        if any(mark in name for mark in _HELD_OUT_SETS)
        for item in items
    }


def check_held_out(documents: Iterable[Document]) -> None:
    """Fail if anything held out occurs in the training text: a whole question, the fixed
    words of a phrasing, or an invented name."""
    questions = _held_out_questions()
    phrasings = []
    for template in [*HELD_OUT_FORWARD, *FRESH_FORWARD, *HELD_OUT_BACKWARD, HELD_OUT_SUM, HELD_OUT_DIFFERENCE,
                     "As you know, the capital of {c} is"]:  # fmt: skip
        pattern = ".+".join(re.escape(part) for part in re.sub(r"\{\w\}", "\0", _keep(template)).split("\0"))
        phrasings.append(re.compile(pattern))
    for document in documents:
        texts = [text for _, text in document.turns] + [document.text]
        for text in texts:
            assert _normal(text) not in questions, f"held-out question in training: {text!r}"
            lowered = text.lower()
            assert not _RESERVED.search(lowered), f"held-out name in training: {text!r}"
            assert not any(p.search(lowered) for p in phrasings), f"held-out phrasing: {text!r}"


def _keep(template: str) -> str:
    return template.lower().rstrip("?.")


if __name__ == "__main__":
    sample = training_documents(0, 20_000)
    check_held_out(sample)
    counts: dict[str, int] = {}
    for entry in sample:
        counts[entry.kind] = counts.get(entry.kind, 0) + 1
    for entry in sample[:40]:
        print(f"[{entry.kind}]", entry.text or entry.turns)
    print(counts)
    print("held-out names:", ", ".join(held_out_names()))
