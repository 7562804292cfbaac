"""How many tokens a provider counts for an image: by its size, as its documentation says, and at most."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Annotated, Self

from pydantic import Field, model_validator

from p2l_engine.apis.pictures import Picture
from p2l_engine.serve.section import Section, Tokens

TILE, SQUARE, SHORT, TILES = 512, 2048, 768, 8  # pixels; an image is scaled into the square, then to the short side
PATCH, PATCHES = 32, 1536  # pixels, and the most that an image has


class ImageTokens(Section):
    """One of tile, patch and pixels, or most alone.

    tile: tokens of each tile of 512 pixels, beside ``base`` tokens of each image, which are all where ``detail: low`` was asked
    for. patch: tokens of each patch of 32 pixels, of at most 1,536. pixels: that are one token. most: tokens of any image; left
    out: what tiles or patches come to. See https://platform.openai.com/docs/guides/images-vision and
    https://platform.claude.com/docs/en/build-with-claude/vision.
    """

    tile: Tokens | None = None
    base: Annotated[int, Field(ge=0)] = 0
    patch: Annotated[float, Field(gt=0)] | None = None
    pixels: Annotated[float, Field(gt=0)] | None = None
    most: Tokens | None = None

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        given = [name for name in ("tile", "patch", "pixels") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"expected one of tile, patch and pixels, got {' and '.join(given)}")
        if self.most is None and given in ([], ["pixels"]):
            raise ValueError("expected most, the most tokens that an image counts, got nothing")
        if self.base and self.tile is None:
            raise ValueError("base: expected a tile beside it, got none")
        return self

    @property
    def bound(self) -> int:
        """The most tokens of an image, whatever it is."""
        if self.most is not None:
            return self.most
        return math.ceil(self.patch * PATCHES) if self.patch is not None else self.base + TILES * (self.tile or 0)

    def of(self, picture: Picture) -> int:
        """The tokens of an image; the most where its size is not known."""
        if self.tile is not None and picture.low:
            return min(self.base, self.bound)
        if picture.size is None:
            return self.bound
        width, height = picture.size
        if self.tile is not None:
            found = self.base + self.tile * _tiles(width, height)
        elif self.patch is not None:
            found = math.ceil(self.patch * _patches(width, height))
        else:
            found = self.bound if self.pixels is None else math.ceil(width * height / self.pixels)
        return min(found, self.bound)


def _tiles(width: int, height: int) -> int:
    scale = min(Fraction(1), Fraction(SQUARE, max(width, height)))
    scale *= min(Fraction(1), SHORT / (scale * min(width, height)))
    return math.ceil(scale * width / TILE) * math.ceil(scale * height / TILE)


def _patches(width: int, height: int) -> int:
    found = math.ceil(width / PATCH) * math.ceil(height / PATCH)
    if found <= PATCHES:
        return found
    # Scaled to the area of the patches, then until whole ones fit into one side.
    scale = math.sqrt(PATCHES / (width * height))
    across, down = max(width * scale, 1.0), max(height * scale, 1.0)
    scale = min(math.floor(across) / across, math.floor(down) / down)
    return min(math.ceil(across * scale - 1e-9) * math.ceil(down * scale - 1e-9), PATCHES)
