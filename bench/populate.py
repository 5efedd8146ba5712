"""
How well populate overlaps its stages: reading, embedding and inserting each alone over the same documents, then the
command itself. Prints a table and one JSON line.

    python bench/populate.py config/quickstart.py [--quick]
"""
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from system import pick_device

from configurator import load_settings, user_errors_as_one_line
from data.documents import as_dataset_configs, load_documents
from data.fingerprint import describe_corpus
from data.tokenizer import load_tokenizer, vocabulary_hash
from retrieval.embedding import Embedder
from retrieval.knowledge_base import open_knowledge_base
from retrieval.populate import populate, read_batches


def stages_alone(settings):
    """Seconds of each stage over all documents, one after another, and the number of chunks."""
    tokenizer = load_tokenizer(settings.tokenizer)
    documents = load_documents(as_dataset_configs(settings.train_datasets, 'train_datasets'))
    embedder = Embedder(settings.retrieval_embedding_model, pick_device(settings.device))
    embedder.embed(['warm up'])
    start = time.perf_counter()
    batches = list(read_batches(documents, tokenizer, settings.retrieval_chunk_size))
    read = time.perf_counter()
    vectors = [embedder.embed(rows.text) for rows in batches]
    embedded = time.perf_counter()
    knowledge_base = open_knowledge_base(settings, vocabulary_hash(tokenizer), embedder, create=True)
    opened = time.perf_counter()
    for rows, embeddings in zip(batches, vectors, strict=True):
        knowledge_base.upsert(rows.to_dicts(embeddings))
    knowledge_base.flush()
    inserted = time.perf_counter()
    knowledge_base.close()
    return (dict(read=read - start, embed=embedded - read, insert=inserted - opened),
            sum(len(rows.id) for rows in batches))


def main():
    arguments = [a for a in sys.argv[1:] if a != '--quick']
    settings = load_settings(arguments)
    with tempfile.TemporaryDirectory() as folder:
        if '--quick' in sys.argv:
            settings = settings.replace(train_datasets=settings.val_datasets)
        alone, chunks = stages_alone(settings.replace(retrieval_milvus_uri=f'{folder}/alone.db'))
        done, seconds = populate(settings.replace(retrieval_milvus_uri=f'{folder}/together.db'), show_progress=False)
    assert done['added'] == chunks
    rates = {stage: chunks / alone[stage] for stage in alone} | dict(all=chunks / seconds['all'])
    slowest = min(alone, key=lambda stage: rates[stage])
    corpus = describe_corpus(settings.train_datasets)
    print(f'{chunks:,} chunks of {corpus}\n')
    for stage in ('read', 'embed', 'insert'):
        print(f'{stage + " alone":<24} {rates[stage]:>10,.0f} chunks/s')
    print(f'{"all, overlapped":<24} {rates["all"]:>10,.0f} chunks/s, {rates["all"] / rates[slowest]:.0%} of {slowest}')
    print(json.dumps(dict(corpus=corpus, chunks=chunks, **{k: round(v) for k, v in rates.items()}, slowest=slowest,
                          all_over_slowest=round(rates['all'] / rates[slowest], 3))))


if __name__ == '__main__':
    with user_errors_as_one_line():
        main()
