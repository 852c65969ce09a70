"""Follow a run, look at unfinished pictures, and stop when one is good enough."""

from octavo import GenerateRequest, generate_each, load
from octavo.pipeline.generate import Progress

components = load()


def watch(progress: Progress) -> None:
    if progress.denoised is not None and progress.step % 5 == 0:
        components.preview(progress.denoised).save(f"preview-{progress.step:02}.png")
        print(f"{progress.stage} {progress.step}/{progress.steps}")


request = GenerateRequest(prompt="a green heart on a white background", seed=1, batch=100)
for picture in generate_each(components, request, watch=watch):
    print(picture.save(f"heart-{picture.settings['seed']}.png"))
    break  # the other 99 are never begun
