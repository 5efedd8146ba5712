"""
Settings that a run takes from the collection where nothing sets them: what its rows were made with.
"""
import os
from contextlib import closing

from configurator import UserError
from retrieval.knowledge_base import Metadata, NoCollection, open_as_made
from retrieval.local_server import Unreachable
from retrieval.offline import open_cache, read_records

TAKEN = dict(tokenizer='tokenizer', retrieval_chunk_size='chunk_size',
             retrieval_embedding_model='embedding_model')  # settings that a run takes from a collection: their fields
OF_GRID = ('tokenizer', 'retrieval_chunk_size')  # those of them that a GPT needs, too


def take_from_collection(settings, named, say, may_be_away=False):
    """
    The settings, with the collection's tokenizer, chunk size and embedding model in place of defaults. Settings in
    `named`, which the user has set, are kept. Reports the changes to `say`. Without a collection the settings are
    returned unchanged, as they are for a GPT, or with `may_be_away`, while Milvus is unreachable.
    """
    keys = [key for key in TAKEN if key not in named and (settings.use_retrieval or key in OF_GRID)]
    if not keys:
        return settings
    if settings.retrieval_offline:
        with closing(open_cache(settings)) as cache:
            metadata = Metadata(**read_records(cache, settings)[0]['made_by'])
        return take_defaults(settings, [key for key in keys if key in OF_GRID], metadata, 'what was precomputed', say
                             ).replace(**{key: metadata.embedding_model for key in keys if key not in OF_GRID})
    try:
        with closing(open_as_made(settings, load=False)) as knowledge_base:
            metadata = knowledge_base.metadata
    except NoCollection:
        return settings
    except Unreachable as error:
        if may_be_away or not settings.use_retrieval:
            say(f'{error}; {" and ".join(keys)} are the defaults, not those of a collection')
            return settings
        raise UserError(f'{error}; or set {" and ".join(keys)}, which are taken from the collection where nothing sets '
                        f'them') from error
    where = f'collection {settings.retrieval_collection!r} in {settings.retrieval_milvus_uri}'
    return take_defaults(settings, keys, metadata, where, say)


def take_defaults(settings, keys, metadata, where, say):
    """The settings, with those of the keys from a Metadata, which `where` says the place of."""
    taken = {key: getattr(metadata, TAKEN[key]) for key in keys}
    lost = [key for key in ('tokenizer', 'retrieval_embedding_model') if key in taken and is_lost(key, taken[key])]
    if lost:
        raise UserError(f'{where} was made with {lost[0]} {taken[lost[0]]!r}, and nothing is there: name in {lost[0]} '
                        f'where it is now')
    if taken != {key: getattr(settings, key) for key in taken}:
        say(f'taken from {where}: ' + ', '.join(f'{key} {value!r}' for key, value in taken.items()))
    return settings.replace(**taken)


def is_lost(key, name):
    """Whether a tokenizer or an embedding model is named by a path that leads nowhere, and not by a hub's name."""
    is_path = name.endswith('.json') if key == 'tokenizer' else name.startswith(('/', '.', '~')) or os.path.isdir(
        os.path.dirname(name) or os.devnull)
    return is_path and not os.path.exists(name)
