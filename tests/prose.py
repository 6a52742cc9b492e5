"""A text that is the same on every Python: the tiny models of the tests learn from it."""

from random import Random

SYLLABLES = [
    "ba", "co", "da", "fi", "go", "ha", "in", "ka", "lo", "ma", "ne", "on", "pa", "qui", "ra",
    "si", "ta", "un", "ve", "wo", "ze", "ch", "st", "th", "er", "an", "re", "al", "is", "ou",
]  # fmt: skip
WORDS, NEXT = 600, 12  # words of the language, and how many of them may follow one of them


def prose(letters: int) -> str:
    """Paragraphs of sentences, in which each word is followed by one of a few."""
    draw = Random(0).random  # of this function alone Python promises the same numbers for ever
    made = ["".join(SYLLABLES[int(draw() ** 2 * 30)] for _ in range(1 + int(draw() * 3))) for _ in range(WORDS)]
    words = sorted(set(made))
    followers = [[int(draw() * len(words)) for _ in range(NEXT)] for _ in words]
    said: list[str] = []
    at = size = 0
    while size < letters:
        sentence = []
        for _ in range(4 + int(draw() * 12)):
            at = followers[at][int(draw() ** 2 * NEXT)]
            sentence.append(words[at])
        said.append(" ".join(sentence).capitalize() + (".\n\n" if draw() < 0.15 else ". "))
        size += len(said[-1])
    return "".join(said)[:letters]
