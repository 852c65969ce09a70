"""Words that pictures show: which there are, which of them training never shows, and where their letters stand.

Training spells a word of the list half of the time and letters thrown together otherwise: a model that is shown a few
hundred words could learn each by heart, one that is shown any letters has to learn to spell. The kept-out words are
what an examination asks for.
"""

from __future__ import annotations

import random
import string
from dataclasses import dataclass

from octavo.train.glyphs import HALF_WIDTH

SHORTEST_WORD, LONGEST_WORD = 3, 5  # letters

_LISTED = """
ACE ACT ADD AGE AIR ANT APE ARM ART ASK BAD BAG BAR BAT BED BEE BIG BOX BOY BUS BUY CAN CAP CAR CAT COW CRY CUP CUT
DAY DOG DOT DRY EAR EAT EGG END EYE FAN FAR FIG FIT FIX FLY FOG FOX FUN GAP GAS GEM HAM HAT HEN HIT HOT ICE INK JAM
JAR JET JOB JOY KEY KID KIT LAB LAW LEG LID LIP LOG MAN MAP MIX MOM MUD MUG NET NEW NUT OAK OIL OLD OWL PAN PEA PEN
PET PIE PIG PIN POT RAT RED RIB ROW RUN SAD SEA SKY SUN TAX TEA TEN TOP TOY VAN WAX WEB WET WIN YES ZIP ZOO
ABLE ACID AQUA BABY BACK BALL BAND BANK BATH BEAR BELL BIRD BLUE BOAT BOOK BUZZ CAKE CALM CARD CITY CLUB COLD COOL
CORN CUBE DARK DEEP DEER DESK DOOR DRUM DUCK EAST EASY EXIT FACE FARM FAST FILM FIRE FISH FLAG FOOD FROG GAME GIFT
GIRL GLAD GOAT GOLD GOOD HAND HARD HELP HERO HILL HOME HOPE IRON JAZZ JUMP KEEP KIND KING KITE LAKE LAMP LEAF LION
LOVE LUCK MAIL MILK MIND MOON NEST NICE NOTE OPEN OVEN PARK PATH PLAY POEM POOL QUIZ RAIN RICE RING ROAD ROCK ROSE
SAFE SALT SAND SHIP SHOP SING SNOW SOFT SONG STAR STOP SWIM TALK TIME TREE TURN VASE VIEW WALK WARM WEST WILD WIND
WISH WOLF WOOD WORD YARD YEAR ZERO ZONE
ALARM ANGEL APPLE BEACH BERRY BLACK BRAVE BREAD BRICK BRUSH CANDY CHAIR CHESS CLOCK CLOUD COLOR CRANE CROWN DAISY
DANCE DREAM EAGLE EARTH EMPTY EQUAL FAIRY FLAME FLOOR FRESH FRUIT GHOST GIANT GLASS GRAPE GRASS GREEN HAPPY HEART
HELLO HONEY HORSE HOTEL HOUSE IMAGE JELLY JUICE LEMON LIGHT LUCKY MAGIC MANGO MAPLE METAL MODEL MONEY MOUSE MUSIC
NIGHT NORTH OCEAN OLIVE ONION PAINT PAPER PARTY PEACE PEARL PHONE PIANO PILOT PIZZA PLANT QUEEN QUICK QUIET RADIO
RIVER ROBOT ROUND ROYAL SALAD SHARK SHEEP SHEET SMILE SNAKE SOUTH SPACE SPOON STONE STORM SUGAR SWEET TABLE THANK
TIGER TOAST TODAY TOWER TRAIN TRUCK VOICE WATCH WATER WHALE WHEEL WHITE WORLD YOUNG ZEBRA
"""
WORDS = tuple(_LISTED.split())
KEPT_OUT_WORDS = WORDS[6::7]
TRAINING_WORDS = tuple(word for word in WORDS if word not in KEPT_OUT_WORDS)

# In radii, which are half heights: from one letter's middle to the next one's.
PITCH = 2 * HALF_WIDTH + 0.32
LINE_WIDTH = 0.92  # of the picture's side, filled by a word that stands alone


@dataclass(frozen=True, slots=True)
class Word:
    """A word in capitals in the middle of a line; lengths are fractions of the picture's side, y points down.

    `x` and `y` are the middle of the word, `radius` is half the height of its letters.
    """

    text: str
    colour: str
    x: float
    y: float
    radius: float

    def spots(self) -> list[tuple[str, float]]:
        """Every letter and the x of its middle, from left to right."""
        first = self.x - (len(self.text) - 1) / 2 * PITCH * self.radius
        return [(letter, first + i * PITCH * self.radius) for i, letter in enumerate(self.text)]


def fitting_radius(text: str, largest: float = 1.0) -> float:
    """The radius at which a word fills a line, at most `largest`."""
    return min(LINE_WIDTH / (len(text) * PITCH), largest)


def sample_word(rng: random.Random, *, held_out: bool = False) -> str:
    """A kept-out word if `held_out`; else a word of training or three to five letters by lot, never a kept-out word."""
    if held_out:
        return rng.choice(KEPT_OUT_WORDS)
    if rng.random() < 0.5:
        return rng.choice(TRAINING_WORDS)
    while True:
        text = "".join(rng.choices(string.ascii_uppercase, k=rng.randint(SHORTEST_WORD, LONGEST_WORD)))
        if text not in KEPT_OUT_WORDS:
            return text
