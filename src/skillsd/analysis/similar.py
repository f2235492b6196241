"""Skills by what they say: search, neighbours, clusters. TF-IDF over words and runs of words, so that move lists compare by their order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from skillsd.errors import ConfigError
from skillsd.skills.skill import FIELDS

_WORD = r"\w+"
"""A word may be one letter: a move."""


class SkillIndex:
    """The texts of skills as TF-IDF vectors of unit length; similarity is their cosine, 0 to 1.

    Args:
        skills: `Run.skills`: by `skill_id`, with the three texts. It may be empty.
    """

    def __init__(self, skills: pd.DataFrame) -> None:
        from scipy.sparse import csr_matrix  # late, as all of scikit-learn: one second
        from sklearn.feature_extraction.text import TfidfVectorizer

        texts = ["\n".join(row) for row in skills[list(FIELDS)].itertuples(index=False)]
        self.skills = skills
        self._vectorizer = TfidfVectorizer(token_pattern=_WORD, ngram_range=(1, 3))
        self._worded = any(map(self._vectorizer.build_analyzer(), texts))
        self._matrix: Any = self._vectorizer.fit_transform(texts) if self._worded else csr_matrix((len(texts), 1))

    def search(self, query: str, n: int = 10) -> pd.DataFrame:
        """The skills most like a text, best first; of equals, the earlier. Those that share no word with it are left out.

        Args:
            query: Any text.
            n: At most so many.

        Returns:
            Rows of `skills` with a column `similarity`.

        Raises:
            ConfigError: n is negative.
        """
        vector = self._vectorizer.transform([query]) if self._worded else self._matrix[:0]
        return self._best(vector, n)

    def neighbours(self, skill_id: int, n: int = 5) -> pd.DataFrame:
        """The skills most like one of them, which is left out; otherwise as `search`. Raises KeyError if there is none of that id."""
        at = self.skills.index.get_loc(int(skill_id))
        return self._best(self._matrix[at], n, without=at)

    def clusters(self, n: int, seed: int = 0) -> pd.Series:
        """Groups of skills by k-means, numbered in the order in which they begin.

        Args:
            n: How many; fewer if fewer skills differ.
            seed: Seed of the first centres.

        Returns:
            int64 by `skill_id`.

        Raises:
            ConfigError: n is less than 1.
        """
        from sklearn.cluster import KMeans

        if n < 1:
            raise ConfigError(f"n: {n} clusters cannot be made: ask for 1 or more.")
        labels = np.zeros(len(self.skills), dtype=np.int64)
        if len(labels):
            labels = KMeans(min(n, self._distinct()), n_init=4, random_state=seed).fit_predict(self._matrix)
        return pd.Series(pd.factorize(labels)[0], index=self.skills.index, name="cluster", dtype=np.int64)

    def _distinct(self) -> int:
        """Vectors that differ: k-means finds no more clusters, and warns."""
        m = self._matrix
        rows = zip(m.indptr, m.indptr[1:], strict=False)
        return len({(m.indices[a:b].tobytes(), m.data[a:b].tobytes()) for a, b in rows})

    def _best(self, vector: Any, n: int, without: int | None = None) -> pd.DataFrame:
        if n < 0:
            raise ConfigError(f"n: {n} skills cannot be listed: ask for 0 or more.")
        scores = np.zeros(len(self.skills))
        if vector.shape[0]:
            scores = np.clip((self._matrix @ vector.T).toarray()[:, 0], 0.0, 1.0)  # rounding may pass 1
        if without is not None:
            scores[without] = 0.0
        order = [at for at in np.argsort(-scores, kind="stable")[:n] if scores[at] > 0]
        return self.skills.assign(similarity=scores).iloc[order]
