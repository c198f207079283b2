"""Ranges that config fields share, checked when a config is made."""

from typing import Annotated

from pydantic import Field

Count = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]
