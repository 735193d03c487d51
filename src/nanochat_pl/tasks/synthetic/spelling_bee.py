"""Counting a letter in a word, in people's words, with an answer that spells, walks, counts and checks itself."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from nanochat_pl.common.schema import setting
from nanochat_pl.tasks.base import Content, Conversation, Part, conversation_of, generator, tool_answer
from nanochat_pl.tasks.registry import task
from nanochat_pl.tasks.synthetic.spelling import count_by_tool, letter_to_count, same_final_number, spelled, walked
from nanochat_pl.tasks.synthetic.words import WordSettings, WordTask

# As people ask. Where a question mark is a sign of its own in a language, it stands here, else it comes and goes.
_QUESTIONS = (
    "How many {letter} are in {word}",
    "How many {letter} are in the word {word}",
    "How many {letter} are there in {word}",
    "How many {letter}s does {word} have",
    "How many times does {letter} appear in {word}",
    "How many times can one find {letter} in {word}",
    "How often does the letter {letter} occur in {word}",
    "How often is {letter} in {word}",
    "Count the {letter} in {word}",
    "Count how many times {letter} is in {word}",
    "Please count the letter {letter} in the word {word}",
    "Can you count the {letter}s in {word}",
    "Could you tell me how many {letter} there are in {word}",
    "Do you know how many {letter} {word} contains",
    "What is the number of {letter} in {word}",
    "What's the count of {letter} in {word}",
    "Tell me how many {letter}s {word} has",
    "In {word}, how many {letter} are there",
    "In the word {word}, how often do we see {letter}",
    "{word}: how many {letter}",
    "number of {letter} in {word}",
    "{letter} in {word}, how many",
    "I wonder how many {letter} are in {word}",
    "Quick question: how many {letter} in {word}",
    # German, Dutch, Swedish, Danish
    "Wie viele {letter} sind in {word}",
    "Wie oft kommt der Buchstabe {letter} in {word} vor",
    "Wie oft steht {letter} in dem Wort {word}",
    "Zähle die {letter} in {word}",
    "Hoeveel keer komt {letter} voor in {word}",
    "Hoeveel letters {letter} zitten er in {word}",
    "Hur många {letter} finns det i {word}",
    "Hvor mange {letter} er der i {word}",
    # French, Spanish, Portuguese, Italian, Romanian
    "Combien de {letter} y a-t-il dans {word}",
    "Combien de fois la lettre {letter} apparaît-elle dans {word}",
    "Compte les {letter} dans {word}",
    "¿Cuántas {letter} hay en {word}?",
    "¿Cuántas veces aparece la letra {letter} en {word}?",
    "Cuenta las {letter} en {word}",
    "Quantas letras {letter} há em {word}",
    "Quantas vezes aparece {letter} em {word}",
    "Quante {letter} ci sono in {word}",
    "Quante volte compare la lettera {letter} nella parola {word}",
    "De câte ori apare litera {letter} în {word}",
    # Polish, Czech, Russian, Ukrainian, Greek, Turkish, Finnish
    "Ile razy litera {letter} występuje w słowie {word}",
    "Kolikrát je písmeno {letter} ve slově {word}",
    "Сколько букв {letter} в слове {word}",
    "Сколько раз буква {letter} встречается в {word}",
    "Скільки літер {letter} у слові {word}",
    "Πόσες φορές υπάρχει το γράμμα {letter} στη λέξη {word}",
    "{word} kelimesinde kaç tane {letter} var",
    "Kuinka monta {letter}-kirjainta on sanassa {word}",
    # Chinese, Japanese, Korean, Vietnamese, Indonesian, Hindi, Arabic
    "{word} 中有几个 {letter}？",
    "{word} 这个词里有多少个字母 {letter}？",
    "请数一数 {word} 里的 {letter}",
    "{word} に {letter} はいくつありますか？",
    "{word} という単語に {letter} は何回出てきますか？",
    "{word}에 {letter}가 몇 개 있나요",
    "{word}에는 {letter}가 몇 번 나오나요",
    "Có bao nhiêu chữ {letter} trong từ {word}",
    "Ada berapa huruf {letter} dalam kata {word}",
    "{word} में {letter} कितनी बार आता है",
    "كم مرة يظهر الحرف {letter} في {word}؟",
)
_QUOTES = ("", "'", '"', "`")
_LOWER_SHARE = 0.3  # typed without capitals
_MARK_SHARE = 0.5  # of the wordings without one: a question mark is put behind


@dataclass(frozen=True)
class SpellingBeeSettings(WordSettings):
    """``How many r are in strawberry?`` in many wordings and languages; the answer spells, counts and checks."""

    size: int | None = setting(80_000, "Training conversations; null: one for each word.", at_least=1)


@task("spelling_bee", SpellingBeeSettings)
class SpellingBee(WordTask):
    """The word spelled, a running count letter by letter, a check with the tool, and ``#### n``, which has to be right.

    The wordings are those of the training part: what is held out are words.
    """

    key = "spelling_bee"

    def conversation(self, index: int) -> Conversation:
        word = self.word(index)
        random = generator(self.name, self.split, index)
        letter = letter_to_count(random, word)
        return conversation_of(_question(random, word, letter), _answer(word, letter))

    def evaluate(self, conversation: Conversation, answer: Content) -> bool:
        return same_final_number(conversation, answer)


def _question(random: Random, word: str, letter: str) -> str:
    wording = random.choice(_QUESTIONS)
    if random.random() < _LOWER_SHARE:
        wording = wording.lower()
    if wording[-1] not in "?？؟" and random.random() < _MARK_SHARE:
        wording += "?"
    around_letter, around_word = random.choice(_QUOTES), random.choice(_QUOTES)
    return wording.format(letter=f"{around_letter}{letter}{around_letter}", word=f"{around_word}{word}{around_word}")


def _answer(word: str, letter: str) -> list[Part]:
    code, output = count_by_tool(word, letter)
    by_hand = (
        f"First the letters of {word}:\n{spelled(word)}\n\n"
        f"Now one by one, counting {letter}:\n{walked(word, letter)}\n\n"
        f"So I count {output}. The tool says: "
    )
    return [{"type": "text", "text": by_hand}, *tool_answer(code, output, f"\n\n#### {output}")]
