"""Search over cards and fetched papers, papers like one, and papers like those that a reader chose."""

from locally.page.search.documents import Document, of_card, of_preprint, words_of
from locally.page.search.index import Index

__all__ = ["Document", "Index", "of_card", "of_preprint", "words_of"]
