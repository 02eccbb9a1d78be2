"""Sentences about the camera wearer, told to the camera wearer: "C picks up a knife." is "You pick up a knife."

By rule, from the words alone: good enough to build data without a language model.
"""

from __future__ import annotations

import re

WEARER = "C"
IRREGULAR = {"is": "are", "was": "were", "has": "have", "does": "do", "goes": "go"}
OWN = {"himself": "yourself", "herself": "yourself", "his": "your", "her": "your"}
# After "and", these show that the word before them was a verb: "and cuts the onion", but not "and forks."
AFTER_VERBS = {"the", "a", "an", "it", "them", "his", "her", "up", "down", "on", "off", "in", "to", "with"}


def second_person(sentence: str) -> str:
    """The sentence with "you" for C; one about somebody else only changes where it mentions C."""
    words = sentence.split()
    if not words or words[0] != WEARER:
        return _mentions(sentence, "you", "your")
    told = ["You"]
    for index, word in enumerate(words[1:], start=1):
        follower = words[index + 1].strip(".,") if index + 1 < len(words) else ""
        verb = index == 1 or (words[index - 1] == "and" and follower in AFTER_VERBS)
        told.append(OWN.get(word, base_form(word) if verb else word))
    return _mentions(" ".join(told), "yourself", "your")


def base_form(verb: str) -> str:
    """The verb without the ending of the third person: "washes" is "wash"."""
    word, end = re.fullmatch(r"(.*?)(\W*)", verb, re.DOTALL).groups()  # type: ignore[union-attr]
    if word in IRREGULAR:
        word = IRREGULAR[word]
    elif word.endswith("ies") and len(word) > 4:
        word = word[:-3] + "y"
    elif re.search(r"(ss|sh|ch|x|zz|o)es$", word):
        word = word[:-2]
    elif word.endswith("s") and not word.endswith("ss"):
        word = word[:-1]
    return word + end


def _mentions(sentence: str, wearer: str, owner: str) -> str:
    sentence = re.sub(rf"\b{WEARER}'s\b", owner, sentence)
    return re.sub(rf"\b{WEARER}\b", wearer, sentence)
