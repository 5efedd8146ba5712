"""
Looks into a filled collection, and changes it without filling it anew:

    python -m retrieval.kb info config/x.py             # what made it, rows, revision, index, size, exact-match index
    python -m retrieval.kb stats config/x.py            # what is in it: documents, chunks of each, lengths
    python -m retrieval.kb search config/x.py "a text"  # its nearest chunks
    python -m retrieval.kb add config/x.py FILE...      # documents of files, as populate adds them
    python -m retrieval.kb remove config/x.py --doc ID...
    python -m retrieval.kb export config/x.py FILE      # all of it as one file; import FILE on another machine
    python -m retrieval.kb validate config/x.py         # recall against exact search, duplicates, bad rows
    python -m retrieval.kb drop config/x.py --yes

COMMAND --help lists a command's options. Arguments that end in .py are config files, and --key=value overrides a
setting; tokenizer, chunk size and embedding model are the collection's where they are not set. What is derived from the
rows follows each change: it begins a new revision, which runs notice, caches of others are not read any more, and the
exact-match index is brought up to date.
"""
import argparse
import json
import os
import shutil
import sys
from contextlib import closing, suppress
from dataclasses import replace

from system import pick_device

import numpy as np

from configurator import UserError, load_settings, named_settings, to_json, user_errors_as_one_line, visible
from data.chunk_store import open_datasets
from data.documents import DatasetConfig, as_dataset_configs, find_files
from data.tokenizer import load_tokenizer, vocabulary_hash
from retrieval.embedding import Embedder, EmbedderInfo
from retrieval.inherit import take_from_collection
from retrieval.kb_file import export_rows, import_rows
from retrieval.knowledge_base import FIELDS, VERSION, describe_score, open_as_made, open_knowledge_base, state_of
from retrieval.leaks import SPARE, hits_without_leaks, search_stage
from retrieval.local_server import Unreachable
from retrieval.match_index import match_index_folder, open_match_index
from retrieval.neighbor_cache import DATA, NeighborCache, cache_name
from retrieval.populate import populate
from retrieval.waiting import wait_for_milvus
from retrieval.writer import writing

PART = 2048  # rows that are read together with their vectors
LEAST = 0.95  # recall below which validate ends with 1
TIE = 1e-4  # scores that differ by less are equal: vectors are float32


def main():
    arguments, words, settings = parse_arguments()
    say = print if not getattr(arguments, 'json', False) else lambda text: print(text, file=sys.stderr)
    arguments.run(settings, arguments, words, say)


def parse_arguments():
    """The command's options, its words, and the settings."""
    parser = argparse.ArgumentParser(prog='python -m retrieval.kb', description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')

    def command(run, usage, description):
        name = run.__name__.removeprefix('run_')
        made = commands.add_parser(name, allow_abbrev=False, description=description, help=description,
                                   usage=f'python -m retrieval.kb {name} config/x.py {usage} [--key=value ...]')
        made.set_defaults(run=run)
        return made.add_argument
    as_json = dict(action='store_true', help='print a JSON object')
    command(run_info, '[--json]', 'What made the collection, and its state.')('--json', **as_json)
    command(run_stats, '[--json]', 'What is in the collection; reads all rows.')('--json', **as_json)
    add = command(run_search, '"a text" [-k N] [--json]', 'The chunks nearest to a text.')
    add('-k', type=int, default=5, metavar='N', help='how many (default: %(default)s)')
    add('--json', **as_json)
    add = command(run_add, 'FILE... [--source=NAME]', 'Add the documents of files, or bring them up to date.')
    add('--source', help='of the documents, as in DatasetConfig; that of the entry of train_datasets that holds the '
        'file, unless it is given')
    add('--text_field', help="column of the text (default: as --source, or 'text')")
    add('--id_field', help="column of the id (default: as --source, or 'id')")
    command(run_remove, '--doc ID...', 'Remove documents.')(
        '--doc', nargs='+', required=True, metavar='ID', help='name of a document as search and stats show it, or its '
        'doc_id, a number')
    command(run_export, 'FILE', 'Write the collection to one Parquet file, embeddings included.')
    command(run_import, 'FILE', 'Add all rows of such a file; documents that both hold become those of the file.')
    add = command(run_validate, '[-k N] [--chunks=N] [--least=R] [--json]',
                  'Check the collection; ends with 1 if recall is too low, or if a row is bad.')
    add('-k', type=int, metavar='N', help='neighbors (default: retrieval_k_neighbors, or 2 if that is 0)')
    add('--chunks', type=int, default=1000, metavar='N', help='val chunks to search for (default: %(default)s)')
    add('--least', type=float, default=LEAST, metavar='R', help='least recall that passes (default: %(default)s)')
    add('--json', **as_json)
    command(run_drop, '[--yes]', 'Remove the collection, and what is derived from it.')(
        '--yes', action='store_true', help='do it; without, only say what would be removed')
    arguments, others = parser.parse_known_args()
    overrides = [a for a in others if a.startswith('-') or a.endswith('.py')]
    words = [a for a in others if a not in overrides]
    named = [a for a in overrides if not a.startswith('-')]
    if arguments.command == 'search' and not words and len(named) > 1:  # the text, which ends in .py
        overrides.remove(named[-1])
        words.append(named[-1])
    wanted = {'search': 1, 'export': 1, 'import': 1}.get(arguments.command, 0)
    if len(words) != wanted and not (arguments.command == 'add' and words):
        what = {'search': 'one text, in quotes', 'export': 'one FILE', 'import': 'one FILE',
                'add': 'one FILE or more'}.get(arguments.command, 'no argument beside config files')
        raise UserError(f'{arguments.command} takes {what}, and got {", ".join(map(repr, words)) or "none"}: see '
                        f'python -m retrieval.kb {arguments.command} --help')
    for name in ('k', 'chunks'):
        if (count := getattr(arguments, name, None)) is not None and not 0 < count <= 10_000:
            raise UserError(f'{"-" if name == "k" else "--"}{name} must be from 1 to 10,000, but is {count}')
    # whoever changes or searches a collection has a database
    settings, named = load_settings(overrides).replace(retrieval_offline=False), named_settings(overrides)
    arguments.named = named
    if arguments.command in ('search', 'add', 'validate', 'remove'):  # the others need no tokenizer
        settings = take_from_collection(settings, named, lambda text: print(text, file=sys.stderr))
    return arguments, words, settings


def open_collection(settings, any_version=False, load=True):
    """The collection, whatever made it. UserError if its rows are of another version of nanoRETRO."""
    knowledge_base = open_as_made(settings, load)
    found = knowledge_base.metadata.version
    if found != VERSION and not any_version:
        knowledge_base.close()
        raise UserError(f'collection {settings.retrieval_collection!r} in {settings.retrieval_milvus_uri} has rows of '
                        f'version {found}, and this nanoRETRO reads version {VERSION}: fill another one')
    return knowledge_base


def open_to_read(settings):
    """The collection with the embedding model that made it; the model, which words do not need; and the tokenizer."""
    with closing(open_collection(settings)) as found:  # before a model is loaded for nothing
        settings = settings.replace(retrieval_index=found.metadata.index, retrieval_vectors=found.metadata.vectors)
        tokenizer, name = load_tokenizer(settings.tokenizer), settings.retrieval_embedding_model
        embedder = EmbedderInfo(name, None, None) if settings.retrieval_mode == 'bm25' else Embedder(
            name, pick_device(settings.device))
        return open_knowledge_base(settings, vocabulary_hash(tokenizer), embedder), embedder, tokenizer


def count_if_loaded(knowledge_base):
    """The number of rows; None while the index is being made anew, without which Milvus does not count them."""
    try:
        knowledge_base.load()
        return knowledge_base.count()
    except Unreachable:
        return None


def end_change(knowledge_base, settings, say):
    """Begin a new revision, with an index of its size, and bring the exact-match index to it, as populate does."""
    wait_for_milvus(lambda: knowledge_base.fit_index(say), knowledge_base.open, settings.retrieval_timeout, say)
    knowledge_base.flush()
    if settings.retrieval_pointers and knowledge_base.count():
        tokenizer = load_tokenizer(settings.tokenizer)
        open_match_index(settings, tokenizer, say, sys.stderr.isatty()).follow(knowledge_base)


def run_info(settings, arguments, _, say):
    with closing(open_collection(settings, any_version=True, load=False)) as knowledge_base:
        made_by, revision, rows = knowledge_base.metadata, knowledge_base.revision(), count_if_loaded(knowledge_base)
        folder = match_index_folder(settings, made_by.vocabulary_hash)
        found = dict(collection=settings.retrieval_collection, uri=settings.retrieval_milvus_uri, **vars(made_by),
                     rows=rows, revision=revision, bytes_on_disk=knowledge_base.size_on_disk(),
                     index_state=knowledge_base.describe_index(), matches=describe_matches(folder, revision, rows))
    if arguments.json:
        return print(to_json(found, default=str))
    size, index, matches = found['bytes_on_disk'], found['index_state'], found['matches']
    indexed = f', {index["indexed_rows"]:,} rows indexed' if 'indexed_rows' in index else ''
    lines = dict(
        collection=f'{found["collection"]} in {found["uri"]}',
        rows='not counted: the index is being made anew, or that was interrupted' if rows is None else f'{rows:,}',
        revision=revision or 'none: it is being changed, or changing it was interrupted',
        tokenizer=f'{made_by.tokenizer} ({made_by.vocabulary_hash})',
        chunks=f'of {made_by.chunk_size} tokens',
        embedding=f'{made_by.embedding_model} ({made_by.embedding_hash}), {made_by.dimension} dimensions',
        index=f'{made_by.index} {json.dumps(index.get("params", {}))}, {index.get("state", "state unknown")}{indexed}',
        size='a server does not tell' if size is None else f'{size / 1e6:,.1f} MB on disk',
        matches=f'{matches["state"]}' + (f': {matches["documents"]:,} documents, {matches["bytes"] / 1e6:,.1f} MB in '
                                         f'{folder}' if matches['bytes'] else ''),
        searched='by embeddings' if made_by.mode == 'dense' else 'by embeddings, by words and by both',
        version=made_by.version)
    for name, line in lines.items():
        print(f'{name:<12}{visible(str(line))}')


def describe_matches(folder, revision, rows):
    """The state of the exact-match index in a folder, without building it: a dict."""
    try:
        with open(os.path.join(folder, 'manifest.json'), encoding='utf-8') as file:
            manifest = json.load(file)
        segments = [os.path.join(folder, segment['name']) for segment in manifest['segments']]
        documents = sum(os.path.getsize(f'{path}/doc_ids.bin') // 8 - len(segment['masked'])
                        for path, segment in zip(segments, manifest['segments'], strict=True))
        size = sum(os.path.getsize(entry) for path in segments for entry in os.scandir(path))
        is_current = manifest['revision'] == state_of(revision, rows)
        state = 'up to date' if is_current else 'of an earlier revision, and follows when it is needed'
        return dict(state=state, documents=documents, bytes=size)
    except (OSError, ValueError, KeyError, TypeError):
        return dict(state='none yet: populate and runs with retrieval_pointers build it', documents=0, bytes=0)


def run_stats(settings, arguments, _, say):
    with closing(open_collection(settings)) as knowledge_base:
        C, parts, size = knowledge_base.metadata.chunk_size, [], 0
        for rows in knowledge_base.all_rows(('doc_id', 'position', 'text', 'tokens')):
            parts.append(np.array([(row['doc_id'], row['position'], min(len(row['tokens']), C)) for row in rows],
                                  dtype=np.int64).reshape(-1, 3))
            size += sum(len(row['text'].encode()) for row in rows)
        table = np.concatenate(parts)
        doc_ids, inverse, chunks = np.unique(table[:, 0], return_inverse=True, return_counts=True)
        length = np.zeros(len(doc_ids), dtype=np.int64)
        np.maximum.at(length, inverse, table[:, 1] + 1)
        longest = doc_ids[np.argsort(-chunks, kind='stable')[:5]]
        names = knowledge_base.rows_at([(d, int(table[table[:, 0] == d, 1].min())) for d in longest.tolist()],
                                       ['document'])
        names = {doc_id: row['document'] for (doc_id, _), row in names.items()}
    found = dict(
        rows=len(table), documents=len(doc_ids), chunks_per_document=spread(chunks), tokens=int(table[:, 2].sum()),
        tokens_per_chunk=spread(table[:, 2]), text_bytes=size, chunks_without_row=int((length - chunks).sum()),
        longest=[dict(document=names.get(d), doc_id=d, chunks=int(chunks[doc_ids == d][0])) for d in longest.tolist()])
    if arguments.json:
        return print(to_json(found))
    print(f'{found["documents"]:,} documents in {found["rows"]:,} rows, {found["tokens"]:,} tokens, {size:,} bytes of '
          f'text; {found["chunks_without_row"]:,} chunks without text of their own are no rows')
    for name in ('chunks_per_document', 'tokens_per_chunk'):
        print(f'{name.replace("_", " "):<20} ' + ', '.join(f'{key} {value:,}' for key, value in found[name].items()))
    for document in found['longest']:
        print(f'{document["chunks"]:>8,} chunks  {visible(str(document["document"]))}')


def spread(values):
    """{name: value} of how integers (n,) are spread."""
    if not len(values):
        return {}
    return dict(least=int(values.min()), median=int(np.median(values)), mean=round(float(values.mean()), 1),
                p90=int(np.percentile(values, 90)), most=int(values.max()))


def run_search(settings, arguments, words, say):
    text, = words
    if not text.strip():
        raise UserError('the text to search for is empty: give some')
    knowledge_base, embedder, tokenizer = open_to_read(settings)
    with closing(knowledge_base):
        mode = knowledge_base.metadata.mode
        vectors = None if mode == 'bm25' else embedder.embed([text])
        if vectors is not None and not vectors.any():
            raise UserError(f'the embedding model maps {text!r} to zero, so nothing is near it: give a longer text')
        hits = knowledge_base.search(vectors, arguments.k, texts=[text])[0]
        hits = hits[hits['score'] > -np.inf]
        rows = knowledge_base.rows(hits['id'], FIELDS)
        C, end = knowledge_base.metadata.chunk_size, tokenizer.eot_token
    found = []
    for hit in hits[[hit['id'] in rows for hit in hits]]:  # others have been removed since
        row = rows[hit['id']]
        found.append(dict(document=row['document'], chunk=row['position'] + 1, score=round(float(hit['score']), 4),
                          text=row['text'], continuation=tokenizer.decode([t for t in row['tokens'][C:] if t != end]),
                          doc_id=row['doc_id'], id=row['id']))
    if arguments.json:
        return print(to_json(dict(text=text, neighbors=found), ensure_ascii=False))
    for rank, neighbor in enumerate(found, 1):
        print(f'{rank}. {visible(neighbor["document"])}, chunk {neighbor["chunk"]}, '
              f'{describe_score(mode, neighbor["score"])}\n{indented(neighbor["text"])}')
        if neighbor['continuation']:
            print(f'   then:\n{indented(neighbor["continuation"])}')


def indented(text):
    return '\n'.join(f'   | {line}' for line in visible(text).split('\n'))


def run_add(settings, arguments, words, say):
    datasets = [dataset_of(path, settings, arguments) for path in words]
    open_collection(settings).close()  # it has to be there
    with writing(settings):
        # by populate, so rows are those that it would write
        done, _ = populate(settings.replace(train_datasets=datasets), sys.stderr.isatty(), say=say)
    print(f'collection {settings.retrieval_collection!r} in {settings.retrieval_milvus_uri}: {done["added"]:,} of '
          f'{done["chunks"]:,} chunks were written now, {done["changed"]:,} documents had changed; it has '
          f'{done["after"]:,}')


def dataset_of(path, settings, arguments):
    """The DatasetConfig of a file: its fields are those of the entry of train_datasets that holds it, if one does."""
    config, place = DatasetConfig(path), os.path.realpath(os.path.expanduser(path))
    for entry in as_dataset_configs(settings.train_datasets, 'train_datasets') if settings.train_datasets else []:
        folder, held = os.path.realpath(os.path.expanduser(entry.path)), set()
        with suppress(UserError):  # it may be missing
            held = {os.path.realpath(file) for file in find_files(entry).paths}
        if place == folder or place.startswith(folder + os.sep) or place in held:
            config = replace(entry, path=path, max_documents=0)
    given = {name: getattr(arguments, name) for name in ('source', 'text_field', 'id_field')}
    return replace(config, **{name: value for name, value in given.items() if value is not None})


def run_remove(settings, arguments, words, say):
    with closing(open_collection(settings)) as knowledge_base, writing(settings):
        doc_ids = {name: find_document(knowledge_base, name) for name in dict.fromkeys(arguments.doc)}
        unknown = [name for name, doc_id in doc_ids.items() if doc_id is None]
        if unknown:
            if knowledge_base.revision() is None:  # a removal was killed
                end_change(knowledge_base, settings, say)
            raise UserError(f'no document {", ".join(map(repr, unknown))} in collection '
                            f'{settings.retrieval_collection!r}, and nothing was removed: name documents as python -m '
                            f'retrieval.kb search shows them, with their source')
        before = knowledge_base.count()
        for doc_id in doc_ids.values():
            knowledge_base.delete_from(doc_id, 0)
        end_change(knowledge_base, settings, say)
        after = knowledge_base.count()
    print(f'removed: {before - after:,} chunks of {len(doc_ids):,} documents; {after:,} chunks remain')


def find_document(knowledge_base, name):
    """The doc_id of a document by its name or by its doc_id; None if there is none. UserError if there are several."""
    doc_ids = knowledge_base.documents_named(name[:256])
    if not doc_ids and name.lstrip('-').isdigit() and abs(int(name)) < 2**63:
        doc_ids = knowledge_base.which_documents({int(name): 0})
    if len(doc_ids) > 1:
        raise UserError(f'{len(doc_ids)} documents are called {name!r}, and nothing was removed: give the doc_id of '
                        f'one, {", ".join(map(str, sorted(doc_ids)))}')
    return next(iter(doc_ids), None)


def run_export(settings, arguments, words, say):
    path, = words
    with closing(open_collection(settings)) as knowledge_base:
        rows, size = export_rows(knowledge_base, path, sys.stderr.isatty())
    print(f'{path}: {rows:,} rows, {size / 1e6:,.1f} MB; its embedding model, '
          f'{knowledge_base.metadata.embedding_model!r}, is not in it')


def run_import(settings, arguments, words, say):
    path, = words
    with writing(settings):
        done, settings, knowledge_base = import_rows(path, settings, arguments.named, say, sys.stderr.isatty())
        with closing(knowledge_base):
            if done['added'] or done['removed'] or knowledge_base.revision() is None:
                end_change(knowledge_base, settings, say)
            after = knowledge_base.count()
    print(f'collection {settings.retrieval_collection!r} in {settings.retrieval_milvus_uri}: {done["added"]:,} of the '
          f'{done["rows"]:,} rows of {path} were written now, {done["removed"]:,} removed; it has {after:,}')


def run_validate(settings, arguments, words, say):
    k = arguments.k or settings.retrieval_k_neighbors or 2
    # words have no exact search to compare with
    knowledge_base, embedder, tokenizer = open_to_read(settings.replace(retrieval_mode='dense'))
    with closing(knowledge_base):
        doc_ids, texts = val_chunks(settings, tokenizer, arguments.chunks, say)
        state = knowledge_base.state()
        vectors = embedder.embed(texts)
        doc_ids, vectors = doc_ids[vectors.any(axis=1)], vectors[vectors.any(axis=1)]
        if not len(vectors):
            raise UserError('the val text has no chunk that could be searched for: name other val_datasets')

        def find_hits(wanted, stage, excluded=()):
            found = search_stage(knowledge_base, vectors[wanted], doc_ids[wanted], stage, k + SPARE, excluded)
            return found, np.ones(len(wanted), dtype=bool)
        numbers = np.arange(len(vectors))
        hits, _ = hits_without_leaks(find_hits, numbers, numbers, doc_ids[:, None], k, k + SPARE)
        best, of_hits, rows, without, copies = scan(knowledge_base, vectors, doc_ids, hits['id'], k)
        if knowledge_base.state() != state:
            raise UserError('the collection has changed while it was validated: start again when it is complete')
    is_hit, is_there = hits['score'] > -np.inf, best > -np.inf
    # of equally near rows, any counts
    is_right = is_hit & (of_hits >= np.where(is_there, best, np.inf).min(1, keepdims=True) - TIE)
    recall = float(is_right.sum() / max(1, is_there.sum()))
    fewer = float((is_hit.sum(1) < k).mean())
    found = dict(recall_at_k=round(recall, 4), k=k, chunks=len(vectors), least=arguments.least,
                 fewer_than_k=round(fewer, 4), rows=rows, duplicates=copies, without_embedding=without,
                 is_good=recall >= arguments.least and not without)
    if arguments.json:
        print(to_json(found))
    else:
        print(f'recall@{k} {recall:.4f} against exact search, of {len(vectors):,} val chunks, their own documents left '
              f'out\n{fewer:.2%} of them have fewer than {k} neighbors\n{rows:,} rows: {copies:,} repeat the text of '
              f'another, {without:,} have no embedding')
        if recall < arguments.least:
            print(f'recall is below {arguments.least}: search further, by retrieval_search_params, or use another '
                  f'retrieval_index')
        if without:
            print('rows without an embedding are never found: remove their documents, and run python -m '
                  'retrieval.populate CONFIG')
    sys.exit(0 if found['is_good'] else 1)


def val_chunks(settings, tokenizer, count, say):
    """doc_ids (n,) and texts of up to `count` chunks of the val documents, spread evenly, that retrieval would ask."""
    datasets = open_datasets(as_dataset_configs(settings.val_datasets, 'val_datasets'), tokenizer, settings, say,
                             head=2 * count * settings.retrieval_chunk_size)  # tokens of those that are streamed
    total, doc_ids, texts = sum(dataset.num_chunks for dataset in datasets), [], []
    for dataset in datasets:
        some = max(1, min(dataset.num_chunks, -(-2 * count * dataset.num_chunks // total)))  # not all can be asked for
        chunks = dataset.read(np.linspace(0, dataset.num_chunks - 1, some).astype(np.int64))
        for tokens, doc_id, is_last in zip(chunks.tokens.tolist(), chunks.doc_ids, chunks.is_last_chunk, strict=True):
            text = tokenizer.decode(tokens)
            if not is_last and text.strip():
                doc_ids.append(doc_id)
                texts.append(text)
    chosen = np.linspace(0, len(texts) - 1, min(count, len(texts))).astype(np.int64) if texts else []
    return np.array(doc_ids, dtype=np.int64)[chosen], [texts[i] for i in chosen]


def scan(knowledge_base, vectors, doc_ids, hit_ids, k):
    """
    By reading all rows: exact scores of the k rows (n, k) nearest to vectors (n, D) that are of other documents than
    doc_ids (n,), of the rows hit_ids (n, k), the number of rows, of those without an embedding, and of those whose
    tokens an earlier one has.
    """
    best, of_hits = np.full((len(vectors), k), -np.inf), np.full(hit_ids.shape, -np.inf)
    C, count, without, texts = knowledge_base.metadata.chunk_size, 0, 0, []
    for rows in knowledge_base.all_rows(('doc_id', 'tokens', 'embedding'), PART):
        if not rows:
            continue
        found = np.array([row['embedding'] for row in rows], dtype=np.float32)
        ids, owners = (np.array([row[name] for row in rows], dtype=np.int64) for name in ('id', 'doc_id'))
        count += len(rows)
        without += int((~(np.linalg.norm(found, axis=1) > 0.5)).sum())  # NaN, too
        texts.append([hash(tuple(row['tokens'][:C])) for row in rows])
        scores = vectors @ np.nan_to_num(found).T
        place = np.argsort(ids)
        at = place[np.minimum(np.searchsorted(ids, hit_ids, sorter=place), len(ids) - 1)]
        of_hits = np.where(ids[at] == hit_ids, np.take_along_axis(scores, at, axis=1), of_hits)
        scores[owners[None] == doc_ids[:, None]] = -np.inf
        best = -np.sort(-np.concatenate([best, -np.sort(-scores, axis=1)[:, :k]], axis=1), axis=1)[:, :k]
    every = np.concatenate([np.array(part, dtype=np.int64) for part in texts] or [np.zeros(0)])
    return best, of_hits, count, without, len(every) - len(np.unique(every))


def run_drop(settings, arguments, words, say):
    with closing(open_collection(settings, any_version=True, load=False)) as knowledge_base, writing(settings):
        rows = count_if_loaded(knowledge_base)
        folder = match_index_folder(settings, knowledge_base.metadata.vocabulary_hash)
        what = (f'collection {settings.retrieval_collection!r} in {settings.retrieval_milvus_uri}'
                + ('' if rows is None else f', {rows:,} rows')
                + f'; its exact-match index in {folder}' * os.path.isdir(folder) + '; its neighbors in the cache')
        if not arguments.yes:
            raise UserError(f'this would remove {what}: give --yes to do it')
        knowledge_base.drop()
        shutil.rmtree(folder, ignore_errors=True)
        if os.path.isfile(os.path.join(settings.retrieval_cache_dir, DATA)) and settings.retrieval_cache_gb > 0:
            with closing(NeighborCache(settings.retrieval_cache_dir, settings.retrieval_cache_gb, cache_name(settings),
                                       [])) as cache:
                cache.drop()
    print(f'removed: {what}')


if __name__ == '__main__':
    with user_errors_as_one_line():
        main()
