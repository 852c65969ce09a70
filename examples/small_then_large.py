"""A second, larger pass: what was drawn small and came out ragged is made larger and drawn again."""

from octavo import GenerateRequest, Hires, generate, load

components = load()
for denoise in (0, 0.5):  # 0 only makes it larger
    hires = Hires(scale=2, denoise=denoise, prompt="a large yellow star on a red background")
    request = GenerateRequest(
        prompt="a small yellow star on a red background", width=64, height=64, seed=3, hires=hires
    )
    (picture,) = generate(components, request)
    print(picture.save(f"output/star-{denoise}.png"), picture.image.size)
