"""Parses one value; the error for a wrong one does not contain the value."""

import re
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator
from pydantic_core import PydanticCustomError

WRONG = "setting"
"""Marks an error whose message is our own and does not contain the value."""

YES = frozenset({"true", "1", "yes", "on", "t", "y"})
NO = frozenset({"false", "0", "no", "off", "f", "n"})


def wrong(sentence: str) -> PydanticCustomError:
    """Return the error whose message completes the sentence "VARIABLE …"."""
    return PydanticCustomError(WRONG, "{sentence}", {"sentence": sentence})


def _boolean(value: object) -> bool:
    word = str(value).lower()
    if word not in YES | NO:
        raise wrong("must be true or false (1/0, yes/no, on/off, t/f and y/n are accepted too)")
    return word in YES


def word(pattern: str, form: str) -> AfterValidator:
    """Accept values that match ``pattern``; ``form`` describes it to the operator."""

    def check(value: str) -> str:
        if not re.fullmatch(pattern, value, re.ASCII):
            raise wrong(f"must be {form}")
        return value

    return AfterValidator(check)


Boolean = Annotated[bool, BeforeValidator(_boolean)]
Upper = BeforeValidator(lambda value: str(value).upper())
Lower = BeforeValidator(lambda value: str(value).lower())
Stripped = BeforeValidator(lambda value: value.strip() if isinstance(value, str) else value)
