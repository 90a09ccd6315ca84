"""Names and things that the tasks speak of: those of training, and those that only tests hold."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PEOPLE", "PLACES", "THINGS", "Pool"]


@dataclass(frozen=True)
class Pool:
    """Words of one kind."""

    train: tuple[str, ...]
    held: tuple[str, ...]


PEOPLE = Pool(
    tuple(
        "Ada Adam Agnes Albert Alice Alma Amir Andrea Anton Arthur Astrid Aurora Beatrice Ben "
        "Bertha Boris Bruno Carl Carmen Cecil Chloe Clara Conrad Cora Dana Daniel David Diego Dora "
        "Edgar Edith Edward Elena Elias Ella Emil Emma Erik Esther Eva Fatima Felix Fiona Flora "
        "Frank Frida George Gerda Gloria Grace Greta Gustav Hanna Harold Hector Heidi Helen Henry "
        "Hugo Ida Igor Ines Ingrid Irene Iris Ivan Jack James Jane Jasper Joan John Josef Julia "
        "Karen Karl Kate Klaus Laura Lena Leo Leon Lily Linda Lisa Louis Lucas Lucy Maria Martin "
        "Mary Max Maya Mia Mona Nadia Naomi Nina Noah Nora Olga Olive Omar Oscar Otto Pablo Paula "
        "Peter Petra Philip Priya Rachel Ralph Ravi Rita Robert Rosa Rudolf Ruth Sally Samuel Sara "
        "Selma Simon Sofia Stefan Susan Tara Thomas Tina Tom Ursula Vera Victor Viola Walter Wanda "
        "Wendy William Yara Yusuf Zelda Zoe".split()
    ),
    tuple(
        "Abel Amanda Anita Barbara Bella Caleb Camille Cyrus Dahlia Derek Elsa Ernest Farah "
        "Gabriel Gina Hilda Isaac Jonas Judith Kira Lorenzo Lydia Magnus Miriam Nathan Odette "
        "Patrick Quinn Rebecca Sven Theo Valerie".split()
    ),
)

PLACES = Pool(
    tuple(
        "abbey|airport|bakery|bank|barn|beach|bridge|cabin|castle|cave|cellar|chapel|church|cinema|"
        "clinic|coast|college|cottage|court|dairy|dam|desert|dock|farm|ferry|field|forest|fort|"
        "fountain|garden|gate|glacier|hall|harbor|hill|hospital|hotel|hut|inn|island|jail|kiosk|"
        "lake|library|lighthouse|market|meadow|mill|mine|monument|mosque|museum|orchard|palace|park|"
        "pier|plaza|pond|port|prison|quarry|river|school|shop|square|stable|stadium|station|swamp|"
        "temple|theater|tower|tunnel|valley|village|vineyard|well|windmill|workshop|zoo".split("|")
    ),
    tuple(
        "arena|bay|brewery|canal|cliff|embassy|factory|gallery|greenhouse|lagoon|marina|monastery|"
        "observatory|pavilion|playground|ridge|shrine|tavern|warehouse|waterfall".split("|")
    ),
)

THINGS = Pool(
    tuple(
        "apple|axe|bag|ball|banana|basket|bell|belt|bench|blanket|book|boot|bottle|bowl|box|bread|"
        "broom|brush|bucket|button|cake|camera|candle|cap|card|carpet|chair|cheese|clock|coat|coin|"
        "comb|cup|curtain|desk|dish|doll|door|dress|drum|fan|fish|flag|flute|fork|glass|glove|guitar|"
        "hammer|hat|helmet|honey|hook|iron|jacket|jar|kettle|key|kite|knife|ladder|lamp|lemon|lock|"
        "map|mask|mat|milk|mirror|mug|nail|needle|net|oven|paint|pan|paper|pear|pen|pencil|pepper|"
        "phone|piano|pillow|pipe|plate|plum|pot|purse|radio|rice|ring|rope|rug|saddle|salt|saw|scarf|"
        "shelf|shirt|shoe|shovel|soap|sock|sofa|soup|spoon|stamp|stool|stove|sugar|table|tea|tent|"
        "towel|toy|tray|umbrella|vase|violin|wagon|watch|wheel|whistle|wire".split("|")
    ),
    tuple(
        "anchor|backpack|battery|bracelet|brick|compass|cushion|drill|envelope|feather|hose|jug|lens|"
        "magnet|napkin|notebook|onion|paddle|ribbon|rocket|ruler|sandal|sponge|sword|teapot|ticket|"
        "torch|trumpet|wallet|zipper".split("|")
    ),
)
