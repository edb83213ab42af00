"""The spelling of phrases."""

from __future__ import annotations

import re


def normal_phrase(text: str) -> str:
    """Return the one spelling of a phrase: lower case, single spaces for underscores, no full stop at the end."""
    return re.sub(r"[\s_]+", " ", text).strip().removesuffix(".").rstrip().lower()
