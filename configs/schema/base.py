"""The base of every section: frozen, strict, no unknown keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
# One line of text: no control characters and no Unicode line ends, which YAML and terminals read as line breaks.
Line = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]{1,4096}$")]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]


class Section(BaseModel):
    """One section of the cluster file. A key that is not declared is an error, never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def refusal(findings: Sequence[tuple[tuple[str | int, ...], str]]) -> ValidationError:
    """What a validator raises to put each message at a key below the section: `((path, message), ...)`."""
    details = [
        InitErrorDetails(type=PydanticCustomError("refused", "{message}", {"message": message}), loc=path, input=None)
        for path, message in findings
    ]
    return ValidationError.from_exception_data("cluster file", details)
