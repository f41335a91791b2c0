"""How well search ranks, on judged queries: nDCG@10 beside FTS5 alone and TF-IDF alone; and what a query costs.

Queries are what a reader might type: exact words, half a word, misspelt, or other words for the same. Papers were
judged by reading their cards, 3 for the paper that is meant, 1 to 2 for what also helps.
"""

import sqlite3
from collections.abc import Callable, Mapping, Sequence
from statistics import mean

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

from benchmarks.harness import Comparison, compare
from locally import catalogue
from locally.evidence import Paper
from locally.page.search import Index, of_card, words_of
from locally.page.search.documents import COLUMNS
from locally.page.search.words import WEIGHTS

JUDGED: dict[str, dict[str, int]] = {
    "halpern iteration": {"halpern": 3},
    "lipschits constant": {"local-lipschitz": 3},
    "robustness certificate": {"local-lipschitz": 3, "small-gain-nash": 1},
    "train without backpropagation": {"auglocal": 3, "momentum-auxiliary-network": 3},
    "local learning auxilary network": {"auglocal": 3, "momentum-auxiliary-network": 3},
    "explain a prediction": {"local-function-approximation": 3, "linear-interpreters": 2},
    "shap": {"local-function-approximation": 3},
    "ntk": {"neural-tangent-kernel": 3},
    "infinitely wide networks": {"neural-tangent-kernel": 3, "bib": 1},
    "relaxation parameter": {"learning-to-relax": 3},
    "conjugate gradient preconditioner": {"deep-conjugate-direction": 3, "learning-to-relax": 2},
    "poisson pressure solver": {"deep-conjugate-direction": 3},
    "differential privacy": {"dp-stationary-points": 3, "ldp-sparse-regression": 3},
    "private regresion": {"ldp-sparse-regression": 3, "dp-stationary-points": 1},
    "constrained optimization sketching": {"adasketch-newton": 3},
    "second order method": {"gradient-normalized-smoothness": 3, "adasketch-newton": 2, "batch-learning-rates": 1},
    "learning rate batch size": {"batch-learning-rates": 3},
    "cluster images without labels": {"manifold-linearizing": 3},
    "reduced order model": {"rom-net": 3},
    "invalid instrument": {"selective-ate": 3},
    "causal effect with machine learning": {"selective-ate": 3, "invariant-representations": 2},
    "domain generalization": {"invariant-representations": 3},
    "adversarial losses reinforcement": {"adversarial-linear-mdp": 3},
    "average reward": {"loop": 3},
    "offline data online exploration": {"ftpedel": 3, "bib": 1},
    "world model": {"losse-ftl": 3},
    "catastrophic forgetting": {"losse-ftl": 3},
    "byzantine": {"monna": 3},
    "malicious workers distributed training": {"monna": 3},
    "dna protein design": {"bib": 3},
    "prune llm": {"tyr-the-pruner": 3, "liger": 1},
    "diffusion language model faster": {"localleap": 3},
    "linear attention": {"local-linear-attention": 3, "liger": 2},
    "recurrent transformer": {"liger": 3, "local-linear-attention": 1},
    "nash equilibrium": {"small-gain-nash": 3, "halpern": 2},
    "graph neural network fixed point": {"convergent-graph-solver": 3},
    "interpretability features": {"local-interaction-basis": 3, "linear-interpreters": 2},
    "super resolution": {"linear-interpreters": 3},
    "michael mahoney": {"adasketch-newton": 3},
    "iclr 2024 solvers": {"learning-to-relax": 3},
}  # fmt: skip


def main() -> list[Comparison]:
    papers = [p for p in catalogue.load() if p.number <= 31]
    index = Index()
    index.update([of_card(paper) for paper in papers])
    ours = quality(index.search)
    results = []
    for name, search in (("FTS5 alone", fts5(papers)), ("TF-IDF alone", tfidf(papers))):
        theirs = quality(search)
        detail = {"ours": round(ours, 4), "theirs": round(theirs, 4), "queries": len(JUDGED)}
        ratio = ours / theirs
        results.append(Comparison("40 judged queries", "nDCG@10", ratio, ratio, ratio, "search", name, detail))
    plain = fts5(papers)
    everything = lambda search: [search(query) for query in JUDGED]
    results.append(
        compare(
            "40 queries",
            ("search", lambda: everything(index.search)),
            ("FTS5 alone", lambda: everything(plain)),
            rounds=5,
        )
    )
    return results


def quality(search: Callable[[str], Sequence[str]]) -> float:
    return mean(ndcg(search(query)[:10], grades) for query, grades in JUDGED.items())


def ndcg(found: Sequence[str], grades: Mapping[str, int]) -> float:
    gain = lambda values: sum((2**g - 1) / np.log2(i + 2) for i, g in enumerate(values))
    return float(gain([grades.get(slug, 0) for slug in found]) / gain(sorted(grades.values(), reverse=True)))


def texts(paper: Paper) -> tuple[str, ...]:
    claims = " ".join(claim.statement for claim in paper.claims)
    people = " ".join((*paper.authors, paper.venue, paper.wing))
    return paper.title, " ".join(paper.keywords), people, paper.summary, claims


def fts5(papers: Sequence[Paper]) -> Callable[[str], list[str]]:
    table = sqlite3.connect(":memory:")
    table.execute(f"create virtual table papers using fts5({', '.join(COLUMNS)})")
    table.executemany("insert into papers values (?, ?, ?, ?, ?)", map(texts, papers))
    order = f"bm25(papers, {', '.join(map(str, WEIGHTS))})"

    def search(query: str) -> list[str]:
        wanted = " OR ".join(f'"{word}"' for word in words_of(query))
        rows = table.execute(f"select rowid from papers where papers match ? order by {order}", (wanted,))
        return [papers[row[0] - 1].slug for row in rows]

    return search


def tfidf(papers: Sequence[Paper]) -> Callable[[str], list[str]]:
    vectorizer = TfidfVectorizer(stop_words="english")
    matrix = vectorizer.fit_transform(" ".join(texts(p)) for p in papers)

    def search(query: str) -> list[str]:
        scores = (matrix @ vectorizer.transform([query]).T).toarray()[:, 0]
        return [papers[i].slug for i in np.argsort(-scores, kind="stable") if scores[i] > 0]

    return search


if __name__ == "__main__":
    for line in main():
        print(line)
