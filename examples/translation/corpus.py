"""A small English-German corpus, generated from a grammar: translation work that needs no download.

    drawn:      Clause(NP("man", "the"), "buy", objects=(NP("car", "a", "red"),), time="today", front="time")
    english():  Today the man buys a red car.
    german():   Heute kauft der Mann ein rotes Auto.

A sentence is drawn once, as a tree of lexicon keys (`NP`, `Clause`, `Sentence`), and then written twice, by two
independent grammars that share nothing but the tree. What a translation model has to learn: gender and agreement,
three cases, adjective endings, verb second and verb final, separable prefixes, participles and infinitives at the
end of the clause, `nicht` against `kein`, do-support.

Each English word has one German translation. Words that would break this are left out ("you", "her", "their",
verbs such as "read" whose past looks like the present); German reads both simple past and perfect as a perfect, so
the English perfect always comes with "already" or "never", which the simple past never does.

Cases are "nom", "acc", "dat"; genders "m", "f", "n", and "p" for any plural; persons "1s", "3s", "1p", "3p".
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

MIN_WORDS, MAX_WORDS = 4, 18
SIZES = {"train": 12_000, "validation": 500, "test": 500}

# --- lexicon ----------------------------------------------------------------------------------------------------------

# english singular, plural | gender, german singular, plural (; singular outside the nominative) | classes
_NOUNS = """
man men | m Mann Männer | person
woman women | f Frau Frauen | person
child children | n Kind Kinder | person
boy boys | m Junge Jungen Jungen | person
girl girls | n Mädchen Mädchen | person
teacher teachers | m Lehrer Lehrer | person
doctor doctors | m Arzt Ärzte | person
neighbour neighbours | m Nachbar Nachbarn Nachbarn | person
student students | m Student Studenten Studenten | person
friend friends | m Freund Freunde | person
brother brothers | m Bruder Brüder | person
sister sisters | f Schwester Schwestern | person
mother mothers | f Mutter Mütter | person
father fathers | m Vater Väter | person
aunt aunts | f Tante Tanten | person
uncle uncles | m Onkel Onkel | person
guest guests | m Gast Gäste | person
queen queens | f Königin Königinnen | person
baker bakers | m Bäcker Bäcker | person
dog dogs | m Hund Hunde | animal
cat cats | f Katze Katzen | animal
horse horses | n Pferd Pferde | animal
bird birds | m Vogel Vögel | animal
cow cows | f Kuh Kühe | animal
mouse mice | f Maus Mäuse | animal
apple apples | m Apfel Äpfel | food
cake cakes | m Kuchen Kuchen | food
egg eggs | n Ei Eier | food cookable
potato potatoes | f Kartoffel Kartoffeln | food cookable
soup soups | f Suppe Suppen | food cookable
banana bananas | f Banane Bananen | food
pear pears | f Birne Birnen | food
letter letters | m Brief Briefe | thing text
book books | n Buch Bücher | thing text
newspaper newspapers | f Zeitung Zeitungen | thing
table tables | m Tisch Tische | thing furniture
chair chairs | m Stuhl Stühle | thing furniture
lamp lamps | f Lampe Lampen | thing machine
knife knives | n Messer Messer | thing
umbrella umbrellas | m Regenschirm Regenschirme | thing
bag bags | f Tasche Taschen | thing closable
key keys | m Schlüssel Schlüssel | thing
picture pictures | n Bild Bilder | thing
clock clocks | f Uhr Uhren | thing machine
cup cups | f Tasse Tassen | thing washable
box boxes | f Kiste Kisten | thing closable
gift gifts | n Geschenk Geschenke | thing
coat coats | m Mantel Mäntel | thing washable
dress dresses | n Kleid Kleider | thing washable
hat hats | m Hut Hüte | thing
shirt shirts | n Hemd Hemden | thing washable
shoe shoes | m Schuh Schuhe | thing
car cars | n Auto Autos | vehicle machine washable
bicycle bicycles | n Fahrrad Fahrräder | vehicle machine washable
ship ships | n Schiff Schiffe | vehicle machine
door doors | f Tür Türen | closable
window windows | n Fenster Fenster | closable
garden gardens | m Garten Gärten | place inside
forest forests | m Wald Wälder | place inside
park parks | m Park Parks | place inside
kitchen kitchens | f Küche Küchen | place inside
room rooms | n Zimmer Zimmer | place inside
city cities | f Stadt Städte | place inside
village villages | n Dorf Dörfer | place inside
house houses | n Haus Häuser | place inside outside
school schools | f Schule Schulen | place inside outside
church churches | f Kirche Kirchen | place inside outside
hotel hotels | n Hotel Hotels | place inside outside
station stations | m Bahnhof Bahnhöfe | place outside
bridge bridges | f Brücke Brücken | place outside
shop shops | m Laden Läden | place outside
tree trees | m Baum Bäume | place outside
"""

# english base, past, participle | german infinitive (a separable prefix ends in "|"), er-form, participle, auxiliary
# | subject classes | objects, as case:classes or preposition:classes | adjuncts it takes
_VERBS = """
see saw seen | sehen sieht gesehen haben | person animal | acc:person,animal,thing,vehicle,place |
buy bought bought | kaufen kauft gekauft haben | person | acc:food,thing,vehicle | for
sell sold sold | verkaufen verkauft verkauft haben | person | acc:food,thing,vehicle |
find found found | finden findet gefunden haben | person animal | acc:animal,food,thing | location
need needed needed | brauchen braucht gebraucht haben | person | acc:thing,vehicle |
love loved loved | lieben liebt geliebt haben | person | acc:person,animal,place |
eat ate eaten | essen isst gegessen haben | person animal | acc:food | location
cook cooked cooked | kochen kocht gekocht haben | person | acc:cookable | for location
write wrote written | schreiben schreibt geschrieben haben | person | acc:text | for location
repair repaired repaired | reparieren repariert repariert haben | person | acc:machine | for location
wash washed washed | waschen wäscht gewaschen haben | person | acc:washable | location
carry carried carried | tragen trägt getragen haben | person | acc:thing,food | goal
open opened opened | öffnen öffnet geöffnet haben | person | acc:closable | for
close closed closed | schließen schließt geschlossen haben | person | acc:closable |
visit visited visited | besuchen besucht besucht haben | person | acc:person,place | company
hear heard heard | hören hört gehört haben | person animal | acc:person,animal | location
paint painted painted | malen malt gemalt haben | person | acc:person,animal | location
lose lost lost | verlieren verliert verloren haben | person | acc:thing | location
forget forgot forgotten | vergessen vergisst vergessen haben | person | acc:thing |
look_for looked_for looked_for | suchen sucht gesucht haben | person animal | acc:person,animal,thing | location
meet met met | treffen trifft getroffen haben | person | acc:person | location
call called called | an|rufen ruft angerufen haben | person | acc:person |
invite invited invited | ein|laden lädt eingeladen haben | person | acc:person |
help helped helped | helfen hilft geholfen haben | person | dat:person,animal | location
thank thanked thanked | danken dankt gedankt haben | person | dat:person |
answer answered answered | antworten antwortet geantwortet haben | person | dat:person |
congratulate congratulated congratulated | gratulieren gratuliert gratuliert haben | person | dat:person |
follow followed followed | folgen folgt gefolgt sein | person animal | dat:person,animal | goal
trust trusted trusted | vertrauen vertraut vertraut haben | person | dat:person |
listen_to listened_to listened_to | zu|hören hört zugehört haben | person | dat:person |
give gave given | geben gibt gegeben haben | person | dat:person acc:thing,food |
show showed shown | zeigen zeigt gezeigt haben | person | dat:person acc:thing,vehicle,place |
send sent sent | schicken schickt geschickt haben | person | dat:person acc:thing |
bring brought brought | bringen bringt gebracht haben | person | dat:person acc:thing,food |
lend lent lent | leihen leiht geliehen haben | person | dat:person acc:thing,vehicle |
sleep slept slept | schlafen schläft geschlafen haben | person animal | | manner location
work worked worked | arbeiten arbeitet gearbeitet haben | person | | manner company for location
laugh laughed laughed | lachen lacht gelacht haben | person | | manner location
dance danced danced | tanzen tanzt getanzt haben | person | | manner company location
sing sang sung | singen singt gesungen haben | person | | manner company for location
swim swam swum | schwimmen schwimmt geschwommen sein | person animal | | manner company
cry cried cried | weinen weint geweint haben | person | | manner location
play played played | spielen spielt gespielt haben | person animal | | manner company location
stand stood stood | stehen steht gestanden haben | person animal | | company location
stay stayed stayed | bleiben bleibt geblieben sein | person animal | | location
get_up got_up got_up | auf|stehen steht aufgestanden sein | person | | manner
arrive arrived arrived | an|kommen kommt angekommen sein | person | | company
come_back came_back come_back | zurück|kommen kommt zurückgekommen sein | person animal | | company
go went gone | gehen geht gegangen sein | person | | manner company goal
drive drove driven | fahren fährt gefahren sein | person | | manner company goal
run ran run | laufen läuft gelaufen sein | person animal | | manner goal
wait waited waited | warten wartet gewartet haben | person animal | for_someone:person,animal | location
dream dreamed dreamed | träumen träumt geträumt haben | person | of:person,animal,place |
think thought thought | denken denkt gedacht haben | person | of_someone:person,animal |
talk talked talked | sprechen spricht gesprochen haben | person | about:person,animal,thing,place | company
believe believed believed | glauben glaubt geglaubt haben | person | that |
hope hoped hoped | hoffen hofft gehofft haben | person | that |
say said said | sagen sagt gesagt haben | person | that |
know knew known | wissen weiß gewusst haben | person | that |
be was been | sein ist gewesen sein | person animal thing vehicle place food | | predicate
"""

# english | german | german stem before an ending, where it differs | classes of nouns it describes
_ADJECTIVES = """
old | alt | | person animal thing vehicle place
young | jung | | person animal
big | groß | | animal thing vehicle place food
small | klein | | person animal thing vehicle place food
red | rot | | thing vehicle
blue | blau | | thing vehicle
green | grün | | thing vehicle
yellow | gelb | | thing
white | weiß | | animal thing vehicle
black | schwarz | | animal thing vehicle
brown | braun | | animal thing
new | neu | | thing vehicle place
beautiful | schön | | animal thing vehicle place
ugly | hässlich | | animal thing place
cheap | billig | | thing vehicle food
expensive | teuer | teur | thing vehicle food
heavy | schwer | | thing
dirty | schmutzig | | thing vehicle place
broken | kaputt | | thing vehicle
dark | dunkel | dunkl | place
quiet | ruhig | | place
famous | berühmt | | person place
clever | klug | | person animal
friendly | freundlich | | person
tired | müde | müd | person animal
strong | stark | | person animal
poor | arm | | person
rich | reich | | person
happy | glücklich | | person
sad | traurig | | person
hungry | hungrig | | person animal
angry | wütend | | person
fresh | frisch | | food
warm | warm | | food
cold | kalt | | food
"""

# english | german | case | what it introduces
_PREPOSITIONS = """
in | in | dat | location inside
behind | hinter | dat | location outside
in front of | vor | dat | location outside
next to | neben | dat | location outside
into | in | acc | goal inside
to | zu | dat | goal outside
with | mit | dat | company person
without | ohne | acc | company person
for | für | acc | for person
for_someone | auf | acc | object
of | von | dat | object
of_someone | an | acc | object
about | über | acc | object
"""

# english | german | tenses it fits ("modal" is any modal verb)
_TIMES = """
today | heute | present past modal
now | jetzt | present modal
tomorrow | morgen | modal
yesterday | gestern | past
last week | letzte Woche | past
last year | letztes Jahr | past
next week | nächste Woche | modal
next year | nächstes Jahr | modal
in the morning | am Morgen | present past modal
in the evening | am Abend | present past modal
at night | in der Nacht | present past modal
in summer | im Sommer | present past modal
in winter | im Winter | present past modal
on Monday | am Montag | present past modal
on Tuesday | am Dienstag | present past modal
on Friday | am Freitag | present past modal
on Sunday | am Sonntag | present past modal
every day | jeden Tag | present past modal
"""

# english | german | tenses; it stands before the English verb and in the middle of the German clause
_FREQUENCIES = """
often | oft | present past modal
always | immer | present past modal
sometimes | manchmal | present past modal
rarely | selten | present past modal
never | nie | present perfect modal
already | schon | perfect
"""

MANNERS = {"slowly": "langsam", "quickly": "schnell", "quietly": "leise", "loudly": "laut", "alone": "allein"}

# english modal: german ich/er form, german plural, whether it may be negated ("must not" is not "muss nicht")
MODALS = {
    "can": ("kann", "können", True),
    "must": ("muss", "müssen", False),
    "should": ("sollte", "sollten", True),
    "want": ("will", "wollen", True),
    "will": ("wird", "werden", True),
}

# english subordinating conjunction: german. Those of QUESTION_WORDS open embedded questions as well.
SUBORDINATORS = {
    "because": "weil", "if": "wenn", "although": "obwohl", "while": "während", "before": "bevor", "that": "dass",
}  # fmt: skip
COORDINATORS = {"and": "und", "but": "aber"}
QUESTION_WORDS = {"where": "wo", "why": "warum", "when": "wann", "what": "was"}
OPENERS = SUBORDINATORS | QUESTION_WORDS

NUMBERS = {
    "two": "zwei", "three": "drei", "four": "vier", "five": "fünf", "six": "sechs", "seven": "sieben", "eight": "acht",
    "nine": "neun", "ten": "zehn",
}  # fmt: skip
NAMES = ("Anna", "Paul", "Maria", "Peter", "Julia", "Thomas", "Lena", "Max", "Sophie", "Felix")

# key (the English nominative): person, English object form, German nominative, accusative, dative. "her" and "them"
# are only ever datives: the German accusative "sie" would not tell them apart.
PRONOUNS = {
    "I": ("1s", "me", "ich", "mich", "mir"),
    "he": ("3s", "him", "er", "ihn", "ihm"),
    "she": ("3s", "her", "sie", "", "ihr"),
    "we": ("1p", "us", "wir", "uns", "uns"),
    "they": ("3p", "them", "sie", "", "ihnen"),
    "who": ("3s", "", "wer", "", ""),
}


@dataclass(frozen=True)
class Noun:
    en: str
    en_plural: str
    gender: str
    de: str
    de_plural: str
    oblique: str  # the singular in the accusative and dative; differs from `de` for weak nouns: der Junge, den Jungen
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Verb:
    en: str
    past: str
    participle: str
    prefix: str  # separable: "an" of "anrufen", else ""
    de: str  # the infinitive without the prefix
    third: str  # er-form without the prefix
    perfect: str
    auxiliary: str
    subjects: tuple[str, ...]
    objects: tuple[tuple[str, tuple[str, ...]], ...]  # (case or preposition, classes)
    adjuncts: tuple[str, ...]
    clause: bool  # takes a "that" clause


def _table(text: str) -> list[list[str]]:
    """The cells of a lexicon table: one row a line, cells separated by "| " (the blank tells it from "an|rufen")."""
    return [[cell.strip() for cell in f"{line} ".split("| ")] for line in text.strip().splitlines()]


def _noun(english: str, german: str, classes: str) -> Noun:
    en, en_plural = english.split()
    gender, de, de_plural, *oblique = german.split()
    return Noun(en, en_plural, gender, de, de_plural, oblique[0] if oblique else de, tuple(classes.split()))


def _verb(english: str, german: str, subjects: str, objects: str, adjuncts: str) -> Verb:
    base, past, participle = (form.replace("_", " ") for form in english.split())
    infinitive, third, perfect, auxiliary = german.split()
    prefix, _, stem = infinitive.rpartition("|")
    governed = [cell.partition(":") for cell in objects.split() if cell != "that"]
    slots = tuple((case, tuple(classes.split(","))) for case, _, classes in governed)
    return Verb(
        base, past, participle, prefix, stem, third, perfect, auxiliary,
        tuple(subjects.split()), slots, tuple(adjuncts.split()), "that" in objects.split(),
    )  # fmt: skip


NOUNS = {noun.en: noun for noun in (_noun(*row) for row in _table(_NOUNS))}
VERBS = {verb.en: verb for verb in (_verb(*row) for row in _table(_VERBS))}
# english: (german predicate, german stem before an ending, classes)
ADJECTIVES = {en: (de, stem or de, tuple(classes.split())) for en, de, stem, classes in _table(_ADJECTIVES)}
PREPOSITIONS = {en: (de, case, *use.split()) for en, de, case, use in _table(_PREPOSITIONS)}
TIMES = {en: (de, tuple(tenses.split())) for en, de, tenses in _table(_TIMES)}
FREQUENCIES = {en: (de, tuple(tenses.split())) for en, de, tenses in _table(_FREQUENCIES)}


# --- what is said -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NP:
    """A noun phrase; `head` is a key of NOUNS or PRONOUNS, or one of NAMES (those two stand alone).

    `determiner`: the, this, every, a, no, my, his, our, many, some or a number; "a" of a plural is written as nothing.
    """

    head: str
    determiner: str = ""
    adjective: str = ""
    plural: bool = False


@dataclass(frozen=True)
class PP:
    """A prepositional phrase: a key of PREPOSITIONS and what it governs."""

    preposition: str
    np: NP


@dataclass(frozen=True)
class Clause:
    """One finite verb with all that belongs to it. `tense`: present, past, perfect, or a key of MODALS."""

    subject: NP
    verb: str
    tense: str = "present"
    objects: tuple[NP, ...] = ()  # one for each slot of the verb, in that order
    predicate: str = ""  # the adjective of "be"
    time: str = ""
    frequency: str = ""
    manner: str = ""
    adjuncts: tuple[PP, ...] = ()
    negated: bool = False
    front: str = ""  # "time" or "place" (the last adjunct): comes first in both languages


@dataclass(frozen=True)
class Sentence:
    """A main clause, maybe joined to a second one by a key of COORDINATORS or OPENERS.

    `question` is "" (a statement), "yes" (a yes/no question), "who" (the subject) or a key of QUESTION_WORDS.
    """

    main: Clause
    joint: str = ""
    second: Clause | None = None
    second_first: bool = False
    question: str = ""


# --- English ----------------------------------------------------------------------------------------------------------


def third_person(verb: str) -> str:
    """The he-form of an English base form; only the first word changes.

    >>> [third_person(verb) for verb in ("buy", "carry", "wash", "go", "have", "look for")]
    ['buys', 'carries', 'washes', 'goes', 'has', 'looks for']
    """
    word, *particle = verb.split(" ")
    if word == "have":
        word = "has"
    elif word.endswith("y") and word[-2] not in "aeiou":
        word = word[:-1] + "ies"
    elif word.endswith(("s", "sh", "ch", "x", "o")):
        word += "es"
    else:
        word += "s"
    return " ".join([word, *particle])


def person(np: NP) -> str:
    """Person and number of a subject: "1s", "3s", "1p" or "3p"."""
    if np.head in PRONOUNS:
        return PRONOUNS[np.head][0]
    return "3p" if np.plural else "3s"


def english_np(np: NP, subject: bool = False) -> str:
    """The English noun phrase.

    >>> english_np(NP("apple", "a")), english_np(NP("apple", "a", "red")), english_np(NP("apple", "this", plural=True))
    ('an apple', 'a red apple', 'these apples')
    """
    if np.head in PRONOUNS:
        return np.head if subject else PRONOUNS[np.head][1]
    if np.head in NAMES:
        return np.head
    noun = NOUNS[np.head]
    words = [np.adjective, noun.en_plural if np.plural else noun.en]
    words = [word for word in words if word]
    if np.determiner == "a":
        determiner = "" if np.plural else "an" if words[0][0] in "aeiou" else "a"
    elif np.determiner == "this" and np.plural:
        determiner = "these"
    else:
        determiner = np.determiner
    return " ".join([determiner, *words]).strip()


def _english_verb(clause: Clause, question: bool) -> tuple[str, str]:
    """(auxiliary, rest); the auxiliary is "" where the verb itself is finite: no "not", no question, no modal."""
    verb, who = VERBS[clause.verb], person(clause.subject)
    do_support = clause.negated or question
    if clause.tense == "want":
        return _finite_or_do("want to", "wanted to", who, clause.tense, do_support, verb.en)
    if clause.tense in MODALS:
        return clause.tense, verb.en
    if clause.verb == "be":
        present = {"1s": "am", "3s": "is"}.get(who, "are")
        past = "was" if who in ("1s", "3s") else "were"
        return (past if clause.tense == "past" else present), ""
    if clause.tense == "perfect":
        return ("has" if who == "3s" else "have"), verb.participle
    return _finite_or_do(verb.en, verb.past, who, clause.tense, do_support, "")


def _finite_or_do(base: str, past: str, who: str, tense: str, do_support: bool, rest: str) -> tuple[str, str]:
    if do_support:
        auxiliary = "did" if tense == "past" else "does" if who == "3s" else "do"
        return auxiliary, f"{base} {rest}".strip()
    finite = past if tense == "past" else third_person(base) if who == "3s" else base
    return "", f"{finite} {rest}".strip()


def english_preposition(name: str) -> str:
    """The English word of a key of PREPOSITIONS: keys such as "for_someone" are the preposition a verb asks for."""
    return name.removesuffix("_someone")


def english_clause(clause: Clause, question: str = "") -> str:
    """The English clause, without capital and full stop; `question` as in Sentence."""
    inverted = question not in ("", "who")
    auxiliary, verb = _english_verb(clause, inverted)
    subject = english_np(clause.subject, subject=True)
    negation = "not" if clause.negated else ""
    if (auxiliary, negation) == ("can", "not") and not inverted:
        auxiliary, negation = "cannot", ""
    objects = []
    for (case, _), np in zip(VERBS[clause.verb].objects, clause.objects, strict=False):
        objects += [english_preposition(case) if case in PREPOSITIONS else "", english_np(np)]
    adjuncts = [f"{english_preposition(pp.preposition)} {english_np(pp.np)}" for pp in clause.adjuncts]
    time, fronted = clause.time, ""
    if clause.front == "time":
        time, fronted = "", clause.time
    elif clause.front == "place":
        fronted = adjuncts.pop()
    middle = [negation, clause.frequency, verb, *objects, clause.predicate, clause.manner, *adjuncts, time]
    opening = [auxiliary, subject] if inverted else [subject, auxiliary]
    words = [question if question in QUESTION_WORDS else "", fronted, *opening, *middle]
    return " ".join(word for word in words if word)


# --- German -----------------------------------------------------------------------------------------------------------

# endings by case, in the order m f n p
_DER = {"nom": ("er", "e", "es", "e"), "acc": ("en", "e", "es", "e"), "dat": ("em", "er", "em", "en")}
_EIN = {"nom": ("", "e", "", "e"), "acc": ("en", "e", "", "e"), "dat": ("em", "er", "em", "en")}
_THE = {"nom": ("der", "die", "das", "die"), "acc": ("den", "die", "das", "die"), "dat": ("dem", "der", "dem", "den")}
_AFTER_DER = {"nom": ("e", "e", "e", "en"), "acc": ("en", "e", "e", "en"), "dat": ("en", "en", "en", "en")}
_AFTER_EIN = {"nom": ("er", "e", "es", "en"), "acc": ("en", "e", "es", "en"), "dat": ("en", "en", "en", "en")}
_STRONG_PLURAL = {"nom": "e", "acc": "e", "dat": "en"}

_DER_WORDS = {"this": "dies", "every": "jed", "many": "viel", "some": "einig"}
_EIN_WORDS = {"a": "ein", "no": "kein", "my": "mein", "his": "sein", "our": "unser"}
_CONTRACTIONS = {"in dem": "im", "in das": "ins", "zu dem": "zum", "zu der": "zur", "von dem": "vom"}

# ich-form, er-form, plural of the verbs that do not follow the rule
_IRREGULAR = {"sein": ("bin", "ist", "sind"), "haben": ("habe", "hat", "haben"), "wissen": ("weiß", "weiß", "wissen")}
_WAS = ("war", "war", "waren")


def _determiner(np: NP, gender: str, case: str) -> tuple[str, str]:
    """(German determiner, ending of an adjective behind it)."""
    column = "mfnp".index(gender)
    name = np.determiner
    if name == "the":
        return _THE[case][column], _AFTER_DER[case][column]
    if name in ("this", "every"):
        return _DER_WORDS[name] + _DER[case][column], _AFTER_DER[case][column]
    if name in _DER_WORDS:
        return _DER_WORDS[name] + _DER[case][column], _STRONG_PLURAL[case]
    if name in NUMBERS:
        return NUMBERS[name], _STRONG_PLURAL[case]
    if name == "a" and np.plural:
        return "", _STRONG_PLURAL[case]
    return _EIN_WORDS[name] + _EIN[case][column], _AFTER_EIN[case][column]


def german_np(np: NP, case: str) -> str:
    """The German noun phrase in a case.

    >>> [german_np(NP("dog", "a", "old"), case) for case in ("nom", "acc", "dat")]
    ['ein alter Hund', 'einen alten Hund', 'einem alten Hund']
    >>> german_np(NP("child", "two", "small", plural=True), "dat"), german_np(NP("boy", "the"), "acc")
    ('zwei kleinen Kindern', 'den Jungen')
    """
    if np.head in PRONOUNS:
        return PRONOUNS[np.head][2 + ("nom", "acc", "dat").index(case)]
    if np.head in NAMES:
        return np.head
    noun = NOUNS[np.head]
    if np.plural:
        word = noun.de_plural
        if case == "dat" and not word.endswith(("n", "s")):
            word += "n"
    else:
        word = noun.de if case == "nom" else noun.oblique
    determiner, ending = _determiner(np, "p" if np.plural else noun.gender, case)
    adjective = ADJECTIVES[np.adjective][1] + ending if np.adjective else ""
    return " ".join(part for part in (determiner, adjective, word) if part)


def german_pp(preposition: str, np: NP) -> str:
    """The German prepositional phrase, with the usual contractions.

    >>> german_pp("in", NP("garden", "the")), german_pp("into", NP("house", "the")), german_pp("to", NP("school", "a"))
    ('im Garten', 'ins Haus', 'zu einer Schule')
    """
    word, case = PREPOSITIONS[preposition][:2]
    phrase = f"{word} {german_np(np, case)}"
    if np.determiner == "the":
        first, second, rest = phrase.split(" ", 2)
        phrase = f"{_CONTRACTIONS.get(f'{first} {second}', f'{first} {second}')} {rest}"
    return phrase


def _conjugate(infinitive: str, third: str, who: str) -> str:
    """The present of a German verb without its prefix.

    >>> [_conjugate("sehen", "sieht", who) for who in ("1s", "3s", "1p")]
    ['sehe', 'sieht', 'sehen']
    """
    rule = (infinitive.removesuffix("en") + "e", third, infinitive)
    first, he, plural = _IRREGULAR.get(infinitive, rule)
    return {"1s": first, "3s": he}.get(who, plural)


def _german_verb(clause: Clause) -> tuple[str, str, bool]:
    """(finite verb, what closes the clause, whether the two are written as one word when they meet)."""
    verb, who = VERBS[clause.verb], person(clause.subject)
    if clause.tense in MODALS:
        singular, plural, _ = MODALS[clause.tense]
        if clause.tense == "will" and who == "1s":
            singular = "werde"
        return (singular if who in ("1s", "3s") else plural), verb.prefix + verb.de, False
    if clause.verb == "be" and clause.tense == "past":
        return _WAS[{"1s": 0, "3s": 1}.get(who, 2)], "", False
    if clause.tense in ("past", "perfect"):
        return _conjugate(verb.auxiliary, "", who), verb.perfect, False
    return _conjugate(verb.de, verb.third, who), verb.prefix, True


def _german_objects(clause: Clause) -> tuple[list[str], list[str], list[str], list[str], bool]:
    """Objects as (pronouns, definite, indefinite, prepositional, whether one of them has taken the negation as "kein").

    Definite objects stand before "nicht" and the adverbs of frequency, indefinite ones behind.
    """
    pronouns, definite, indefinite, prepositional = [], [], [], []
    kein = False
    for (case, _), np in zip(VERBS[clause.verb].objects, clause.objects, strict=False):
        if case in PREPOSITIONS:
            prepositional.append(german_pp(case, np))
        elif np.head in PRONOUNS:
            pronouns.append(german_np(np, case))
        elif np.head in NAMES or np.determiner in ("the", "this", "my", "his", "our"):
            definite.append(german_np(np, case))
        else:
            if clause.negated and np.determiner == "a" and not kein:
                np, kein = NP(np.head, "no", np.adjective, np.plural), True
            indefinite.append(german_np(np, case))
    return pronouns, definite, indefinite, prepositional, kein


def german_clause(clause: Clause, order: str = "second", opener: str = "") -> str:
    """The German clause, without capital and full stop.

    `order` is where the finite verb stands: "second" (a main clause), "first" (a question, or after a subordinate
    clause or a question word), "final" (a subordinate clause). `opener` is the German word in front, if any.
    """
    finite, closing, joined = _german_verb(clause)
    subject = german_np(clause.subject, "nom")
    pronouns, definite, indefinite, prepositional, kein = _german_objects(clause)
    adjuncts = [german_pp(pp.preposition, pp.np) for pp in clause.adjuncts]
    time = TIMES[clause.time][0] if clause.time else ""
    fronted = ""
    if clause.front == "time":
        time, fronted = "", time
    elif clause.front == "place":
        fronted = adjuncts.pop()
    frequency = FREQUENCIES[clause.frequency][0] if clause.frequency else ""
    negation = "nicht" if clause.negated and not kein else ""
    manner = MANNERS[clause.manner] if clause.manner else ""
    predicate = ADJECTIVES[clause.predicate][0] if clause.predicate else ""
    middle = [*pronouns, time, *definite, frequency, negation, *indefinite, manner]
    middle += [*prepositional, *adjuncts, predicate]
    if order == "final":
        last = [closing + finite] if joined else [closing, finite]
        words = [opener, subject, *middle, *last]
    elif order == "first":
        words = [opener, finite, subject, *middle, closing]
    elif fronted:
        words = [fronted, finite, subject, *middle, closing]
    else:
        words = [subject, finite, *middle, closing]
    return " ".join(word for word in words if word)


# --- sentences --------------------------------------------------------------------------------------------------------


def _finish(text: str, question: str) -> str:
    return text[0].upper() + text[1:] + ("?" if question else ".")


def english(sentence: Sentence) -> str:
    """The English sentence.

    >>> tired = Clause(NP("child", "the"), "be", predicate="tired")
    >>> english(Sentence(Clause(NP("child", "the"), "sleep"), "because", tired))
    'The child sleeps because the child is tired.'
    """
    text = english_clause(sentence.main, sentence.question)
    if sentence.second is not None:
        second = english_clause(sentence.second)
        if sentence.second_first:
            text = f"{sentence.joint} {second}, {text}"
        else:
            text += f"{',' if sentence.joint == 'but' else ''} {sentence.joint} {second}"
    return _finish(text, sentence.question)


def german(sentence: Sentence) -> str:
    """The German sentence.

    >>> tired = Clause(NP("child", "the"), "be", predicate="tired")
    >>> german(Sentence(Clause(NP("child", "the"), "sleep"), "because", tired))
    'Das Kind schläft, weil das Kind müde ist.'
    """
    question, second = sentence.question, sentence.second
    if question and question != "who":
        text = german_clause(sentence.main, "first", QUESTION_WORDS.get(question, ""))
    else:
        text = german_clause(sentence.main, "first" if sentence.second_first else "second")
    if second is not None and sentence.joint in COORDINATORS:
        comma = "," if sentence.joint == "but" else ""
        text = f"{text}{comma} {COORDINATORS[sentence.joint]} {german_clause(second)}"
    elif second is not None:
        subordinate = german_clause(second, "final", OPENERS[sentence.joint])
        text = f"{subordinate}, {text}" if sentence.second_first else f"{text}, {subordinate}"
    return _finish(text, question)


# --- drawing ----------------------------------------------------------------------------------------------------------

_BY_CLASS = {name: [n.en for n in NOUNS.values() if name in n.classes] for n in NOUNS.values() for name in n.classes}
_DESCRIBES = {name: [a for a, row in ADJECTIVES.items() if name in row[2]] for name in _BY_CLASS}
_INTRODUCES = {
    use: [(en, row[3]) for en, row in PREPOSITIONS.items() if row[2] == use]
    for use in ("location", "goal", "company", "for")
}
_CLAUSE_VERBS = [name for name, verb in VERBS.items() if verb.clause]
_PLAIN_VERBS = [name for name, verb in VERBS.items() if not verb.clause] + ["be"]  # "be" twice: it has the predicates


def _draw_noun(rng: random.Random, classes: Sequence[str], negated: bool = False, taken: Sequence[NP] = ()) -> NP:
    """A noun phrase of one of the classes, of a head not `taken`; `negated` keeps to what "kein" can negate."""
    heads = [head for name in classes for head in _BY_CLASS[name] if all(head != np.head for np in taken)]
    head = rng.choice(heads)
    adjectives = [a for name in NOUNS[head].classes if name in _DESCRIBES for a in _DESCRIBES[name]]
    adjective = rng.choice(adjectives) if adjectives and rng.random() < 0.4 else ""
    plural = rng.random() < 0.3
    determiners = ["the", "the", "the", "a", "a", "this"]
    if head not in ("man", "woman"):  # "meine Frau" is "my wife"
        determiners += ["my", "his", "our"]
    if not negated:
        determiners += ["many", "some", rng.choice(list(NUMBERS))] if plural else ["every"]
    return NP(head, rng.choice(determiners), adjective, plural)


def _draw_subject(rng: random.Random, verb: Verb, negated: bool) -> NP:
    """A subject for the verb: a pronoun, a name or a noun."""
    kind = rng.random()
    if "person" in verb.subjects and kind < 0.3:
        return NP(rng.choice(["I", "he", "she", "we", "they"]))
    if "person" in verb.subjects and kind < 0.45:
        return NP(rng.choice(NAMES))
    return _draw_noun(rng, verb.subjects, negated)


def _draw_object(rng: random.Random, case: str, classes: Sequence[str], subject: NP, negated: bool, first: bool) -> NP:
    """An object; pronouns only as the only accusative or as the dative, so that their order is not in question."""
    kind = rng.random()
    if "person" in classes and kind < 0.3 and first:
        pool = ["I", "he", "we"] if case == "acc" else ["I", "he", "she", "we", "they"]
        taken = ("I", "we") if subject.head in ("I", "we") else (subject.head,)  # neither "I help me" nor "I help us"
        if case not in PREPOSITIONS:
            return NP(rng.choice([head for head in pool if head not in taken]))
        return NP(rng.choice([name for name in NAMES if name != subject.head]))
    return _draw_noun(rng, classes, negated, (subject,))


def _draw_adjuncts(rng: random.Random, verb: Verb, taken: Sequence[NP]) -> tuple[PP, ...]:
    """Up to two prepositional phrases: someone first, then somewhere."""
    adjuncts: list[PP] = []
    for use in ("company", "for", "location", "goal"):
        if use in verb.adjuncts and len(adjuncts) < 2 and rng.random() < (0.25 if use in ("company", "for") else 0.55):
            preposition, kind = rng.choice(_INTRODUCES[use])
            np = _draw_noun(rng, (kind,), negated=True, taken=[*taken, *(pp.np for pp in adjuncts)])
            adjuncts.append(PP(preposition, np))
    return tuple(adjuncts)


def _can_be_asked(verb: Verb, question: str) -> bool:
    """Whether a "what" or "where" question makes sense with the verb; any other question does."""
    if question == "what":
        return any(case == "acc" and "person" not in classes for case, classes in verb.objects[-1:])
    return question != "where" or "location" in verb.adjuncts


def _draw_adverb(rng: random.Random, kind: str, negated: bool, question: str) -> tuple[str, str]:
    """(time, frequency), at most one of the two; a perfect always has a frequency."""
    if kind == "perfect" or (not negated and question not in ("where", "when", "what") and rng.random() < 0.15):
        return "", rng.choice([f for f, row in FREQUENCIES.items() if kind in row[1]])
    if question != "when" and rng.random() < 0.45:
        return rng.choice([t for t, row in TIMES.items() if kind in row[1] and not (negated and t == "every day")]), ""
    return "", ""


def _draw_clause(
    rng: random.Random, tenses: Sequence[str], verbs: Sequence[str] = _PLAIN_VERBS, *, fronting: bool = False,
    negation: float = 0.2, question: str = "",
) -> Clause:  # fmt: skip
    """A clause in one of the tenses ("modal" stands for any modal verb), fit for the question it will be, if any."""
    name = rng.choice([name for name in verbs if _can_be_asked(VERBS[name], question)])
    verb = VERBS[name]
    kind = rng.choice([tense for tense in tenses if not (name == "be" and tense == "perfect")])
    tense = rng.choice(list(MODALS)) if kind == "modal" else kind
    if name == "be" and kind == "modal":
        tense = "will"
    may_negate = kind != "perfect" and (tense not in MODALS or MODALS[tense][2])
    negated = may_negate and rng.random() < negation
    subject = NP("who") if question == "who" else _draw_subject(rng, verb, negated)
    objects: tuple[NP, ...] = ()
    for index, (case, classes) in enumerate(verb.objects):
        if not (question == "what" and index == len(verb.objects) - 1):
            objects += (_draw_object(rng, case, classes, subject, negated, index == 0),)
    predicate = ""
    if "predicate" in verb.adjuncts:
        classes = NOUNS[subject.head].classes if subject.head in NOUNS else ("person",)
        choices = [a for c in classes for a in _DESCRIBES[c] if a != subject.adjective]
        predicate = rng.choice(choices)
    adjuncts = () if question == "where" else _draw_adjuncts(rng, verb, (subject, *objects))
    manner = rng.choice(list(MANNERS)) if "manner" in verb.adjuncts and rng.random() < 0.25 else ""
    time, frequency = ("", "") if verb.clause else _draw_adverb(rng, kind, negated, question)
    front = ""
    if fronting and time and rng.random() < 0.5:
        front = "time"
    elif fronting and adjuncts and adjuncts[-1].preposition in dict(_INTRODUCES["location"]) and rng.random() < 0.3:
        front = "place"
    return Clause(subject, name, tense, objects, predicate, time, frequency, manner, adjuncts, negated, front)


def _draw_sentence(rng: random.Random) -> Sentence:
    """A sentence: about half plain statements, the rest questions, subordination and coordination."""
    every, kind = ("present", "present", "past", "past", "perfect", "modal"), rng.random()
    if kind < 0.5:
        return Sentence(_draw_clause(rng, every, fronting=True))
    if kind < 0.65:
        question = rng.choice(["yes", "yes", "where", "why", "when", "what", "who"])
        tenses = tuple(tense for tense in every if tense != "perfect" or question in ("yes", "who"))
        negation = 0.3 if question == "why" else 0.0
        verbs = [n for n in _PLAIN_VERBS if n != "be" and "person" in VERBS[n].subjects]
        return Sentence(_draw_clause(rng, tenses, verbs, negation=negation, question=question), question=question)
    present: tuple[str, ...] = ("present", "modal")
    past: tuple[str, ...] = ("past",)
    if kind < 0.75:
        tenses = rng.choice([present, past])
        first = _draw_clause(rng, tenses, fronting=True)
        return Sentence(first, rng.choice(list(COORDINATORS)), _draw_clause(rng, tenses, fronting=True))
    if kind < 0.85:
        tense = rng.choice(["present", "past"])
        main = _draw_clause(rng, (tense,), _CLAUSE_VERBS)
        if main.verb == "know" and main.negated:
            question = rng.choice(["where", "why", "when"])
            verbs = [n for n in _PLAIN_VERBS if n != "be"]
            return Sentence(main, question, _draw_clause(rng, (tense,), verbs, negation=0.0, question=question))
        return Sentence(main, "that", _draw_clause(rng, present if tense == "present" else past))
    joint = rng.choice(["because", "because", "if", "although", "while", "before"])
    tenses = present if joint == "if" else rng.choice([present, past])
    negation = 0.0 if joint == "before" else 0.2
    subordinate = _draw_clause(rng, tenses[:1], negation=negation)  # no modal verb
    second_first = rng.random() < 0.4
    main = _draw_clause(rng, tenses, fronting=not second_first)
    return Sentence(main, joint, subordinate, second_first)


def generate(rows: int, seed: int) -> list[dict[str, dict[str, str]]]:
    """`rows` WMT-style rows {"translation": {"en": ..., "de": ...}}; the same rows for the same seed.

    No sentence appears twice, in either language; every sentence has 4 to 18 words. A longer draw with the same seed
    begins with the shorter one.

    >>> generate(2, seed=0) == generate(5, seed=0)[:2]
    True
    """
    rng = random.Random(seed)
    seen: set[str] = set()
    found: list[dict[str, dict[str, str]]] = []
    while len(found) < rows:
        sentence = _draw_sentence(rng)
        pair = {"en": english(sentence), "de": german(sentence)}
        fits = all(MIN_WORDS <= len(text.split()) <= MAX_WORDS for text in pair.values())
        if fits and seen.isdisjoint(pair.values()):
            seen.update(pair.values())
            found.append({"translation": pair})
    return found


def splits(
    train: int = SIZES["train"], validation: int = SIZES["validation"], test: int = SIZES["test"], seed: int = 0
) -> dict[str, list[dict[str, dict[str, str]]]]:
    """Disjoint rows for training, validation and test.

    The held-out rows are drawn first, so that a larger `train` leaves them as they are.
    """
    rows = generate(test + validation + train, seed)
    return {"train": rows[test + validation :], "validation": rows[test : test + validation], "test": rows[:test]}
