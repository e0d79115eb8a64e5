"""What all parts of a recipe share."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Refuses what is no name of an argument: YAML reads `{size:64}`, without a space, as one text."""
    for name in options:
        if not name.isidentifier():
            raise ValueError(f"'{name}' is no name of an argument; YAML wants a space after the colon")
    return options


Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Arguments = Annotated[dict[str, Any], AfterValidator(_arguments)]


class Section(BaseModel):
    """A part of a recipe: frozen, and strict about keys and types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
