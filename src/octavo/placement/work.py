"""What a picture asks of a model: the numbers that memory and time follow from."""

from dataclasses import dataclass

from octavo.errors import RequestError
from octavo.models.mmdit import MMDiTConfig

FACTOR = 8  # pixels that a latent pixel covers, along one side


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One run: some pictures of one prompt, drawn together."""

    width: int = 1024  # pixels
    height: int = 1024  # pixels
    steps: int = 28  # evaluations of the model
    rows: int = 2  # of a model call: twice the pictures with guidance, else as many
    tokens: int = 333  # of text: CLIP's 77 and 256 of T5, the longest that diffusers takes
    prompts: int = 2  # texts to encode, in one pass: with guidance the negative one, too
    pictures: int = 1  # to decode, one after the other

    def __post_init__(self) -> None:
        for name in ("width", "height", "steps", "rows", "tokens", "prompts", "pictures"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name}={getattr(self, name)}: a picture needs 1 at least.")

    @property
    def latents(self) -> tuple[int, int]:
        """Height and width of the latents."""
        return -(-self.height // FACTOR), -(-self.width // FACTOR)

    def image_tokens(self, config: MMDiTConfig) -> int:
        """Tokens of the picture in the MMDiT."""
        height, width = self.latents
        return -(-height // config.patch_size) * -(-width // config.patch_size)
