"""What the subject is one of and what prompts call it, read from the prompts of its photos and of its class."""

import re
from collections import Counter
from typing import NamedTuple

ARTICLES = ("a", "an", "the")
POSSESSIVES = ("my", "our", "your", "his", "her", "their", "this", "that")
PREPOSITIONS = (
    *("of", "with", "in", "on", "at", "by", "and", "for", "from", "near", "like", "under", "over", "behind", "beside"),
    *("against", "inside", "outside", "next", "to", "during", "among", "between", "without", "is", "are", "was", "as"),
)
PICTURES = (
    *("photo", "photograph", "picture", "image", "portrait", "painting", "drawing", "sketch", "rendering", "render"),
    *("illustration", "shot", "closeup", "close-up", "view", "selfie"),
)
# Words that say how a thing is, and are therefore no name.
MODIFIERS = set(
    """
    red orange yellow green blue purple violet pink brown black white grey gray golden silver beige colorful
    colourful small little big large tiny huge old young new cute fancy shiny wet dry wild fluffy furry soft
    happy sad sleepy beautiful pretty dark bright wooden metal metallic plastic glass paper leather ceramic
    stuffed plush toy rc remote controlled one single good whole rare nice adult male female vintage antique
    modern striped spotted round square
    """.split()
)
# The list of things, by kind: what is of one kind is no other thing. Longer names first among those that end alike.
KINDS = {
    "dog": """
        golden retriever, labrador retriever, labrador, german shepherd, border collie, french bulldog,
        bulldog, poodle, beagle, husky, siberian husky, corgi, dachshund, chihuahua, pug, shiba inu, boxer,
        rottweiler, dalmatian, great dane, australian shepherd, cocker spaniel, springer spaniel, spaniel,
        jack russell terrier, yorkshire terrier, terrier, retriever, shepherd, collie, pomeranian, shih tzu,
        greyhound, samoyed, puppy, hound, dog
    """,
    "cat": """
        maine coon, british shorthair, tabby cat, persian cat, siamese cat, bengal cat, ragdoll, kitten, cat
    """,
    "animal": """
        guinea pig, hamster, rabbit, bunny, horse, pony, cow, pig, sheep, goat, donkey, parrot, bird, owl,
        chicken, duck, goose, fish, goldfish, turtle, tortoise, snake, lizard, gecko, bearded dragon, frog,
        hedgehog, ferret, mouse, rat, squirrel, fox, wolf, bear, polar bear, lion, tiger, elephant, giraffe,
        zebra, monkey, panda, sloth, penguin, dinosaur, dragon, unicorn, animal, pet
    """,
    "person": """
        man, woman, person, boy, girl, child, kid, baby, toddler, guy, lady, gentleman, male, female, face,
        actor, actress, singer, model, couple, family, people
    """,
    "toy": """
        stuffed animal, teddy bear, plushie, plush toy, soft toy, rubber duck, action figure, figurine, doll,
        puppet, robot, toy, monster, emoji, cartoon, character, mascot, sculpture, statue
    """,
    "vehicle": """
        sports car, race car, car, truck, van, bus, motorcycle, motorbike, scooter, bicycle, bike, train,
        plane, airplane, boat, ship
    """,
    "house": """
        house, cottage, cabin, castle, church, tower, building, room, kitchen, bridge
    """,
    "thing": """
        backpack, bag, handbag, purse, suitcase, bowl, can, tin can, candle, clock, alarm clock, watch,
        wristwatch, sneaker, sneakers, shoe, shoes, boot, boots, sandal, sandals, slipper, slippers, glasses,
        sunglasses, teapot, coffee mug, mug, cup, vase, bottle, jar, plate, spoon, knife, chair, armchair,
        sofa, couch, table, desk, lamp, bed, pillow, blanket, rug, shirt, t-shirt, sweater, hoodie, jacket,
        coat, dress, skirt, hat, cap, scarf, ring, necklace, earrings, guitar, piano, violin, camera, phone,
        laptop, computer, keyboard, headphones, book, pen, umbrella, ball, box, basket, key, flower, rose,
        sunflower, plant, cactus, tree, cake, bread, pizza, burger, apple, fruit, food, painting, logo, object
    """,
}
KIND_OF = {" ".join(thing.split()): kind for kind, things in KINDS.items() for thing in things.split(",")}
KNOWN = MODIFIERS | {word for thing in KIND_OF for word in thing.split()}
LONGEST = max(len(thing.split()) for thing in KIND_OF)


class Subject(NamedTuple):
    """What the subject is one of, such as cat, and its own name in prompts, such as sks; None if it was not told."""

    class_name: str | None
    identifier: str | None


def guess_subject(prompts: list[str], class_prompt: str | None = None) -> Subject:
    """The class and the identifier by the prompts of the subject's photos, and its class's prompt if there is one.

    The class is what the class's prompt names, else the thing of the list that the prompts name. The identifier is
    the first word before it that is neither an article nor a word of the list, or a name of several words with
    capitals. Of several prompts, most decide.
    """
    shared = set.intersection(*(set(words_of(prompt)) for prompt in prompts)) if len(prompts) > 1 else set()
    known_class = " ".join(strip_articles(noun_phrase(class_prompt or ""))) or None
    found = Counter(_guess(noun_phrase(prompt, shared), known_class) for prompt in prompts)
    if not found:
        return Subject(known_class, None)
    return max(found, key=lambda subject: (found[subject], sum(part is not None for part in subject)))


def words_of(text: str) -> list[str]:
    """Lower-case words, without punctuation around them."""
    return [word for word in (word.strip(".,;:!?\"'()") for word in text.lower().split()) if word]


def noun_phrase(prompt: str, shared: set[str] | None = None) -> list[str]:
    """The words that name what a prompt is of, as it spells them: 'a photo of my cat on a rug' gives ['my', 'cat'].

    Only words in `shared` are kept, if there are any.
    """
    first_part = re.split(r"[,;:.!?](?:\s|$)", prompt.strip())[0]
    words = [word for word in (word.strip("\"'()") for word in first_part.split()) if word]
    for place in range(len(words)):  # what follows 'photo of'
        if words[place].lower() == "of" and any(word.lower() in PICTURES for word in words[:place]):
            words = words[place + 1 :]
            break
    end = next((place for place, word in enumerate(words) if place and ends_a_phrase(word.lower())), len(words))
    return [word for word in words[:end] if not shared or word.lower() in shared or word.lower() in ARTICLES]


def ends_a_phrase(word: str) -> bool:
    """A preposition or a verb such as sitting; things on the list, such as ring, are neither."""
    return word in PREPOSITIONS or (len(word) > 5 and word.endswith("ing") and word not in KNOWN)


def strip_articles(words: list[str]) -> list[str]:
    """The words without articles in front."""
    while words and words[0].lower() in ARTICLES:
        words = words[1:]
    return words


def thing_in(words: list[str]) -> tuple[int, int] | None:
    """(first, end) of the last thing of the list in the words, the longest name that ends there."""
    lower = [word.lower() for word in words]
    for end in range(len(words), 0, -1):
        for first in range(max(0, end - LONGEST), end):
            if " ".join(lower[first:end]) in KIND_OF:
                return first, end
    return None


def _guess(words: list[str], known_class: str | None) -> Subject:
    """Of one prompt's noun phrase."""
    words = strip_articles(words)
    place = class_in(words, known_class)
    if place is None:
        if len(words) < 2 or words[0].lower() in PICTURES:
            return Subject(known_class, words[0] if known_class and len(words) == 1 else None)
        place = (1, len(words))  # a thing that is not on the list: its name comes first
    first, end = place
    class_name = known_class or " ".join(words[first:end])
    if words[0].lower() in POSSESSIVES:
        return Subject(class_name, words[0])
    unknown = [word for word in words[:first] if word.lower() not in KNOWN]
    name = unknown if all(word.istitle() for word in unknown) else unknown[:1]
    return Subject(class_name, " ".join(name) or None)


def class_in(words: list[str], known_class: str | None) -> tuple[int, int] | None:
    """(first, end) of the class's words in a noun phrase: the known class's, or the list's."""
    named = known_class.lower().split() if known_class else []
    lower = [word.lower() for word in words]
    for first in range(len(words) - len(named) + 1):
        if named and lower[first : first + len(named)] == named:
            return first, first + len(named)
    return thing_in(words)


def same_kind(one: str, other: str) -> bool:
    """Whether two things are of one kind, such as a golden retriever and a dog."""
    return kind_of(one) == kind_of(other)


def kind_of(thing: str) -> str:
    """The kind of a thing of the list, else its last word."""
    words = thing.lower().split()
    place = thing_in(words)
    return KIND_OF[" ".join(words[place[0] : place[1]])] if place else thing.lower()


def subject_line(samples: dict) -> str:
    """What samples.json takes the subject for, and the flags that correct it: a sentence or two."""
    class_name, identifier = samples["class_name"], samples["identifier"]
    guessed = samples.get("guessed", [])
    named = f"is called “{identifier}” in prompts" if identifier else "has no name of its own in prompts"
    line = f"The subject is a “{class_name}” and {named}"
    if not class_name:
        line = f"What the subject is one of is not known, and it {named}"
    if not guessed and class_name:
        return f"{line}, as the flags say."
    return f"{line}, by the prompts it was trained with. If that is wrong, say so with --class_name and --identifier."
