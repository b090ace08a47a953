"""The small world that the embedded model knows: its people, things and words, all written for this project.

No word belongs to two categories, and no adjective has two opposites here, so that every question has one right answer.
"""

from __future__ import annotations

WOMEN = ("Anna", "Mary", "Lisa", "Emma", "Sara", "Nora", "Julia", "Clara")
MEN = ("Tom", "Ben", "Paul", "Max", "Leo", "Jack", "Oscar", "Felix")
PEOPLE = (*WOMEN, *MEN)

CATEGORIES: dict[str, tuple[str, ...]] = {
    "fruit": ("apple", "pear", "plum", "peach", "cherry", "lemon", "banana", "melon", "mango", "fig"),
    "animal": ("horse", "cow", "dog", "cat", "sheep", "goat", "lion", "wolf", "fox", "bear"),
    "tool": ("hammer", "drill", "wrench", "axe", "spade", "rake", "chisel", "shovel", "screwdriver", "crowbar"),
    "vehicle": ("car", "bus", "train", "truck", "boat", "ship", "tram", "van", "bike", "tractor"),
    "garment": ("shirt", "coat", "hat", "sock", "glove", "scarf", "dress", "jacket", "skirt", "sweater"),
    "instrument": ("piano", "violin", "guitar", "flute", "drum", "trumpet", "harp", "cello", "banjo", "oboe"),
    "flower": ("tulip", "daisy", "lily", "orchid", "poppy", "lavender", "sunflower", "iris", "jasmine", "peony"),
    "furniture": ("chair", "table", "bed", "sofa", "desk", "shelf", "stool", "bench", "cupboard", "dresser"),
}
CATEGORY_OF = {word: category for category, words in CATEGORIES.items() for word in words}

OPPOSITES: tuple[tuple[str, str, str], ...] = (
    ("heat", "hot", "cold"),
    ("size", "big", "small"),
    ("size", "tall", "short"),
    ("size", "wide", "narrow"),
    ("size", "thick", "thin"),
    ("size", "deep", "shallow"),
    ("size", "heavy", "light"),
    ("time", "fast", "slow"),
    ("time", "early", "late"),
    ("age", "old", "young"),
    ("water", "wet", "dry"),
    ("content", "full", "empty"),
    ("access", "open", "closed"),
    ("touch", "hard", "soft"),
    ("touch", "smooth", "rough"),
    ("touch", "sharp", "blunt"),
    ("dirt", "clean", "dirty"),
    ("money", "rich", "poor"),
    ("money", "cheap", "expensive"),
    ("force", "strong", "weak"),
    ("sound", "loud", "quiet"),
    ("taste", "sweet", "sour"),
    ("place", "near", "far"),
    ("danger", "safe", "dangerous"),
    ("truth", "true", "false"),
    ("sleep", "awake", "asleep"),
    ("life", "alive", "dead"),
    ("owner", "public", "private"),
    ("line", "straight", "crooked"),
    ("food", "raw", "cooked"),
    ("heart", "kind", "cruel"),
    ("work", "lazy", "busy"),
    ("fit", "tight", "loose"),
    ("mind", "wise", "foolish"),
    ("pride", "proud", "humble"),
    ("body", "sick", "healthy"),
)
"""(group, word, opposite); words of one group are too near to each other to serve as wrong answers."""
OPPOSITE_OF = {one: other for _, a, b in OPPOSITES for one, other in ((a, b), (b, a))}
GROUP_OF = {word: group for group, a, b in OPPOSITES for word in (a, b)}
ADJECTIVES = tuple(OPPOSITE_OF)

PRAISE = (
    "wonderful", "great", "lovely", "excellent", "charming", "brilliant", "pleasant", "superb", "friendly", "amazing",
    "beautiful", "perfect", "delightful", "splendid", "nice", "helpful", "fantastic", "elegant", "tasty", "cosy",
)  # fmt: skip
BLAME = (
    "awful", "terrible", "horrible", "nasty", "dreadful", "boring", "ugly", "broken", "rotten", "annoying",
    "dull", "miserable", "rude", "useless", "gloomy", "stale", "lousy", "noisy", "sloppy", "shabby",
)  # fmt: skip
REVIEWED = (
    "film", "song", "book", "soup", "cake", "hotel", "room", "waiter", "garden", "show",
    "story", "teacher", "trip", "concert", "dinner", "museum",
)  # fmt: skip

VERBS: tuple[tuple[str, str, str, str], ...] = (
    ("walk", "walks", "walked", "walking"),
    ("jump", "jumps", "jumped", "jumping"),
    ("cook", "cooks", "cooked", "cooking"),
    ("play", "plays", "played", "playing"),
    ("paint", "paints", "painted", "painting"),
    ("climb", "climbs", "climbed", "climbing"),
    ("dance", "dances", "danced", "dancing"),
    ("laugh", "laughs", "laughed", "laughing"),
    ("wait", "waits", "waited", "waiting"),
    ("work", "works", "worked", "working"),
    ("shout", "shouts", "shouted", "shouting"),
    ("study", "studies", "studied", "studying"),
    ("cry", "cries", "cried", "crying"),
    ("rest", "rests", "rested", "resting"),
    ("sing", "sings", "sang", "singing"),
    ("swim", "swims", "swam", "swimming"),
    ("run", "runs", "ran", "running"),
    ("write", "writes", "wrote", "writing"),
    ("drive", "drives", "drove", "driving"),
    ("eat", "eats", "ate", "eating"),
    ("drink", "drinks", "drank", "drinking"),
    ("sleep", "sleeps", "slept", "sleeping"),
    ("speak", "speaks", "spoke", "speaking"),
    ("fall", "falls", "fell", "falling"),
    ("draw", "draws", "drew", "drawing"),
    ("sit", "sits", "sat", "sitting"),
    ("stand", "stands", "stood", "standing"),
    ("teach", "teaches", "taught", "teaching"),
    ("win", "wins", "won", "winning"),
    ("ride", "rides", "rode", "riding"),
)
"""(base form, third person, past, -ing form)."""

COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "pink")
SHAPES = ("circle", "square", "star", "cross", "heart", "moon", "arrow", "ring")
LETTERS = tuple("ABCDEFGHKLMNPRST")
HOLDERS = ("box", "bag", "drawer", "basket")
OBJECTS = (
    "key", "coin", "pen", "ball", "letter", "stone", "watch", "spoon",
    "map", "candle", "button", "ticket", "brush", "rope", "shell", "bell",
)  # fmt: skip
PLACES = ("park", "garden", "kitchen", "school", "city", "forest", "house", "market", "village", "library")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
COUNTED = ("coins", "books", "apples", "stones", "pens", "keys", "plums", "cards", "eggs", "cups")


def article(noun: str) -> str:
    """The noun with its indefinite article: an apple, a pear."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def pronoun(person: str) -> str:
    return "she" if person in WOMEN else "he"
