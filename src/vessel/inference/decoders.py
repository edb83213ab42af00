"""Names of the ways to decode an answer."""

from __future__ import annotations

DECODERS = ("forced", "generate")
