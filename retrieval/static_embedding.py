"""
Fits the offline embedding on the train documents and saves it as an ordinary SentenceTransformer folder, at
`retrieval_embedding_model`:

    python -m retrieval.static_embedding config/quickstart.py

Latent semantic analysis (Deerwester et al. 1990): chunks as tf-idf over BPE tokens, reduced by a truncated SVD. The
projection is linear in the token counts, so a chunk's vector is a sum of one vector per token. That is what
sentence-transformers' StaticEmbedding computes, at over 10,000 chunks a second on a CPU.
"""
import json
import os
import shutil
import sys
import time

import numpy as np

from configurator import UserError, load_settings, user_errors_as_one_line
from data.chunk_store import open_datasets
from data.conversations import check_documents
from data.documents import as_dataset_configs, check_sides
from data.tokenizer import load_tokenizer, tokenizer_json

DIMENSION = 192
FIT_CHUNKS = 60_000  # more change the vectors little and take longer


def count_tokens(chunks, vocabulary, end_of_text):
    """chunks (N, C) to a sparse matrix of token counts (N, V), without end-of-text and padding."""
    from scipy.sparse import csr_matrix
    rows = np.repeat(np.arange(len(chunks)), chunks.shape[1])
    counts = csr_matrix((np.ones(chunks.size, dtype=np.float32), (rows, chunks.reshape(-1))),
                        shape=(len(chunks), vocabulary))  # sums repeated entries
    keep = np.ones(vocabulary, dtype=np.float32)
    keep[end_of_text] = 0
    return counts.multiply(keep).tocsr()


def fit(counts, seed=0):
    """Token vectors (V, D) whose sum over a chunk's tokens, normalized, is the chunk's tf-idf reduced by SVD."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfTransformer
    tfidf = TfidfTransformer()
    weighted = tfidf.fit_transform(counts)
    dimension = min(DIMENSION, min(counts.shape) - 1)
    svd = TruncatedSVD(dimension, n_iter=3, random_state=seed).fit(weighted)
    vectors = np.ascontiguousarray(tfidf.idf_[:, None] * svd.components_.T, dtype=np.float32)  # to be saved
    vectors[np.asarray(counts.sum(axis=0)).ravel() == 0] = 0  # not the rounding errors of zero, which have directions
    return vectors


def save(vectors, tokenizer, folder):
    """Save the token vectors (V, D) as a SentenceTransformer folder, complete or not at all. `tokenizer` is JSON."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
    from tokenizers import Tokenizer
    model = SentenceTransformer(modules=[StaticEmbedding(Tokenizer.from_str(tokenizer),
                                                         embedding_weights=vectors), Normalize()], device='cpu')
    tmp_folder = folder.rstrip('/') + '.tmp'
    shutil.rmtree(tmp_folder, ignore_errors=True)
    model.save(tmp_folder, create_model_card=False)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(tmp_folder, folder)


def read_some(datasets, count):
    """About `count` chunks (N, C) of ChunkedDatasets, of each its share, and of how many documents they are."""
    share = min(1.0, count / sum(dataset.num_chunks for dataset in datasets))
    chunks, documents = [], 0
    for dataset in datasets:
        wanted = round(share * dataset.num_chunks)
        for block in dataset.blocks():
            if wanted <= 0:
                break
            found = dataset.read(block)
            chunks.append(found.tokens)
            documents += int((found.positions == 0).sum())
            wanted -= len(block)
    return np.concatenate(chunks), documents


def is_static_embedding(folder):
    try:
        with open(os.path.join(folder, 'modules.json'), encoding='utf-8') as file:
            return json.load(file)[0]['type'].endswith('StaticEmbedding')
    except OSError:
        return False


def fit_embedding(settings):
    """Fit it on the train documents of the settings, and save it where they say."""
    check_documents(settings)
    folder = settings.retrieval_embedding_model
    if folder == load_settings([]).retrieval_embedding_model:
        raise UserError(f'retrieval_embedding_model is {folder!r}, a model of the hub: name a folder to save the '
                        f'static embedding in, such as out/static_embedding')
    if os.path.exists(folder) and not is_static_embedding(folder):
        raise UserError(f'retrieval_embedding_model {folder!r} exists and was not made by this command: name a new '
                        f'folder')
    start = time.time()
    tokenizer = load_tokenizer(settings.tokenizer)
    configs = as_dataset_configs(settings.train_datasets, 'train_datasets')
    if settings.val_datasets:
        check_sides(configs, as_dataset_configs(settings.val_datasets, 'val_datasets'))
    datasets = open_datasets(configs, tokenizer, settings, head=FIT_CHUNKS * settings.retrieval_chunk_size)
    chunks, documents = read_some(datasets, FIT_CHUNKS)
    if len(chunks) < 3:
        raise UserError(f'{len(chunks)} chunks are too few to fit an embedding on: train_datasets need more text')
    counts = count_tokens(chunks, tokenizer.n_vocab, tokenizer.eot_token)
    vectors = fit(counts)
    save(vectors, tokenizer_json(settings.tokenizer, tokenizer), folder)
    print(f'fitted {vectors.shape[0]:,} token vectors of {vectors.shape[1]} dimensions on {documents:,} documents, '
          f'{len(chunks):,} chunks: {folder} | {time.time() - start:.0f} s')


if __name__ == '__main__':
    with user_errors_as_one_line():
        fit_embedding(load_settings(sys.argv[1:]))
