"""Twenty documents and an encoder that counts their letters: light enough for other processes to import, and known without it."""

import numpy as np

from echelon.data.documents import Doc


class Letters:
    """Counts of letters; remembers what it was given. It reads 80 letters of a text."""

    dim, similarity = 26, "dot"

    def __init__(self, fingerprint="letters"):
        self.fingerprint, self.seen, self.truncated = fingerprint, [], {"query": 0, "document": 0}

    def encode_queries(self, texts):
        return np.array([counts(text) for text in texts], np.float32).reshape(-1, 26)

    def encode_documents(self, docs):
        self.seen += [doc.content for doc in docs]
        self.truncated["document"] += sum(len(doc.content) > 80 for doc in docs)
        return self.encode_queries([doc.content for doc in docs])


def counts(text):
    return [text[:80].lower().count(chr(97 + i)) for i in range(26)]


def collection(n=40, seed=0):
    """Documents some of whose texts come twice, and whose ids are not in order."""
    pick = np.random.default_rng(seed)
    words = "sea boat lamp rope gull storm door child coat letter tower bell road horse fire song".split()
    texts = [" ".join(np.random.default_rng(int(s)).choice(words, 6 + int(s) % 12)) for s in pick.integers(0, 2 * n // 3, n)]
    return [Doc(f"doc-{(7 * i) % n:03}", text, "Storm" * (i % 5 == 0)) for i, text in enumerate(texts)]
