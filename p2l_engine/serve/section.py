"""A section of serve.yaml: unknown keys are errors that name the nearest one."""

from __future__ import annotations

import difflib
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

Price = Annotated[float, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0, le=1e9)]  # 31 years: a deadline must be a date
Tokens = Annotated[int, Field(gt=0)]


class Section(BaseModel):
    """A section of the file. Unknown keys are errors that name the nearest key."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, values: Any) -> Any:
        for key in values if isinstance(values, dict) else ():
            if key not in cls.model_fields:
                near = difflib.get_close_matches(str(key), cls.model_fields, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; expected {', '.join(cls.model_fields)}"
                raise ValueError(f"unknown key {key!r}{hint}")
        return values
