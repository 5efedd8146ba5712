"""
The leak rule: a sequence never receives a neighbor from a document that any of its own chunks belongs to (Megatron's
rule), or the loss would measure what has leaked. A chunk's nearest rows are often of its own document, so a search
over-fetches and filters. Chunks that are left with fewer than k neighbors are searched for again with larger limits,
and finally with their document excluded by the database, which costs a search per document.
"""
import numpy as np

from retrieval.knowledge_base import HIT

SPARE = 6  # hits kept beyond k at every stage, which the first stage asks for
LIMITS = (0, 32, 128, 1024)  # rows asked for by stage, or `candidates` if that is more
EXCLUDING = len(LIMITS)  # the last stage


def search_stage(knowledge_base, vectors, doc_ids, stage, candidates, excluded=(), latest=False, texts=None):
    """
    Up to `candidates` hits (n, candidates) for chunks of the documents doc_ids (n,), by their vectors (n, D) or texts
    (n,), as KnowledgeBase.search reads them. None is of the chunk's own document. The last stage may exclude other
    documents instead, which then hold for all n chunks.
    """
    if len(excluded):
        return knowledge_base.search(vectors, candidates, excluded, latest, texts)
    if stage < EXCLUDING:
        hits = knowledge_base.search(vectors, max(LIMITS[stage], candidates), latest=latest, texts=texts)
        return keep_first(hits, hits['doc_id'] != doc_ids[:, None], candidates)
    hits = np.zeros((len(doc_ids), candidates), dtype=HIT)
    for doc_id in np.unique(doc_ids):
        is_of_document = doc_ids == doc_id
        near, said = (None if values is None else values[is_of_document] for values in (vectors, texts))
        hits[is_of_document] = knowledge_base.search(near, candidates, [doc_id], latest, said)
    return hits


def hits_without_leaks(find_hits, inverse, sequences, sequence_doc_ids, k, candidates):
    """
    Hits (N, k) for N queries and whether each was searched again (N,). Query i asks for the unique chunk inverse[i] in
    sequence sequences[i], whose documents are sequence_doc_ids[sequences[i]] (L,). find_hits(unique (n,), stage,
    excluded) returns hits (n, M), M >= k, and which of them were searched just now (n,).
    """
    hits = np.zeros((len(inverse), k), dtype=HIT)
    searched_again = np.zeros(len(inverse), dtype=bool)
    starved = np.arange(len(inverse))  # queries with fewer than k hits so far
    for stage in range(EXCLUDING + 1):
        if 0 < stage < EXCLUDING and LIMITS[stage] <= candidates:
            continue  # the first stage has asked for as many
        unique, unique_inverse = np.unique(inverse[starved], return_inverse=True)
        found, searched = find_hits(unique, stage)
        found, searched = found[unique_inverse], searched[unique_inverse]
        is_leak = is_in(found['doc_id'], sequence_doc_ids[sequences[starved]])
        hits[starved] = keep_first(found, ~is_leak, k)
        searched_again[starved] |= searched & (stage > 0)
        starved = starved[hits['score'][starved, -1] == -np.inf]
        if not len(starved):
            break
    for sequence in np.unique(sequences[starved]):  # the sequence's other documents crowd the hits
        of_sequence = starved[sequences[starved] == sequence]
        found, searched = find_hits(inverse[of_sequence], EXCLUDING, np.unique(sequence_doc_ids[sequence]))
        hits[of_sequence] = found[:, :k]
        searched_again[of_sequence] |= searched
    return hits, searched_again


def is_in(doc_ids, others):
    """(n, M) bool: which of doc_ids (n, M) are among the same line of others (n, L)."""
    return (doc_ids[:, :, None] == others[:, None, :]).any(-1)


def keep_first(hits, allowed, count):
    """The first `count` of hits (n, M) that are allowed (n, M), in their order. Missing ones have score -inf."""
    allowed = allowed & (hits['score'] > -np.inf)
    order = np.argsort(~allowed, axis=1, kind='stable')[:, :count]
    kept = np.take_along_axis(hits, order, axis=1)
    kept['score'][~np.take_along_axis(allowed, order, axis=1)] = -np.inf
    return kept
