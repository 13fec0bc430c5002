"""What people say to the thinker that asks for no picture and no sound, and the one line that it answers."""

from __future__ import annotations

import random

CAN = "i draw shapes and play notes"
ONLY = "i only draw shapes and play notes"
SAYINGS: dict[str, tuple[str, ...]] = {
    "hello": (
        "hello", "hi", "hey", "good morning", "good evening", "good afternoon", "greetings", "hi there", "hello there",
        "hey there", "howdy", "nice to meet you", "good day", "welcome back",
    ),
    "you are welcome": (
        "thanks", "thank you", "many thanks", "thank you so much", "thanks a lot", "that was great", "well done",
        "good job", "that is lovely", "perfect", "i like it", "very nice", "great work", "cheers", "that sounds good",
        "that looks good", "nice picture", "what a nice sound",
    ),
    "i am fine": (
        "how are you", "how do you do", "how are you doing", "how is it going", "are you ok", "are you well",
        "how do you feel", "what's up", "how was your day", "are you happy",
    ),
    CAN: (
        "what can you do", "what do you do", "help", "how can you help me", "what are you good at", "can you help me",
        "what should i ask", "what can i ask you", "how does this work", "what is this", "what are your skills",
        "can you draw", "can you play music", "do you make sounds", "what can you play", "what can you draw",
        "what do you know", "show me what you can do",
    ),
    "i am a small model": (
        "who are you", "what is your name", "what are you", "are you a robot", "are you human", "are you real",
        "who made you", "how old are you", "are you a model", "tell me about yourself", "how big are you",
        "where do you live",
    ),
    "goodbye": (
        "bye", "goodbye", "see you", "see you later", "good night", "farewell", "bye bye", "that is all", "i am done",
        "see you tomorrow", "talk to you later", "stop",
    ),
    ONLY: (
        "tell me a joke", "what is the weather like", "what time is it", "write a poem about {}", "tell me a story",
        "what is two plus two", "who won the game", "what is the capital of {}", "tell me about {}", "do you like {}",
        "what do you think of {}", "explain {} to me", "write me a letter", "translate this", "how far is the moon",
        "what day is it", "where is {}", "how do i cook {}", "why is the sky blue", "i am tired", "i am bored",
        "i feel sad today", "what is the meaning of life", "can you write code", "recommend a book about {}",
        "is it going to rain", "what is {}", "who is the president of {}",
    ),
}  # fmt: skip
TOPICS = (
    "france", "tea", "soup", "cats", "dogs", "football", "london", "history", "the sea", "winter", "love", "rice",
    "physics", "trains", "japan", "bread", "books", "the moon", "summer", "coffee",
)  # fmt: skip
BEFORE = ("", "", "", "", "oh, ", "well, ", "ok, ", "hey, ", "so, ", "hello, ", "um, ", "hi! ", "please ", "now ")
AFTER = (
    "", "", "", "", "!", "?", ".", " :)", " today", " my friend", ", friend", " please", " then", " again", "!!", "...",
)  # fmt: skip


def small_talk(rng: random.Random) -> tuple[str, str]:
    """(what is said, the answer)."""
    answer = rng.choices(tuple(SAYINGS), (1, 1, 1, 1.2, 1, 1, 2))[0]
    said = rng.choice(BEFORE) + rng.choice(SAYINGS[answer]).format(rng.choice(TOPICS)) + rng.choice(AFTER)
    return (said[0].upper() + said[1:] if rng.random() < 0.3 else said), answer
