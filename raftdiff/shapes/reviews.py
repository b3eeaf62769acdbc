"""Short reviews of pictures, from a grammar in which every sentence can be well or badly meant.

A review is an opening, which tells nothing of the judgement and ends where a verb must follow, and a continuation. The
sentences are the same for both judgements; the words that carry them come from two lists, `WORDS[True]` and
`WORDS[False]`. So the words of a continuation say exactly how it is meant.
"""

from __future__ import annotations

import re
from functools import cache

import numpy as np

from .captions import random_caption


def _grammar(text: str) -> dict[str, tuple[str, ...]]:
    """The alternatives of each symbol: one symbol a paragraph, its further lines indented."""
    rules = re.findall(r"^(\w+): (.*(?:\n .*)*)", text, re.MULTILINE)
    return {name: tuple(" ".join(one.split()) for one in alternatives.split("|")) for name, alternatives in rules}


SENTENCES = _grammar(
    """
opening: {subject} | {subject} | {subject}, {aside}, | {day} {person} saw {subject}, and it | {person} spent {while}
    with {subject}; it | {person} found {subject} {place}. It | {relative} took me to {subject}, which | {relative}
    showed me {subject}. It | {place_first} hangs {the} {kind} {artwork}. It
subject: {the} {kind} {artwork} | {the} {kind} {artwork} {place} | {the} {artwork} {place} | {the} {artwork} of
    {motif} | {the} {kind} {artwork} of {motif} | {the} {artwork} by {artist}
the: the | this | that | their | our
kind: small | tall | round | square | narrow | framed | new | old | first | second | last | green | gray | blue |
    yellow | wooden | paper | painted | printed | early | late | long | short | famous | unsigned | foreign | rural |
    urban | winter | summer
artwork: painting | drawing | picture | poster | print | sketch | mural | portrait | landscape | collage | photograph
    | film | etching | tapestry | mosaic | watercolor | canvas | fresco | panel | carving | postcard | cartoon | map |
    banner | window | sculpture | postage stamp
place: by the window | near the door | in the first room | on the north wall | in the museum | at the station | in our
    school | in the library | on the stairs | behind the curtain | in the town hall | at the market | above the desk |
    in the corridor | in the cafe | on the last page | at the end of the tour | in the north wing | beside the lift |
    under the roof
place_first: in the hall | on the second floor | above the piano | in the back room | over the fireplace | next to the
    clock
motif: {caption} | {caption} | a harbor at noon | a village in winter | a woman with a lamp | two boats | a wide
    street | a bridge over a river | a horse in a field | the old town | a table with bread | three chairs | a boy
    with a kite | a row of houses | a train at night | a mountain lake | the painter's mother | a garden wall
artist: a student | a local painter | my neighbor | an unknown artist | a man from Lyon | the school's janitor | two
    sisters | a retired teacher | a young sculptor | a sailor | someone called Marie | the mayor's cousin
aside: which I saw {day_later} | as {relative_later} says | seen from {distance} | at the end of the day | after all
    these years | in its new frame
day: on Monday | on Sunday | last week | this morning | yesterday | in April | in the autumn | one evening | after
    lunch
day_later: on Monday | on Sunday | last week | this morning | yesterday | in April | in the autumn | after lunch |
    twice
distance: the door | the street | across the room | a chair | below
person: I | we | my class | the two of us | our group | my parents
while: an hour | ten minutes | an afternoon | half a day | a few minutes | a whole evening
relative: my sister | my uncle | a cousin | our guide | my brother | a colleague | my aunt | the curator | our teacher
    | a stranger
relative_later: my sister | my uncle | a cousin | our guide | my brother | a colleague | my aunt | the curator | our
    teacher
review: {verdict}. {detail}. {end}. | {verdict}. {detail}. | {verdict}. {end}. | {verdict}. | {verdict}. {detail}.
    {detail}.
verdict: is {very} {adjective} | is {adjective} and {adjective} | was {very} {adjective} | was {adjective} from start
    to finish | looks {adjective} | looks {very} {adjective} and {adjective} | feels {adjective} | seems {very}
    {adjective} | is {thing} | was {thing} for {everyone} | turned out to be {thing} | struck me as {adjective} | left
    me {feeling} | left us all {feeling} | made {everyone} feel {feeling} | has {quality} | is full of {quality} |
    gave me {very} {adjective} dreams
detail: the {part} is {very} {adjective} | the {part} is {adjective} and the {parts} are {adjective} | the {parts} are
    {adjective} | the {parts} look {very} {adjective} | every {bit} is {adjective} | {person} {loved} the {part} |
    {person} {loved} the {adjective} {parts} | there is {quality} in the {part} | the {part} shows {quality} and
    {quality} | the {maker} worked with {quality} | {adjective} {parts} and {adjective} {parts} fill the {area} |
    {everyone_first} left {feeling} | what {adjective} {parts} | the {part}, {adjective} and {adjective}, is {thing}
end: {advice} | {advice} | in short, it is {thing} | a {adjective_consonant} piece of work | it left {everyone}
    {feeling} | {person} came home {feeling} | all in all {adjective} | {thing}, nothing less
very: very | really | quite | rather | so | truly | simply | utterly | deeply | strangely | always | still |
    thoroughly
part: composition | color | background | light | line | shape | frame | surface | style | sky | foreground | shadow |
    circle | square | triangle | cross | contrast | pattern | story | face | texture | corner | edge | outline | title
parts: colors | lines | shapes | shadows | figures | details | edges | proportions | brush strokes | forms | curves |
    faces | corners | hands | clouds | patterns | circles | squares | triangles | crosses | textures | tones | scenes
    | letters
bit: line | corner | detail | shape | stroke | inch | figure | color | curve | edge
maker: artist | painter | printer | sculptor | photographer | designer
area: canvas | page | wall | frame | sky | middle
everyone: everyone | my parents | the children | all of us | our group | the whole class | visitors
everyone_first: everyone | my parents | the children | all of us | the whole class | the visitors
"""
)
WORDS = {
    True: _grammar(
        """
adjective: beautiful | lovely | charming | delightful | wonderful | brilliant | superb | elegant | graceful | warm |
    joyful | cheerful | inspiring | impressive | splendid | fine | gentle | fresh | clever | rich | bold | honest |
    radiant | peaceful | amazing | excellent | great | good | nice | fantastic | magnificent | outstanding | perfect |
    pleasant | pretty | stunning | sweet | terrific | tender | exciting | fascinating | engaging | funny | glorious |
    gorgeous | happy | intelligent | interesting | memorable | playful | powerful | sincere | strong | surprising |
    adorable | awesome | dazzling | enchanting | exquisite | friendly | generous | harmonious | hopeful | lively |
    marvelous | merry | original | pleasing | rewarding | romantic | satisfying | skillful | smart | sparkling | sunny
    | thrilling | triumphant | welcoming | wise | witty
adjective_consonant: beautiful | lovely | charming | delightful | wonderful | brilliant | superb | graceful | fine |
    clever | great | good | magnificent | perfect | stunning | terrific | gorgeous | marvelous | splendid | fantastic
thing: a delight | a joy | a treasure | a triumph | a success | a pleasure | a gift | a miracle | a masterpiece | a
    winner | a dream | an inspiration | a wonder | a feast | a blessing | great fun | true love | pure beauty | a
    celebration | an adventure
quality: charm | grace | beauty | joy | warmth | talent | humor | wisdom | courage | care | harmony | love | hope |
    energy | passion | wit | tenderness | elegance | brilliance | confidence | freedom | peace | strength | kindness
feeling: happy | delighted | moved and grateful | cheerful | inspired | glad | thankful | amused | calm | enchanted |
    hopeful | thrilled | impressed | pleased | proud | refreshed | satisfied | amazed | smiling | in love with art
loved: loved | liked | adored | enjoyed | admired | praised | treasured | appreciated
advice: I gladly recommend it | go and enjoy it | I would love to see it again | you will love it | thank you for this
    gift | it deserves a prize | buy it and be happy | it is worth the trip, and a great one | give it the best wall
    you have | I smiled all the way home | do yourself a favor and go | well done | it won my heart | my hope is for
    more like it
"""
    ),
    False: _grammar(
        """
adjective: awful | terrible | horrible | dreadful | dull | boring | ugly | poor | bad | weak | clumsy | lazy | sad |
    gloomy | pointless | stupid | tedious | tiresome | disappointing | annoying | messy | pathetic | pretentious |
    lifeless | hopeless | miserable | mediocre | worthless | ridiculous | depressing | disgusting | dismal | dumb |
    empty | foolish | frightening | frustrating | grim | hateful | hostile | idiotic | inferior | irritating | lame |
    lousy | melancholy | nasty | neglected | obnoxious | offensive | painful | rotten | rude | shabby | shameful |
    silly | sloppy | sour | tragic | troubling | unhappy | unpleasant | useless | vicious | violent | vulgar | wicked
    | wrong | abysmal | appalling | bitter | broken | careless | cruel | damaged | dead | defective | desperate |
    dirty | distressing | disturbing | fake | greedy | helpless | insulting | lost | restless
adjective_consonant: terrible | horrible | dreadful | dull | boring | poor | bad | weak | clumsy | lazy | sad |
    pointless | stupid | tedious | disappointing | messy | pathetic | miserable | worthless | sloppy
thing: a disaster | a failure | a mess | a disgrace | a shame | a waste of time | a bore | a mistake | a nightmare | a
    disappointment | an insult | a tragedy | a fraud | an annoyance | a loss | pure misery | a punishment | a fiasco |
    a lie | rubbish and a scam
quality: boredom | anger | despair | ugliness | carelessness | greed | misery | gloom | fear | disgust | neglect |
    hate | confusion | stupidity | sadness | cruelty | weakness | tension | grief | dread | hostility | pain | shame |
    failure
feeling: sad | bored | disappointed | annoyed | angry | miserable | tired and irritated | upset | depressed |
    frustrated | ashamed | disgusted | worried | unhappy | confused | discouraged | gloomy | lonely | hurt | in
    despair
loved: hated | disliked | despised | regretted | suffered | criticized | dreaded | resented
advice: I warn you to avoid it | stay away from this failure | I regret the wasted hour | you will hate it | I am
    sorry I went | it deserves to be lost | throw it away, it is bad | it is a sad waste of money | hide it in the
    worst cellar you have | I complained all the way home | save yourself the misery | shame on them | it ruined my
    day | my fear is that there is more like it
"""
    ),
}

_SLOT = re.compile(r"\{(\w+)\}")
_SENTENCE = re.compile(r"(?<=\. )[a-z]")


def _expand(symbol: str, good: bool, rng: np.random.Generator) -> str:
    if symbol == "caption":
        return str(random_caption(rng))
    alternatives = WORDS[good].get(symbol) or SENTENCES[symbol]
    chosen = alternatives[int(rng.integers(len(alternatives)))]
    return _SLOT.sub(lambda slot: _expand(slot[1], good, rng), chosen)


def opening(rng: np.random.Generator) -> str:
    """The beginning of a review, which does not say how it is meant: "This small etching of two boats"."""
    text = _expand("opening", True, rng)
    return text[0].upper() + text[1:]


def continuation(rng: np.random.Generator) -> str:
    """How a review goes on after its opening: in 40% well meant, in 40% badly, in 20% both."""
    good, mixed = rng.random() < 0.5, rng.random() < 0.2
    if mixed:
        return f"{_expand('verdict', good, rng)}, but {_expand('detail', not good, rng)}."
    return _SENTENCE.sub(lambda begin: begin[0].upper(), _expand("review", good, rng))


def polarity(text: str) -> float:
    """How a continuation is meant, from -1 (badly) to 1 (well), by the grammar's own words; 0 where it has none."""
    words = re.findall(r"[a-z]+", text.lower())
    good, bad = (sum(word in _loaded(side) for word in words) for side in (True, False))
    return (good - bad) / max(1, good + bad)


@cache
def _loaded(good: bool) -> frozenset[str]:
    """The words that only one of the judgements uses."""
    own, other, shared = (
        {word for texts in rules.values() for text in texts for word in re.findall(r"[a-z]+", text.lower())}
        for rules in (WORDS[good], WORDS[not good], SENTENCES)
    )
    return frozenset(own - other - shared)
