"""Material for word problems of one step: people, things, and stories by operation.

The last story of each operation is kept for the test part.
"""

NAMES = (
    *("Ada", "Amir", "Anna", "Ben", "Carla", "Chen", "Dana", "David", "Elif", "Emma"),
    *("Femi", "Grace", "Hana", "Ivan", "Jack", "Jonas", "Kofi", "Lena", "Leo", "Lucy"),
    *("Maria", "Max", "Mia", "Nina", "Noah", "Olga", "Omar", "Paul", "Priya", "Rosa"),
    *("Sam", "Sara", "Tom", "Uma", "Victor", "Yuki", "Zoe"),
)
THINGS = (
    *("apples", "books", "balls", "boxes", "buttons", "cakes", "cards", "coins", "cookies", "cups"),
    *("eggs", "flowers", "keys", "lemons", "marbles", "nuts", "oranges", "pears", "pencils", "pens"),
    *("photos", "shells", "stamps", "stars", "stickers", "stones", "tickets", "toys"),
)
STORIES: dict[str, tuple[str, ...]] = {
    "+": (
        "{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?",
        "{name} has {a} {things}. {other} gives {name} {b} more. How many {things} does {name} have now?",
        "{name} has {a} {things} and {other} has {b} {things}. How many {things} do they have together?",
        "There are {a} {things} in a box. {name} puts {b} more into it. How many {things} are in the box?",
        "{name} found {a} {things} on Monday and {b} on Tuesday. How many {things} did {name} find in all?",
        "A shop has {a} red {things} and {b} blue {things}. How many {things} does it have?",
        "{name} bought {a} {things}. Then {name} bought {b} more. How many {things} did {name} buy?",
        "{name} put {a} {things} into a bag and {b} into another. How many {things} are that together?",
        "There are {a} {things} on the floor and {b} on the table. How many {things} are there altogether?",
        "{name} saw {a} {things} in the morning and {b} in the evening. How many {things} were that in all?",
        "In one house there are {a} {things}, in another {b}. How many {things} are in both?",
        "{other} counted {a} {things} in one room and {b} in another. How many {things} are there altogether?",
    ),
    "-": (
        "{name} has {a} {things} and gives {b} to {other}. How many {things} does {name} have left?",
        "{name} had {a} {things} and lost {b} of them. How many {things} are left?",
        "There are {a} {things} in a box. {name} takes {b} out of it. How many {things} are in the box now?",
        "{name} has {a} {things}. {b} of them are red. How many {things} are not red?",
        "A shop had {a} {things} and sold {b}. How many {things} does it still have?",
        "{name} has {a} {things} and {other} has {b}. How many more {things} does {name} have than {other}?",
        "{name} wants {a} {things} and has {b}. How many {things} does {name} still need?",
        "Of {a} {things} in a bag {b} are broken. How many {things} remain whole?",
        "There were {a} {things} on the floor. {name} took {b} away. How many {things} remain there?",
        "{name} baked {a} cakes, of which {other} ate {b}. How many cakes remain?",
        "Out of {a} {things}, {name} used {b}. How many {things} did {name} not use?",
        "Of {a} {things} on the table {other} took {b}. How many {things} remain on the table?",
    ),
    "*": (
        "{name} has {a} boxes with {b} {things} each. How many {things} does {name} have?",
        "There are {a} tables, and on each table there are {b} {things}. How many {things} are there?",
        "{name} buys {a} bags of {b} {things}. How many {things} does {name} buy?",
        "Each of {a} children has {b} {things}. How many {things} do they have together?",
        "{name} finds {b} {things} every day. How many {things} does {name} find in {a} days?",
        "A shelf has {a} rows of {b} {things}. How many {things} are on the shelf?",
        "One of the {things} costs {b} dollars. How many dollars do {a} {things} cost?",
        "{name} fills {a} bags and puts {b} {things} into each. How many {things} are that?",
        "{a} people bring {b} {things} each. How many {things} do they bring in all?",
        "In every one of {a} rooms there are {b} {things}. How many {things} are there in all?",
        "{name} puts {b} {things} on every plate. How many {things} are on {a} plates?",
        "{other} fills {a} baskets, and puts {b} {things} into every basket. How many {things} are that in all?",
    ),
    "/": (
        "{name} shares {a} {things} equally among {b} friends. How many {things} does each friend get?",
        "{a} {things} are put into {b} boxes, the same number in each. How many {things} are in each box?",
        "{name} has {a} {things} and packs them into bags of {b}. How many bags does {name} need?",
        "{a} {things} lie in {b} equal rows. How many {things} are in a row?",
        "{name} paid {a} dollars for {b} {things}. How many dollars did each of the {things} cost?",
        "{name} reads {a} pages in {b} days, the same number every day. How many pages does {name} read a day?",
        "{b} children have {a} {things} together, each as many as the others. How many {things} does each child have?",
        "{name} divides {a} {things} evenly into {b} bags. How many {things} go into each bag?",
        "{name} lays {a} {things} onto {b} tables, as many on one as on the other. How many {things} are on a table?",
        "{other} wants to split {a} {things} evenly over {b} plates. How many {things} go onto each plate?",
    ),
}
