"""What a subject is about: the head noun of "a cute dog with a hat" is "dog". Word lists and rules, no parser."""

from __future__ import annotations

import re

from consistory.weights.errors import ConsistoryError

# A word may have dots in it ("1.5"), or be a title that ends with one; else they are what ends a phrase, as commas are.
WORDS = re.compile(r"""(?:St|Mr|Mrs|Ms|Dr)\.|[^\s,.;:!?()\[\]"“”]+(?:\.[^\s,.;:!?()\[\]"“”]+)*|[,.;:(]""")
# Where the noun phrase at the start of a subject ends: "a cat | with a hat", "an old man | who smiles".
PHRASE_END = re.compile(
    r"with|without|in|inside|on|at|by|from|near|under|over|above|behind|beside|between|for|to|like|as|and|or|of|"
    r"who|which|that|whose|made|dressed|covered|named|called|wrapped|[,.;:(]"
)
# A word in -ing after the noun ends it, too ("a cat | wearing a hat"), unless it is a noun itself, or there has been no
# noun yet ("a cute smiling cat").
NOUNS_IN_ING = re.compile(
    "king|ring|wing|string|spring|swing|thing|being|building|painting|drawing|clothing|ceiling|viking|earring|duckling|"
    "gosling|sibling|darling|starling|pudding|dumpling|railing|wedding|evening|morning|lightning"
)
ADJECTIVES = re.compile(
    "cute|little|small|tiny|big|large|huge|giant|tall|short|long|old|young|new|ancient|antique|vintage|modern|"
    "futuristic|red|orange|yellow|green|blue|purple|pink|brown|black|white|grey|gray|golden|silver|happy|sad|angry|"
    "funny|silly|friendly|lovely|pretty|beautiful|handsome|ugly|scary|elegant|fancy|fluffy|furry|hairy|fat|thin|slim|"
    r"chubby|round|magic|magical|mechanical|wooden|metal|plastic|steampunk|classic|\w+(?:ful|ous|less)"
)
# "a pair of shoes" is about shoes, unlike "the queen of hearts".
MEASURES = re.compile("pair|couple|group|bunch|herd|pack|piece|kind|portrait|picture|photo|painting|drawing")


def find_concept(subject: str) -> str:
    """The head noun of a subject such as "a cute dog with a hat": its last word before any addition to it.

    Raises ConsistoryError if there is none.
    """
    noun = ""
    for word in WORDS.findall(subject):
        lower = word.lower()
        participle = lower.endswith("ing") and not NOUNS_IN_ING.fullmatch(lower)
        if lower == "of" and MEASURES.fullmatch(noun.lower()):
            noun = ""
        elif PHRASE_END.fullmatch(lower) or (noun and participle and not ADJECTIVES.fullmatch(noun.lower())):
            break
        elif lower not in ("a", "an", "the"):
            noun = word
    if not noun:
        raise ConsistoryError(f"no concept is found in the subject {subject!r}: name the word that stands for it")
    return noun
