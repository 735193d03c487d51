"""Material for questions that no task teaches the answer to: wordings by kind, and what they are about.

The kinds of the test part have no wording in training.
"""

from __future__ import annotations

# By the name of a slot. What one part of the wordings asks about, the other may ask about too: the kinds differ.
SLOTS: dict[str, tuple[str, ...]] = {
    "country": (
        *("Argentina", "Australia", "Brazil", "Canada", "Chile", "China", "Denmark", "Egypt", "Finland", "France"),
        *("Germany", "Greece", "India", "Ireland", "Italy", "Japan", "Kenya", "Mexico", "Norway", "Peru"),
        *("Poland", "Portugal", "Spain", "Sweden", "Thailand", "Turkey", "Vietnam"),
    ),
    "city": (
        *("Amsterdam", "Athens", "Berlin", "Boston", "Cairo", "Chicago", "Delhi", "Dublin", "Hamburg", "Helsinki"),
        *("Istanbul", "Lima", "Lisbon", "London", "Madrid", "Milan", "Moscow", "Nairobi", "New York", "Oslo"),
        *("Paris", "Prague", "Rome", "Seoul", "Sydney", "Tokyo", "Vienna", "Warsaw"),
    ),
    "person": (
        *("Albert Einstein", "Ada Lovelace", "Beethoven", "Charles Darwin", "Cleopatra", "Galileo", "Gandhi"),
        *("Isaac Newton", "Julius Caesar", "Leonardo da Vinci", "Marie Curie", "Mozart", "Napoleon", "Picasso"),
        *("Shakespeare", "Socrates", "Queen Victoria", "Abraham Lincoln", "Frida Kahlo", "Alan Turing"),
    ),
    "food": (
        *("bread", "soup", "pizza", "pancakes", "an omelette", "apple pie", "rice", "pasta", "a cake", "coffee"),
        *("tea", "lasagne", "a salad", "fish", "tomato sauce", "chocolate", "curry", "cheese"),
    ),
    "animal": (
        *("cats", "dogs", "elephants", "whales", "bees", "penguins", "horses", "bears", "owls", "spiders"),
        *("snakes", "wolves", "dolphins", "ants", "tigers", "frogs", "sheep", "parrots"),
    ),
    "thing": (
        *("a car", "a bicycle", "a house", "a phone", "a guitar", "a boat", "a lamp", "a camera", "a watch"),
        *("an umbrella", "a chair", "a laptop", "a ring", "a train ticket", "a piano", "a coat"),
    ),
    "subject": (
        *("the sea", "the moon", "love", "friendship", "winter", "the rain", "a dragon", "a lost key", "trees"),
        *("a robot", "the wind", "a small town", "music", "time", "a long journey", "an old king"),
    ),
    "phenomenon": (
        *("gravity", "the rainbow", "electricity", "the tide", "lightning", "magnetism", "an earthquake"),
        *("photosynthesis", "evolution", "a black hole", "inflation", "democracy", "the big bang", "a volcano"),
    ),
    "work": (
        *("Hamlet", "Don Quixote", "The Odyssey", "Moby Dick", "The Magic Flute", "Faust", "War and Peace"),
        *("Pride and Prejudice", "The Mona Lisa", "Casablanca", "Star Wars", "The Lion King"),
    ),
    "language": ("French", "German", "Spanish", "Italian", "Polish", "Japanese", "Latin", "Greek", "Turkish"),
    "phrase": (
        "good morning",
        "thank you",
        "house",
        "water",
        "see you soon",
        "friend",
        "where is the station",
        "bread",
    ),
    "sport": ("football", "tennis", "chess", "basketball", "swimming", "cycling", "hockey", "golf", "skiing"),
    "illness": ("a cold", "a headache", "the flu", "a fever", "a cough", "back pain", "a broken arm", "tiredness"),
    "day": ("today", "tomorrow", "tonight", "next week", "on Sunday", "this evening", "at the weekend"),
    "year": ("1066", "1492", "1789", "1815", "1914", "1945", "1969", "1989", "2001", "2020"),
}

TRAIN_KINDS: dict[str, tuple[str, ...]] = {
    "geography": (
        "What is the capital of {country}?",
        "Where is {city}?",
        "In which country is {city}?",
        "Which river flows through {city}?",
        "What is the highest mountain of {country}?",
        "Which countries border on {country}?",
        "How far is it from {city} to {country}?",
        "Describe the city of {city}.",
    ),
    "population": (
        "How many people live in {city}?",
        "How many people live in {country}?",
        "What is the population of {country}?",
        "How big is {city}?",
        "How old is the city of {city}?",
    ),
    "weather": (
        "What is the weather like {day}?",
        "Will it rain in {city} {day}?",
        "How warm is it in {city}?",
        "Is it cold in {country} {day}?",
        "Do I need an umbrella {day}?",
    ),
    "date": (
        "What time is it?",
        "What day is it {day}?",
        "What is the date {day}?",
        "What time is it in {city}?",
        "When does the shop open {day}?",
        "Which year is it?",
    ),
    "people": (
        "Who was {person}?",
        "When was {person} born?",
        "Where did {person} live?",
        "What is {person} famous for?",
        "Who is the president of {country}?",
        "Who is the mayor of {city}?",
        "Tell me about {person}.",
        "What did {person} do?",
    ),
    "cooking": (
        "How do I cook {food}?",
        "What is the recipe for {food}?",
        "What goes into {food}?",
        "How long does {food} take?",
        "Tell me how to make {food}.",
        "Is {food} healthy?",
    ),
    "writing": (
        "Write a poem about {subject}.",
        "Tell me a story about {subject}.",
        "Write a song about {subject}",
        "Write an essay on {subject}.",
        "Tell me a joke.",
        "Tell me a joke about {subject}.",
        "Give me a title for a book about {subject}.",
        "Write a letter to {person}.",
    ),
    "prices": (
        "How much is {thing}?",
        "What does {thing} cost?",
        "Where can I buy {thing}?",
        "Is {thing} expensive?",
        "How much money do I need for {thing}?",
        "Which shop has {thing}?",
    ),
    "science": (
        "What is {phenomenon}?",
        "Explain {phenomenon}.",
        "Why is there {phenomenon}?",
        "Who discovered {phenomenon}?",
        "How does {phenomenon} work?",
        "What causes {phenomenon}?",
        "Describe {phenomenon} to a child.",
    ),
    "art": (
        "Who wrote {work}?",
        "What is {work} about?",
        "Summarise {work} for me.",
        "When was {work} made?",
        "Do you like {work}?",
        "Who is the hero of {work}?",
    ),
    "opinions": (
        "What do you think about {subject}?",
        "Which is better, {thing} or {thing}?",
        "What is the meaning of life?",
        "What is your favourite food?",
        "Do you like {animal}?",
        "Should I buy {thing}?",
        "Are you happy?",
        "Is {city} nicer than {city}?",
    ),
    "travel": (
        "How do I get to {city}?",
        "When does the train to {city} leave?",
        "Book a flight to {city} {day}.",
        "Which hotel in {city} is good?",
        "Is {country} worth a visit?",
        "What should I see in {city}?",
    ),
    "me": (
        "What is my name?",
        "Where do I live?",
        "How old am I?",
        "What did I say yesterday?",
        "Where are my keys?",
        "What am I thinking of?",
        "Call me {day}.",
        "Remind me of {thing} {day}.",
    ),
}

TEST_KINDS: dict[str, tuple[str, ...]] = {
    "translation": (
        "What is {phrase} in {language}?",
        "How do you say {phrase} in {language}?",
        "Translate {phrase} into {language}.",
        "Do you speak {language}?",
    ),
    "animals": (
        "What do {animal} eat?",
        "How long do {animal} live?",
        "Where do {animal} sleep?",
        "How fast are {animal}?",
        "Why do people keep {animal}?",
    ),
    "sport": (
        "Who won the game of {sport} {day}?",
        "What are the rules of {sport}?",
        "How do I get better at {sport}?",
        "Which team is the best at {sport}?",
    ),
    "health": (
        "What helps against {illness}?",
        "Should I see a doctor about {illness}?",
        "How long does {illness} last?",
        "My friend has {illness}. What is to be done?",
    ),
    "history": (
        "What happened in {year}?",
        "Who ruled {country} in {year}?",
        "Was there a war in {year}?",
        "Why is the year {year} remembered?",
    ),
}
