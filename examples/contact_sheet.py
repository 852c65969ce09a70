"""Many prompts on one sheet: the one that the README shows. `python examples/contact_sheet.py` writes sheet.png."""

import numpy as np

from octavo import GenerateRequest, generate, load
from octavo.train.pictures import contact_sheet

PROMPTS = """a large red star on a blue background
red star
a large green triangle on white
a small yellow circle at the top left on a black background
a blue square left of a red circle
a pink heart on a purple background
a white moon on black
an orange ring at the bottom right on gray
a black arrow above a red heart on yellow
a tiny purple diamond in the middle on green
a green cross to the right of a white star on red
on an orange background a big white cross
a red circle and a blue circle on white
a gray square under an orange triangle on pink
a yellow crescent on a blue background
a huge black heart""".splitlines()

components = load()
requests = [GenerateRequest(prompt=prompt, seed=seed) for seed, prompt in enumerate(PROMPTS)]
pictures = [np.asarray(picture.image) for request in requests for picture in generate(components, request)]
contact_sheet(np.stack(pictures), 8, PROMPTS).save("sheet.png")
