"""Passages for questions, from a real collection of real text, in Milvus Lite and on a Milvus server."""
from contextlib import closing
from itertools import pairwise

import numpy as np
import pytest

from configurator import UserError
from data.chunking import chunk_document, document_hash
from data.documents import as_dataset_configs, load_documents
from data.tokenizer import load_tokenizer, tokenize
from retrieval.passages import PassageFinder
from tests.conftest import BACKENDS, CHUNK, run

QUESTIONS = ['How do I remove the common indentation of lines?', 'Which day of the week is it?', 'parse a JSON number',
             'What does heappush do?', 'naïve 中文?', '?']


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def tokenizer(settings):
    return load_tokenizer(settings.tokenizer)


def documents_of(settings):
    return list(load_documents(as_dataset_configs(settings.train_datasets, 'train_datasets')))


def test_passages_are_those_of_an_exhaustive_search_without_ones_own_document(settings, tokenizer, workspace, backend):
    """Computed here from the texts, with no database, for a model without neighbors; the collection is exact."""
    run('-m', 'retrieval.populate', 'config.py', '--retrieval_collection=exact', '--retrieval_index=FLAT',
        *['--retrieval_mode=hybrid'] * (backend == 'lite'), folder=workspace)
    settings = settings.replace(retrieval_collection='exact', retrieval_index='FLAT', retrieval_k_neighbors=0,
                                num_passages=3)
    texts, passages, owners = [], [], []
    for document in documents_of(settings):
        chunks, _ = chunk_document(tokenize(document.text, tokenizer), CHUNK, tokenizer.eot_token)
        parts = [[t for t in row if t != tokenizer.eot_token] for row in chunks.tolist()]
        texts += [tokenizer.decode(part) for part in parts]
        passages += [tokenizer.decode(part + after).strip('\ufffd')
                     for part, after in pairwise([*parts, []])]
        owners += [(f'stdlib/{document.id}', place) for place in range(len(parts))]
    own = ['textwrap', 'calendar', 'json.decoder', 'heapq', 'none', 'none']  # two have none
    left_out = 0
    with closing(PassageFinder(settings, tokenizer)) as finder:
        found = finder.find(QUESTIONS, [document_hash('stdlib', name) for name in own])
        anywhere = finder.find(QUESTIONS)
        vectors = finder.embedder.embed(texts)
        for question, name, some, more in zip(QUESTIONS, own, found, anywhere, strict=True):
            scores = vectors @ finder.embedder.embed([question])[0]
            for left, answer in ((f'stdlib/{name}', some), ('', more)):
                expected = []
                for i in np.argsort(-scores, kind='stable'):
                    document, place = owners[i]
                    near = [owners[j] for j in expected if owners[j][0] == document]
                    if (document != left and passages[i].strip() and passages[i] not in [passages[j] for j in expected]
                            and not any(abs(place - other) < 2 for _, other in near)):
                        expected.append(i)
                    if len(expected) == 3:
                        break
                if np.diff(np.sort(-scores)[:12]).min() > 1e-5:  # else the order of equal ones is the database's
                    assert [(p.title, p.text) for p in answer] == [(owners[i][0], passages[i]) for i in expected]
                assert len(answer) == 3 and left not in [p.title for p in answer]
            left_out += f'stdlib/{name}' in [p.title for p in more]
    assert left_out > 1  # the leak rule had something to do
    for mode in ('bm25', 'hybrid') if backend == 'lite' else ():  # this version of the server has no search by words
        with closing(PassageFinder(settings.replace(retrieval_mode=mode), tokenizer)) as finder:
            (passage, *_), nothing = finder.find(['What does heappushpop return?', '...'])
            assert passage.title == 'stdlib/heapq' and 'heappushpop' in passage.text
            assert (nothing == []) == (mode == 'bm25')  # there are no words
            assert finder.find([]) == []
            others, = finder.find(['What does heappushpop return?'], [document_hash('stdlib', 'heapq')])
            assert others and 'stdlib/heapq' not in [p.title for p in others]


def test_a_large_own_document_hides_nothing(settings, tokenizer):
    """So many of its chunks are nearer that the first searches find no other."""
    questions = ['calendar week month year day weekday first of the month']
    with closing(PassageFinder(settings.replace(num_passages=60), tokenizer)) as finder:
        titles = [p.title for p in finder.find(questions, [document_hash('stdlib', 'calendar')])[0]]
    assert len(titles) == 60 and 'stdlib/calendar' not in titles


def test_what_cannot_be_meant_is_refused(settings, tokenizer):
    with pytest.raises(UserError, match='retrieval_offline is True'):
        PassageFinder(settings.replace(num_passages=2, retrieval_offline=True), tokenizer)
    with pytest.raises(UserError, match="no collection 'none'"):
        PassageFinder(settings.replace(num_passages=2, retrieval_collection='none'), tokenizer)
