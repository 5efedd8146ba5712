"""
What `python -m retrieval.precompute` has stored in the neighbor cache, for whom: a record for each share of a set of
sequences. It holds a label, which is all that its neighbors and pointers depend on, and how much of the share is done.
With retrieval_offline = True a run reads the cache alone, and does not start unless records cover all that it will ask.
"""
import json

from configurator import UserError
from retrieval.neighbor_cache import VERSION, NeighborCache, cache_name, short_hash

COMMAND = 'python -m retrieval.precompute CONFIG'
OF_NEIGHBORS = ('retrieval_mode', 'retrieval_embedding_model', 'retrieval_search_params',
                'retrieval_rerank')  # settings that pointers do not depend on; the index is the collection's
OF_SETTINGS = ('retrieval_chunk_size', 'retrieval_k_neighbors', 'retrieval_pointers',
               *OF_NEIGHBORS)  # in a label, under their names


def label_of(settings, vocabulary):
    """What the settings say of how neighbors and pointers are found; `vocabulary` is the tokenizer's hash."""
    # words need no embedding model
    unread = ('retrieval_embedding_model',) if settings.retrieval_mode == 'bm25' else ()
    unread = unread if settings.retrieval_k_neighbors else OF_NEIGHBORS
    label = {name: getattr(settings, name) for name in OF_SETTINGS if name not in unread}
    return label | dict(tokenizer=vocabulary, version=VERSION)


def train_set(settings, stream):
    """What identifies the sequences of a SequenceStream, whatever part of them a rank takes."""
    state = stream.state()
    return dict(set='train', block_size=settings.block_size, seed=state['seed'], datasets=state['datasets'],
                epochs=[dataset.config.epochs for dataset in stream.datasets])


def val_set(settings, datasets):
    """What identifies the sequences of the val text of ChunkedDatasets."""
    return dict(set='val', block_size=settings.block_size, eval_tokens=settings.eval_tokens,
                datasets=[dataset.hash for dataset in datasets])


def open_cache(settings, kinds=()):
    """The NeighborCache of the settings."""
    if not settings.retrieval_cache_gb > 0:
        raise UserError('retrieval_cache_gb is 0, and precomputed neighbors are in the cache: set it to its size')
    return NeighborCache(settings.retrieval_cache_dir, settings.retrieval_cache_gb, cache_name(settings), list(kinds))


def read_records(cache, settings):
    """The cache's records. UserError if there are none."""
    records = list(cache.records().values())
    if len({record['revision'] for record in records}) > 1:
        raise UserError(f'the records in {settings.retrieval_cache_dir!r} are of several revisions of the collection: '
                        f'run {COMMAND} again')
    if not records:
        raise UserError(f'retrieval_offline is True, and nothing was precomputed for collection '
                        f'{settings.retrieval_collection!r} in {settings.retrieval_milvus_uri} into '
                        f'{settings.retrieval_cache_dir!r}: run {COMMAND} first')
    return records


def covered(records, label, sequences_of):
    """
    How many sequences of a set, from its first one on, are in the cache: the ranks of a precompute take turns, and each
    has stored `done` steps of its share.
    """
    best, shares = 0, {}
    for record in records:
        if (record['label'], record['set']) == (label, sequences_of):
            shares.setdefault((record['step_size'], record['world_size']), {})[record['rank']] = record['done']
    for (step_size, world_size), done in shares.items():
        if len(done) == world_size:
            best = max(best, step_size * min(done.values()))
    return best


def check_covered(records, label, sequences_of, wanted, settings):
    """UserError, with what is missing or differs, unless the first `wanted` sequences of a set are in the cache."""
    missing = wanted - covered(records, label, sequences_of)
    if missing <= 0:
        return
    ours = label | sequences_of
    theirs = [record['label'] | record['set'] for record in records if record['set']['set'] == sequences_of['set']]
    different = [[key for key in ours | other if ours.get(key) != other.get(key)] for other in theirs]
    if different and [] not in different:
        keys, other = min(zip(different, theirs, strict=True), key=lambda pair: len(pair[0]))
        both = '; '.join(f'{key}: they have {other.get(key)!r}, the run {ours.get(key)!r}' for key in keys)
        raise UserError(f'the precomputed {sequences_of["set"]} neighbors in {settings.retrieval_cache_dir!r} are of '
                        f'something else ({both}): use the settings that made them, or run {COMMAND} with these')
    chunks = settings.block_size // settings.retrieval_chunk_size
    raise UserError(f'{missing * chunks:,} of {wanted * chunks:,} {sequences_of["set"]} chunks are not precomputed in '
                    f'{settings.retrieval_cache_dir!r}: run {COMMAND}, which goes on where it was')


def record_of(cache, label, sequences_of, step_size, world_size, rank):
    """The record of a rank's share of a set, which may have to be begun."""
    record = dict(label=label, set=sequences_of, step_size=step_size, world_size=world_size, rank=rank)
    return cache.records().get(key_of(record)) or record | dict(done=0, state=None)


def put_record(cache, record, settings):
    """Store a record. UserError if the cache is full: what it lacks would be missed."""
    if not cache.put_record(key_of(record), record):
        raise UserError(f'the cache in {settings.retrieval_cache_dir!r} is full, and lacks entries: raise '
                        f'retrieval_cache_gb, which is {settings.retrieval_cache_gb:g}, or name another '
                        f'retrieval_cache_dir; {COMMAND} then goes on')


def key_of(record):
    named = [record[name] for name in ('label', 'set', 'step_size', 'world_size', 'rank')]
    return short_hash(json.dumps(named, sort_keys=True))
