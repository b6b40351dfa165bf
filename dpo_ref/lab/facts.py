"""The words of the world.

Every word belongs to one table only, and no sentence of the writers (`writers.py`) contains one of them: what a
response answers can therefore be read off its text.
"""

CATEGORIES: dict[str, tuple[str, ...]] = {
    "animals": ("cat", "dog", "fox", "cow", "hen", "owl", "bee", "goat"),
    "fruits": ("fig", "pear", "plum", "lime", "kiwi", "mango", "apple", "grape"),
    "tools": ("saw", "axe", "rake", "drill", "spade", "clamp", "chisel", "hammer"),
    "trees": ("oak", "elm", "ash", "fir", "yew", "pine", "cedar", "birch"),
    "instruments": ("drum", "harp", "lute", "horn", "flute", "viola", "piano", "cello"),
}
WORDS: tuple[str, ...] = tuple(word for members in CATEGORIES.values() for word in members)
THINGS: tuple[str, ...] = ("hat", "cup", "pen", "bag", "box", "ball", "coat", "lamp")
COLOURS: tuple[str, ...] = ("red", "blue", "green", "black", "white", "pink", "gray", "brown")
NUMBERS: tuple[str, ...] = tuple(str(number) for number in range(20))
COUNT_WORDS: dict[str, int] = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
MARKS: dict[str, str] = {"dashes": "-", "slashes": "/", "stars": "*", "pluses": "+"}
