# ruff: noqa: SIM905 (a hundred quoted words are harder to read than one split string)
"""Word lists for invented facts, split for good: every fourth entry is held out for evaluation."""

from __future__ import annotations

from random import Random

_ADJECTIVES = """
amber ancient azure bitter blue brave bright bronze calm clever cold copper crimson crooked dark deep distant double
dusty eager eastern electric emerald empty faded fierce final flat foggy fragile frozen gentle giant glass golden
grand gray green hidden hollow humble hungry icy inner iron ivory jolly late lazy little lonely loud lucky lunar
mellow merry mighty misty modern narrow noble northern odd old orange outer pale plain polar proud purple quick
quiet rapid rare red restless rough round royal rusty sacred scarlet secret shallow sharp silent silver simple
sleepy slow small smooth soft solar southern spare steady steep still stone stormy strange sunny sweet swift tall
tame tiny tired upper velvet violet warm western white wide wild winter wise wooden yellow young
""".split()

_NOUNS = """
acorn anchor antler apple arrow badger basin basket beacon bear beaver bell birch bison boulder bridge bucket cabin
candle canyon castle cedar cellar chapel cherry circle cliff clock cloud clover comet compass condor copper coral
cottage crane creek crow crystal dagger daisy delta desert dolphin dragon drum dune eagle ember engine falcon
feather fern ferry field finch fjord flame flute forest fountain fox garden gate geyser ginger glacier goose granite
grove hammer harbor hare hawk hazel heron hill hornet island ivy jaguar juniper kettle kite ladder lagoon lake
lantern larch lark lemon lily lion lizard lotus lynx magnet magpie maple marble market marsh meadow mill mirror
moose moth mountain nettle oak ocean olive onyx orchid otter owl oyster panther parrot peach pebble pelican pepper
pigeon pine planet plum pond poppy prairie quail quarry rabbit raven reef ridge river robin rocket rose saddle sail
salmon sparrow spider spring squirrel star stork summit swan temple thistle thunder tiger torch tower trout tulip
tunnel turtle valley violin walnut warbler whale willow window wolf wren zebra
""".split()

_FIRST = """
Ada Adele Agnes Alan Albert Alice Amara Anders Anita Anton Arjun Astrid Aurora Basil Beatrix Benno Bianca Boris
Bridget Bruno Camille Carlos Carmen Cecilia Cedric Chiara Clara Conrad Cora Cyrus Daniela Daphne Darius Dmitri
Dolores Edgar Edith Elena Elias Elsa Emil Enzo Erik Esther Eva Fatima Felix Fiona Florian Freya Gemma Georg Gideon
Greta Gustav Hana Harriet Hector Helga Hiro Hugo Ibrahim Ida Igor Ines Ingrid Irene Isaac Ivan Jade Jasper Joan
Johan Jonas Josefa Judith Julius Karin Kenji Kira Klaus Lars Laura Leila Lena Leo Linus Lorenzo Lucia Ludwig Luis
Lydia Magnus Malik Marco Maria Marta Mateo Maya Mei Milo Mira Monica Nadia Naomi Nils Nora Octavia Olaf Olga Omar
Oscar Otto Pablo Paula Pavel Petra Pia Quentin Rafael Ravi Rosa Rufus Ruth Sanjay Sara Selma Silas Simon Sofia
Stella Sven Tamara Tariq Tessa Theo Thora Tobias Ulrich Uma Ursula Vera Victor Viola Walter Wanda Xavier Yara Yusuf
Zara Zoe
""".split()

_LAST = """
Abbott Aguilar Almeida Anand Armitage Baker Barlow Bauer Becker Bellini Berg Bishop Blom Brandt Carver Castillo
Chandra Chen Clarke Costa Cruz Dahl Dalton Delgado Dietrich Dubois Duran Ekberg Ellis Engel Farrell Ferrari Fischer
Fletcher Foster Fraser Fuentes Gallo Garner Gibson Gomez Graf Greene Haas Hale Hansen Harlow Hayashi Heller Hobbs
Holm Hughes Ibsen Ito Ivers Jansen Jensen Joshi Kapoor Kaufman Keller Khan Kimura Klein Kovacs Kruger Larsen Laurent
Lehmann Lindgren Lopez Lund Mackay Marino Marsh Mendez Meyer Moreau Moretti Morris Mueller Nakamura Navarro Nielsen
Novak Olsen Ortega Osman Parker Patel Pereira Petrov Porter Quinn Ramos Reid Richter Rivera Romano Rossi Roth
Sandoval Santos Sato Schmidt Serrano Silva Singh Sokolov Stein Strand Sullivan Suzuki Tanaka Teller Thorne Torres
Ueda Vance Varga Vega Vogel Voss Wagner Walsh Weber Whitman Winter Wolff Yamada Young Zapata Ziegler Zimmer
""".split()

_PLACES = """
Aarhus Accra Adelaide Ankara Antwerp Athens Austin Baku Basel Bergen Bilbao Bogota Bordeaux Boston Bremen Brno
Bruges Cairo Calgary Cardiff Casablanca Chicago Cologne Cordoba Cork Dakar Dallas Delhi Denver Dresden Dublin Durban
Florence Galway Gdansk Geneva Genoa Ghent Glasgow Granada Graz Halifax Hamburg Hanoi Havana Helsinki Houston Jakarta
Kampala Kazan Kigali Krakow Kyoto Lagos Leeds Leipzig Lima Lisbon Liverpool Ljubljana Lusaka Lyon Madrid Malaga
Malmo Manila Medellin Milan Montreal Mumbai Munich Nairobi Nantes Naples Odessa Osaka Oslo Ottawa Oxford Palermo
Perth Porto Prague Quito Reykjavik Riga Rome Salzburg Santiago Seoul Seville Sofia Split Tallinn Tampere Tbilisi
Tokyo Toronto Toulouse Trieste Tromso Tunis Turin Utrecht Valencia Vienna Vilnius Warsaw Wellington Zagreb Zurich
""".split()

_OBJECTS = """
archive backpack balloon barge battery bicycle boiler bookshelf bus camera cargo carriage clinic computer container
crate depot diary drone elevator exhibit factory fleet freezer furnace gallery generator greenhouse guitar hangar
helicopter hostel hotel kiosk laboratory laptop library locker machine manuscript museum notebook observatory office
oven painting parcel patient piano pipeline platform printer pump radio reactor recipe robot room router sample
satellite school scooter sensor server shelf ship shipment shop station statue studio submarine suitcase tank team
telescope terminal theatre ticket tractor trailer train truck turbine van vault vehicle vessel warehouse weapon
workshop yacht
""".split()

_VERBS = """
add append apply bind build cache check clear clone close collect compare compile copy count create decode delete
detect dispatch dump emit encode escape evict expand export fetch filter find flush fold format freeze gather group
guess handle hash import index insert join link list load lock log map mark match merge mount move normalize open
order pack parse patch ping plan poll prune pull push query read rebuild refresh register reload remove render
repair replace reset resize resolve restore retry rotate route run sample save scan schedule seek select send serve
shuffle sign skip sort split start stop store strip swap sync tag trace trim unlock unpack update validate verify
wait walk wrap write
""".split()

_CODE_NOUNS = """
account address alias array attribute backend backup batch block bound branch buffer bundle cache callback channel
client cluster code color column command config connection context counter credit cursor database deadline delay
depth device digest domain driver edge entry error event factor field file flag folder font frame group handler
header height history host image index interval item job key label layer length level limit line list lock margin
mask matrix member memory message method mode model module name network node number object offset option order
output owner packet page panel parent parser part password path pattern payload peer pipe pixel point policy pool
port prefix price priority process profile proxy query queue quota range rank rate ratio record region registry
report request response result retry role root row rule scale schema scope score section seed segment server session
shape signal size slot socket source stack state step storage stream suffix symbol table target task template thread
threshold timeout timer token topic tree type unit url user value vector version view volume weight width window
worker zone
""".split()

_ATTRIBUTES: dict[str, str] = {
    "number": """access code|account number|altitude|annual budget|batch number|battery level|capacity|catalogue number
|charge|combination|daily quota|depth|deposit|distance|door code|elevation|extension|fee|flight number
|frequency|fuel level|gate number|growth rate|head count|height|identification number|interest rate
|invoice number|key number|length|licence number|limit|locker number|magic number|mass|maximum load
|member count|monthly rent|order number|parking space|passcode|payload|phone number|PIN|population
|postal code|price|production target|registration number|reserve|room number|salary|score|seat number
|serial number|shelf number|speed limit|tax|temperature|threshold|ticket number|timeout|tolerance|total
|transaction number|turnover|unlock code|voltage|volume|weight|yield""",
    "id": """access key|API key|asset tag|build id|certificate|checksum|commit|digest|device id|fingerprint
|identifier|licence key|lot id|order id|reference|request id|secret|session id|signature|token
|tracking code|transaction id|voucher""",
    "word": """alias|badge|blend|callsign|category|code name|codeword|colour|emblem|favourite animal|favourite flower
|favourite fruit|flavour|grade|keyword|label|mascot|material|mood|motif|nickname|passphrase|password
|pattern|pet|safe word|secret word|shape|signal|symbol|theme|title|trigger word|verdict""",
    "person": """architect|assistant|author|captain|chairperson|coach|contact|designer|director|doctor|editor|founder
|guardian|guide|heir|inspector|instructor|inventor|landlord|lawyer|librarian|maintainer|manager|mentor
|neighbour|operator|owner|partner|pilot|principal|producer|reviewer|sponsor|supervisor|teacher|treasurer
|witness""",
    "place": """base|birthplace|branch|depot|destination|head office|home port|home town|landing site|location
|meeting place|next stop|origin|port of call|residence|venue""",
    "date": """anniversary|arrival date|birthday|closing date|deadline|delivery date|departure date|expiry date
|founding date|inspection date|launch date|opening day|release date|renewal date|start date|wedding day""",
    "sentence": """advice|caption|complaint|conclusion|excuse|final remark|first rule|instruction|last message|motto
|note|promise|remark|reminder|slogan|status|summary|warning|wish""",
}
_SYLLABLES = """
ba be bo bra bri ca ce cor da del dor dra el en fa fel fi ga gol gri ha hel il ja jor ka kel kor la len lo lu ma mel
mi mor na nel ni no or pa pel po qua ra rel ri ro sa sel si sol ta tel ti tor ul va vel vi vor wa wel xa yo za zel
zi zor
""".split()

SPLITS = ("train", "held_out")


def part(entries: list[str], split: str) -> list[str]:
    """The entries of one split: the fourth, eighth, ... are held out. Raises KeyError for an unknown split."""
    held = {"train": False, "held_out": True}[split]
    return [entry for index, entry in enumerate(entries) if (index % 4 == 3) == held]


_BY_SPLIT: dict[str, dict[str, list[str]]] = {
    split: {
        "adjective": part(_ADJECTIVES, split),
        "noun": part(_NOUNS, split),
        "first": part(_FIRST, split),
        "last": part(_LAST, split),
        "place": part(_PLACES, split),
        "object": part(_OBJECTS, split),
        "verb": part(_VERBS, split),
        "code": part(_CODE_NOUNS, split),
        "syllable": part(_SYLLABLES, split),
        **{
            f"attribute-{kind}": part([entry.strip() for entry in text.replace("\n", "").split("|")], split)
            for kind, text in _ATTRIBUTES.items()
        },
    }
    for split in SPLITS
}


def pick(rng: Random, sort: str, split: str) -> str:
    """One word of a sort: adjective, noun, first, last, place, object, verb, code, syllable, attribute-<kind>."""
    return rng.choice(_BY_SPLIT[split][sort])


def attribute_kinds() -> list[str]:
    """The kinds of value that attributes ask for."""
    return list(_ATTRIBUTES)


def person(rng: Random, split: str) -> str:
    """A first and a last name."""
    return f"{pick(rng, 'first', split)} {pick(rng, 'last', split)}"


def invented(rng: Random, split: str) -> str:
    """A pronounceable name that is no word, e.g. Kelvora."""
    return "".join(pick(rng, "syllable", split) for _ in range(rng.randint(2, 4))).capitalize()


def identifier(rng: Random, split: str, upper: bool = False) -> str:
    """An identifier of two or three parts in snake_case, UPPER_CASE or (one in five) camelCase."""
    parts = [pick(rng, "code", split) for _ in range(rng.randint(1, 2))]
    parts.insert(0, pick(rng, rng.choice(["verb", "adjective", "noun", "code"]), split))
    if upper:
        return "_".join(parts).upper()
    if rng.random() < 0.2:
        return parts[0] + "".join(piece.capitalize() for piece in parts[1:])
    return rng.choice(["", "", "", "_"]) + "_".join(parts)


def contains(sort: str, word: str, split: str) -> bool:
    """Whether `word` is in the list of a sort."""
    return word in _BY_SPLIT[split][sort]
