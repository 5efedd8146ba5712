"""The network: masks, causality, equality with references. Tiny models with large random weights, so that whatever
should reach a logit does."""
import atexit
import math

import numpy as np
import pytest
import torch

from configurator import defaults_and_comments
from model import (
    RETRO,
    ChunkedCrossAttention,
    NeighborContext,
    RETROConfig,
    attend,
    chunk_windows,
    count_matches,
    document_starts,
)

C, L, K, V = 4, 3, 2, 50
R, T = 2 * C, C * L

# the paper's model, and those that copy, with and without an encoder
PAPER = dict(bias=True, token_mix=False, copy_own_context=False, retrieval_pointers=0, retrieval_copy=False,
             retrieval_encoder_layers=2)
OPTIONS = [{}, dict(token_mix=True, retrieval_copy=True, retrieval_encoder_layers=0),
           dict(token_mix=True, retrieval_copy=True), dict(retrieval_copy=True, retrieval_longest_match=0),
           dict(token_mix=True), dict(copy_own_context=True, retrieval_pointers=3)]  # beside PAPER
with_an_encoder = pytest.mark.parametrize('options', [OPTIONS[0], *OPTIONS[2:]],
                                          ids=['paper', 'copy+encoder', 'no match', 'mix', 'pointers'])
with_all_options = pytest.mark.parametrize('options', OPTIONS, ids=['paper', 'copy', 'copy+encoder', 'no match', 'mix',
                                                                     'pointers'])


def make_model(seed=0, **changes):
    torch.manual_seed(seed)
    config = RETROConfig(**{**PAPER, **dict(block_size=T, vocab_size=V, n_layer=3, n_head=2, n_embd=16,
                                            retrieval_layers=[2, 3], retrieval_chunk_size=C, retrieval_k_neighbors=K),
                            **changes})
    model = RETRO(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def make_batch(B=2, seed=1):
    torch.manual_seed(seed)
    return torch.randint(V, (B, T)), torch.randint(V, (B, L, K, R)), torch.ones(B, L, K, R, dtype=torch.bool)


def logits_and_embeddings(model, tokens, neighbors, mask, doc_ids=None):
    """Logits, and the embeddings of tokens and neighbors that they were computed from."""
    embeddings = {}
    wte = model.transformer.wte
    handle = wte.register_forward_hook(lambda _, inputs, output: embeddings.update({inputs[0].dim(): output}))
    logits, _ = model(tokens, None, neighbors, mask, doc_ids)
    handle.remove()
    return logits, embeddings[2], embeddings[3]


def as_context(encoded, mask):
    """Encoded neighbors (B, L, K * R, D) and their mask as the paper's cross-attention reads them."""
    B, L = encoded.shape[:2]
    mask = mask.reshape(B * L, K, R)
    return NeighborContext(mask.flatten(1).any(-1).view(B, L), mask, None, encoded.flatten(0, 1), None, None)


def reached_from(model, tokens, neighbors, mask, documents=None):
    """(T, L) which logits of one sequence change with the neighbors' tokens of which chunk."""
    logits, _ = model(tokens, None, neighbors, mask, documents)
    reached = torch.zeros(T, L, dtype=torch.bool)
    for u in range(L):
        other = neighbors.clone()
        other[:, u] = (other[:, u] + 1) % V
        reached[:, u] = (model(tokens, None, other, mask, documents)[0] != logits)[0].any(-1)
    return reached.tolist()


@with_all_options
def test_no_logit_depends_on_later_tokens_and_every_one_on_all_earlier(options):
    model = make_model(**options)
    logits, tokens, _ = logits_and_embeddings(model, *make_batch(B=1))
    for t in range(T):
        gradient, = torch.autograd.grad(logits[0, t].square().sum(), tokens, retain_graph=True)
        reached = gradient[0].abs().sum(-1) > 0
        assert reached.tolist() == [s <= t for s in range(T)]


@with_all_options
def test_a_logit_stays_the_same_to_the_bit_when_later_tokens_change(options):
    """Also where they change what matches, which no gradient tells."""
    model, (tokens, neighbors, mask) = make_model(**options), make_batch(B=1)
    logits, _ = model(tokens, None, neighbors, mask)
    for t in range(1, T):
        other = tokens.clone()
        other[:, t:] = neighbors[0, 0, 0].repeat(L)[:T - t]
        changed = (model(other, None, neighbors, mask)[0] != logits)[0].any(-1)
        assert not changed[:t].any()


@with_an_encoder
def test_neighbors_reach_no_position_before_their_chunks_last_token_and_that_one_first(options):
    model = make_model(**options)
    logits, _, neighbors = logits_and_embeddings(model, *make_batch(B=1))
    for t in range(T):
        gradient, = torch.autograd.grad(logits[0, t].square().sum(), neighbors, retain_graph=True)
        reached = gradient.view(L, -1).abs().sum(-1) > 0  # (L,)
        assert reached.tolist() == [t >= (u + 1) * C - 1 for u in range(L)]


@with_all_options
def test_neighbors_tokens_change_no_logit_before_their_chunks_last_token_and_that_one_first(options):
    """Also where no gradient tells: by how much of them matches, and what is copied without an encoder."""
    expected = [[t >= (u + 1) * C - 1 for u in range(L)] for t in range(T)]
    assert reached_from(make_model(**options), *make_batch(B=1)) == expected


def test_cross_attention_hands_a_chunks_neighbors_to_its_last_token_and_the_next_chunks_first_ones():
    cca = make_model().transformer.h[1].cca
    _, _, mask = make_batch(B=1)
    x, encoded = torch.randn(1, T, 16), torch.randn(1, L, K * R, 16, requires_grad=True)
    y = cca(x, as_context(encoded, mask))
    for t in range(T):
        gradient, = torch.autograd.grad(y[0, t].sum(), encoded, retain_graph=True)
        reached = gradient[0].abs().sum((-1, -2)) > 0
        assert reached.tolist() == [(u + 1) * C - 1 <= t <= (u + 2) * C - 2 for u in range(L)]


@with_all_options
def test_no_document_reads_tokens_or_neighbors_of_another(options):
    model = make_model(**options)
    tokens, neighbors, mask = make_batch(B=1)
    documents = torch.tensor([[7, 7, 8]])
    mask[:, 1] = False  # a document's last chunk retrieves nothing
    logits, embeddings, _ = logits_and_embeddings(model, tokens, neighbors, mask, documents)
    for t in range(T):
        gradient, = torch.autograd.grad(logits[0, t].square().sum(), embeddings, retain_graph=True)
        reached = (gradient[0].abs().sum(-1) > 0).nonzero().flatten().tolist()
        assert reached == list(range(2 * C, t + 1) if t >= 2 * C else range(t + 1))
    assert reached_from(model, tokens, neighbors, mask, documents) == [
        [t >= C - 1, False, False] if t < 2 * C else [False, False, t == T - 1] for t in range(T)]


@with_all_options
def test_what_matches_does_not_depend_on_the_document_before(options):
    """The neighbor holds the tokens around the documents' border, so that a longer match would reach over it."""
    model, (tokens, neighbors, mask) = make_model(**options), make_batch(B=1)
    documents = torch.tensor([[7, 7, 8]])
    mask[:, 1] = False
    neighbors[0, 2, 0, :6] = tokens[0, 2 * C - 2:]
    logits, _ = model(tokens, None, neighbors, mask, documents)
    other = tokens.clone()
    other[:, :2 * C] = (other[:, :2 * C] + 1) % V
    assert (model(other, None, neighbors, mask, documents)[0] == logits)[0, 2 * C:].all()


def slow_chunked_cross_attention(cca, x, encoded, mask):
    """Section 2.4 of the paper, token by token and head by head."""
    D, heads = x.shape[-1], cca.attn.n_head
    normed = cca.ln(x)
    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for u in range(encoded.shape[1]):
            keys, values = cca.attn.c_kv(encoded[b, u]).split(D, dim=-1)
            allowed = mask[b, u].nonzero().flatten().tolist()
            for t in range((u + 1) * C - 1, min((u + 2) * C - 1, x.shape[1])):
                if not allowed:
                    continue
                query = cca.attn.c_q(normed[b, t])
                parts = []
                for h in range(heads):
                    s = slice(h * D // heads, (h + 1) * D // heads)
                    scores = [query[s] @ keys[j, s] / math.sqrt(D // heads) for j in allowed]
                    weights = torch.stack(scores).softmax(0)
                    parts.append(sum(w * values[j, s] for w, j in zip(weights, allowed, strict=True)))
                out[b, t] = cca.attn.c_proj(torch.cat(parts))
    return out


@pytest.mark.parametrize('length', [T, T - 1, T + 2, 2 * T])
def test_chunked_cross_attention_equals_the_papers_equations(length):
    torch.manual_seed(2)
    cca = make_model().transformer.h[1].cca
    x, encoded = torch.randn(2, length, 16), torch.randn(2, length // C, K * R, 16)
    mask = torch.rand(2, length // C, K * R) < 0.6
    mask[0, 1] = False
    torch.testing.assert_close(cca(x, as_context(encoded, mask)), slow_chunked_cross_attention(cca, x, encoded, mask),
                               rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('S, masked', [(8, 'keys'), (8, 'pairs'), (8, 'causal'), (5, 'no')])
def test_attention_in_bfloat16_on_a_cpu_equals_float32s(S, masked):
    torch.manual_seed(3)
    q, k, v = torch.randn(2, 2, S, 16), torch.randn(2, 2, 8, 16), torch.randn(2, 2, 8, 16)
    mask = {'keys': torch.rand(2, 1, 1, 8) < 0.5, 'pairs': torch.rand(2, 1, S, 8) < 0.5}.get(masked)
    if mask is not None:
        mask[..., 0] = True
    given, results = (q.bfloat16(), k.bfloat16(), v.bfloat16()), []
    for dtype in (torch.bfloat16, torch.float32):
        inputs = [x.to(dtype).requires_grad_() for x in given]
        y = attend(*inputs, mask, causal=masked == 'causal')
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for low, full in zip(*results, strict=True):
        torch.testing.assert_close(low.float(), full, rtol=0.03, atol=0.03)


@with_all_options
def test_absent_neighbors_and_absent_tokens_change_nothing_and_all_others_do(options):
    model = make_model(**options)
    tokens, neighbors, mask = make_batch()
    mask[0, 0, 1] = False  # fewer than k neighbors
    mask[1, 1] = False  # none
    mask[0, 1, 0, C:] = False  # no continuation
    logits, _ = model(tokens, None, neighbors, mask)
    assert torch.isfinite(logits).all()
    other = torch.where(mask, neighbors, (neighbors + 1) % V)
    torch.testing.assert_close(model(tokens, None, other, mask)[0], logits, rtol=0, atol=0)
    for place in mask.nonzero().tolist():
        other = neighbors.clone()
        other[tuple(place)] = (other[tuple(place)] + 1) % V
        assert (model(tokens, None, other, mask)[0] != logits).any()


@with_an_encoder
def test_absent_neighbors_and_absent_tokens_carry_no_gradient(options):
    tokens, neighbors, mask = make_batch()
    mask[0, 0, 1] = mask[1, 1] = mask[0, 1, 0, C:] = False
    logits, _, embeddings = logits_and_embeddings(make_model(**options), tokens, neighbors, mask)
    gradient, = torch.autograd.grad(logits.square().sum(), embeddings)
    gradient = gradient.view(*mask.shape, -1)
    assert gradient[~mask].abs().max() == 0
    assert gradient[mask].abs().max() > 0


@with_all_options
def test_gradients_are_finite_where_nothing_was_found(options):
    model = make_model(**options).train()
    tokens, neighbors, mask = make_batch()
    model(tokens, tokens, neighbors, torch.zeros_like(mask))[1].backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@with_all_options
def test_without_neighbors_the_model_equals_itself_with_cross_attention_off(options):
    model = make_model(**options)
    tokens, neighbors, mask = make_batch()
    off, _ = model(tokens)
    torch.testing.assert_close(model(tokens, None, neighbors, torch.zeros_like(mask))[0], off)
    assert not torch.allclose(model(tokens, None, neighbors, mask)[0], off)
    for block in model.transformer.h:
        block.cca = None
    torch.testing.assert_close(model(tokens, None, neighbors, mask)[0], off, rtol=0, atol=0)


def test_use_retrieval_false_is_nanogpts_gpt_parameter_for_parameter():
    model = make_model(use_retrieval=False, bias=True)
    D, n = 16, 3
    names = [name for name, _ in model.named_parameters()]
    assert not [name for name in names if 'cca' in name or 'encoder' in name]
    block = 12 * D * D + 13 * D
    assert sum(p.numel() for p in model.parameters()) == V * D + T * D + n * block + 2 * D
    assert model.lm_head.weight is model.transformer.wte.weight


def test_use_retrieval_false_equals_a_gpt2_of_transformers_with_the_same_weights(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=T, n_embd=16, n_layer=3, n_head=2,
                                        initializer_range=0.3)).eval()
    theirs.save_pretrained(tmp_path)
    tokens, neighbors, mask = make_batch()
    with torch.no_grad():
        expected = theirs(tokens, labels=tokens)
        ours = RETRO.from_pretrained(str(tmp_path)).eval()
        logits, _ = ours(tokens)
        torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-4)
        targets = torch.cat([tokens[:, 1:], torch.full((2, 1), -1)], dim=1)
        torch.testing.assert_close(ours(tokens, targets)[1], expected.loss, rtol=1e-4, atol=1e-4)
        retro = RETRO.from_pretrained(str(tmp_path), **PAPER, use_retrieval=True, retrieval_layers=[3],
                                      retrieval_chunk_size=C).eval()
        assert (retro(tokens)[0] == logits).all() and (retro(tokens, None, neighbors, mask)[0] == logits).all()


@pytest.fixture
def gpt2(tmp_path):
    """Saves a tiny GPT-2 with other fields, and returns its path and itself."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def save(**fields):
        torch.manual_seed(0)
        shape = dict(vocab_size=V, n_positions=T, n_embd=16, n_layer=3, n_head=2, initializer_range=0.3)
        model = GPT2LMHeadModel(GPT2Config(**shape | fields)).eval()
        model.save_pretrained(tmp_path / 'gpt2')
        return str(tmp_path / 'gpt2'), model
    return save


@pytest.mark.parametrize('fields', [
    dict(activation_function='gelu'), dict(activation_function='relu'), dict(tie_word_embeddings=False),
    dict(layer_norm_epsilon=1e-3), dict(scale_attn_weights=False), dict(scale_attn_by_inverse_layer_idx=True),
    dict(reorder_and_upcast_attn=True), dict(n_inner=24)])
def test_what_is_not_plain_gpt2_is_refused_by_the_fields_name(gpt2, fields):
    path, _ = gpt2(**fields)
    with pytest.raises(ValueError, match=f'is not a plain GPT-2: {next(iter(fields))} is'):
        RETRO.from_pretrained(path)


def test_another_architecture_is_refused_by_its_name(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM
    LlamaForCausalLM(LlamaConfig(vocab_size=V, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                 num_attention_heads=2)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is not a plain GPT-2: model_type is 'llama'"):
        RETRO.from_pretrained(str(tmp_path))


def test_gpt2s_fields_that_change_no_logit_are_taken_as_they_are(gpt2):
    path, theirs = gpt2(resid_pdrop=0.3, attn_pdrop=0.2, n_inner=64, summary_type='last')
    tokens, _, _ = make_batch()
    ours = RETRO.from_pretrained(path).eval()
    torch.testing.assert_close(ours(tokens)[0], theirs(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('changes, said', [
    (dict(n_layer=2), 'n_layer is 2 and that of .* 3'), (dict(n_head=4), 'n_head is 4'),
    (dict(n_embd=32), 'n_embd is 32'),
    (dict(bias=False), 'bias is False and that of .* True'), (dict(block_size=2 * T), f'block_size is {2 * T}'),
    (dict(vocab_size=V - 1), f'vocab_size is {V - 1}')])
def test_a_gpt2_of_another_shape_is_refused_by_the_fields_name(gpt2, changes, said):
    path, _ = gpt2()
    with pytest.raises(ValueError, match=said):
        RETRO.from_pretrained(path, **changes)


def test_a_smaller_block_and_a_padded_vocabulary_keep_gpt2s_logits(gpt2):
    path, theirs = gpt2()
    tokens, _, _ = make_batch()
    ours = RETRO.from_pretrained(path, block_size=T // 2, vocab_size=64).eval()
    logits, _ = ours(tokens[:, :T // 2])
    expected = theirs(tokens[:, :T // 2]).logits
    torch.testing.assert_close(logits[..., :V], expected, rtol=1e-4, atol=1e-4)
    assert (logits[..., V:].logsumexp(-1) < expected.logsumexp(-1)).all()  # each is as likely as an average token


def test_a_batch_without_targets_has_the_loss_zero_and_no_gradient():
    model = make_model().train()
    tokens, neighbors, mask = make_batch()
    loss = model(tokens, torch.full_like(tokens, -1), neighbors, mask, loss_reduction='sum')[1]
    loss.backward()
    assert loss.item() == 0 and all(p.grad.abs().max() == 0 for p in model.parameters() if p.grad is not None)


def test_what_copies_starts_as_the_gpt2_that_it_is_loaded_from(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=T, n_embd=16, n_layer=3, n_head=2)).eval()
    theirs.save_pretrained(tmp_path)
    tokens, neighbors, mask = make_batch()
    ours = RETRO.from_pretrained(str(tmp_path), use_retrieval=True, retrieval_layers=[2, 3], retrieval_chunk_size=C,
                                 **OPTIONS[1]).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens, None, neighbors, mask)[0], theirs(tokens).logits, rtol=1e-4, atol=1e-4)
    ours(tokens, tokens, neighbors, mask)[1].backward()
    assert ours.transformer.h[1].cca.attn.c_proj.weight.grad.abs().max() > 0  # and it learns to


def slow_matches(tokens, neighbors, longest):
    """Token by token."""
    counts = torch.zeros(*neighbors.shape[:2], C, K * R, dtype=torch.int8)
    for b, u, c, k, j in np.ndindex(*neighbors.shape[:2], C, K, R):
        t, n = (u + 1) * C - 1 + c, 0
        while t < tokens.shape[1] and n < min(longest, t + 1, j + 1) and tokens[b, t - n] == neighbors[b, u, k, j - n]:
            n += 1
        counts[b, u, c, k * R + j] = n
    return counts


@pytest.mark.parametrize('length, longest', [(T, 6), (T - 1, 3), (T + 2, 1), (2 * T, 6)])
def test_matches_are_counted_back_from_both_and_at_most_so_far(length, longest):
    torch.manual_seed(0)
    tokens, neighbors = torch.randint(2, (2, length)), torch.randint(2, (2, length // C, K, R))
    L = neighbors.shape[1]
    counts = count_matches(chunk_windows(tokens, L, C, longest), neighbors.flatten(0, 1), longest).unflatten(0, (2, L))
    assert (counts == slow_matches(tokens, neighbors, longest)).all() and counts.max() == longest


def test_what_matches_is_copied_from_the_first_step_on():
    """Of heads that weigh a match, nearly all attention goes to the token that followed it in the neighbor."""
    model = make_model(**OPTIONS[1])
    cca = model.transformer.h[1].cca
    torch.nn.init.eye_(cca.attn.c_proj.weight)
    torch.nn.init.zeros_(cca.attn.c_q.weight)
    tokens, neighbors, mask = make_batch(B=1)
    neighbors = torch.full_like(neighbors, V - 1)
    neighbors[0, 1, 1, 1:6] = torch.tensor([*tokens[0, 2 * C - 3:2 * C].tolist(), 7, V - 1])
    y = cca(torch.randn(1, T, 16), model.read_neighbors(tokens, neighbors, mask))
    expected = torch.nn.functional.layer_norm(model.transformer.wte.weight[7], (16,))
    torch.testing.assert_close(y[0, 2 * C - 1, 8:], expected[8:], rtol=0.1, atol=0.1)  # the second head


def test_documents_start_where_the_dense_mask_starts_anew():
    doc_ids = torch.tensor([[5, 5, 7], [7, 8, 9], [9, 9, 9], [1, 2, 1]])
    starts = document_starts(doc_ids, C)
    assert starts.dtype == torch.int32 and starts.shape == (doc_ids.numel() + 1,) and starts[-1] == doc_ids.numel() * C
    documents = torch.searchsorted(starts, torch.arange(4 * T), right=True).view(4, T)
    dense = doc_ids.repeat_interleave(C, dim=1)
    dense[3, 2 * C:] = 3  # a document that recurs is another
    for packed, plain in zip(documents, dense, strict=True):
        assert torch.equal(packed[:, None] == packed, plain[:, None] == plain)
    assert len({documents[0, -1].item(), documents[1, 0].item(), documents[2, 0].item()}) == 3  # borders of sequences


@torch.no_grad()
def test_a_document_that_recurs_in_a_sequence_does_not_see_itself():
    """As where flash attention takes documents by where they start."""
    model, (tokens, _, _) = make_model().eval(), make_batch()
    doc_ids = torch.tensor([[1, 2, 1]] * 2)
    other = tokens.clone()
    other[:, :C] = (other[:, :C] + 1) % V
    logits, changed = (model(given, doc_ids=doc_ids)[0] for given in (tokens, other))
    assert torch.equal(logits[:, 2 * C:], changed[:, 2 * C:])


@torch.no_grad()
def test_a_tiny_temperature_takes_the_likeliest_token():
    model, (tokens, _, _) = make_model().eval(), make_batch()
    greedy = model.generate(tokens[:, :C], 5, temperature=0)
    assert torch.equal(model.generate(tokens[:, :C], 5, temperature=1e-40), greedy)


def test_where_flash_attention_takes_documents_no_mask_is_made_and_the_graph_is_one(monkeypatch):
    """Traced without a GPU: shapes and types of the forward and backward pass, not its numbers."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    monkeypatch.setattr('model.takes_documents', lambda *_: True)
    graphs = []

    def backend(graph, inputs):
        graphs.append([node.meta['example_value'] for node in graph.graph.nodes if 'example_value' in node.meta])
        assert sum('varlen' in str(node.target) for node in graph.graph.nodes) == 3  # one in each block
        return graph.forward

    def batch():
        tokens, neighbors, mask = make_batch()
        return tokens, tokens, neighbors, mask, torch.tensor([[1, 1, 2], [3, 4, 4]])

    with pytest.raises(NotImplementedError, match='CPU'):
        torch.compile(make_model(), backend=backend, fullgraph=True)(*batch())
    assert not any(isinstance(x, torch.Tensor) and x.dtype == torch.bool and x.shape[-2:] == (T, T)
                   for values in graphs for x in values)
    with FakeTensorMode():
        model = make_model()
        logits, loss = model(*(torch.empty(x.shape, dtype=x.dtype) for x in batch()))
        loss.backward()
    assert logits.shape == (2, T, V) and model.transformer.h[0].attn.c_attn.weight.grad is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason='flash attention for documents needs a GPU')
def test_documents_of_flash_attention_equal_the_dense_mask(monkeypatch):
    from bench.gpu import check_documents
    check_documents('cuda')


def test_targets_of_minus_one_do_not_count():
    model = make_model()
    tokens, _, _ = make_batch()
    targets = tokens.roll(-1, 1)
    targets[:, 3:] = -1
    loss = model(tokens, targets)[1]
    expected = torch.nn.functional.cross_entropy(model(tokens)[0][:, :3].flatten(0, 1), targets[:, :3].flatten())
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize('n_layer, expected', [(4, [4]), (12, [6, 9, 12]), (16, [9, 12, 15, 16]),
                                               (24, [9, 12, 15, 18, 21, 24])])
def test_default_retrieval_layers_are_the_papers(n_layer, expected):
    assert RETROConfig(n_layer=n_layer).retrieval_layers == expected


def test_residual_projections_start_smaller_the_deeper_the_model():
    torch.manual_seed(0)
    model = RETRO(RETROConfig(block_size=64, vocab_size=64, n_layer=8, n_head=2, n_embd=64, retrieval_chunk_size=16,
                              **PAPER))
    std = {name: p.std().item() for name, p in model.named_parameters()}
    assert std['transformer.h.0.mlp.c_proj.weight'] == pytest.approx(0.02 / 4, rel=0.1)
    assert std['transformer.h.7.cca.attn.c_proj.weight'] == pytest.approx(0.02 / 4, rel=0.1)
    assert std['transformer.h.5.encoder.h.0.attn.c_proj.weight'] == pytest.approx(0.02 / 2, rel=0.1)
    assert std['transformer.h.0.mlp.c_fc.weight'] == pytest.approx(0.02, rel=0.1)


def test_optimizer_decays_matrices_alone_and_holds_every_parameter_once():
    model = make_model(bias=True)
    decayed, plain = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu').param_groups
    assert decayed['weight_decay'] == 0.1 and plain['weight_decay'] == 0.0
    assert all(p.dim() >= 2 for p in decayed['params']) and all(p.dim() < 2 for p in plain['params'])
    assert len(decayed['params']) + len(plain['params']) == len(list(model.parameters()))


@pytest.mark.parametrize('use_retrieval, is_frozen', [(False, False), *((options, False) for options in OPTIONS),
                                                      (OPTIONS[1], True)])
def test_flops_per_token_counts_what_the_profiler_counts(use_retrieval, is_frozen):
    """Attention is counted by its shapes; the fused kernel that the profiler knows no count for is left out."""
    from torch.utils.flop_counter import FlopCounterMode
    model = RETRO(RETROConfig(**PAPER | dict(block_size=128, vocab_size=512, n_layer=2, n_head=2, n_embd=64, bias=False,
                                             use_retrieval=use_retrieval is not False, retrieval_chunk_size=32,
                                             retrieval_layers=[] if use_retrieval is False else [2])
                              | (use_retrieval or {}))).train()
    tokens, neighbors = torch.randint(512, (2, 128)), torch.randint(512, (2, 4, 2, 64))
    given = (neighbors, torch.ones_like(neighbors, dtype=torch.bool)) if use_retrieval is not False else (None, None)
    pointers = torch.ones(2, 128, model.config.retrieval_pointers, 3, dtype=torch.int64)
    if is_frozen:
        model.freeze_decoder()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, tokens, *given, pointers=pointers)[1].backward()
    assert model.flops_per_token() == pytest.approx(counter.get_total_flops() / tokens.numel(), rel=0.02)


def make_retrieve(seed=3):
    """Neighbors that depend on the chunk, so that a wrong chunk gives wrong neighbors."""
    def retrieve(chunks):
        assert chunks.shape[1:] == (1, C)
        shift = torch.arange(K * R).view(1, 1, K, R) * 7
        return (chunks.sum(-1)[..., None, None] + shift + seed) % V, torch.ones(len(chunks), 1, K, R, dtype=torch.bool)
    return retrieve


@with_all_options
def test_generate_takes_the_most_likely_token_of_the_full_forward_with_each_completed_chunks_neighbors(options):
    model, retrieve = make_model(**options), make_retrieve()
    tokens = model.generate(torch.randint(V, (2, 3)), T - 3, retrieve, temperature=0)
    neighbors, mask = (torch.cat(parts, 1) for parts in
                       zip(*[retrieve(tokens[:, None, u * C:(u + 1) * C]) for u in range(L)], strict=True))
    logits, _ = model(tokens, None, neighbors, mask)
    assert tokens.shape == (2, T)
    assert (logits[:, 2:-1].argmax(-1) == tokens[:, 3:]).all()


@with_all_options
@pytest.mark.parametrize('length', [1, 2, 3])
def test_the_shortest_inputs_have_the_logits_of_the_beginning_of_a_longer_one(options, length):
    model, (tokens, _, _) = make_model(**options), make_batch()
    torch.testing.assert_close(model(tokens[:, :length])[0], model(tokens)[0][:, :length])


def test_generate_goes_on_beyond_the_block_and_keeps_to_the_grid():
    model, calls = make_model(), []

    def retrieve(chunks):
        calls.append(chunks.clone())
        return make_retrieve()(chunks)
    tokens = model.generate(torch.randint(V, (1, 5)), 3 * T, retrieve, generator=torch.Generator().manual_seed(0))
    assert tokens.shape == (1, 5 + 3 * T)
    assert len(calls) == (5 + 3 * T - 1) // C
    assert all((chunk[0, 0] == tokens[0, u * C:(u + 1) * C]).all() for u, chunk in enumerate(calls))


def test_generate_is_the_same_for_the_same_seed_and_stops_at_the_end_of_text():
    model = make_model()
    start = torch.randint(V, (2, 2))
    a, b, c = (model.generate(start, 8, top_k=10, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert (a == b).all() and not (a == c).all()
    allowed = torch.arange(V) % 5 == 2  # of a vocabulary with gaps, all but the last few padding
    written = model.generate(start, 40, allowed=allowed[:40])[:, 2:]
    assert (written % 5 == 2).all() and written.max() < 40
    model.lm_head.weight.data.zero_()  # the tied embedding too: every logit is 0, and argmax is token 0
    assert model.generate(start, 8, temperature=0, end_of_text=0).shape == (2, 3)


@pytest.mark.parametrize('changes, said', [(dict(block_size=T + 1), 'multiple of retrieval_chunk_size'),
                                           (dict(retrieval_layers=[4]), 'from 1 to n_layer 3'),
                                           (dict(retrieval_layers=[0]), 'from 1 to n_layer 3'),
                                           (dict(retrieval_longest_match=-1), 'longest_match -1 is not from 0 to 127'),
                                           (dict(retrieval_longest_match=128), 'from 0 to 127'),
                                           (dict(n_head=3), 'multiple of n_head'),
                                           (dict(n_embd=15, n_head=3, retrieval_copy=True), 'multiple of 2 for')])
def test_a_config_that_makes_no_model_is_refused_by_name(changes, said):
    with pytest.raises(ValueError, match=said):
        make_model(**changes)


def test_the_defaults_of_the_architecture_are_those_of_the_settings():
    settings, _ = defaults_and_comments()
    for name, default in vars(RETROConfig(use_retrieval=False, copy_own_context=False)).items():
        if name not in ('vocab_size', 'use_retrieval', 'copy_own_context'):
            assert settings[name] == default, name


@with_all_options
def test_a_wrapped_block_computes_the_same(options):
    """Recomputed in the backward pass, as activation checkpointing does, and sharded, as FSDP does."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    tokens, neighbors, mask = make_batch()
    mask[0, 0, 1] = False
    doc_ids = torch.tensor([[7, 7, 8], [9, 9, 9]])
    gradients = []
    for wrap in (lambda block: block, checkpoint_wrapper, fully_sharded):
        model = make_model(**options).train()
        for number, block in enumerate(model.transformer.h):
            model.transformer.h[number] = wrap(block)
        loss = model(tokens, tokens, neighbors, mask, doc_ids)[1]
        loss.backward()
        gradients.append({name.replace('_checkpoint_wrapped_module.', ''):
                          getattr(p.grad, 'full_tensor', lambda p=p: p.grad)() for name, p in model.named_parameters()
                          if p.grad is not None})
    for other in gradients[1:]:
        assert gradients[0].keys() == other.keys()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradient, other[name], rtol=1e-5, atol=1e-6)


def fully_sharded(block):
    """The block under FSDP2, in this process alone."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    if not dist.is_initialized():
        dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
        atexit.register(dist.destroy_process_group)
    return fully_shard(block, mesh=dist.init_device_mesh('cpu', (1,)))


@pytest.mark.parametrize('options', OPTIONS[:2], ids=['paper', 'copy'])
def test_the_compiled_model_has_no_graph_break_and_is_compiled_once_for_training_and_each_evaluation(options):
    """
    As train.py uses it: training with retrieval, evaluation with it on and off, in autocast, and then again. Breaks and
    recompilations are a matter of tracing, so no code is made of the graphs, which would take a minute.
    """
    model = make_model(**dict(n_layer=2, retrieval_layers=[2], retrieval_encoder_layers=1) | options)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)

    def losses(model, seed):
        tokens, neighbors, mask = make_batch(seed=seed)
        documents = torch.tensor([[seed] * L, [seed, seed + 1, seed + 1]])
        with torch.autocast('cpu', torch.bfloat16):
            training = model.train()(tokens, tokens, neighbors, mask, documents)[1]
        training.backward()
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
            on, off = (model.eval()(tokens, tokens, *given, documents)[1]
                       for given in ((neighbors, mask), (None, None)))
        return torch.stack([training.detach(), on, off])

    torch.testing.assert_close(losses(compiled, 1), losses(model, 1), rtol=0.02, atol=0)
    compilations = torch._dynamo.utils.counters['stats']['unique_graphs']
    assert compilations == 3
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (2, 3):
            torch.testing.assert_close(losses(compiled, seed), losses(model, seed), rtol=0.02, atol=0)
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == compilations


def test_encoder_gives_the_same_for_a_neighbor_wherever_it_stands():
    """Positions are local to the neighbor: swapping two neighbors swaps what they give."""
    model = make_model()
    _, neighbors, mask = make_batch()
    chunks = torch.randn(2, L, C, 16)
    encoder, mask, chunks = model.transformer.h[1].encoder, mask.flatten(0, 1), chunks.flatten(0, 1)
    encoded, swapped = (encoder(model.transformer.wte(n.flatten(0, 1)), mask, chunks).unflatten(1, (K, R))
                        for n in (neighbors, neighbors.flip(2)))
    torch.testing.assert_close(encoded.flip(1), swapped)


def test_chunked_cross_attention_is_one_attention_call(monkeypatch):
    calls, attend = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, 'scaled_dot_product_attention',
                        lambda *a, **k: calls.append(a[0].shape) or attend(*a, **k))
    cca = ChunkedCrossAttention(make_model().config)
    cca(torch.randn(2, T, 16), as_context(torch.randn(2, L, K * R, 16), torch.ones(2, L, K * R, dtype=torch.bool)))
    assert calls == [torch.Size([2 * L, 2, C, 8])]
