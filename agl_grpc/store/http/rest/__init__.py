"""REST as Agent Lightning 0.3 speaks it: thin translations to and from the contract's methods."""

from __future__ import annotations
