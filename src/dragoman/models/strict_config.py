"""Configurations that refuse impossible values with one sentence."""

import functools
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError


def strict_config(config_class: type) -> type:
    """
    `@strict`, which checks types and calls the `validate_` methods, but what it refuses at construction is a
    `ValueError` that says no more than what is wrong.
    """
    checked: Any = strict(config_class)
    build = checked.__init__

    @functools.wraps(build)
    def init(self, *args, **kwargs):
        try:
            build(self, *args, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(str(error.__cause__)) from None

    checked.__init__ = init
    return checked
