"""The model's pointers, into the knowledge base and into the own context: tokens that came next at a match."""
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.corpus import val_batches
from data.tokenizer import load_tokenizer
from model import (
    GROWTH,
    LONGEST,
    OCTAVE,
    OWN_LENGTHS,
    OWN_PLACES,
    OWN_POINTERS,
    RETRO,
    RETROConfig,
    own_pointers,
)
from retrieval import suffix_array
from tests.conftest import open_all
from tests.test_model import PAPER

B, T, C, P, V = 2, 12, 4, 3, 50
MIXED = dict(token_mix=True, copy_own_context=True, retrieval_pointers=P, retrieval_encoder_layers=0,
             retrieval_copy=True)


def make_model(**changes):
    torch.manual_seed(0)
    model = RETRO(RETROConfig(**PAPER | dict(block_size=T, vocab_size=V, n_layer=3, n_head=2, n_embd=16,
                                             retrieval_layers=[2, 3], retrieval_chunk_size=C, retrieval_k_neighbors=2)
                              | MIXED | changes))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def make_pointers():
    torch.manual_seed(1)
    pointers = torch.stack([torch.randint(n, (B, T, P)) for n in (V, LONGEST + 1, 128)], dim=-1)
    pointers[..., 0] = torch.argsort(torch.rand(B, T, V))[..., :P]  # distinct
    pointers[:, :, 0, 1] += pointers[:, :, 0, 1] == 0
    return torch.randint(V, (B, T)), pointers


def test_a_pointer_changes_the_prediction_at_its_own_position_alone():
    model, (tokens, pointers) = make_model(), make_pointers()
    logits, _ = model(tokens, pointers=pointers)
    for t in range(T):
        other = pointers.clone()
        other[:, t, 0, 0] = (other[:, t, 0, 0] + 1) % V
        is_changed = (model(tokens, pointers=other)[0] != logits).any(-1)
        assert is_changed[:, t].all() and is_changed.sum() == B


def test_predictions_with_pointers_sum_to_one_and_are_the_mixture_of_both():
    model, (tokens, pointers) = make_model(), make_pointers()
    log_p, _ = model(tokens, pointers=pointers)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(B, T))
    decoder, scores = model.mixture(model.hidden(tokens), pointers)
    torch.testing.assert_close(decoder.exp().sum(-1) + scores.exp().sum(-1), torch.ones(B, T))
    expected = model(tokens)[0].softmax(-1) * decoder.exp()
    for b, t, p in np.ndindex(B, T, P):
        expected[b, t, pointers[b, t, p, 0]] += scores[b, t, p].exp()
    torch.testing.assert_close(log_p.exp(), expected)


@pytest.mark.parametrize('reduction', ['mean', 'sum'])
def test_the_loss_with_pointers_is_that_of_the_predictions_and_the_decoders_gradient_that_without(reduction):
    model, (tokens, pointers) = make_model(), make_pointers()
    targets = pointers[:, :, 1, 0].clone()  # often named
    targets[0, :5] = -1
    loss = model(tokens, targets, pointers=pointers, loss_reduction=reduction)[1]
    log_p, _ = model(tokens, pointers=pointers)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(log_p.flatten(0, 1), targets.flatten(),
                                                                       ignore_index=-1, reduction=reduction))
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(tokens, targets, loss_reduction=reduction)[1].backward()
    for name, parameter in model.named_parameters():
        if name.startswith('mixture'):
            assert gradients[name].abs().max() > 0 and parameter.grad is None
        elif parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradients[name])


def test_pointers_without_a_match_change_nothing_and_nothing_is_not_finite():
    model, (tokens, pointers) = make_model(), make_pointers()
    off, _ = model(tokens)
    pointers[..., 1] = 0
    torch.testing.assert_close(model(tokens, pointers=pointers)[0], off.log_softmax(-1))
    loss = model(tokens, tokens, pointers=pointers)[1]
    torch.testing.assert_close(loss, model(tokens, tokens)[1])
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_length_and_share_of_a_pointer_count():
    model, (tokens, pointers) = make_model(), make_pointers()
    logits, _ = model(tokens, pointers=pointers)
    for part, size in ((1, LONGEST), (2, OCTAVE * 16)):
        other = pointers.clone()
        other[..., part] = (other[..., part] + size // 2) % size + 1
        assert not torch.allclose(model(tokens, pointers=other)[0], logits)


def test_a_decoder_with_pointers_starts_as_the_gpt():
    torch.manual_seed(0)
    config = dict(block_size=T, vocab_size=V, n_layer=3, n_head=2, n_embd=16, retrieval_k_neighbors=0)
    models = []
    for use_retrieval in (False, True):
        torch.manual_seed(0)
        models.append(RETRO(RETROConfig(**PAPER | MIXED | config | dict(use_retrieval=use_retrieval))))
    names = [dict(model.named_parameters()) for model in models]
    assert names[1].keys() - names[0].keys() == {'mixture.score.weight', 'mixture.score.bias'}
    assert all((names[0][name] == names[1][name]).all() for name in names[0])


def test_pointers_and_neighbors_are_both_either_or_none():
    tokens, pointers = make_pointers()
    neighbors, mask = torch.randint(V, (B, 3, 2, 2 * C)), torch.ones(B, 3, 2, 2 * C, dtype=torch.bool)
    for k, p in ((2, P), (2, 0), (0, P), (0, 0)):
        model = make_model(retrieval_k_neighbors=k, retrieval_pointers=p)
        off, _ = model(tokens)
        assert torch.allclose(model(tokens, None, neighbors, mask)[0], off) == (k == 0)
        assert torch.allclose(model(tokens, pointers=pointers)[0], off) == (p == 0)


def test_a_new_model_learns_to_follow_pointers_that_are_right_and_to_ignore_those_that_are_not():
    for is_right in (True, False):
        torch.manual_seed(0)
        model = RETRO(RETROConfig(**PAPER | MIXED | dict(block_size=T, vocab_size=V, n_layer=2, n_head=2, n_embd=16,
                                                         retrieval_k_neighbors=0)))
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
        for _ in range(150):
            tokens, targets = torch.randint(V, (2, B, T))  # nothing but the pointer tells which
            named = targets if is_right else (targets + 1) % V
            pointers = torch.stack([named, torch.full_like(named, 5), torch.full_like(named, 8)], dim=-1)[:, :, None]
            loss = model(tokens, targets, pointers=pointers)[1]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss < 0.5 if is_right else abs(loss - model(tokens, targets)[1]) < 0.1


def test_generate_asks_for_pointers_at_every_token_and_is_the_full_forward():
    model, calls = make_model(), []

    def point(tokens):
        calls.append(tokens.shape[1])
        return torch.stack([(tokens * 7 + n) % V for n in range(P)] + [tokens % LONGEST + 1] * P
                           + [tokens] * P, dim=-1).unflatten(-1, (3, P)).mT
    start = torch.randint(V, (B, 2))
    tokens = model.generate(start, T - 2, point=point, temperature=0)
    assert calls == list(range(2, T))
    logits, _ = model(tokens, pointers=point(tokens))
    assert (logits[:, 1:-1].argmax(-1) == tokens[:, 2:]).all()


def slow_own_pointers(tokens, documents):
    """The same by its definition, with Python's sets: a list of (token, longest, bucket) for each position."""
    found = []
    for t in range(len(tokens)):
        weights, longest = Counter(), Counter()
        for shorter, n in pairwise((0, *OWN_LENGTHS)):
            places = [j for j in range(n - 1, t) if tokens[j - n + 1:j + 1] == tokens[t - n + 1:t + 1]
                      and len(set(documents[t - n + 1:t + 1] + documents[j - n + 1:j + 1])) == 1]
            for j in places[::-1][:OWN_PLACES]:
                weights[tokens[j + 1]] += np.exp(GROWTH * n) - (np.exp(GROWTH * shorter) if shorter else 0)
                longest[tokens[j + 1]] = n
        total = sum(weights.values())
        found.append({token: (longest[token], weight / total) for token, weight in weights.items()})
    return found


@given(st.integers(1, 30), st.integers(1, 4), st.integers(0, 2**31))
def test_own_pointers_equal_their_definition(chunks, vocabulary, seed):
    torch.manual_seed(seed)
    tokens = torch.randint(vocabulary, (2, chunks * C))
    documents = torch.randint(2, (2, chunks)).cumsum(1).repeat_interleave(C, 1)
    for line, of_line, ids in zip(own_pointers(tokens, documents), tokens.tolist(), documents.tolist(), strict=True):
        for given_pointers, expected in zip(line.tolist(), slow_own_pointers(of_line, ids), strict=True):
            pointers = [p for p in given_pointers if p[1]]
            assert len(pointers) == min(len(expected), OWN_POINTERS) and len({p[0] for p in pointers}) == len(pointers)
            for token, longest, bucket in pointers:
                assert longest == expected[token][0]
                assert abs(-OCTAVE * np.log2(expected[token][1]) - bucket) < 0.501
            assert [p[2] for p in pointers] == sorted(p[2] for p in pointers)  # the largest share first


def test_own_pointers_depend_on_no_later_token():
    tokens = torch.randint(5, (1, 64))
    whole = own_pointers(tokens)
    for t in range(1, 64):
        other = tokens.clone()
        other[:, t:] = (other[:, t:] + 1) % 5
        assert (own_pointers(other)[:, :t] == whole[:, :t]).all()
        assert (own_pointers(tokens[:, :t]) == whole[:, :t]).all()


def test_a_model_without_own_context_has_none_of_its_parameters_and_a_gpt_may_have_it():
    names = [{name for name, _ in make_model(copy_own_context=own, use_retrieval=False).named_parameters()}
             for own in (True, False)]
    assert names[1] < names[0] and all('.own.' in name for name in names[0] - names[1])


def test_pointers_compile_to_one_graph_with_the_same_loss_and_gradients():
    tokens, pointers = make_pointers()
    results = []
    for compiled in (False, True):
        model = make_model()
        call = torch.compile(model, backend='aot_eager', fullgraph=True) if compiled else model
        loss = call(tokens, tokens, pointers=pointers, doc_ids=torch.tensor([[1, 1, 2], [3, 4, 4]]))[1]
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(*results)


def test_lengths_and_shares_are_those_of_the_index():
    assert (LONGEST, OCTAVE) == (suffix_array.DEPTH, suffix_array.OCTAVE)


@pytest.mark.parametrize('options, said', [
    (dict(own_context_layers=[0]), r'own_context_layers \[0\] must be numbers from 1 to n_layer 3, but \[0\] are not'),
    (dict(n_embd=15, n_head=3, retrieval_copy=False), 'n_embd 15 must be a multiple of 2 for copy_own_context'),
])
def test_a_config_that_cannot_point_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        make_model(**options)


def test_pointers_lower_the_loss_of_real_text_that_the_collection_knows(settings):
    """A pointer names the next token of held-out source far more often than chance."""
    from retrieval.retriever import Retriever
    tokenizer = load_tokenizer(settings.tokenizer)
    retriever = Retriever(settings, tokenizer)
    batch, = val_batches(open_all(settings, 'val_datasets'), tokenizer, settings.block_size, 64, 4000)
    batch, = retriever.retrieve_for([batch])
    retriever.close()
    is_named = (batch.pointers[..., 0] == batch.targets[..., None]) & (batch.pointers[..., 1] > 0)
    assert is_named.any(-1)[batch.targets >= 0].mean() > 0.25
