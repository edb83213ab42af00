"""Locate the configuration tree: inside an installed package, or at the top of a checkout."""

from pathlib import Path

_PACKAGED = Path(__file__).parents[1] / "conf"
CONF = str(_PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[3] / "conf")
