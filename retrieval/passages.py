"""
Questions in, passages out: the chunks of the collection that are nearest to a question, each with its continuation, as
text. Any model can read them in its prompt, also one that has no neighbors.

    with closing(PassageFinder(settings, tokenizer)) as finder:
        passages, = finder.find(['What does textwrap.dedent do?'])
"""
import numpy as np

from configurator import UserError
from data.conversations import Passage
from retrieval.knowledge_base import FIELDS
from retrieval.leaks import SPARE, hits_without_leaks, search_stage
from retrieval.local_server import Unreachable
from retrieval.retriever import READ_AGAIN, Retriever


class PassageFinder(Retriever):
    """
    Finds up to settings.num_passages passages for each question, by retrieval_mode, until close(). It waits for Milvus
    as a Retriever does. Of chunks that follow each other only the nearest gives a passage, since their texts overlap,
    and of equal texts only one. retrieval_rerank does not apply: what shares runs of tokens with a question may be
    another question. UserError if the collection does not fit the settings.
    """

    def __init__(self, settings, tokenizer, say=None, device='cpu'):
        if settings.retrieval_offline:
            raise UserError('retrieval_offline is True, and passages are retrieved live for each question: set it to '
                            'False, or take the passages that the file has')
        super().__init__(settings.replace(retrieval_k_neighbors=settings.num_passages, retrieval_rerank=0,
                                          retrieval_pointers=0, retrieval_cache_gb=0.0), tokenizer, device, say)

    def find(self, questions, doc_ids=None):
        """
        For each of n questions a list of Passages, the nearest first. None is of the question's own document, doc_ids
        (n,). RetrievalTimeout if Milvus is unreachable for too long.
        """
        if doc_ids is None:
            doc_ids = np.zeros(len(questions), dtype=np.int64)
        doc_ids = np.asarray(doc_ids, dtype=np.int64)
        return self._wait(lambda: self._find(list(questions), doc_ids)) if len(questions) else []

    def _find(self, questions, doc_ids):
        vectors = None if self.mode == 'bm25' else self.embedder.embed(questions)
        texts = None if self.mode == 'dense' else np.array(questions, dtype=object)
        count = 2 * self.k  # some overlap
        candidates, places = count + SPARE, np.arange(len(questions))

        def find_hits(wanted, stage, excluded=()):
            near, said = (None if values is None else values[wanted] for values in (vectors, texts))
            return search_stage(self.knowledge_base, near, doc_ids[wanted], stage, candidates, excluded,
                                self._is_stale(), said), np.ones(len(wanted), dtype=bool)
        for _ in range(READ_AGAIN):
            self._follow_revision()
            hits, _ = hits_without_leaks(find_hits, places, places, doc_ids[:, None], count, candidates)
            ids = np.unique(hits['id'][hits['score'] > -np.inf])
            rows = self.knowledge_base.rows(ids, FIELDS, self._is_stale())
            if self.knowledge_base.revision() == self.revision:
                return [self._choose([rows[hit['id']] for hit in line if hit['score'] > -np.inf and hit['id'] in rows])
                        for line in hits]
        raise Unreachable('the collection changes again and again while it is searched')

    def _choose(self, rows):
        """The Passages of the first k rows that do not overlap."""
        chosen = {}  # text to row
        for row in rows:
            text = self.tokenizer.decode([t for t in row['tokens'] if t != self.tokenizer.eot_token])
            text = text.strip('\ufffd')  # of characters that the chunk's borders cut
            overlaps = any(row['doc_id'] == other['doc_id'] and abs(row['position'] - other['position']) < 2
                           for other in chosen.values())
            if text.strip() and text not in chosen and not overlaps:
                chosen[text] = row
        return [Passage(row['document'], text) for text, row in list(chosen.items())[:self.k]]
