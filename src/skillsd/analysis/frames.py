"""Data frames of texts that come from elsewhere."""

from __future__ import annotations

from typing import Any

import pandas as pd


def text_frame(*args: Any, **kwargs: Any) -> pd.DataFrame:
    """A pandas.DataFrame whose texts stay Python's own strings.

    Where pyarrow is installed, pandas would keep them in Arrow's, which refuses lone surrogates: JSON may hold those, and so may a record.
    """
    with pd.option_context("mode.string_storage", "python"):
        return pd.DataFrame(*args, **kwargs)
